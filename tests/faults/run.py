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


def unbroken(folder, processes):
    """(the workdir of a run without a fault, the seconds of one whose programs were all compiled before)."""
    workdir = folder / f"unbroken-{processes}"
    if not (workdir / "summary.json").exists():
        shutil.rmtree(workdir, ignore_errors=True)
        assert command.Group(workdir, processes).wait() == 0, command.said(workdir)
    again, begun = folder / "again", time.monotonic()
    shutil.rmtree(again, ignore_errors=True)
    assert command.Group(again, processes).wait() == 0, command.said(again)
    assert not command.differences(again, workdir)
    return workdir, time.monotonic() - begun


def wait_for_a_moment(rng, process, workdir, seconds):
    """Waits for a random moment of a run: by the clock, or some time after one of its next steps.

    Not before the command listens for signals, for which a busy machine may need seconds. Later
    steps are waited for with their evaluations, saves and, after the last one, the export.
    """
    path, steps = workdir / "metrics.jsonl", command.SMALL["train.steps"]

    def rows():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    while process.poll() is None and not command.listens(process):
        time.sleep(0.005)
    by_clock, wanted = rng.random() < 0.25, min(rows() + rng.randint(1, 4), steps)
    end = time.monotonic() + (rng.uniform(0, 0.7 * seconds) if by_clock else 600)
    while process.poll() is None and time.monotonic() < end and (by_clock or rows() < wanted):
        time.sleep(0.005)
    if not by_clock:
        end = time.monotonic() + rng.uniform(0, seconds if wanted == steps else 1.0)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)


def kills(folder, reference, seconds, count, deadline, rng):
    """SIGKILL at random moments, run after run; each run has to end as the one without."""
    while tally("kills").get("bitwise equal", 0) < count and time.monotonic() < deadline:
        workdir = folder / f"kills-{rng.randrange(1 << 32):08x}"
        killed = 0
        while True:
            process = command.Group(workdir)
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


def signals(folder, reference, seconds, count, deadline, rng, part="signals", processes=1):
    """SIGTERM and SIGINT at random moments: status, sentence, and in the end the run of one without."""
    numbers = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
    while time.monotonic() < deadline:
        done = {name: tally(part).get(name, 0) for name in numbers}
        if min(done.values()) >= count:
            return
        workdir, got = folder / f"signals-{rng.randrange(1 << 32):08x}", []
        while True:
            name = min(numbers, key=lambda name: done[name] + got.count(name))
            before = len(command.said(workdir))
            group = command.Group(workdir, processes)
            wait_for_a_moment(rng, group, workdir, seconds)
            group.send_signal(numbers[name])
            status = group.wait()
            if status == 0:
                break
            got.append(name)
            said = command.said(workdir)[before:]
            told = f"\nstopped by {name}; " in f"\n{said}" and "Traceback" not in said
            if status != 128 + numbers[name] or not told:
                print(f"{workdir}: {name}: status {status}: {said[-300:]}", flush=True)
                tally(part, failed=1)
                break
        differ = command.differences(workdir, reference) if status == 0 else [f"status {status}"]
        if differ:
            print(f"{workdir}: after {got}: {', '.join(differ)}", flush=True)
            tally(part, failed=len(got))
            continue
        figures = tally(part, runs=1, **{name: got.count(name) for name in numbers})
        print(f"{got}, equal; in all {figures}", flush=True)
        shutil.rmtree(workdir)


def signals_to_two(*arguments):
    """The same with two processes, which both get each signal."""
    signals(*arguments, part="signals-to-two", processes=2)


def steady(folder, reference, seconds, count, deadline, rng):
    """A run of `count` steps: the most that it holds in its last 50 steps, and in those from 50 to 100."""
    workdir = folder / "steady"
    shutil.rmtree(workdir, ignore_errors=True)
    process = command.start(workdir, train__steps=count, checkpoint__every=50, eval__every=50)
    early, late = {}, {}
    while process.poll() is None and time.monotonic() < deadline:
        path = workdir / "metrics.jsonl"
        step = path.read_bytes().count(b"\n") if path.exists() else 0
        for most, wanted in ((early, 50 <= step < 100), (late, step >= count - 50)):
            for name, held in command.holdings(process.pid).items() if wanted else ():
                most[name] = max(most.get(name, 0), held)
        time.sleep(0.1)
    status = process.wait()
    growth = 100 * (late["MB"] / early["MB"] - 1)
    flat = all(late[name] <= early[name] + 2 for name in ("handles", "threads", "processes"))
    print(f"status {status}; resident memory {growth:+.2f} %; steps 50 to 100: {early}, the last 50: {late}")
    tally("steady", **{"as promised" if status == 0 and growth < 2 and flat else "failed": 1})


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


# Part -> (what injects its faults, how many, processes of a run).
PARTS = {
    "kills": (kills, 100, 1),
    "signals": (signals, 30, 1),
    "signals-to-two": (signals_to_two, 30, 2),
    "steady": (steady, 500, 1),
    "fuzz": (fuzzing, 500, 1),
}


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
    part, count, processes = PARTS[options.part]
    deadline = time.monotonic() + 60 * options.minutes
    reference, seconds = (
        (None, 0.0) if options.part in ("fuzz", "steady") else unbroken(options.folder, processes)
    )
    part(options.folder, reference, seconds, options.count or count, deadline, random.Random())
    figures = tally(options.part)
    print(f"{options.part}: {figures}")
    sys.exit(bool(figures.get("failed")))


if __name__ == "__main__":
    main()
