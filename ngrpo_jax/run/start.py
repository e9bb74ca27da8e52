"""The start of a run: settings -> a checked run, then its first or restored state.

Owns the order of the checks: whatever can be wrong is found before anything is written, and each refusal is
one sentence. Only a warm start is written here, after every other check. Must not know what a step does.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.learner import update
from ngrpo_jax.model import decoder, hf, lora
from ngrpo_jax.preflight import capacity, memory, slots
from ngrpo_jax.preflight.fit import check_decode_attention, check_memory, check_offload, check_positions
from ngrpo_jax.run.state import Run, RunState, restore
from ngrpo_jax.runtime import distributed, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.learner import attention_name, make_learner
from ngrpo_jax.setup.model_spec import ModelSpec, as_trained, locate_adapter, locate_model
from ngrpo_jax.setup.problems import load_set
from ngrpo_jax.setup.tokenizer_info import make_tokenizer_info
from ngrpo_jax.setup.warm_start import warm_start, warm_start_config
from ngrpo_jax.tasks import arithmetic, prompts


def compose(settings: Settings, workdir: pathlib.Path, devices: jax.sharding.Mesh) -> Run:
    """The run with these settings, checked, before any weight is read or compiled.

    Weights are fetched from the hub after every check. With model.path "warm-start" and no model in the
    workdir yet, the first process trains one into WORKDIR/warm_start while the others wait.
    """
    directory = locate_model(settings, workdir, weights=False)
    made = directory.is_dir()
    tokenizer = prompts.load_tokenizer(directory if made else arithmetic.TOKENIZER)
    config = hf.read_config(directory) if made else warm_start_config(settings.warm_start, tokenizer)
    base, config = config, as_trained(config, settings)
    adapter = locate_adapter(settings, config)
    tokenizer_info = make_tokenizer_info(tokenizer, config, settings)
    mesh.param_shardings(devices, decoder.parameter_shapes(config))  # refuses axes that do not divide it
    attention_name(settings, devices)
    check_offload(settings, devices)
    check_decode_attention(settings, config, devices)
    check_positions(settings, config)
    room = capacity.whole_memory(devices)
    longest = settings.data.max_prompt_tokens
    least = slots.for_training(settings, config, devices, longest, room)
    check_memory(least, config, devices)
    begun = (workdir / "checkpoints").exists()  # then the disk already holds what it has to
    capacity.check_workdir(
        workdir, 0 if begun else memory.checkpoint_bytes(config, kept=settings.checkpoint.keep + 1)
    )
    training = load_set(settings, tokenizer, "train")
    held_out = load_set(settings, tokenizer, "test")
    if made:
        directory = locate_model(settings, workdir)
    elif distributed.process().primary:
        warm_start(settings, base, tokenizer, training, directory)
    distributed.allgather("the starting model is there", None)
    longest = max(training.longest_prompt, held_out.longest_prompt)
    return Run(
        slots.for_training(settings, config, devices, longest, room),
        workdir,
        devices,
        ModelSpec(str(directory), config, tokenizer_info, adapter, settings.seed),
        training,
        held_out,
        make_learner(settings, config, devices),
    )


def begin(run: Run, params: Any, checkpoints: Checkpoints) -> tuple[Run, RunState]:
    """The run with its reference model, and its state: that of the latest checkpoint, or the first.

    Args:
      params: the starting model's, on the mesh.
    """
    if run.settings.objective.kl_coef > 0:
        run = dataclasses.replace(run, reference=_reference(run, params))
    checkpoints.put_back()
    step = checkpoints.newest_good(_warn)
    if step is not None:
        state = restore(run, checkpoints, step)
        whole = update.TrainState(params, None).changed_to(state.train_state)
        state = dataclasses.replace(state, train_state=whole)
        checkpoints.go_on_from(step)
    else:
        init = jax.jit(run.learner.optimizer.init, out_shardings=run.learner.shardings.opt_state)
        state = RunState(0, update.TrainState(params, init(lora.split(params)[0])), None, {})
    programs, (params, opt_state) = run.learner.programs, state.train_state
    trained, base = lora.split(params)
    params = lora.joined(programs.base_offload.to_host(base), trained)
    kept = update.TrainState(params, programs.optimizer_offload.to_host(opt_state))
    return run, dataclasses.replace(state, train_state=kept)


def _warn(sentence: str) -> None:
    if distributed.process().primary:
        print(f"warning: {sentence}; an older one is used instead.", flush=True)


def _reference(run: Run, params: Any) -> Any:
    """What `Run.reference` is: a copy, since the learner donates what it trains at every step."""
    trained, base = lora.split(params)
    dtype = "float32" if base else run.model_spec.config.dtype
    copy = jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), trained)
    return run.learner.programs.reference_offload.to_host(copy)
