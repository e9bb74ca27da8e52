"""How often a whole run compiles: each program once, and nothing after the first step."""

import logging
import re

import jax
from test_commands import _argv

from ngrpo_jax import flags, train

FINISHED = re.compile(r"Finished XLA compilation of jit\((.*?)\)")
UPDATE = ("logprobs", "zeros", "accumulate", "apply")


class _Compilations(logging.Handler):
    """Names of the programs that XLA compiled, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def emit(self, record):
        found = FINISHED.search(record.getMessage())
        if found:
            self.names.append(found[1])


def test_a_run_compiles_each_program_once(tmp_path, monkeypatch):
    """Five steps and two evaluations: the programs of the update once in all, of the rollout once a use."""
    counter, after_step = _Compilations(), []
    step = train.train_step

    def counted(*arguments):
        result = step(*arguments)
        after_step.append(len(counter.names))
        return result

    monkeypatch.setattr(train, "train_step", counted)
    jax.clear_caches()  # else what another test compiled in this process would not be counted
    logger = logging.getLogger("jax")
    logger.addHandler(counter)
    try:
        with jax.log_compiles():
            argv = _argv(tmp_path / "run", train__steps=5, checkpoint__every=50, eval__every=50)
            flags.run_command(train.main, argv)
    finally:
        logger.removeHandler(counter)
    assert counter.names, "jax says nothing of its compilations: this test cannot fail"
    assert {name: counter.names.count(name) for name in UPDATE} == dict.fromkeys(UPDATE, 1)
    assert counter.names.count("decode_chunk") == 2  # training mixes, evaluation does not
    assert counter.names[after_step[0] : after_step[-1]] == []
