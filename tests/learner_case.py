"""A small update that the tests of the learner share: a rollout with mixtures, programs and gradients."""

import dataclasses
import functools

import jax
import numpy as np

from configs import base
from ngrpo_jax.algo.mixture import Mixing
from ngrpo_jax.learner import packing, update
from ngrpo_jax.learner.loss import ForwardOptions
from ngrpo_jax.learner.optimizer import make_optimizer
from ngrpo_jax.model import attention as attentions
from ngrpo_jax.model import decoder
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.rollout import engine
from ngrpo_jax.runtime import mesh as meshes
from ngrpo_jax.settings import OptimizerSettings, resolve

CONFIG = ModelConfig(
    architecture="qwen2",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
OBJECTIVE = dataclasses.replace(resolve(base.get_config()).objective, kl_coef=0.05)
OPTIMIZER = OptimizerSettings(1e-3, 0, 0.9, 0.999, 1e-8, 0.01, 1.0)
TEMPERATURE = 0.8
PROMPTS = [[3, 4, 5], [7, 8, 9, 10, 11, 12, 13], [20] * 11, [31, 2]]


def make_params(seed, config=CONFIG):
    """Parameters whose norms and biases are no longer 1 and 0."""
    params = decoder.init(jax.random.key(seed), config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@functools.cache
def rollout_batch():
    """A rollout with mixtures, and advantages of both signs: (prompts, trajectories, advantages)."""
    written = engine.generate(
        make_params(0),
        CONFIG,
        PROMPTS,
        samples=4,
        max_new_tokens=20,
        temperature=TEMPERATURE,
        mixing=Mixing(rate=0.5, k=3),
        stop_ids=tuple(range(0, 96, 24)),
        seed=1,
    )
    assert written.mixed_BT.sum() > 10 and 2 < written.stopped_B.sum() < 14
    advantages = np.random.default_rng(0).normal(size=16).astype(np.float32)
    return [prompt for prompt in PROMPTS for _ in range(4)], written, advantages


def make_programs(
    mesh=None,
    remat="none",
    objective=OBJECTIVE,
    logprob_chunk=64,
    attention="chunked",
    unroll=False,
    config=CONFIG,
    **options,
):
    """(programs, shardings of the state, optimiser) on this mesh; one device where it is None."""
    mesh = mesh or meshes.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    optimizer = make_optimizer(OPTIMIZER)
    shapes = jax.eval_shape(lambda: update.init_state(decoder.init(jax.random.key(0), config), optimizer))
    shardings = meshes.state_shardings(mesh, shapes)
    attend = attentions.make(attention, "cpu", block=16)
    programs = update.compile_programs(
        ForwardOptions(config, TEMPERATURE, remat, logprob_chunk, attend, unroll),
        objective,
        optimizer,
        state_shardings=shardings,
        rows_sharding=meshes.rows_sharding(mesh),
        **options,
    )
    return programs, shardings, optimizer


def pack_batch(objective, row_tokens=64, rows=4, share_prompts=False):
    """The batch as the microbatches of one optimiser step."""
    layout = packing.RowLayout(row_tokens, rows, share_prompts)
    (batch,) = packing.mini_batches(packing.Batch(*rollout_batch()), objective, layout, count=1)
    return batch


def step_gradients(
    mesh=None,
    *,
    row_tokens=64,
    rows=4,
    params_seed=2,
    objective=OBJECTIVE,
    share_prompts=False,
    old="learner",
    config=CONFIG,
    **options,
):
    """Gradients and metrics of one optimiser step by parameters that differ from old and reference ones."""
    programs, shardings, _ = make_programs(mesh, objective=objective, config=config, **options)
    batch = pack_batch(objective, row_tokens, rows, share_prompts)
    before, new, ref = (
        jax.device_put(make_params(seed, config), shardings.params) for seed in (0, params_seed, 4)
    )
    reference = ref if objective.kl_coef else None
    (microbatches,) = update.compute_logprobs(programs, before, reference, [batch], old=old)
    sums = jax.device_get(update.gradients(programs, new, microbatches))
    return sums.gradient, update.batch_metrics([sums.metrics]), microbatches, batch


@functools.cache
def reference_step():
    """The step with every sequence in a row of its own, one device, plain attention, nothing recomputed."""
    return step_gradients(row_tokens=30, rows=16, attention="plain")[:2]


def assert_same_step(grads, metrics, expected=None):
    """Gradients to 1e-5 of each leaf's norm and the loss to 3e-6, those of `reference_step` by default."""
    others, of_others = expected or reference_step()
    np.testing.assert_allclose(metrics["learner/loss"], of_others["learner/loss"], rtol=3e-6)
    whole = np.sqrt(sum(np.sum(leaf.astype(np.float64) ** 2) for leaf in jax.tree.leaves(others)))
    assert whole > 1e-3
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(others), strict=True
    ):
        limit = 1e-5 * max(np.linalg.norm(other), 1e-3 * whole)
        assert np.linalg.norm(leaf - other) <= limit, jax.tree_util.keystr(path)
