"""Checkpoints: what comes back, what stays on disk, what is refused, and what a killed process leaves."""

import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from ngrpo_jax.errors import StorageError, UserError
from ngrpo_jax.runtime.checkpoints import Checkpoints
from ngrpo_jax.runtime.mesh import make_mesh, replicated, state_shardings
from ngrpo_jax.runtime.steps import ReplacedError

MODEL = {"num_layers": 2, "hidden_size": 8, "eos_token_ids": (1, 2)}
ROOT = pathlib.Path(__file__).parent.parent


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array


def _state(value=0.0, mesh=None):
    params = {"embed": {"embedding": value + jnp.arange(512.0).reshape(64, 8)}}
    state = State(params, optax.adamw(1e-3).init(params), jnp.int32(value))
    return jax.device_put(state, state_shardings(mesh, state) if mesh else jax.devices()[0])


def _abstract(state, mesh):
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(mesh, state),
    )


def _assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def _saved(directory, steps=1, **options):
    with Checkpoints(directory, model=MODEL, **options) as checkpoints:
        for step in range(1, steps + 1):
            checkpoints.save(step, _state(step), {"position": step})
    return directory


def test_a_state_comes_back_bitwise_on_another_mesh(tmp_path):
    saved = _state(3.0, make_mesh(2, 2, 2))
    with Checkpoints(tmp_path / "deep" / "ck", model=MODEL) as checkpoints:
        checkpoints.save(7, saved, {"data": {"position": 5}, "seeds": (1, 2)})
    mesh = make_mesh(1, 4, 2)
    with Checkpoints(tmp_path / "deep" / "ck", model=MODEL) as checkpoints:
        assert checkpoints.latest_step() == 7
        state, host = checkpoints.restore(7, _abstract(saved, mesh))
    _assert_equal(state, saved)
    assert state.params["embed"]["embedding"].sharding.mesh == mesh
    assert host == {"data": {"position": 5}, "seeds": [1, 2]}


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state, wanted = _state(), []
    for i in range(3):
        with Checkpoints(tmp_path / str(i), model=MODEL) as checkpoints:
            wanted.append(jax.device_get(state))
            checkpoints.save(i, state, {})
            for _ in range(3):
                state = step(state)
    for i in range(3):
        with Checkpoints(tmp_path / str(i), model=MODEL) as checkpoints:
            _assert_equal(checkpoints.restore(i, _state())[0], wanted[i])


def test_latest_and_best_are_both_kept_and_ties_go_to_the_newest(tmp_path):
    scores = {1: 0.1, 2: 0.5, 3: 0.5, 4: 0.2, 5: float("nan"), 6: None}
    with Checkpoints(tmp_path, model=MODEL, best="eval/mean_at_n") as checkpoints:
        assert checkpoints.best_step() is None
        for step, score in scores.items():
            metrics = None if score is None else {"eval/mean_at_n": score, "other": 9.0}
            checkpoints.save(step, _state(step), {}, metrics)
        assert (checkpoints.steps(), checkpoints.best_step()) == ([3, 6], 3)
    assert sorted(os.listdir(tmp_path)) == ["3", "6"]
    with Checkpoints(tmp_path, model=MODEL, best="eval/mean_at_n") as checkpoints:  # the scores are on disk
        assert (checkpoints.best_step(), checkpoints.latest_step()) == (3, 6)
        checkpoints.save(7, _state(7), {}, {"eval/mean_at_n": 0.6})
        assert (checkpoints.steps(), checkpoints.best_step()) == ([7], 7)


def test_the_best_by_another_metric_is_found_among_what_was_kept(tmp_path):
    with Checkpoints(tmp_path, model=MODEL, best="eval/mean_at_n") as checkpoints:
        for step, (mean, passed) in {1: (0.1, 0.9), 2: (0.5, 0.3), 3: (0.2, 0.9)}.items():
            checkpoints.save(step, _state(step), {}, {"eval/mean_at_n": mean, "eval/pass_at_k": passed})
        assert checkpoints.best_step() == 2
    for best, step in {"eval/pass_at_k": 3, "eval/mean_at_n": 2, "eval/unknown": None}.items():
        with Checkpoints(tmp_path, model=None, best=best) as checkpoints:
            assert checkpoints.best_step() == step


def test_without_best_only_the_newest_stays(tmp_path):
    _saved(tmp_path, steps=4)
    with Checkpoints(tmp_path, model=MODEL) as checkpoints:
        assert checkpoints.steps() == [4]
        assert checkpoints.best_step() is None


def test_a_best_metric_that_is_not_there_is_refused(tmp_path):
    with (
        Checkpoints(tmp_path, model=MODEL, best="eval/mean_at_n") as checkpoints,
        pytest.raises(ValueError, match=r"'eval/mean_at_n', which is not among .*: reward/mean"),
    ):
        checkpoints.save(1, _state(), {}, {"reward/mean": 1.0})


@pytest.mark.parametrize("step", [1, 2])
def test_saving_a_step_again_or_an_older_one_is_loud(tmp_path, step):
    _saved(tmp_path, steps=2)
    with (
        Checkpoints(tmp_path, model=MODEL) as checkpoints,
        pytest.raises(ValueError, match=f"already has step 2, so step {step} cannot"),
    ):
        checkpoints.save(step, _state(), {})


def test_a_checkpoint_of_another_model_is_refused_before_arrays_are_read(tmp_path):
    shutil.rmtree(_saved(tmp_path) / "1" / "state")  # reading arrays would fail otherwise
    with Checkpoints(tmp_path, model={**MODEL, "num_layers": 4}) as checkpoints:
        for read in (checkpoints.read_host, lambda step: checkpoints.restore(step, _state())):
            with pytest.raises(
                ValueError, match=r"another model \(num_layers 2\) .* \(num_layers 4\)"
            ) as refusal:
                read(1)
            assert str(tmp_path) in str(refusal.value)
    with Checkpoints(tmp_path, model=None) as checkpoints:
        assert checkpoints.read_host(1) == {"position": 1}
        with pytest.raises(ValueError, match="opened for reading"):
            checkpoints.save(2, _state(), {})


def test_opening_and_reading_touch_nothing(tmp_path):
    with Checkpoints(tmp_path / "ck", model=MODEL) as checkpoints:
        assert checkpoints.latest_step() is None
        with pytest.raises(UserError, match=r"no checkpoint at step 3 .*none"):
            checkpoints.read_host(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("abstract", "words"),
    [
        ({"params": {"extra": jnp.zeros(2)}}, "has no params/extra"),
        (
            {"params": {"embed": {"embedding": jnp.zeros((64, 8))}}},
            "has opt_state/0/count, which this run has not",
        ),
        (_state()._replace(step=jnp.zeros(3, jnp.int32)), r"step as int32\[\], this run as int32\[3\]"),
        (_state()._replace(step=jnp.float32(0)), r"step as int32\[\], this run as float32\[\]"),
    ],
)
def test_other_leaves_shapes_or_dtypes_are_refused_by_name(tmp_path, abstract, words):
    with Checkpoints(_saved(tmp_path), model=MODEL) as checkpoints, pytest.raises(ValueError, match=words):
        checkpoints.restore(1, abstract)


def test_a_part_can_be_read_alone_in_another_dtype(tmp_path):
    sharding = replicated(make_mesh(8, 1, 1))
    leaf = jax.ShapeDtypeStruct((64, 8), jnp.bfloat16, sharding=sharding)
    with Checkpoints(_saved(tmp_path), model=MODEL) as checkpoints:
        state, host = checkpoints.restore(1, {"params": {"embed": {"embedding": leaf}}}, partial=True)
    assert state["params"]["embed"]["embedding"].sharding == sharding
    wanted = _state(1).params["embed"]["embedding"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(state["params"]["embed"]["embedding"], wanted)
    assert host == {"position": 1}


def _cut_off(path):
    (path / "state" / "ocdbt.process_0" / "d").mkdir(exist_ok=True)
    for file in (path / "state" / "ocdbt.process_0" / "d").iterdir():
        os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: shutil.rmtree(path / "state" / "d"),
        lambda path: shutil.rmtree(path / "host"),
        lambda path: (path / "host" / "metadata").unlink(),
        _cut_off,
    ],
)
def test_a_damaged_checkpoint_is_one_sentence_that_names_its_folder(tmp_path, damage):
    damage(_saved(tmp_path) / "1")
    with Checkpoints(tmp_path, model=MODEL) as checkpoints:
        with pytest.raises(
            UserError, match=r"checkpoint 1 is damaged: \S+ \((missing|checksum)\)"
        ) as refusal:
            checkpoints.restore(1, _state())
        assert f"{tmp_path}/1" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_a_disk_that_fails_is_a_storage_error_that_names_the_directory(tmp_path, monkeypatch):
    """In the words of TensorStore, which raises ValueError in a thread of its own."""
    words = "RESOURCE_EXHAUSTED: Failed to write 9 bytes: No space left on device [os_error_code='28']"
    _saved(tmp_path)
    with Checkpoints(tmp_path, model=MODEL) as checkpoints, monkeypatch.context() as patch:

        def fail(*_, **__):
            raise ValueError(words)

        training = checkpoints._writer()
        patch.setattr(type(training), "wait_until_finished", fail)
        patch.setattr(ocp.Checkpointer, "restore", fail)
        with pytest.raises(StorageError, match=f"written to {tmp_path}: .*No space left on device"):
            checkpoints.wait()
        with pytest.raises(StorageError, match=f"{tmp_path}/1 cannot be read"):
            checkpoints.read_host(1)


def test_a_bug_while_reading_keeps_its_type(tmp_path, monkeypatch):
    with Checkpoints(_saved(tmp_path), model=MODEL) as checkpoints, monkeypatch.context() as patch:

        def fail(*_, **__):
            raise AttributeError("no such method")

        patch.setattr(ocp.Checkpointer, "restore", fail)
        with pytest.raises(AttributeError):
            checkpoints.read_host(1)


def test_a_process_killed_while_saving_leaves_no_step_and_resume_goes_on(tmp_path):
    script = textwrap.dedent(
        f"""
        import os, jax.numpy as jnp
        from ngrpo_jax.runtime.checkpoints import Checkpoints
        checkpoints = Checkpoints({str(tmp_path)!r}, model={MODEL!r})
        checkpoints.save(1, {{"step": jnp.int32(1)}}, {{}})
        checkpoints.wait()
        die = lambda *_, **__: os._exit(9)  # at the rename that would make the step visible
        os.rename = os.replace = die
        checkpoints.save(2, {{"step": jnp.int32(2)}}, {{}})
        checkpoints.close()
        """
    )
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert killed.returncode == 9
    assert any(name.startswith("2.") for name in os.listdir(tmp_path))  # the half-written one is there
    with Checkpoints(tmp_path, model=MODEL) as checkpoints:
        assert checkpoints.latest_step() == 1
        state, _ = checkpoints.restore(1, {"step": jnp.int32(0)})
        assert int(state["step"]) == 1
        checkpoints.save(3, {"step": jnp.int32(3)}, {})
    assert os.listdir(tmp_path) == ["3"]  # the half-written one is cleared away


def test_orbax_is_quiet_and_other_loggers_are_not(tmp_path, caplog):
    logger = logging.getLogger("absl")
    with caplog.at_level(logging.DEBUG):
        before = logger.level
        logger.setLevel(logging.DEBUG)
        _saved(tmp_path)
        logger.warning("mine")
        logger.setLevel(before)
    assert [record.message for record in caplog.records if record.name == "absl"] == ["mine"]


# Damage


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


DAMAGES = {
    "a bit": _flip_a_bit,
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "gone": pathlib.Path.unlink,
    "garbled": lambda path: path.write_bytes(b"{}" + os.urandom(8)),
}
# As Orbax and checksums.py name them, and the folder of the two files with names of their own in each.
FILES = (
    "_CHECKPOINT_METADATA",
    "checksums.json",
    "commit_success.txt",
    "host/metadata",
    "metrics/metrics",
    "state/_METADATA",
    "state/_sharding",
    "state/array_metadatas/process_0",
    "state/d/*",
    "state/manifest.ocdbt",
    "state/ocdbt.process_0/d/*",
    "state/ocdbt.process_0/manifest.ocdbt",
)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints 1, 2 and 3; the best is 1."""
    directory = tmp_path_factory.mktemp("three")
    with Checkpoints(directory, model=MODEL, best="score", keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, _state(step), {"position": step}, {"score": 1.0 / step})
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", FILES)
def test_any_damaged_file_is_named_and_the_checkpoint_before_is_used(three, tmp_path, pattern, damage):
    directory, warnings = tmp_path / "checkpoints", []
    shutil.copytree(three, directory)
    (file, *_) = sorted((directory / "3").glob(pattern))
    DAMAGES[damage](file)
    with Checkpoints(directory, model=MODEL, best="score", keep=3) as checkpoints:
        assert checkpoints.newest_good(warnings.append) == 2
        (warning,) = warnings
        name = file.relative_to(directory / "3")
        assert warning == f"checkpoint 3 is damaged: {name} ({'missing' if damage == 'gone' else 'checksum'})"
        _assert_equal(checkpoints.restore(2, _state())[0], _state(2))
        checkpoints.go_on_from(2)
        checkpoints.save(3, _state(3), {"position": 3}, {"score": 0.2})
        assert checkpoints.best_step() == 1
    assert sorted(os.listdir(directory)) == ["1", "2", "3", "damaged-3"]
    with Checkpoints(directory, model=MODEL) as checkpoints:
        assert checkpoints.newest_good(warnings.append) == 3 and len(warnings) == 1


def test_damaged_scores_are_named_and_do_not_keep_a_run_from_going_on(three, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three, directory)
    (directory / "1" / "metrics" / "metrics").write_bytes(b"{'score")
    with Checkpoints(directory, model=MODEL, best="score", keep=3) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoint 1 is damaged: metrics/metrics \(checksum\)"):
            checkpoints.best_step()
        assert checkpoints.newest_good(print) == 3
        checkpoints.go_on_from(3)
        checkpoints.save(4, _state(4), {})
        assert checkpoints.best_step() == 2


@pytest.mark.parametrize("left", ["state", "metrics", "host", "checksums.json", "_CHECKPOINT_METADATA"])
def test_what_a_killed_process_has_deleted_in_part_is_deleted(three, tmp_path, left):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three, directory)
    for path in (directory / "2").iterdir():
        if path.name != left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Checkpoints(directory, model=MODEL, best="score", keep=3) as checkpoints:
        assert checkpoints.newest_good(pytest.fail) == 3
        checkpoints.go_on_from(3)
        checkpoints.save(4, _state(4), {})
        assert checkpoints.best_step() == 1
    assert sorted(os.listdir(directory)) == ["1", "3", "4"]


def test_where_all_are_damaged_nothing_is_begun_anew(three, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three, directory)
    for step in "123":
        (directory / step / "state" / "_METADATA").unlink()
    with (
        Checkpoints(directory, model=MODEL) as checkpoints,
        pytest.raises(
            UserError, match=r"no checkpoint .* 3 is damaged: state/_METADATA \(missing\); .* 1 is"
        ),
    ):
        checkpoints.newest_good(lambda _: None)


def test_a_checkpoint_of_a_version_without_checksums_is_read(three, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three, directory)
    document = json.loads((directory / "3" / "host" / "metadata").read_text())
    del document["checksums"]
    (directory / "3" / "host" / "metadata").write_text(json.dumps(document))
    (directory / "3" / "checksums.json").unlink()
    with Checkpoints(directory, model=MODEL, best="score") as checkpoints:
        assert checkpoints.newest_good(print) == 3 and checkpoints.best_step() == 1
        _assert_equal(checkpoints.restore(3, _state())[0], _state(3))


def test_the_newest_the_best_and_those_for_good_stay(tmp_path):
    with Checkpoints(tmp_path, model=MODEL, best="score", keep=2, keep_every=4) as checkpoints:
        for step in range(1, 10):
            checkpoints.save(step, _state(step), {}, {"score": -abs(step - 2.0)})
    assert sorted(os.listdir(tmp_path)) == ["2", "4", "8", "9"]


def test_a_reader_sees_new_steps_and_is_told_when_its_own_was_replaced(tmp_path):
    with (
        Checkpoints(tmp_path, model=MODEL) as training,
        Checkpoints(tmp_path, model=None) as reader,
    ):
        training.save(1, _state(1), {})
        training.wait()
        assert reader.latest_step() == 1
        restore = ocp.Checkpointer.restore

        def replaced(checkpointer, folder, arguments):
            if checkpointer is reader._reader and "state" in arguments.keys():  # noqa: SIM118
                training.save(2, _state(2), {})
                training.wait()
            return restore(checkpointer, folder, arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ocp.Checkpointer, "restore", replaced)
            with pytest.raises(ReplacedError, match=r"has replaced .*/1 meanwhile"):
                reader.restore(1, _state())
        assert reader.latest_step() == 2
        _assert_equal(reader.restore(2, _state())[0], _state(2))


def test_a_step_that_is_saved_again_stays_until_the_new_one_is_on_disk(three, tmp_path):
    directory, found = tmp_path / "checkpoints", []
    shutil.copytree(three, directory)
    with Checkpoints(directory, model=MODEL, best="score", keep=3) as checkpoints:
        checkpoints.put_back()

        def save():
            found.append(sorted(os.listdir(directory)))
            checkpoints.save(3, _state(30), {"position": 3}, {"score": 2.0})

        checkpoints.replace(3, save)
        assert found == [["1", "2", "replaced-3"]]
        assert checkpoints.best_step() == 3
        _assert_equal(checkpoints.restore(3, _state())[0], _state(30))
    assert sorted(os.listdir(directory)) == ["1", "2", "3"]


def test_a_process_killed_while_it_saves_a_step_again_loses_nothing(three, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(three, directory)
    with Checkpoints(directory, model=MODEL, best="score", keep=3) as killed, pytest.raises(SystemExit):
        killed.replace(3, sys.exit)
    with Checkpoints(directory, model=MODEL, best="score", keep=3) as checkpoints:
        checkpoints.put_back()
        assert checkpoints.newest_good(pytest.fail) == 3
        _assert_equal(checkpoints.restore(3, _state())[0], _state(3))
        checkpoints.go_on_from(3)
        checkpoints.save(4, _state(4), {})
    assert sorted(os.listdir(directory)) == ["1", "2", "3", "4"]
