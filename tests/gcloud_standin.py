"""A stand-in for gcloud: records its calls, plays back states, and has a folder for each TPU worker.

Run as a program named gcloud, with the world's folder in STANDIN. `world.json` there says what happens:

    lives     one entry a creation: `states` that describe answers with one after the other (the last one
              stays), `queue` the same for the queued resource, `training` how the training ends (an exit
              status, or null: it goes on), `reboot_at` the status call before which worker 0 restarts
    workers   how many there are
    refusals  how many creations are refused for want of capacity

`ssh` runs its command with bash in the home folder of each worker, so that quoting is tested by a real shell;
there `python3` is a stand-in too, which keeps the arguments and environment of a training.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

WORLD = pathlib.Path(os.environ["STANDIN"])

PYTHON = """#!/bin/bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *" ngrpo_jax.train "*)
    "$REAL_PYTHON" -I -c 'import json, os, sys
keep = ("LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "PYTHONUNBUFFERED", "COLOUR")
environment = {name: os.environ.get(name) for name in keep}
print(json.dumps({"worker": os.environ["WORKER"], "arguments": sys.argv[1:], "environment": environment}))
' "$@" >>"$STANDIN/trainings.jsonl"
    echo "step 1 of the training"
    status=$(head -n 1 "$HOME/ends_with")
    [ "$(wc -l <"$HOME/ends_with")" = 1 ] || sed -i 1d "$HOME/ends_with"
    while [ -e "$HOME/goes_on" ]; do sleep 0.05; done
    exit "$status" ;;
  *--version*) echo "Python 3.12.0" ;;
esac
"""


def load() -> dict:
    return json.loads((WORLD / "world.json").read_text())


def save(world: dict) -> None:
    (WORLD / "world.json").write_text(json.dumps(world))


def fail(sentence: str) -> None:
    print(f"ERROR: (gcloud.compute.tpus) {sentence}", file=sys.stderr)
    sys.exit(1)


def homes(world: dict) -> list[pathlib.Path]:
    return [WORLD / f"life{world['life']}" / f"worker{i}" for i in range(world["workers"])]


def create(world: dict) -> None:
    if world["refusals"]:
        world["refusals"] -= 1
        save(world)
        fail("RESOURCE_EXHAUSTED: There is no more capacity in the zone.")
    world["life"] += 1
    world["exists"] = True
    training = world["lives"][world["life"]].get("training")
    for home in homes(world):
        (home / "bin").mkdir(parents=True)
        (home / "boot").write_text("first boot\n")
        (home / "ends_with").write_text("143\n" if training is None else f"{training}\n")
        if training is None:
            (home / "goes_on").touch()
        for name, text in (("python3", PYTHON), ("hostname", f"#!/bin/bash\necho {home.name}\n")):
            (home / "bin" / name).write_text(text)
            (home / "bin" / name).chmod(0o755)
    save(world)


def delete(world: dict) -> None:
    for home in homes(world):
        (home / "goes_on").unlink(missing_ok=True)
    world["exists"] = False
    save(world)


def describe(world: dict, kind: str) -> None:
    states = world["lives"][world["life"]].get(kind, ["ACTIVE"]) if world["exists"] else ["ABSENT"]
    state = states.pop(0) if len(states) > 1 else states[0]
    save(world)
    if state == "ABSENT":
        fail("NOT_FOUND: Resource 'projects/p/locations/z/nodes/n' was not found.")
    if state == "ERROR":
        fail("UNAVAILABLE: The service is currently unavailable.")
    print(state)


def reboot(everyone: list[pathlib.Path]) -> None:
    """Worker 0 restarts, whereupon the trainings of the others fail; the next training finishes."""
    first = everyone[0]
    os.killpg(int((first / "ngrpo_run" / "pid").read_text()), signal.SIGKILL)
    (first / "boot").write_text("second boot\n")
    for home in everyone:
        (home / "ends_with").write_text("0\n")
        (home / "goes_on").unlink()


def settle(world: dict) -> None:
    """Waits until every training that was started has said so, and has ended where it ends by itself."""
    ends = world["lives"][world["life"]].get("training") is not None
    for run in [home / "ngrpo_run" for home in homes(world)]:
        for _ in range(1000):
            log = (run / "log").read_text() if (run / "pid").exists() else ""
            if log.count("\n== ") + log.startswith("== ") == log.count("\nstep 1 ") and (
                not log or not ends or (run / "exit").exists()
            ):
                break
            time.sleep(0.02)


def ssh(world: dict, worker: str, command: str) -> None:
    everyone = homes(world)
    if " status " in command:
        life = world["lives"][world["life"]]
        life["statuses"] = life.get("statuses", 0) + 1
        save(world)
        if life["statuses"] == life.get("reboot_at"):
            reboot(everyone)
    statuses = []
    for home in everyone if worker == "all" else [everyone[int(worker)]]:
        environment = {
            "HOME": str(home),
            "WORKER": home.name,
            "PATH": f"{home}/bin:{os.environ['PATH']}",
            "NGRPO_BOOT_FILE": str(home / "boot"),
            "STANDIN": str(WORLD),
            "REAL_PYTHON": sys.executable,
        }
        statuses.append(
            subprocess.run(["bash", "-c", command], cwd=home, env=environment, check=False).returncode
        )
    settle(world)
    sys.exit(max(statuses))


def scp(world: dict, source: str, target: str) -> None:
    for home in homes(world):
        (home / target.partition(":")[2]).write_bytes(pathlib.Path(source).read_bytes())


def main() -> None:
    arguments = sys.argv[1:]
    with (WORLD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    flags = dict(word[2:].partition("=")[::2] for word in arguments if word.startswith("--"))
    words = [word for word in arguments if not word.startswith("--")]
    words = words[words.index("tpus") + 1 :]
    world = load()
    match words:
        case [_, "create", _]:
            create(world)
        case [_, "delete", _]:
            delete(world)
        case ["tpu-vm", "describe", _]:
            describe(world, "states")
        case ["queued-resources", "describe", _]:
            describe(world, "queue")
        case ["tpu-vm", "ssh", _]:
            ssh(world, flags["worker"], flags["command"])
        case ["tpu-vm", "scp", source, target]:
            scp(world, source, target)
        case _:
            fail(f"no such command: {words}")


if __name__ == "__main__":
    main()
