"""The optax chain: clip the global gradient norm, then AdamW; the rate follows a schedule after a warm-up."""

from collections.abc import Callable

import optax

from ngrpo_jax.settings import OptimizerSettings

WSD_DECAY = 0.2  # share of the steps after the warm-up in which "wsd" (warm-up, stable, decay) falls to 0

# Peak rate and number of steps after the warm-up -> the rate at each of them.
_AFTER_WARMUP: dict[str, Callable[[float, int], optax.Schedule]] = {
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": lambda peak, steps: optax.cosine_decay_schedule(peak, steps),
    "wsd": lambda peak, steps: optax.linear_schedule(
        peak, 0.0, max(round(WSD_DECAY * steps), 1), steps - max(round(WSD_DECAY * steps), 1)
    ),
}


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The optimiser of the paper (arXiv 2606.10768). Weight decay is decoupled and applies to every leaf."""
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(
            learning_rate(settings),
            settings.b1,
            settings.b2,
            settings.eps,
            weight_decay=settings.weight_decay,
            mu_dtype=settings.moments_dtype,
        ),
    )


def learning_rate(settings: OptimizerSettings) -> optax.ScalarOrSchedule:
    """The rate at each optimiser step, counted from 0: a warm-up, then what `schedule` says."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    after: optax.ScalarOrSchedule = peak
    if settings.decay_steps is not None:
        after = _AFTER_WARMUP[settings.schedule](peak, settings.decay_steps - warmup)
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, warmup - 1 or 1)
    return rise if settings.decay_steps is None else optax.join_schedules([rise, after], [warmup])
