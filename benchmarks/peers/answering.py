"""The far end of a peer that answers requests: JSON lines in, JSON lines out (benchmarks/peer.py)."""

import json
import os
import sys
from collections.abc import Callable


def answer_requests(operations: dict[str, Callable[..., dict]]) -> None:
    """Answers until stdin ends. What libraries print goes to stderr: stdout is for answers alone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = operations[request.pop("op")](**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
