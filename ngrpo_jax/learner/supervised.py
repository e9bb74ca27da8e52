"""Supervised training from fresh parameters: the warm start of the small model that needs no download.

Next-token cross-entropy on the response of each example, less a bonus for entropy (the confidence penalty of
arXiv 1701.06548). The bonus leaves a model that is uncertain rather than wrong, so that its samples differ in
reward, and reinforcement learning learns from nothing but such differences. AdamW under a warmed-up cosine.
Must not know what the token ids mean.

E is examples.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ngrpo_jax.algo.logprobs import token_logprobs
from ngrpo_jax.model import decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.settings import WarmStartSettings

WARMUP_SHARE = 0.05
END_OF_DECAY = 0.05  # of the peak rate


def train_supervised(
    config: ModelConfig,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    settings: WarmStartSettings,
    *,
    seed: int,
    progress: Callable[[int, float], None] | None = None,
) -> Any:
    """Trains fresh parameters on (prompt ids, response ids) pairs; only response tokens are targets.

    Args:
      config: of the model to make.
      examples: pairs of non-empty id lists; sampled with replacement, by `seed`.
      settings: steps, batch and peak rate.
      seed: of the initial parameters and of the sampling.
      progress: called every 25 steps and after the last with (steps done, mean loss in nats a token).

    Returns:
      float32 parameters, stacked layout.
    """
    optimizer = _optimizer(settings)
    params = decoder.init(jax.random.key(seed), config)
    opt_state = jax.jit(optimizer.init)(params)
    ids_ET, weight_ET = _pad(examples)

    def step(params, opt_state, ids_BT, weight_BT):
        def loss(params):
            hidden_BTD = decoder.hidden_states(params, config, ids_BT[:, :-1])
            logprobs_BT, entropy_BT = token_logprobs(
                hidden_BTD, decoder.head(params, config), ids_BT[:, 1:], 1.0
            )
            weight_Bt = weight_BT[:, 1:] / jnp.sum(weight_BT[:, 1:])
            nats = -jnp.sum(logprobs_BT * weight_Bt)
            return nats - settings.confidence_penalty * jnp.sum(entropy_BT * weight_Bt), nats

        (_, value), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    generator = np.random.default_rng(seed)
    losses = []
    for done in range(1, settings.steps + 1):
        chosen = generator.integers(len(examples), size=settings.batch)
        params, opt_state, value = step(params, opt_state, ids_ET[chosen], weight_ET[chosen])
        losses.append(value)
        if progress is not None and (done % 25 == 0 or done == settings.steps):
            progress(done, float(np.mean(jax.device_get(losses))))
            losses = []
    return params


def _optimizer(settings: WarmStartSettings) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        min(max(1, int(WARMUP_SHARE * settings.steps)), settings.steps - 1),
        settings.steps,
        END_OF_DECAY * settings.learning_rate,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99, weight_decay=0.01))


def _pad(examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded ids int32 [E, T] and target weights float32 [E, T], 1 at response tokens."""
    length = max(len(prompt) + len(response) for prompt, response in examples)
    ids_ET = np.zeros((len(examples), length), np.int32)
    weight_ET = np.zeros((len(examples), length), np.float32)
    for row, (prompt, response) in enumerate(examples):
        end = len(prompt) + len(response)
        ids_ET[row, :end] = [*prompt, *response]
        weight_ET[row, len(prompt) : end] = 1.0
    return ids_ET, weight_ET
