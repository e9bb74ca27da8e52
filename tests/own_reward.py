"""A reward of a user's own, for tests: it varies within a group whatever the model writes."""


def odd_length(response: str, gold: str) -> float:
    """1.0 for a response of an odd number of characters."""
    return float(len(response) % 2)
