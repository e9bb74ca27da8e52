"""The update as it is compiled: how often, and what a device gathers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import learner_case as case
import pytest

from ngrpo_jax.learner import packing, update
from ngrpo_jax.learner.loss import ForwardOptions, row_loss
from ngrpo_jax.runtime import mesh as meshes


def test_nothing_compiles_after_the_first_step(compiled):
    """Three batches of other sizes, so that microbatches and calls differ in number."""
    programs, shardings, optimizer = case.make_programs()
    whole = packing.Batch(*case.rollout_batch())
    start = jax.jit(lambda params: update.init_state(params, optimizer), out_shardings=shardings)
    state = start(case.make_params(0))
    reference = jax.device_put(case.make_params(4), shardings.params)
    compiled.clear()
    for part in ((0, 16), (4, 12), (2, 6)):
        rows = packing.mini_batches(whole.part(*part), case.OBJECTIVE, packing.RowLayout(64, 2), count=2)
        batches = update.compute_logprobs(programs, state.params, reference, rows)
        state, _ = update.update(programs, state, batches)
        assert sorted(compiled) == ["accumulate", "apply", "logprobs", "zeros"]


@pytest.mark.parametrize("algorithm", ["grpo", "gspo"])
def test_a_tied_table_gets_the_gradients_of_both_its_uses_as_they_come(algorithm):
    """An untied model of the same rows tells the look-up's and the head's apart; neither is ever turned."""
    objective = dataclasses.replace(case.OBJECTIVE, algorithm=algorithm, kl_coef=0.0)
    (rows,) = case.pack_batch(objective, row_tokens=64, rows=8, share_prompts=True)

    def program(params, config):
        options = ForwardOptions(config, case.TEMPERATURE, logprob_chunk=16)
        loss = functools.partial(row_loss, objective=objective, options=options)
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        return gradient.lower(params, rows, None, None).compile()

    body = {name: leaves for name, leaves in case.make_params(2).items() if name != "head"}
    untied = body | {"head": {"rows": body["embed"]["embedding"]}}
    (_, sums), apart = program(untied, case.CONFIG)(untied, rows, None, None)
    of_tied = program(body, dataclasses.replace(case.CONFIG, tie_embeddings=True))
    (_, of_sums), grads = of_tied(body, rows, None, None)
    sums, metrics = (update.batch_metrics([jax.device_get(each)]) for each in (sums, of_sums))
    uses = apart["embed"]["embedding"], apart.pop("head")["rows"]
    assert min(map(jnp.linalg.norm, uses)) > 1e-3
    case.assert_same_step(grads, metrics, (jax.device_get(apart | {"embed": {"embedding": sum(uses)}}), sums))
    text = of_tied.as_text()
    assert "f32[96,32]" in text and "f32[32,96]" not in text


@pytest.mark.parametrize("tied", [False, True])
def test_no_device_gathers_the_vocabulary(tied):
    """Rows of the embedding and columns of the head stay where the tensor axis has them, both passes."""
    for text in _compiled_of_rows(dataclasses.replace(case.CONFIG, tie_embeddings=tied)):
        gathers = re.findall(r"= \(?(\S+?)\[([\d,]*)\]\S* all-gather", text)
        assert gathers, "fsdp gathers the other weights"
        assert not [shape for _, shape in gathers if str(case.CONFIG.vocab_size) in shape.split(",")]


@pytest.mark.parametrize("unroll", [False, True])
def test_weights_are_gathered_within_the_turn_of_a_microbatch(unroll):
    """Gathered before the loop over microbatches, whole weights would be held through all of it."""
    for text in _compiled_of_rows(case.CONFIG, unroll=unroll):
        (before_loop,) = re.findall(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
        assert "while(" in before_loop and "all-gather" in text.replace(before_loop, "")
        assert "all-gather" not in before_loop


def _compiled_of_rows(config, **options):
    """The texts of a microbatch's gradient and of its log-probabilities, on a mesh of 2 × 2 × 2."""
    programs, shardings, _ = case.make_programs(meshes.make_mesh(2, 2, 2), config=config, **options)
    params = jax.device_put(case.make_params(0, config), shardings.params)
    rows, *_ = case.pack_batch(case.OBJECTIVE)
    given = programs.shard([rows])
    logprobs = programs.logprobs.lower(params, given)
    logprobs_MRT = given.rows.sampler_logprobs_RT
    given = given._replace(old_logprobs_MRT=logprobs_MRT, ref_logprobs_MRT=logprobs_MRT)
    gradient = programs.accumulate.lower(programs.zeros(params, given), params, given)
    return [program.compile().as_text() for program in (gradient, logprobs)]
