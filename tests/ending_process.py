"""A process of several that exchanges values with the others until one of them ends, for test_ending.py.

    python tests/ending_process.py HEARTBEAT_S KIND VICTIM

KIND: how process VICTIM ends after a few exchanges; "all": every process raises the same UserError.
"""

import os
import signal
import sys
import time

from ngrpo_jax import flags
from ngrpo_jax.errors import StorageError, UserError
from ngrpo_jax.runtime import distributed, ending


def end(kind):
    if kind in ("kill", "term"):
        os.kill(os.getpid(), signal.SIGKILL if kind == "kill" else signal.SIGTERM)
    elif kind == "exit":
        os._exit(3)
    elif kind == "bug":
        raise TypeError("shapes differ")
    elif kind == "storage":
        raise StorageError("/share/x cannot be written: No space left on device.")
    raise UserError("this file is no data file.")


def main(words):
    kind, victim = words[2], int(words[3])
    process = distributed.initialize()
    texts = [f"é{index}" * 3000 * index for index in range(process.count)]  # longer than one message
    assert distributed.allgather("texts", texts[process.index]) == texts
    assert distributed.allgather_items("shares", list(process.share(5))) == list(range(5))
    print("death at", time.time(), flush=True)
    if kind == "all":
        time.sleep(2 * process.index)  # as hosts that are not equally fast
    if kind == "all" or (process.index == victim and kind != "names"):
        end(kind)
    while True:
        distributed.allgather("other" if kind == "names" and process.index == victim else "again", None)
        time.sleep(0.05)


if __name__ == "__main__":
    ending.HEARTBEAT_S = int(sys.argv[1])
    flags.run_command(main)
