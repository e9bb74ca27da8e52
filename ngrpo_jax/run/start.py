"""The start of a run: settings -> everything that a run needs, checked in order, and its first state.

Whatever can be wrong is found before anything is written, and each refusal is one sentence. The one thing
that is written here is a warm start, after every other check.
"""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp

from ngrpo_jax.learner import update
from ngrpo_jax.model import decoder, hf
from ngrpo_jax.preflight import capacity, memory
from ngrpo_jax.preflight.fit import check_memory, check_offload, check_positions
from ngrpo_jax.run.state import Run, RunState, restore
from ngrpo_jax.runtime import distributed, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.settings import Settings
from ngrpo_jax.setup.learner import attention_name, make_learner
from ngrpo_jax.setup.model_spec import ModelSpec, locate_model
from ngrpo_jax.setup.problems import ProblemSet, load_set
from ngrpo_jax.setup.tokenizer_info import make_tokenizer_info
from ngrpo_jax.setup.warm_start import warm_start, warm_start_config
from ngrpo_jax.tasks import arithmetic, prompts
from ngrpo_jax.tasks.datasets import ProblemStream


def compose(
    settings: Settings, workdir: pathlib.Path, devices: jax.sharding.Mesh
) -> tuple[ModelSpec, ProblemSet, ProblemSet]:
    """The model, the training problems and the held-out ones; no weights are read yet, for they take longest.

    Nor are they fetched from the hub before everything else is known to be right.

    With model.path "warm-start" and none made yet, the model is trained here, into WORKDIR/warm_start, and
    that is the only thing that is written; of several processes the first one does it, and the others wait.
    """
    directory = locate_model(settings, workdir, weights=False)
    made = directory.is_dir()
    with tempfile.TemporaryDirectory() as folder:
        if not made:
            arithmetic.make_tokenizer(folder)
        tokenizer = prompts.load_tokenizer(directory if made else folder)
        config = hf.read_config(directory) if made else warm_start_config(settings.warm_start, tokenizer)
        config = dataclasses.replace(config, dtype=settings.model.dtype)
        tokenizer_info = make_tokenizer_info(tokenizer, config, settings)
        mesh.param_shardings(
            devices, decoder.parameter_shapes(config)
        )  # refuses axes that do not divide the model
        attention_name(settings)
        check_offload(settings)
        check_positions(settings, config)
        check_memory(settings, config)
        begun = (workdir / "checkpoints").exists()  # then the disk already holds what it has to
        capacity.check_workdir(workdir, 0 if begun else memory.checkpoint_bytes(config, kept=2))
        training = load_set(settings, tokenizer, "train")
        held_out = load_set(settings, tokenizer, "test")
        process = distributed.process()
        if made:
            directory = locate_model(settings, workdir)
        elif process.primary:
            warm_start(settings, config, tokenizer, training.problems, training.prompts, folder, directory)
        distributed.allgather("the starting model is there", None)
    return ModelSpec(str(directory), config, tokenizer_info), training, held_out


def prepare(
    settings: Settings,
    workdir: pathlib.Path,
    parts: tuple[ModelSpec, ProblemSet, ProblemSet],
    devices: jax.sharding.Mesh,
    params: Any,
    checkpoints: Checkpoints,
) -> tuple[Run, RunState]:
    """The run, and its state: that of the latest checkpoint, or the start. Compiles no program of a step.

    Args:
      params: the starting model's, on the mesh; donated.
    """
    model_spec, training, held_out = parts
    programs, optimizer, abstract, shardings = make_learner(settings, model_spec.config, devices)
    reference = None
    if settings.objective.kl_coef > 0:
        # A copy, even where the dtype is the same: the learner donates its own parameters at every step.
        copy = jax.tree.map(lambda leaf: jnp.array(leaf, model_spec.config.dtype, copy=True), params)
        reference = programs.reference.store(copy)
    process = distributed.process()
    stream = ProblemStream(
        training.problems,
        batch=settings.rollout.prompts // process.count,
        seed=settings.seed,
        host=process.index,
        hosts=process.count,
    )
    prompt_of = {p.id: ids for p, ids in zip(training.problems, training.prompts, strict=True)}
    run = Run(settings, workdir, model_spec, training, held_out, devices, programs, reference, prompt_of)
    step = checkpoints.latest_step()
    if step is None:
        train_state = _initial_state(params, optimizer, shardings)
        state = RunState(0, train_state, None, 0, stream, {})
    else:
        state = restore(run, checkpoints, step, abstract, shardings, stream)
    train_state = state.train_state._replace(opt_state=programs.optimizer.store(state.train_state.opt_state))
    return run, dataclasses.replace(state, train_state=train_state)


def _initial_state(params: Any, optimizer: Any, shardings: update.TrainState) -> update.TrainState:
    start = jax.jit(
        lambda params: update.init_state(params, optimizer), out_shardings=shardings, donate_argnums=0
    )
    return start(params)
