"""`evaluate --from` and `--compare`: stored generations read again, without a model or a config."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence
from typing import NoReturn

from ngrpo_jax.errors import UserError, require
from ngrpo_jax.evaluation import comparison, generations, tables
from ngrpo_jax.evaluation.generations import Generations
from ngrpo_jax.tasks.rewards import Grader

FLAGS = ("--from", "--compare")


def wanted(argv: Sequence[str]) -> bool:
    """Whether a command line asks for stored generations."""
    return any(argument.partition("=")[0] in FLAGS for argument in argv[1:])


def main(argv: Sequence[str]) -> None:
    """Prints what the flags ask for. ValueError or OSError, in one sentence, where they cannot be met."""
    parser = _Parser(prog="python -m ngrpo_jax.evaluate", allow_abbrev=False)
    parser.add_argument("--from", dest="files", nargs="+", type=pathlib.Path)
    parser.add_argument("--compare", nargs="+", type=pathlib.Path)
    parser.add_argument("--pass_k", type=_numbers)
    parser.add_argument("--regrade", action="store_true")
    flags = parser.parse_args(argv[1:])
    require(not (flags.files and flags.compare), "--from and --compare are two things; give one of them.")
    if flags.compare:
        require(
            len(flags.compare) == 2, "--compare needs two runs: files of generations, or workdirs with some."
        )
        require(
            not flags.regrade and flags.pass_k is None,
            "--regrade and --pass_k go with --from, not --compare.",
        )
        print(comparison.compare(*flags.compare))
    else:
        show(_files(flags.files), flags.pass_k, regrade=flags.regrade)


def show(paths: Sequence[pathlib.Path], pass_k: Sequence[int] | None, *, regrade: bool) -> None:
    """The metrics of these files: of their stored verdicts, or of their texts graded anew."""
    found = []
    for path in paths:
        one = generations.read(path)
        if regrade:
            one, changed = _regraded(one)
            print(f"graded anew: {changed} of {sum(map(len, one.problems))} verdicts changed ({path})")
        found.append((one, one.metrics(pass_k)))
    for one, metrics in found:
        print(tables.details(one, metrics, pass_k or one.pass_k), end="\n\n")
    for step in sorted({one.header["step"] for one, _ in found}):
        of_step = [(one, metrics) for one, metrics in found if one.header["step"] == step]
        names = [one.header["set"] for one, _ in of_step]
        require(
            len(set(names)) == len(names),
            f"two of the files hold step {step} of the same data set; give one of each.",
        )
        print(tables.table_1(of_step, dict.fromkeys(names, pass_k) if pass_k else None))


def _regraded(one: Generations) -> tuple[Generations, int]:
    kind = one.header["depends"]["reward.kind"]
    with Grader() as grader:
        grader.check(kind)
        return generations.regraded(one, lambda texts, golds: grader.grade(texts, golds, kind))


def _files(given: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Files as they are, folders as the files of generations in them."""
    found: list[pathlib.Path] = []
    for path in given:
        inside = generations.find(path) if path.is_dir() else [path]
        require(bool(inside), f"{path} has no generations_*.jsonl; evaluate writes them.")
        found += inside
    return found


def _numbers(text: str) -> tuple[int, ...]:
    numbers = tuple(sorted({int(part) for part in text.split(",")}))
    if not numbers or numbers[0] < 1:
        raise ValueError(text)  # argparse makes its complaint of it
    return numbers


class _Parser(argparse.ArgumentParser):
    """Argparse whose complaints are one sentence, like every other of the commands'."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; write --from FILE [--pass_k=1,8] [--regrade], or --compare RUN_A RUN_B.")
