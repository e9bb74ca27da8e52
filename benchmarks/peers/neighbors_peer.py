"""Exact nearest rows by other libraries, one method a process; prints one line of JSON.

    python neighbors_peer.py --method faiss|sklearn --rows rows.npy --k 8 --threads 2 --save table.npy

Runs in an environment of its own (pip install faiss-cpu scikit-learn), started by benchmarks/neighbors.py.
Both search by cosine; the row itself is among the k.
"""

import argparse
import json
import os
import pathlib
import time


def main() -> None:
    """Measures one method."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--save", required=True)
    given = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(given.threads)
    import numpy as np

    rows = np.load(given.rows)
    version, search = METHODS[given.method](rows, given.k, given.threads)
    before = _forget_peak()
    start = time.perf_counter()
    table = search()
    seconds = time.perf_counter() - start
    np.save(given.save, np.asarray(table))
    print(json.dumps({"seconds": seconds, "extra_mb": _memory_mb("VmHWM") - before, "version": version}))


def _faiss(rows, k, threads):
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(threads)
    unit = np.ascontiguousarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30))

    def search():
        index = faiss.IndexFlatIP(unit.shape[1])
        index.add(unit)
        return index.search(unit, k)[1]

    return f"faiss {faiss.__version__}", search


def _sklearn(rows, k, threads):
    import sklearn
    from sklearn.neighbors import NearestNeighbors

    finder = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute", n_jobs=threads)
    return f"scikit-learn {sklearn.__version__}", lambda: finder.fit(rows).kneighbors(rows)[1]


def _memory_mb(name: str) -> float:
    """VmRSS (now) or VmHWM (at most, since `_forget_peak`) of this process; Linux alone."""
    lines = pathlib.Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def _forget_peak() -> float:
    """Starts VmHWM anew; returns the memory in use."""
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _memory_mb("VmRSS")


METHODS = {"faiss": _faiss, "sklearn": _sklearn}

if __name__ == "__main__":
    main()
