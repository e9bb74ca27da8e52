"""The evaluation command: Mean@n, Pass@k and other metrics of a checkpoint, or responses to one prompt.

    python -m ngrpo_jax.evaluate --workdir=DIR [--step=N|best|latest|start] [--generations=DIR]
        [--sets="tfds:aime25; tfds:gpqa_diamond prompt=choice reward=choice"] [--config=configs/NAME.py]
    python -m ngrpo_jax.evaluate --workdir=DIR --prompt="What is 1+1?" --config.eval.mixing=true
    python -m ngrpo_jax.evaluate --from FILE|DIR ... [--pass_k=1,8] [--regrade]
    python -m ngrpo_jax.evaluate --compare RUN_A RUN_B

`--step` is the best checkpoint by default, and the starting model where the workdir has no checkpoint. The
settings are those of the run, by WORKDIR/config.json; `--config` takes others. Graded
responses are stored in generations_STEP_SET.jsonl in the workdir, or in --generations; an evaluation that was
interrupted is continued there. docs/evaluation.md has the rest.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from ngrpo_jax import flags
from ngrpo_jax.errors import require
from ngrpo_jax.evaluation import comparison, one_prompt, runner, stored
from ngrpo_jax.evaluation.runner import SetEvaluation
from ngrpo_jax.evaluation.sets import EvalSet, eval_sets, parse_flag
from ngrpo_jax.evaluation.writer import GenerationsWriter, generations_path, make_header
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.preflight import capacity, fit, slots
from ngrpo_jax.runtime import distributed, mesh
from ngrpo_jax.settings import Settings, resolve
from ngrpo_jax.setup.model_spec import ModelSpec, model_identity, open_checkpoint, open_model_spec
from ngrpo_jax.setup.neighbor_table import build_table
from ngrpo_jax.setup.policy import Policy, evaluation_mixes, make_policy
from ngrpo_jax.setup.problems import ProblemSet, load_set
from ngrpo_jax.setup.resume import best_key
from ngrpo_jax.tasks.rewards import Grader

# For --help: beginnings of the names of the settings that this command reads.
SETTINGS_READ = (
    *("seed", "model.", "lora.", "mixing.", "mesh.", "reward.", "checkpoint.best_metric"),
    *("data.eval", "data.prompt", "data.chat_template", "data.stop", "data.system_prompt"),
    *("data.template_options", "data.max_prompt_tokens", "eval.problems", "eval.samples"),
    *("eval.temperature", "eval.top_", "eval.max_new_tokens", "eval.pass_k", "eval.mixing", "eval.sets"),
    *("rollout.slots", "rollout.chunk", "rollout.layout", "rollout.attention"),
)
_OF_STORED = ("--from", "--compare")


def main(argv: Sequence[str]) -> None:
    """Evaluates a checkpoint, prints its responses to `--prompt`, or reads stored generations."""
    if any(argument.partition("=")[0] in _OF_STORED for argument in argv[1:]):
        _read_stored(argv)
        return
    given, options = flags.parse_flags(
        argv, of_run=True, step="best", prompt=None, sets=None, generations=None
    )
    if options["sets"] is not None:
        given.eval.sets = parse_flag(options["sets"])
    settings, workdir = resolve(given), pathlib.Path(options["workdir"])
    folder = pathlib.Path(options["generations"] or workdir)
    distributed.require_alone("evaluate")
    sets = eval_sets(settings)
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    for directory in (workdir, folder):
        capacity.check_workdir(directory)
    model_spec = open_model_spec(settings, workdir)
    config, room = model_spec.config, capacity.whole_memory(devices)
    checkpoint = workdir, options["step"], best_key(settings)
    if options["prompt"] is not None:
        longest, sequences = settings.data.max_prompt_tokens, settings.eval.samples
        settings = slots.for_evaluation(settings, config, sequences, longest, room)
        fit.check_evaluation(settings, config, devices)
        step, _, policy = _open_policy(settings, model_spec, devices, *checkpoint)
        one_prompt.print_responses(settings, policy, options["prompt"], step)
        return
    held_out = [load_set(one.settings, model_spec.tokenizer_info.tokenizer, "test") for one in sets]
    sets, needed_bytes = _sized(sets, held_out, config, devices)
    with Grader(settings.reward.workers, settings.reward.deadline_s, settings.reward.memory_mb) as grader:
        for one in sets:
            grader.check(one.settings.reward.kind)
        step, weights, policy = _open_policy(settings, model_spec, devices, *checkpoint)
        print(f"checkpoint step {step} of {workdir} ({options['step']})", flush=True)
        policy = dataclasses.replace(policy, longest_prompt=max(one.longest_prompt for one in held_out))
        evaluations = []
        for one, problems in zip(sets, held_out, strict=True):
            header = make_header(one, problems, step, weights)
            writer = GenerationsWriter(generations_path(folder, step, one.name), header)
            evaluations.append(SetEvaluation(one, problems, writer))
        runner.announce(model_spec, evaluations, needed_bytes)
        runner.run(policy, evaluations, grader)
    stored.show([one.writer.path for one in evaluations], None, regrade=False)


def _sized(
    sets: Sequence[EvalSet], held_out: Sequence[ProblemSet], config: ModelConfig, devices: jax.sharding.Mesh
) -> tuple[list[EvalSet], int]:
    """The sets with numbers of slots, and the bytes that they need on each device. UserError: too large."""
    longest, room = max(one.longest_prompt for one in held_out), capacity.whole_memory(devices)
    sequences = max(
        len(problems.problems) * one.settings.eval.samples
        for one, problems in zip(sets, held_out, strict=True)
    )
    sized = [
        dataclasses.replace(
            one, settings=slots.for_evaluation(one.settings, config, sequences, longest, room)
        )
        for one in sets
    ]
    return sized, max(fit.check_evaluation(one.settings, config, devices) for one in sized)


def _open_policy(
    settings: Settings,
    model_spec: ModelSpec,
    devices: jax.sharding.Mesh,
    workdir: pathlib.Path,
    which: str,
    best: str,
) -> tuple[int, str, Policy]:
    """(step, digest of the parameters, policy) of a checkpoint; arguments as of `open_checkpoint`."""
    step, params = open_checkpoint(model_spec, workdir, devices, which, best)
    table_VC: Any = build_table(params, model_spec, devices) if evaluation_mixes(settings) else None
    policy = make_policy(model_spec, devices, params, table_VC, settings.rollout.layout)
    return step, model_identity(model_spec, params)["weights"], policy


def _read_stored(argv: Sequence[str]) -> None:
    """Prints the metrics of stored generations, or compares two runs by them."""
    parser = flags.ArgumentParser("python -m ngrpo_jax.evaluate")
    modes = parser.add_mutually_exclusive_group(required=True)
    modes.add_argument("--from", dest="paths", nargs="+", type=pathlib.Path)
    modes.add_argument("--compare", nargs=2, metavar=("RUN_A", "RUN_B"), type=pathlib.Path)
    parser.add_argument("--pass_k", type=_numbers)
    parser.add_argument("--regrade", action="store_true")
    given = parser.parse_args(argv[1:])
    if given.compare:
        alone = not given.regrade and given.pass_k is None
        require(alone, "--regrade and --pass_k go with --from, not --compare.")
        print(comparison.compare(*given.compare))
    else:
        stored.show(given.paths, given.pass_k, regrade=given.regrade)


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({int(part) for part in text.split(",")}))
    if numbers[0] < 1:
        raise ValueError(text)  # argparse then names the flag and its value
    return numbers


def cli() -> None:
    """The console script ngrpo-evaluate."""
    flags.run_command(main)


if __name__ == "__main__":
    cli()
