"""Lengths into as few bins as first-fit decreasing finds. Knows neither rows nor tokens."""

from collections.abc import Sequence


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of `lengths` grouped so that no group's sum exceeds `capacity`."""
    return first_fit_groups(range(len(lengths)), [0] * len(lengths), lengths, capacity)


def first_fit_groups(
    groups: Sequence[int], prefixes: Sequence[int], counts: Sequence[int], capacity: int
) -> list[list[int]]:
    """First-fit decreasing of sequences of which those of a group share a prefix where they share a bin.

    Args:
      groups: of each sequence; those of one group have equal prefixes.
      prefixes, counts: tokens that a group pays once a bin, and that a sequence pays for itself.
      capacity: of a bin, at least prefix + count of every sequence.

    Returns:
      indices of the sequences of each bin, those of a group together.
    """
    size = {group: 0 for group in groups}
    for group, count in zip(groups, counts, strict=True):
        size[group] += count
    order = sorted(range(len(counts)), key=lambda i: (-size[groups[i]], groups[i], -counts[i], i))
    bins: list[list[int]] = []
    room: list[int] = []
    homes: list[int] = []  # bins that hold the present group
    for place, index in enumerate(order):
        if place and groups[index] != groups[order[place - 1]]:
            homes = []
        fitting = next((home for home in homes if counts[index] <= room[home]), None)
        if fitting is None:
            cost = prefixes[index] + counts[index]
            fitting = next((number for number, left in enumerate(room) if cost <= left), len(bins))
            if fitting == len(bins):
                bins.append([])
                room.append(capacity)
            homes.append(fitting)
            room[fitting] -= prefixes[index]
        bins[fitting].append(index)
        room[fitting] -= counts[index]
    return bins
