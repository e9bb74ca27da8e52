"""How often a whole run compiles: each program once, and nothing after the first step."""

import jax
from test_commands import _argv

from ngrpo_jax import flags, train
from ngrpo_jax.run import loop

UPDATE = ("logprobs", "zeros", "accumulate", "apply")


def test_a_run_compiles_each_program_once(tmp_path, monkeypatch, compiled):
    """Five steps and two evaluations: the programs of the update once in all, of the rollout once a use."""
    after_step, step = [], loop.train_step

    def counted(*arguments):
        result = step(*arguments)
        after_step.append(len(compiled))
        return result

    monkeypatch.setattr(loop, "train_step", counted)
    jax.clear_caches()  # else what another test compiled in this process would not be counted
    argv = _argv(tmp_path / "run", train__steps=5, checkpoint__every=50, eval__every=50)
    flags.run_command(train.main, argv)
    assert {name: compiled.count(name) for name in UPDATE} == dict.fromkeys(UPDATE, 1)
    assert compiled.count("decode_chunk") == 2  # training mixes, evaluation does not
    assert compiled[after_step[0] : after_step[-1]] == []
