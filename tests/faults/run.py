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
import fuzz

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


def wait_for_a_moment(rng, process, workdir, seconds):
    """Waits for a random moment of a run: by the clock, or some time after one of its next steps.

    Not before the interpreter can have come to the command: seconds on a busy machine. Later steps are waited
    for with their evaluations, saves and, after the last one, the export.
    """
    path, steps = workdir / "metrics.jsonl", command.SMALL["train.steps"]

    def rows():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    by_clock, wanted = rng.random() < 0.25, min(rows() + rng.randint(1, 4), steps)
    end = time.monotonic() + (rng.uniform(2.0, 0.7 * seconds) if by_clock else 600)
    while process.poll() is None and time.monotonic() < end and (by_clock or rows() < wanted):
        time.sleep(0.005)
    if not by_clock:
        end = time.monotonic() + rng.uniform(0, 4.0 if wanted == steps else 1.0)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)


def kills(folder, reference, seconds, count, deadline, rng):
    """SIGKILL at random moments, run after run; each run has to end as the one without."""
    while tally("kills").get("bitwise equal", 0) < count and time.monotonic() < deadline:
        workdir = folder / f"kills-{rng.randrange(1 << 32):08x}"
        killed = 0
        while True:
            process = command.start(workdir)
            wait_for_a_moment(rng, process, workdir, seconds)
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


def signals(folder, reference, seconds, count, deadline, rng):
    """SIGTERM and SIGINT at random moments: status, sentence, and in the end the run of one without."""
    numbers = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
    while time.monotonic() < deadline:
        done = {name: tally("signals").get(name, 0) for name in numbers}
        if min(done.values()) >= count:
            return
        workdir, got = folder / f"signals-{rng.randrange(1 << 32):08x}", []
        while True:
            name = min(numbers, key=lambda name: done[name] + got.count(name))
            process = command.start(workdir)
            wait_for_a_moment(rng, process, workdir, seconds)
            process.send_signal(numbers[name])
            status = process.wait()
            if status == 0:
                break
            got.append(name)
            *_, last = command.said(workdir).splitlines() or [""]
            told = last.startswith(f"stopped by {name}; ") and "Traceback" not in command.said(workdir)
            if status != 128 + numbers[name] or not told:
                print(f"{workdir}: {name}: status {status}: {last}", flush=True)
                tally("signals", failed=1)
                break
        differ = command.differences(workdir, reference) if status == 0 else [f"status {status}"]
        if differ:
            print(f"{workdir}: after {got}: {', '.join(differ)}", flush=True)
            tally("signals", failed=len(got))
            continue
        figures = tally("signals", runs=1, **{name: got.count(name) for name in numbers})
        print(f"{got}, equal; in all {figures}", flush=True)
        shutil.rmtree(workdir)


def fuzzing(folder, reference, seconds, count, deadline, rng):
    """Mutated settings, data files and model directories."""
    made = fuzz.make_model(folder / "model")
    for kind, (_, wanted) in fuzz.KINDS.items():
        while (done := sum(tally("fuzz").get(f"{kind} {way}", 0) for way in fuzz.WAYS)) < min(wanted, count):
            if time.monotonic() > deadline:
                return
            what, way, said = fuzz.one(kind, done, folder / "mutated", made)
            tally("fuzz", **{f"{kind} {way}": 1})
            if way == "failed":
                print(f"{kind} {done}: {what}: {said}", flush=True)
                tally("fuzz", failed=1)


PARTS = {"kills": (kills, 100), "signals": (signals, 30), "fuzz": (fuzzing, 500)}


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
    reference, seconds = (None, 0.0) if options.part == "fuzz" else unbroken(options.folder)
    part(options.folder, reference, seconds, options.count or count, deadline, random.Random())
    figures = tally(options.part)
    print(f"{options.part}: {figures}")
    sys.exit(bool(figures.get("failed")))


if __name__ == "__main__":
    main()
