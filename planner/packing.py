"""Disjoint subsets of few nodes with the greatest total value, for a value of every subset."""

import numpy as np

from planner.cost import Floats, Ints


def best_packing(value: Floats) -> tuple[float, list[int]]:
    """The greatest total of disjoint subsets, as bit masks; value has shape (2^n,).

    Each packing is met with its smallest block first: that has at most an n-th of the nodes of n
    blocks, and what is left to one block is a look at the best subset within.
    """
    within, where = _best_within(value)
    whole = len(value) - 1
    sizes = np.bitwise_count(np.arange(len(value))).astype(np.int64)
    blocks = np.nonzero((value > 0) & (value >= within * (1 - 1e-12)))[0]
    blocks = blocks[np.argsort(sizes[blocks], kind="stable")]
    best, chosen = float(within[whole]), [int(where[whole])]
    total, more = _split(whole, blocks, value, within, where, sizes, best)
    if total > best:
        best, chosen = total, more
    return best, [block for block in chosen if block]


def _best_within(value: Floats) -> tuple[Floats, Ints]:
    """For every subset the greatest value of any subset within it, 0 at least, and which."""
    n = len(value).bit_length() - 1
    best, where = np.maximum(value, 0.0), np.where(value > 0, np.arange(len(value)), 0)
    for bit in range(n):
        shape = (-1, 2, 1 << bit)
        b, w = best.reshape(shape), where.reshape(shape)
        better = b[:, 0] > b[:, 1]
        b[:, 1] = np.where(better, b[:, 0], b[:, 1])
        w[:, 1] = np.where(better, w[:, 0], w[:, 1])
    return best, where


def _split(
    left: int,
    blocks: Ints,
    value: Floats,
    within: Floats,
    where: Ints,
    sizes: Ints,
    beat: float,
) -> tuple[float, list[int]]:
    """The best packing of `left` in two or more of the blocks that is above `beat`, if any."""
    inside = blocks[(blocks & ~left) == 0]
    inside = inside[2 * sizes[inside] <= sizes[left]]
    found: list[int] = []
    if not len(inside):
        return 0.0, found
    rest = left ^ inside
    pairs = value[inside] + within[rest]
    at = int(pairs.argmax())
    if pairs[at] > beat:
        beat, found = float(pairs[at]), [int(inside[at]), int(where[rest[at]])]
    # Of three or more blocks the first has a third of the nodes at most, and the second no less.
    most = value[inside] + (sizes[left] // sizes[inside] - 1) * within[rest]
    for i in np.nonzero((3 * sizes[inside] <= sizes[left]) & (most > beat))[0]:
        if most[i] <= beat:
            continue
        block = int(inside[i])
        total, more = _split(
            left ^ block, inside[i + 1 :], value, within, where, sizes, beat - float(value[block])
        )
        if more:
            beat, found = float(value[block]) + total, [block, *more]
    return (beat, found) if found else (0.0, [])
