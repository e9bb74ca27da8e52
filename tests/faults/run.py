"""The long forms of the tests of faults: make faults. Each part goes on from its tally, within an hour.

    python tests/faults/run.py PART [--count=N] [--minutes=M] [--folder=DIR]

A part injects faults into real commands until its tally (tests/faults/tallies.json) holds N of them. What is
not as promised is printed and counted as `failed`, and the folder of that run is kept.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
import command

TALLIES = pathlib.Path(__file__).parent / "tallies.json"


def tally(part, **added):
    """Adds to the figures of a part, on disk, and returns them."""
    tallies = json.loads(TALLIES.read_text(encoding="utf-8")) if TALLIES.exists() else {}
    own = tallies.setdefault(part, {})
    for name, count in added.items():
        own[name] = own.get(name, 0) + count
    TALLIES.write_text(json.dumps(tallies, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return own


def unbroken(folder):
    """(the workdir of a run without a fault, the seconds of one whose programs were all compiled before)."""
    workdir = folder / "unbroken"
    if not (workdir / "summary.json").exists():
        shutil.rmtree(workdir, ignore_errors=True)
        assert command.start(workdir).wait() == 0, command.said(workdir)
    again, begun = folder / "again", time.monotonic()
    shutil.rmtree(again, ignore_errors=True)
    assert command.start(again).wait() == 0, command.said(again)
    assert not command.differences(again, workdir)
    return workdir, time.monotonic() - begun


def moment(rng, workdir, seconds):
    """A random time to wait for: from the imports to the end of what is left of the run."""
    steps = command.SMALL["train.steps"]
    folder = workdir / "checkpoints"
    done = max((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), default=0)
    return rng.uniform(0.1, seconds * (1 - 0.4 * done / steps))


def kills(folder, reference, seconds, count, deadline, rng):
    """SIGKILL at random moments, run after run; each run has to end as the one without."""
    while tally("kills").get("bitwise equal", 0) < count and time.monotonic() < deadline:
        workdir = folder / f"kills-{rng.randrange(1 << 32):08x}"
        killed = 0
        while True:
            process = command.start(workdir)
            wait = moment(rng, workdir, seconds)
            end = time.monotonic() + wait
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            status = process.wait()
            if status != -signal.SIGKILL:
                break
            killed += 1
        differ = [f"status {status}"] if status else command.differences(workdir, reference)
        if differ:
            print(f"{workdir}: after {killed} kills: {', '.join(differ)}", flush=True)
            tally("kills", failed=killed, runs=1)
            continue
        figures = tally("kills", **{"bitwise equal": killed, "runs": 1})
        print(f"{killed} kills, equal; in all {figures}", flush=True)
        shutil.rmtree(workdir)


PARTS = {"kills": (kills, 100)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--count", type=int)
    parser.add_argument("--minutes", type=float, default=55)
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir(), "faults"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.folder / "cache"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    part, count = PARTS[options.part]
    deadline = time.monotonic() + 60 * options.minutes
    reference, seconds = unbroken(options.folder)
    print(f"a run takes {seconds:.0f} s", flush=True)
    part(options.folder, reference, seconds, options.count or count, deadline, random.Random())
    figures = tally(options.part)
    print(f"{options.part}: {figures}")
    sys.exit(bool(figures.get("failed")))


if __name__ == "__main__":
    main()
