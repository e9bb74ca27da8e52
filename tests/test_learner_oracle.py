"""From rewards to gradients: each choice of the objective in the compiled step, against NumPy.

The oracle goes through one sequence after the other in float64: advantages (12), weights, ratios and the
loss (13) are written out, and the loss is differentiated by central differences. A plain forward pass over
unpacked sequences, differentiated by jax, turns its gradient of log-probabilities into one of parameters.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import learner_case as case
import numpy as np
import pytest

from ngrpo_jax.algo.mixture import Mixture
from ngrpo_jax.learner import packing, update
from ngrpo_jax.learner.advantages import compute_advantages
from ngrpo_jax.model import decoder
from ngrpo_jax.runtime import mesh as meshes

LIMIT = 20  # new tokens of a response
REWARDS = np.array([[1, 0, 1, 0.5], [1, 1, 1, 1], [0, 0, 1, 0], [0.5, 0, 0, 1]], np.float32)
NEW, OLD, REFERENCE = 2, 6, 4  # seeds of parameters; those that wrote the batch are of 0
GSPO = {"algorithm": "gspo", "clip_low": 0.02, "clip_high": 0.03}
CHOICES = {
    "as the paper has it": {},
    "asymmetric clip, token mean, k1": {
        "clip_low": 0.1, "clip_high": 0.4, "dual_clip": None, "aggregate": "token", "kl_estimator": "k1",
        "scale_by_std": False,
    },
    "constant length, k2, entropy, not on mixed": {
        "aggregate": "constant", "kl_estimator": "k2", "entropy_coef": 0.1, "loss_on_mixed": False,
        "skip_zero_variance": True,
    },
    "importance weights, masked": {"importance_cap": 1.2, "overlong": "mask", "dual_clip": 1.5},
    "the sampler's log-probabilities, penalised": {
        "old_logprobs": "sampler", "overlong": "penalize", "overlong_interval": 10, "overlong_penalty": 0.5,
        "kl_coef": 0.0,
    },
    "the update's own log-probabilities": {},
    "GSPO": GSPO | {"skip_zero_variance": True, "entropy_coef": 0.05},
    "GSPO, constant length, importance weights, not on mixed": GSPO | {
        "aggregate": "constant", "importance_cap": 1.01, "loss_on_mixed": False,
    },
}  # fmt: skip


def _forward(params):
    """Log-probabilities of the written tokens, and entropies, [16, LIMIT]; each sequence in a row alone."""
    prompts, written, _ = case.rollout_batch()
    longest = max(map(len, prompts)) + LIMIT
    ids_BTC = np.zeros((len(prompts), longest, written.mixtures.ids.shape[-1]), np.int32)
    weights_BTC = np.zeros(ids_BTC.shape, np.float32)
    weights_BTC[..., 0] = 1.0
    for i, prompt in enumerate(prompts):
        stop = len(prompt) + LIMIT
        ids_BTC[i, : len(prompt), 0] = prompt
        ids_BTC[i, len(prompt) : stop], weights_BTC[i, len(prompt) : stop] = (
            leaf[i] for leaf in written.mixtures[:2]
        )
    hidden_BTD = decoder.hidden_states(
        params, case.CONFIG, Mixture(jnp.asarray(ids_BTC), jnp.asarray(weights_BTC))
    )
    before_BT = np.array([len(prompt) - 1 + np.arange(LIMIT) for prompt in prompts])
    hidden_BtD = jnp.take_along_axis(hidden_BTD, before_BT[..., None], axis=1)
    logits_BtV = jnp.einsum("btd,vd->btv", hidden_BtD, decoder.head(params, case.CONFIG)) / case.TEMPERATURE
    laws_BtV = jax.nn.log_softmax(logits_BtV)
    logprobs_Bt = jnp.take_along_axis(laws_BtV, written.tokens_BT[..., None], axis=2)[..., 0]
    return logprobs_Bt, -jnp.sum(jnp.exp(laws_BtV) * laws_BtV, axis=-1)


@functools.cache
def _logprobs(seed):
    """Log-probabilities and entropies under the parameters of a seed, float64."""
    return tuple(np.asarray(x, np.float64) for x in jax.jit(_forward)(case.make_params(seed)))


def _advantages(o):
    """Advantages of the 16 responses and whether they count, by (12) and the settings `o`."""
    _, written, _ = case.rollout_batch()
    rewards = REWARDS.astype(np.float64)
    included = np.ones((4, 4), bool)
    stopped = written.stopped_B.reshape(4, 4)
    if o.overlong == "penalize":
        interval = o.overlong_interval
        late = np.maximum(written.lengths_B - (LIMIT - interval), 0) / max(interval, 1)
        rewards -= o.overlong_penalty * np.where(stopped, late.reshape(4, 4), 1.0)
    if o.overlong == "mask":
        included &= stopped
    if o.skip_zero_variance:
        included &= rewards.std(axis=1, keepdims=True) > 0
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    scale = rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6 if o.scale_by_std else 1.0
    return (centred / scale).reshape(-1), included.reshape(-1)


def _weights(i, included, o):
    """Shares of the loss of the tokens of response i."""
    _, written, _ = case.rollout_batch()
    lengths = written.lengths_B
    share = {
        "sequence": 1 / (included.sum() * lengths[i]),
        "token": 1 / lengths[included].sum(),
        "constant": 1 / (included.sum() * LIMIT),
    }[o.aggregate]
    kept = np.ones(lengths[i]) if o.loss_on_mixed else 1.0 - written.mixed_BT[i, : lengths[i]]
    return share * kept * included[i]


def _loss(o, advantage, weight, entropy, old, ref, sampler, new):
    """(13) of one response, from float64 [n] each."""

    def ratio(above, below):
        if o.algorithm == "grpo":
            return np.exp(above - below)
        kept = weight > 0
        return np.full(len(new), np.exp((above - below)[kept].mean()) if kept.any() else 1.0)

    r = ratio(new, old)
    term = np.minimum(r * advantage, np.clip(r, 1 - o.clip_low, 1 + o.clip_high) * advantage)
    if o.dual_clip is not None and advantage < 0:
        term = np.maximum(term, o.dual_clip * advantage)
    if o.importance_cap is not None:
        term = term * np.minimum(ratio(old, sampler), o.importance_cap)
    q = ref - new
    kl = {"k1": -q, "k2": q**2 / 2, "k3": np.exp(q) - q - 1}[o.kl_estimator]
    return -np.sum(weight * (term - o.kl_coef * kl + o.entropy_coef * entropy))


def _losses(o, own):
    """Of each response: its loss as a function of its log-probabilities, these, and its weights."""
    _, written, _ = case.rollout_batch()
    advantages, included = _advantages(o)
    new_BT, entropy_BT = _logprobs(NEW)
    sampler_BT = written.logprobs_BT.astype(np.float64)
    old_BT = new_BT if own else sampler_BT if o.old_logprobs == "sampler" else _logprobs(OLD)[0]
    ref_BT, _ = _logprobs(REFERENCE)
    for i, n in enumerate(written.lengths_B):
        weight = _weights(i, included, o)
        given = (x_BT[i, :n] for x_BT in (entropy_BT, old_BT, ref_BT, sampler_BT))
        loss = functools.partial(_loss, o, advantages[i], weight, *given)
        yield loss, new_BT[i, :n], weight


def _oracle_loss(o, own=False):
    return sum(loss(new) for loss, new, _ in _losses(o, own))


def _oracle(o, own):
    """(loss, gradients of all parameters); `own`: π_old is π_θ at the parameters of the update."""
    to_new, to_entropy = np.zeros((2, 16, LIMIT))
    for i, (loss, new, weight) in enumerate(_losses(o, own)):
        to_entropy[i, : len(new)] = -o.entropy_coef * weight
        for t in range(len(new)):
            step = np.zeros(len(new))
            step[t] = 1e-5
            to_new[i, t] = (loss(new + step) - loss(new - step)) / 2e-5
    _, pull = jax.vjp(jax.jit(_forward), case.make_params(NEW))
    (grads,) = pull((jnp.float32(to_new), jnp.float32(to_entropy)))
    return _oracle_loss(o, own), jax.device_get(grads)


def _learner(o, own, mesh=None):
    """The same of the compiled step, from rewards on, packed."""
    prompts, written, _ = case.rollout_batch()
    computed = compute_advantages(REWARDS, written, o)
    responses = packing.Batch(
        prompts, written, computed.advantages_PG.reshape(-1), computed.included_PG.reshape(-1)
    )
    (batch,) = packing.mini_batches(responses, o, packing.RowLayout(64, 4, share_prompts=True), count=1)
    programs, shardings, _ = case.make_programs(mesh, objective=o)
    old, new, ref = (
        jax.device_put(case.make_params(seed), shardings.params) for seed in (OLD, NEW, REFERENCE)
    )
    source = "update" if own else "sampler" if o.old_logprobs == "sampler" else "learner"
    (calls,) = update.compute_logprobs(programs, old, ref if o.kl_coef else None, [batch], old=source)
    sums = jax.device_get(update.gradients(programs, new, calls))
    return update.batch_metrics([sums.metrics]), sums.gradient


@pytest.mark.parametrize("name", CHOICES)
def test_the_compiled_step_is_the_objective(name):
    o, own = dataclasses.replace(case.OBJECTIVE, **CHOICES[name]), name.startswith("the update's")
    loss, expected = _oracle(o, own)
    metrics, grads = _learner(o, own)
    case.assert_same_step(grads, metrics, (expected, {"learner/loss": loss}))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(case.OBJECTIVE)])
def test_every_setting_of_the_objective_changes_the_loss_of_some_choice(field):
    """So that a step which ignored it could not pass the comparison above; each alone, the rest as chosen."""
    changes = []
    for name, choices in CHOICES.items():
        if field not in choices:
            continue
        default = {field: getattr(case.OBJECTIVE, field)}
        if field == "overlong":  # an interval is refused without a penalty
            default["overlong_interval"] = 0
        chosen, own = dataclasses.replace(case.OBJECTIVE, **choices), name.startswith("the update's")
        one, other = (_oracle_loss(o, own) for o in (chosen, dataclasses.replace(chosen, **default)))
        changes.append(abs(one - other) / abs(other))
    assert max(changes) > 1e-3


def test_gspo_on_a_mesh_of_all_axes():
    o = dataclasses.replace(case.OBJECTIVE, **CHOICES["GSPO"])
    loss, expected = _oracle(o, False)
    metrics, grads = _learner(o, False, meshes.make_mesh(2, 2, 2))
    case.assert_same_step(grads, metrics, (expected, {"learner/loss": loss}))
