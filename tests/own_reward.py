"""Rewards of a user's own, for tests."""

import sys


def odd_length(response: str, gold: str) -> float:
    """1.0 for a response of an odd number of characters."""
    return float(len(response) % 2)


def leave(response: str, gold: str) -> float:
    """Ends the process: no verdict, but a fault of the function."""
    sys.exit(0)
