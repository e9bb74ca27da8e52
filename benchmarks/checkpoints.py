"""What checksums cost: seconds of a save and of the checksums in it, bytes a second when they are verified.

    python benchmarks/checkpoints.py [--mib=1024] [--rounds=3]

A state of random float32 numbers, as they compress no better than weights, is saved to --folder and verified.
"""

import argparse
import pathlib
import shutil
import sys
import tempfile
import time

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from ngrpo_jax.runtime import checksums
from ngrpo_jax.runtime.checkpoints import Checkpoints


def main() -> None:
    """Prints one line a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the state")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, default=None, help="where to save; default: a new one")
    options = parser.parse_args()
    folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix="checkpoints-"))
    keys = jax.random.split(jax.random.key(0), 16)
    state = {f"leaf{i}": jax.random.normal(key, (options.mib * 2**20 // 64,)) for i, key in enumerate(keys)}
    jax.block_until_ready(state)
    for number in range(1, options.rounds + 1):
        with Checkpoints(folder / "checkpoints", model={}) as checkpoints:
            begun = time.monotonic()
            checkpoints.save(number, state, {})
            checkpoints.wait()
            save = time.monotonic() - begun
        step = folder / "checkpoints" / str(number)
        size = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
        begun = time.monotonic()
        checksums.write(step)
        write = time.monotonic() - begun
        begun = time.monotonic()
        assert checksums.fault(step) is None
        read = time.monotonic() - begun
        print(
            f"round {number}: {size / 1e9:.2f} GB; save {save:.2f} s, of it checksums {write:.2f} s "
            f"({100 * write / save:.1f} %); verified at {size / read / 1e9:.2f} GB/s",
            flush=True,
        )
    if options.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
