"""Signals of a process alone: when it ends, with which status and sentence, and what it still does."""

import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = """
import pathlib, sys, time
from ngrpo_jax.runtime import ending
ending.listen()
ending.last_words(lambda: "words.")
log = lambda word: print(word, flush=True)
"""
BODIES = {
    "early": "log('ready'); time.sleep(60)",
    # As a compiler does: no bytecode in between, and without Python's lock.
    "in a library": "import hashlib; log('ready'); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
    "held": """
with ending.last_act(lambda: log('released')):
    log('ready')
    time.sleep(60)
""",
    "a short step": """
with ending.Deferred(grace_s=30, kept=lambda: False) as signals, signals.expected("step", {"step": 1.0}):
    log('ready')
    while not signals.received:
        ending.pause()
    ending.pause()
log('finished')
""",
    "a long step": """
with ending.Deferred(grace_s=1, kept=lambda: False) as signals, signals.expected("step", {"step": 50.0}):
    log('ready')
    try:
        while True:
            ending.pause()
    except ending.Abandoned:
        log('abandoned')
    time.sleep(60)
""",
    "a long step, and all is kept": """
with ending.Deferred(grace_s=1, kept=lambda: True) as signals, signals.expected("step", {"step": 50.0}):
    log('ready')
    time.sleep(60)
""",
    "of several": """
ending.joined(several=True, primary=True)
with ending.Deferred(grace_s=0, kept=lambda: True) as signals, signals.expected("step", {"step": 50.0}):
    log('ready')
    while not signals.received:
        ending.pause()
log('finished')
""",
    "of several, and the others have ended": """
from ngrpo_jax import flags
ending.joined(several=True, primary=False)
with flags.report_fatal(), ending.Deferred(grace_s=0, kept=lambda: True) as signals:
    log('ready')
    while not signals.received:
        ending.pause()
    raise ValueError("Gloo all-reduce failed: Connection closed by peer")
""",
}
# What is logged after the first signal, and whether the process has to be ended by a second one.
EXPECTED = {
    "early": ([], False),
    "in a library": ([], False),
    "held": (["released"], False),
    "a short step": (["finished"], None),
    "a long step": (["abandoned"], True),
    "a long step, and all is kept": ([], False),
    "of several": (["finished"], None),
    "of several, and the others have ended": ([], False),
}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", BODIES)
def test_a_signal_ends_a_process_at_once_or_after_a_step(name, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT + BODIES[name]],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        logged, second = EXPECTED[name]
        for word in logged:
            assert process.stdout.readline() == f"{word}\n"
        if second:
            process.send_signal(number)
        rest, said = process.communicate(timeout=50)
    finally:
        process.kill()
    assert rest == ""
    if second is None:  # the owner of the block ends it
        assert (process.returncode, said) == (0, "")
    else:
        assert (process.returncode, said) == (128 + number, f"\nstopped by {number.name}; words.\n")


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_the_command_listens_before_it_imports_jax(command):
    """By the order of its own lines: a signal in the seconds of these imports would leave a traceback."""
    text = (ROOT / "ngrpo_jax" / f"{command}.py").read_text(encoding="utf-8")
    first = min(text.index("\nimport "), text.index("\nfrom ngrpo_jax import"))
    assert text.index("ending.listen()") < first
    console_script = text[text.index("def cli()") :]
    assert console_script.index("ending.listen()") < console_script.index("flags.run_command(main)")
