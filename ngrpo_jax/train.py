"""The training command: trains a model, or goes on with a run that was stopped.

    python -m ngrpo_jax.train --config=configs/NAME.py --workdir=DIR [--config.a.b=value] [--preflight]

prompts -> rollout -> reward -> update -> next rollout, with an evaluation before, on a schedule, and after.
A run is resumed from the newest good checkpoint of its workdir; a finished one prints its summary again. What
changes its numbers is refused then, by name, unless `--allow-changes=NAME,…` has the name: that of a setting
(`data.train` and `data.eval` also for what they contain), `model` or `tokenizer`.
`--preflight` trains nothing and prints whether this run could start here and would fit.
`--preflight --target=CHIP:TOPOLOGY [--json=FILE]`, such as v5e:2x4 or h100:8, compiles every program for that
machine, which need not be here, and takes no `--workdir`.
"""

from ngrpo_jax.runtime import ending

if __name__ == "__main__":
    ending.listen()  # before the slow imports: a signal during these ends the command with a sentence too

import dataclasses
import pathlib
import time
from collections.abc import Sequence

from ngrpo_jax import files, flags
from ngrpo_jax.errors import require
from ngrpo_jax.model import hf_directory
from ngrpo_jax.preflight import capacity, checks, fit, forecast
from ngrpo_jax.run import summary
from ngrpo_jax.run.loop import train
from ngrpo_jax.run.start import begin, compose
from ngrpo_jax.run.state import check_finished
from ngrpo_jax.runtime import console, distributed, loggers, mesh
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.runtime.lock import held
from ngrpo_jax.settings import resolve
from ngrpo_jax.setup.model_spec import load_params, model_identity
from ngrpo_jax.setup.resume import MODEL, allowed_changes, best_key
from ngrpo_jax.tasks.rewards import Grader


def main(argv: Sequence[str]) -> None:
    """Parses flags, checks everything, trains."""
    config, options = flags.parse_flags(argv, preflight=False, target=None, json=None, allow_changes=None)
    if options["target"] is not None:
        require(options["preflight"], "--target is of --preflight; add it, or leave --target out.")
        raise SystemExit(forecast.run(config, options["target"], options["json"]))
    workdir = pathlib.Path(options["workdir"])
    if options["preflight"]:
        raise SystemExit(checks.run(config, workdir))
    settings, allowed = resolve(config), allowed_changes(options["allow_changes"])
    loggers.require_installed(settings.loggers)
    ending.last_words(lambda: summary.how_to_go_on(workdir))
    process = distributed.initialize()
    fit.check_hosts(settings, process.count)
    distributed.check_shared(workdir)
    # Of all processes: shared storage may show a file to some before the others.
    summaries = distributed.allgather("finished", summary.read_finished(workdir, settings.train.steps))
    if any(summaries):
        check_finished(settings, workdir, allowed)
        if process.primary:
            summary.print_finished(next(filter(None, summaries)), settings, workdir)
        return
    devices = mesh.make_mesh(settings.mesh.data, settings.mesh.fsdp, settings.mesh.tensor)
    hf_directory.check_replaceable(workdir / "export")
    begun = time.monotonic()
    capacity.check_workdir(workdir)
    with (
        held(workdir, primary=process.primary) as lock,
        Grader(settings.reward.workers, settings.reward.deadline_s, settings.reward.memory_mb) as grader,
    ):
        if process.primary:
            capacity.check_renames(workdir)
        grader.check(settings.reward.kind)
        run = dataclasses.replace(compose(settings, workdir, devices), allowed=allowed)
        with console.Progress("reading the model", keep=False, enabled=process.primary):
            params = load_params(run.model_spec, devices)
            identity = model_identity(run.model_spec, params)
        own = settings.checkpoint
        with Checkpoints(
            workdir / "checkpoints",
            model=identity,
            best=best_key(settings),
            keep=own.keep,
            keep_every=own.keep_every,
            any_model=MODEL in allowed,
        ) as checkpoints:
            run, state = begin(run, params, checkpoints)
            del params  # the state holds them, and donates what is trained at every update
            if process.primary:
                files.write_json(workdir / "config.json", config.to_dict())
            with flags.report_fatal():
                train(run, state, grader, checkpoints, lock, begun)


def cli() -> None:
    """The console script ngrpo-train."""
    ending.listen()
    flags.run_command(main)


if __name__ == "__main__":
    cli()
