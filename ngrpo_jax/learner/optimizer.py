"""The optax chain: clip the global gradient norm, then AdamW with a constant rate after a linear warm-up."""

import optax

from ngrpo_jax.settings import OptimizerSettings


def make_optimizer(settings: OptimizerSettings) -> optax.GradientTransformation:
    """The optimiser of the paper (arXiv 2606.10768). Weight decay is decoupled and applies to every leaf."""
    rate: optax.ScalarOrSchedule = settings.learning_rate
    if settings.warmup_steps:
        first = settings.learning_rate / settings.warmup_steps
        rate = optax.linear_schedule(first, settings.learning_rate, settings.warmup_steps - 1 or 1)
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(rate, settings.b1, settings.b2, settings.eps, weight_decay=settings.weight_decay),
    )
