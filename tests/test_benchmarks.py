"""The benchmarks' own arithmetic, the talk with a peer, and that the accelerator's runs on a bare machine."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import all as everything
from benchmarks import bounds, chunks, measure, memory, mixing, rollout, shapes, simulation, strategies
from benchmarks.peer import Peer
from ngrpo_jax import flags
from ngrpo_jax.algo.mixture import neighbor_mixture
from ngrpo_jax.algo.neighbors import neighbor_table
from ngrpo_jax.model import decoder, inference
from ngrpo_jax.model.config import ModelConfig
from ngrpo_jax.settings import resolve

ROOT = pathlib.Path(__file__).parent.parent
TINY = ModelConfig("qwen2", 64, 16, 24, 2, 4, 2, 8, tie_embeddings=False)
# What a bare accelerator machine has not, and what of the project must not be needed there.
ABSENT = ("ml_collections", "safetensors", "orbax", "transformers", "tensorflow_datasets")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
FOREIGN = tuple(f"ngrpo_jax.{name}" for name in ("runtime.mesh", "tasks", "setup", "run", "evaluation"))


# Runs each program with --help; prints those that do not end with status 0. One process imports jax once.
ALL_WITH_HELP = """
import contextlib, io, runpy, sys, traceback
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code:
            print(program, end.code)
    except BaseException:
        print(program, traceback.format_exc())
"""


def test_every_program_says_how_it_is_used_or_can_be_imported():
    """What the project renames or adds must not leave a benchmark behind."""
    programs = sorted(str(path) for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
    command = [sys.executable, "-c", ALL_WITH_HELP, *programs]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert len(programs) > 10 and (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_accelerator_benchmark_runs_where_only_jax_flax_optax_and_chex_are(tmp_path):
    figures = tmp_path / "figures.json"
    program = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT + FOREIGN!r}))\n"
        f"sys.argv = ['accelerator.py', '--shape=small', '--json={figures}']\n"
        f"runpy.run_path({str(ROOT / 'benchmarks' / 'accelerator.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    tables = {table["title"].split(":")[0]: table for table in json.loads(figures.read_text())["tables"]}
    assert set(tables) == {"Decode", "Prefill", "Neighbour table", "Mixing", "Update"}
    for table in tables.values():
        numbers = [value for row in table["rows"] for value in row if isinstance(value, float)]
        assert numbers and all(0 < number < math.inf for number in numbers), table["title"]


@pytest.mark.parametrize("name", strategies.STRATEGIES)
def test_what_a_strategy_sets_is_settings_of_mixing(name):
    config = flags.load_config(str(ROOT / "configs" / "tiny.py"))
    for leaf, value in strategies.STRATEGIES[name].mixing.items():
        config.mixing[leaf] = value
    assert resolve(config).mixing.active == (name != "grpo")


@pytest.mark.long
def test_the_estimate_of_memory_meets_its_goal_for_three_sizes(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), f"--json={figures}"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(figures.read_text())["tables"]
    ratios = {(model, phase): ratio for model, phase, *_, ratio in table["rows"] if phase != "table"}
    assert len(ratios) == 6
    assert all(abs(ratio - 1) <= memory.GOAL for ratio in ratios.values()), ratios


@pytest.mark.parametrize(
    ("machine", "held", "rows", "tokens", "bandwidth", "fixed_s"),
    [
        (0, False, 32, (1152, 1152, 1152), 819e9, 0.55e-3),  # eight v5e: whole rows of the smallest cache
        (2, True, 256, (320, 320, 64), 3350e9, 0.8e-3),  # an H100: blocks of 64 columns
    ],
)
def test_simulated_seconds_are_those_of_the_steps_by_hand(
    monkeypatch, machine, held, rows, tokens, bandwidth, fixed_s
):
    """256 responses of 64 tokens in 256 slots: two chunks, and one that began before their end was known."""
    monkeypatch.setattr(simulation, "response_lengths", lambda seed: np.full(256, 64))
    design = simulation.Design(256, simulation.PROMPT, held=held)
    weights = 2 * (1_777_088_000 - 151936 * 1536)  # without the embedding, whose rows are looked up
    steps_s = [
        (weights + rows * read * 28_672) / (0.75 * bandwidth) + fixed_s + rows * 4e-6 for read in tokens
    ]
    found = simulation.speed(shapes.SHAPES["r1-1.5b"], simulation.MACHINES[machine], design, 0)
    assert found == pytest.approx(256 * 64 / (32 * sum(steps_s)), rel=1e-6)


def test_sides_take_turns_and_every_side_begins_a_round():
    order = []
    sides = {name: lambda name=name: order.append(name) or 1.0 + "abc".index(name) for name in "abc"}
    timings = measure.alternate(sides, 3)
    assert "".join(order) == "cab" + "abc" + "bca" + "cab"  # a warm-up first
    assert timings.kept == (0, 1, 2) and timings.dropped == 0
    assert timings.ratio("c", "a") == measure.Interval(3.0, 3.0, 3.0)
    assert timings.each("b").median == 2.0


def test_rounds_that_others_disturbed_are_thrown_away(monkeypatch):
    clock, busy = iter(np.arange(0.0, 1e6, 2.0)), iter([0.0, 0.1, 5.0, 7.0, 7.0, 7.1])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(measure, "_others", lambda pids: next(busy))
    seconds = iter([1.0, 50.0, 3.0])
    timings = measure.alternate({"x": lambda: next(seconds)}, 3, warmups=0)
    assert timings.kept == (0, 2) and timings.dropped == 1
    assert timings.seconds["x"].tolist() == [1.0, 3.0]
    assert timings.others == pytest.approx(0.05)


def test_an_interval_is_a_range_of_few_and_a_bootstrap_interval_of_many():
    assert measure.interval([3.0, 1.0, 2.0]) == measure.Interval(2.0, 1.0, 3.0)
    values = np.random.default_rng(1).normal(10.0, 1.0, 400)
    found = measure.interval(values)
    assert found.median == np.median(values)
    half = 1.96 * math.sqrt(math.pi / 2) / math.sqrt(400)  # of a normal sample's median
    assert found.high - found.low == pytest.approx(2 * half, rel=0.4)
    assert found.low < found.median < found.high


def test_tables_are_markdown_and_come_back_from_json(tmp_path, capsys):
    report = measure.Report("title")
    report.table("one", ("a", "b"), [("x", measure.Interval(1.5, 1.0, 2.0)), ("y", None)], "A note.")
    report.save(tmp_path / "out.json")
    printed = capsys.readouterr().out.split("\n")
    assert "| x | 1.5 (1 … 2) |" in printed and "| y | – |" in printed and "A note." in printed
    table = json.loads((tmp_path / "out.json").read_text())["tables"][0]
    assert table["rows"] == [["x", {"median": 1.5, "low": 1.0, "high": 2.0}], ["y", None]]


def test_tail_lengths_are_log_normal_as_the_case_says():
    lengths = rollout.tail_lengths(200_000)
    assert np.median(lengths) == rollout.TAIL_MEDIAN
    assert np.quantile(lengths, 0.95) == pytest.approx(rollout.TAIL_95TH, rel=0.02)
    assert lengths.min() >= 1 and lengths.max() == rollout.TAIL_CAP
    np.testing.assert_array_equal(rollout.tail_lengths(256), rollout.tail_lengths(256))


def test_a_perfect_scheduler_is_that_of_a_simulation_step_by_step():
    for seed in range(20):
        draw = np.random.default_rng(seed)
        lengths, slots = draw.integers(1, 30, size=draw.integers(1, 40)), int(draw.integers(1, 9))
        waiting, left, steps = list(lengths), [0] * slots, 0
        while waiting or any(left):
            left = [n or (waiting.pop(0) if waiting else 0) for n in left]
            left = [max(n - 1, 0) for n in left]
            steps += 1
        assert rollout.perfect_steps(lengths, slots) == steps
    assert rollout.perfect_steps([3, 1, 1, 1], 2) == 3


@pytest.mark.parametrize("tied", [True, False])
def test_counts_of_parameters_are_those_of_the_decoder(tied):
    config = ModelConfig("qwen2", 50, 16, 24, 3, 4, 2, 8, tie_embeddings=tied)
    tree = jax.eval_shape(lambda key: decoder.init(key, config), jax.random.key(0))
    named = jax.tree.leaves_with_path(tree)
    kernels = sum(x.size for path, x in named if "kernel" in jax.tree_util.keystr(path))
    head = 50 * 16  # rows of its own, or the embedding's
    total = sum(x.size for _, x in named)
    assert shapes.matrix_parameters(config) == kernels + head
    assert shapes.weights_read(config) == (total if tied else total - 50 * 16)


@pytest.mark.parametrize("stacked", [True, False])
def test_random_parameters_have_the_decoders_shapes(stacked):
    config = ModelConfig("qwen3", 50, 16, 24, 3, 4, 2, 8, dtype="bfloat16")
    made = shapes.random_params(config, stacked=stacked)
    wanted = jax.eval_shape(lambda key: decoder.init(key, config), jax.random.key(0))
    wanted = (
        wanted
        if stacked
        else jax.eval_shape(lambda tree: inference.to_inference_layout(tree, config), wanted)
    )
    assert jax.tree.structure(made) == jax.tree.structure(wanted)
    for leaf, shape in zip(jax.tree.leaves(made), jax.tree.leaves(wanted), strict=True):
        assert leaf.shape == shape.shape and leaf.dtype == jnp.bfloat16
    layers = made["layers"]
    first, second = (
        layers["mlp"]["up"]["kernel"][:2] if stacked else [layers[i]["mlp"]["down"]["kernel"] for i in (0, 1)]
    )
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("order", bounds.ORDERS)
@pytest.mark.parametrize("fused", [True, False])
def test_every_weight_has_its_part_in_the_products(order, fused):
    """The chain against NumPy, and a change of any one kernel changes what comes out."""
    weights = bounds._weights(TINY, order, fused)
    flat, tree = jax.tree.flatten(weights)
    assert sum(leaf.size for leaf in flat) == shapes.matrix_parameters(TINY)
    columns = order == "W·x"
    first = jnp.ones((16, 5) if columns else (5, 16))
    logits = jnp.zeros((64, 5) if columns else (5, 64))

    chain = jax.jit(functools.partial(bounds._chain, order=order, config=TINY, steps=1))

    def out(leaves):
        return np.asarray(chain(jax.tree.unflatten(tree, leaves), first, logits))

    plain = out(flat)
    for place, leaf in enumerate(flat):
        changed = out([*flat[:place], 1.5 * leaf, *flat[place + 1 :]])
        assert not np.allclose(changed, plain, rtol=1e-6), place
    turned = [np.asarray(leaf) if order == "x·W" else np.asarray(leaf).T for leaf in flat]
    wanted = _chain(tree, turned)
    assert 0.1 < wanted.std() < 10, "values must neither vanish nor grow, or their arithmetic may slow down"
    np.testing.assert_allclose(plain.T if columns else plain, wanted, atol=1e-4)


def _chain(tree, leaves):
    weights, x = jax.tree.unflatten(tree, leaves), np.ones((5, 16), np.float32)
    for layer in weights["layers"]:
        q, k, v = np.split(x @ np.concatenate(layer["qkv"], axis=1), (32, 48), axis=1)
        gate, up = np.split((q + np.tile(k + v, 2)) @ layer["o"] @ np.concatenate(layer["gate_up"], 1), 2, 1)
        x = (gate + up) @ layer["down"]
    return x @ weights["head"]


def test_recomputed_neighbours_are_those_of_the_table():
    embedding_VD = jax.random.normal(jax.random.key(0), (97, 16))
    logits_BV = 3.0 * jax.random.normal(jax.random.key(1), (8, 97))
    wanted = neighbor_mixture(logits_BV, neighbor_table(embedding_VD, 4))
    found = mixing.recomputed_mixture(logits_BV, mixing.unit_rows(embedding_VD), 4)
    np.testing.assert_array_equal(found.ids, wanted.ids)
    np.testing.assert_allclose(found.weights, wanted.weights, rtol=1e-6)


def test_a_chunk_is_timed_again_and_again_from_the_same_place():
    run = chunks.decoding(shapes.random_params(TINY), TINY, slots=3, context=12, steps=4)
    assert all(run() > 0 for _ in range(3))


PEER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "die":
        sys.exit("no memory left")
    answer = {"error": "ValueError: odd"} if request.get("x") == 1 else {"twice": 2 * request["x"]}
    print(json.dumps(answer), flush=True)
"""


def test_a_peer_answers_fails_and_ends_in_so_many_words(tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(PEER)
    with Peer(sys.executable, script) as peer:
        assert peer.ask("double", x=4) == {"twice": 8}
        with pytest.raises(RuntimeError, match="stand_in failed in 'double': ValueError: odd"):
            peer.ask("double", x=1)
        assert peer.ask("double", x=5) == {"twice": 10}
        with pytest.raises(RuntimeError, match="stand_in ended during 'die'; its last words: no memory left"):
            peer.ask("die")


def test_a_python_of_a_peer_that_is_none_is_refused():
    with pytest.raises(ValueError, match="/nowhere/python is no program"):
        Peer("/nowhere/python", "hf_generate.py")


def test_a_goals_figure_is_the_one_furthest_from_it_and_a_miss_is_said():
    headers = ["", "seconds", "it / ours"]
    rows = [
        ["peer 1.2", 3.0, {"median": 1.9, "low": 1.8, "high": 2.1}],
        ["peer 1.3", 2.0, 2.5],
        ["ours", 1.0, None],
    ]
    report = {"machine": "a machine", "tables": [{"title": "Speed: all", "headers": headers, "rows": rows}]}
    goal = everything.Goal("speed", "case", "Speed", "peer", "it / ours", least=2.0)
    assert everything.find(report, goal) == rows[0][2]
    assert everything.find(report, goal._replace(row="peer 1.3")) == 2.5
    assert everything.find(report, goal._replace(row="other")) is None
    assert everything.find(report, goal._replace(column="other")) is None
    assert everything.find(report, goal._replace(least=None, most=2.0)) == 2.5  # too large now
    with mock.patch.object(
        everything, "GOALS", (goal, goal._replace(row="peer 1.3"), goal._replace(case="none"))
    ):
        lines = everything.table({"case": report}).splitlines()
    assert lines[2:] == [
        "| speed | ≥ 2.0 | **1.9 (1.8 … 2.1)**, missed |",
        "| speed | ≥ 2.0 | 2.5 |",
        "| speed | ≥ 2.0 | not measured |",
        "",
        "a machine",
    ]


def test_every_goal_is_of_a_benchmark_and_every_script_is_there():
    assert {goal.case for goal in everything.GOALS} == set(everything.CASES)
    for case in everything.CASES.values():
        assert (everything.HERE / case.words.split()[0]).is_file()
