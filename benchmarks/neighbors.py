"""The neighbour table: against other libraries and a bare matrix product, and its certified refresh.

    python benchmarks/neighbors.py [--model DIR] [--k 8] [--peer-python PATH] [--repeats 3] [--json FILE]
    python benchmarks/neighbors.py --refresh [--model DIR] [--updates 50] [--rates 1e-6,1e-4]

Without --model: random rows in clusters, --size × --width. The first form runs each method in a process of
its own, in turn, and prints medians; each table is compared with a float64 scan for --sample rows. The other
libraries need the Python of an environment with faiss-cpu and scikit-learn.

The second form makes real AdamW updates of the model (next-token loss of 4 × 64 random tokens; a random walk
of the rows without a model), refreshes a table after each, and builds one from nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import measure
from ngrpo_jax.algo.neighbors import refresh
from ngrpo_jax.algo.neighbors.eligibility import eligible_rows
from ngrpo_jax.algo.neighbors.exact import TILE, neighbor_table
from ngrpo_jax.algo.neighbors.nearness import tile_scores
from ngrpo_jax.learner.optimizer import make_optimizer
from ngrpo_jax.model import decoder, hf
from ngrpo_jax.settings import OptimizerSettings
from ngrpo_jax.tasks import prompts

PEER = pathlib.Path(__file__).parent / "peers" / "neighbors_peer.py"
OWN, PRODUCT = "ngrpo_jax", "matrix product, all pairs"
TIE = 1e-6  # cosines that differ by less count as equal
REFRESH_K = 3


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=pathlib.Path, help="Hugging Face directory, float32 as stored")
    parser.add_argument("--size", type=int, default=8192, help="rows, without --model")
    parser.add_argument("--width", type=int, default=256, help="their width")
    parser.add_argument("--k", type=int, default=8, help="with the row itself")
    parser.add_argument("--peer-python", type=pathlib.Path)
    parser.add_argument("--peers", default="faiss,sklearn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of the peers")
    parser.add_argument("--sample", type=int, default=2048, help="rows compared with float64")
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--rates", default="1e-6,1e-4")
    parser.add_argument("--json", metavar="FILE", help="where the figures go as well")
    parser.add_argument("--only", choices=(OWN, PRODUCT), help=argparse.SUPPRESS)
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--save", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        measure_one(given)
        return
    report = measure.Report("Neighbour table")
    if given.refresh:
        for rate in given.rates.split(","):
            compare_refresh(report, given, float(rate))
    else:
        compare(report, given)
    report.save(given.json)


def make_rows(given: argparse.Namespace) -> np.ndarray:
    """The model's input embedding, or clusters of random rows."""
    if given.model:
        return np.asarray(hf.load(str(given.model))[1]["embed"]["embedding"], np.float32)
    random = np.random.default_rng(0)
    centres = random.normal(size=(max(1, given.size // 16), given.width))
    rows = centres[random.integers(0, len(centres), given.size)]
    return (rows + 0.7 * random.normal(size=rows.shape)).astype(np.float32)


def compare(report: measure.Report, given: argparse.Namespace) -> None:
    """Every method in turn, --repeats times; medians, memory, and rows that are not the nearest."""
    rows = make_rows(given)
    methods = [OWN, PRODUCT]
    if given.peer_python and given.peer_python.exists():
        methods += given.peers.split(",")
    else:
        print(f"no Python at --peer-python {given.peer_python}: the other libraries are left out.")
    with tempfile.TemporaryDirectory() as folder:
        source = f"{folder}/rows.npy"
        np.save(source, rows)
        runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for _ in range(given.repeats):
            for method in methods:
                runs[method].append(_start(given, method, source, f"{folder}/{method}.npy"))
        wrong = {
            method: wrong_rows(rows, np.load(f"{folder}/{method}.npy"), given.sample)
            for method in methods
            if method != PRODUCT
        }
    seconds = {method: np.array([run["seconds"] for run in runs[method]]) for method in methods}
    lines = [
        (
            runs[method][0]["version"],
            measure.interval(seconds[method]),
            measure.interval(seconds[method] / seconds[OWN]),
            max(run["extra_mb"] for run in runs[method]),
            wrong.get(method),
        )
        for method in methods
    ]
    report.table(
        f"Exact table: {rows.shape[0]} × {rows.shape[1]} float32, k = {given.k} with the row itself",
        ("", "seconds", "it / this table", "peak extra MB", f"wrong of {given.sample} rows"),
        lines,
    )


def _start(given: argparse.Namespace, method: str, source: str, target: str) -> dict[str, Any]:
    common = ["--rows", source, "--k", str(given.k), "--save", target]
    if method in (OWN, PRODUCT):
        command = [sys.executable, __file__, "--only", method, *common]
    else:
        command = [
            *(str(given.peer_python), str(PEER), "--method", method, *common),
            *("--threads", str(given.threads)),
        ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_one(given: argparse.Namespace) -> None:
    """One of our own two methods in this process; prints one line of JSON. The first call compiles."""
    rows_VD = jax.block_until_ready(jnp.asarray(np.load(given.rows)))
    before = _reset_peak()
    if given.only == OWN:
        run, version = lambda: neighbor_table(rows_VD, given.k), f"this table (jax {jax.__version__})"
    else:
        whole = jax.jit(_all_products)
        run, version = lambda: whole(rows_VD), PRODUCT
    jax.block_until_ready(run())
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    extra = _memory_mb("VmHWM") - before
    np.save(given.save, np.asarray(result))
    print(json.dumps({"seconds": seconds, "extra_mb": extra, "version": version}))


def _all_products(rows_VD: jax.Array) -> jax.Array:
    """The product of every row with every row; of each tile only the maximum is returned."""
    tile = min(TILE, rows_VD.shape[0])
    blocks = -(-rows_VD.shape[0] // tile)
    padded = jnp.pad(rows_VD, ((0, blocks * tile - rows_VD.shape[0]), (0, 0))).reshape(blocks, tile, -1)

    def row(a_TD: jax.Array) -> jax.Array:
        return jnp.max(jax.lax.map(lambda b_TD: jnp.max(tile_scores(a_TD, b_TD, "dot")), padded))

    return jax.lax.map(row, padded)


def wrong_rows(rows: np.ndarray, table: np.ndarray, sample: int, valid: np.ndarray | None = None) -> int:
    """Of `sample` rows, those whose neighbours have other cosines than the nearest ones, by float64."""
    unit = rows.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-300)
    chosen = np.random.default_rng(1).permutation(len(rows))[:sample]
    wrong = 0
    for some in np.array_split(chosen, -(-len(chosen) // 256)):
        cosines = unit[some] @ unit.T
        found = np.array([_others(table[i], i) for i in some])
        ours = np.sort(np.take_along_axis(cosines, found, 1))[:, ::-1]
        cosines[np.arange(len(some)), some] = -2
        if valid is not None:
            cosines[:, ~valid] = -2
        count = found.shape[1]
        best = np.sort(np.partition(cosines, len(rows) - count, axis=1)[:, -count:])[:, ::-1]
        wrong += int((np.abs(ours - best) > TIE).any(axis=1).sum())
    return wrong


def _others(neighbors: np.ndarray, row: int) -> np.ndarray:
    """A table's row without the row itself, which other libraries may leave out for an identical row."""
    return np.delete(neighbors, np.flatnonzero(neighbors == row)[:1] if row in neighbors else -1)


def compare_refresh(report: measure.Report, given: argparse.Namespace, rate: float) -> None:
    """A table refreshed after each update of one learning rate, against one built from nothing."""
    if given.model:
        config, params = hf.load(str(given.model))
        tokenizer = prompts.load_tokenizer(given.model)
        eligible = eligible_rows(
            config.vocab_size, REFRESH_K, prompts.usable_rows(tokenizer, config.vocab_size)
        )
        walk = _updates(config, params, rate)
    else:
        rows_VD = jnp.asarray(make_rows(given))
        eligible, walk = eligible_rows(rows_VD.shape[0], REFRESH_K), _random_walk(rows_VD, rate)
    config = refresh.TableConfig(REFRESH_K)
    before_VD = next(walk)
    empty = refresh.empty_state(before_VD.shape[0], config)
    state, _ = refresh.refresh(empty, before_VD, eligible, config)
    state = _refreshed(state, before_VD, before_VD, eligible, config)[0]  # compiles
    lines = []
    for update in range(1, given.updates + 1):
        after_VD = jax.block_until_ready(next(walk))
        start = time.perf_counter()
        state, stats = _refreshed(state, before_VD, after_VD, eligible, config)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        fresh = jax.block_until_ready(neighbor_table(after_VD, REFRESH_K, valid_V=eligible.valid_V))
        built = time.perf_counter() - start
        table = np.asarray(refresh.table(state, config))
        other = _unequal(np.asarray(after_VD), table, np.asarray(fresh))
        lines.append((seconds, built, int(stats.rescored), int(stats.searched), other))
        print(
            f"rate {rate:g}, update {update}: {seconds:.2f} s of {built:.1f}, rescored {stats.rescored}, "
            f"searched {stats.searched}, unequal rows {other}",
            file=sys.stderr,
            flush=True,
        )
        before_VD = after_VD
    seconds, built, rescored, searched, other = (np.array(column) for column in zip(*lines, strict=True))
    report.table(
        f"Refresh: {given.updates} updates at learning rate {rate:g}, k = {REFRESH_K}",
        ("", "seen"),
        [
            ("seconds of a refresh", measure.interval(seconds)),
            ("seconds of a full build", measure.interval(built)),
            ("refresh / full build", measure.interval(seconds / built)),
            ("rows scored again", measure.interval(rescored)),
            ("rows searched anew", measure.interval(searched)),
            ("updates after which both tables are equal", int((other == 0).sum())),
        ],
    )


def _refreshed(state, before_VD, after_VD, eligible, config):
    state = refresh.add_drift(state, before_VD, after_VD, eligible, config)
    return jax.block_until_ready(refresh.refresh(state, after_VD, eligible, config))


def _unequal(rows: np.ndarray, ours: np.ndarray, fresh: np.ndarray) -> int:
    """Rows whose neighbours have other cosines, place by place."""
    places = np.flatnonzero((ours != fresh).any(axis=1))
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    cosines = [np.einsum("rd,rcd->rc", unit[places], unit[table[places]]) for table in (ours, fresh)]
    return int((np.abs(cosines[0] - cosines[1]) > TIE).any(axis=1).sum())


def _updates(config, params, rate: float) -> Iterator[jax.Array]:
    """The input embedding, at first and after each AdamW step on a batch of random tokens."""
    optimizer = make_optimizer(OptimizerSettings(rate, 0, 0.9, 0.999, 1e-8, 0.01, 1.0))
    opt_state = jax.jit(optimizer.init)(params)

    def loss(params, ids_BT):
        logprobs = jax.nn.log_softmax(decoder.forward(params, config, ids_BT))
        return -jnp.mean(jnp.take_along_axis(logprobs[:, :-1], ids_BT[:, 1:, None], axis=2))

    @jax.jit
    def step(params, opt_state, key):
        ids_BT = jax.random.randint(key, (4, 64), 0, config.vocab_size)
        changes, opt_state = optimizer.update(jax.grad(loss)(params, ids_BT), opt_state, params)
        return jax.tree.map(jnp.add, params, changes), opt_state

    for number in range(10**9):
        yield params["embed"]["embedding"]
        params, opt_state = step(params, opt_state, jax.random.key(number))


def _random_walk(rows_VD: jax.Array, rate: float) -> Iterator[jax.Array]:
    for number in range(10**9):
        yield rows_VD
        rows_VD = rows_VD + rate * jax.random.normal(jax.random.key(number), rows_VD.shape)


def _memory_mb(name: str) -> float:
    """VmRSS (now) or VmHWM (at most, since `_reset_peak`) of this process; Linux alone."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _reset_peak() -> float:
    """Resets VmHWM to the memory in use, and returns that."""
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory_mb("VmRSS")


if __name__ == "__main__":
    main()
