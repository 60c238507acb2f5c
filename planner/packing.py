"""Disjoint subsets of few nodes with the greatest total value, for a value of every subset."""

from dataclasses import dataclass

import numpy as np

from planner.cost import Floats, Ints
from planner.subset_bounds import over_subsets

MOST_VISITS = 4_000
"""First blocks of three or more that are followed up; what is left then counts by its bound."""


@dataclass(frozen=True, slots=True)
class _Values:
    """Of every subset: its value, the best within it and which that is, and its nodes."""

    value: Floats
    within: Floats
    where: Ints
    sizes: Ints
    shares: Floats
    """Sums of shares of the nodes: no subset is worth more than its nodes' shares."""


@dataclass(slots=True)
class _Search:
    """The best packing so far, and what packings that were not followed up could reach."""

    best: float
    chosen: list[int]
    missed: float = 0.0
    visits: int = 0


def best_packing(value: Floats) -> tuple[float, list[int]]:
    """A total that no disjoint subsets exceed, and the best found, as bit masks; (2^n,) values.

    Each packing is met with its smallest block first: that has at most an n-th of the nodes of n
    blocks, and what is left to one block is a look at the best subset within. The total is that of
    the subsets found, except where there are too many to follow up.
    """
    whole = len(value) - 1
    sizes = np.bitwise_count(np.arange(len(value))).astype(np.int64)
    known = _Values(value, *_best_within(value), sizes, _shares(value, sizes))
    blocks = np.nonzero((value > 0) & (value >= known.within * (1 - 1e-12)))[0]
    blocks = blocks[np.argsort(sizes[blocks], kind="stable")]
    search = _Search(float(known.within[whole]), [int(known.where[whole])])
    _split(known, search, whole, blocks, [])
    return max(search.best, search.missed), [block for block in search.chosen if block]


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


def _shares(value: Floats, sizes: Ints) -> Floats:
    """For every subset the sum of its nodes' shares: a node's is the most that any subset has a node."""
    masks = np.arange(len(value))
    each = np.maximum(value, 0.0) / np.maximum(sizes, 1)
    nodes = range(len(value).bit_length() - 1)
    return over_subsets(np.array([each[masks >> node & 1 == 1].max() for node in nodes]))


def _split(known: _Values, search: _Search, left: int, blocks: Ints, taken: list[int]) -> None:
    """Try the blocks taken with two or more in `left`, the first of them one of these blocks."""
    inside = blocks[(blocks & ~left) == 0]
    inside = inside[2 * known.sizes[inside] <= known.sizes[left]]
    if not len(inside):
        return
    value, rest = known.value[inside], left ^ inside
    reached = float(known.value[taken].sum()) if taken else 0.0
    pairs = reached + value + known.within[rest]
    at = int(pairs.argmax())
    if pairs[at] > search.best:
        search.best = float(pairs[at])
        search.chosen = [*taken, int(inside[at]), int(known.where[rest[at]])]
    # Of three or more blocks the first has a third of the nodes at most, and the second no less.
    more = known.sizes[left] // known.sizes[inside] - 1
    most = reached + value + np.minimum(more * known.within[rest], known.shares[rest])
    for i in np.nonzero((3 * known.sizes[inside] <= known.sizes[left]) & (most > search.best))[0]:
        if most[i] <= max(search.best, search.missed):
            continue
        search.visits += 1
        if search.visits > MOST_VISITS:
            search.missed = max(search.missed, float(most[i]))
        else:
            block = int(inside[i])
            _split(known, search, left ^ block, inside[i + 1 :], [*taken, block])
