"""First-fit decreasing bin packing of lengths. Must not know what a length stands for."""

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
      prefixes, counts: tokens that a group needs once a bin, and that a sequence needs for itself.
      capacity: of a bin, at least prefix + count of every sequence.

    Returns:
      indices of the sequences of each bin, those of a group together.
    """
    size = {group: 0 for group in groups}
    for group, count in zip(groups, counts, strict=True):
        size[group] += count
    order = sorted(range(len(counts)), key=lambda i: (-size[groups[i]], groups[i], -counts[i], i))
    bins: list[list[int]] = []
    free: list[int] = []  # tokens left in each bin
    of_group: list[int] = []  # bins that have the prefix of the current group
    current = None
    for index in order:
        if groups[index] != current:
            current, of_group = groups[index], []
        chosen = next((i for i in of_group if counts[index] <= free[i]), None)
        if chosen is None:
            cost = prefixes[index] + counts[index]
            chosen = next((i for i, left in enumerate(free) if cost <= left), len(bins))
            if chosen == len(bins):
                bins.append([])
                free.append(capacity)
            of_group.append(chosen)
            free[chosen] -= prefixes[index]
        bins[chosen].append(index)
        free[chosen] -= counts[index]
    return bins
