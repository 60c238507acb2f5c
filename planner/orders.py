"""Orders of nodes round a ring: least latency and widest bottleneck, by dynamic programming.

Held and Karp 1962, over subsets as bit masks; all masks of one size at a time.
"""

from functools import lru_cache

import numpy as np

from planner.cost import Bools, Floats, Ints


@lru_cache(maxsize=16)
def _by_size(n: int) -> tuple[Ints, ...]:
    """Masks of n bits, grouped by how many bits are set."""
    masks = np.arange(1 << n)
    sizes = np.array([int(m).bit_count() for m in masks])
    return tuple(masks[sizes == size] for size in range(n + 1))


def widest_paths(bytes_per_s: Floats) -> Floats:
    """For every subset, the widest bottleneck of a path through all of it; shape (2^n,).

    Infinite for single nodes, 0 for subsets that no path joins.
    """
    n = len(bytes_per_s)
    width = np.zeros((1 << n, n))
    width[1 << np.arange(n), np.arange(n)] = np.inf
    for masks in _by_size(n)[1:n]:
        for new in range(n):
            open_masks = masks[masks & (1 << new) == 0]
            through = np.minimum(width[open_masks], bytes_per_s[None, :, new])
            width[open_masks | (1 << new), new] = through.max(axis=1)
    return np.asarray(width.max(axis=1), np.float64)


def path_table(step_s: Floats) -> Floats:
    """Least sums of `step_s` over paths from `first` through a subset to `last`.

    Shape (2^n, first, last); infinite where no such path is.
    """
    n = len(step_s)
    table = np.full((1 << n, n, n), np.inf)
    at = np.arange(n)
    table[1 << at, at, at] = 0.0
    for masks in _by_size(n)[1:n]:
        for new in range(n):
            open_masks = masks[masks & (1 << new) == 0]
            through = table[open_masks] + step_s[None, None, :, new]
            table[open_masks | (1 << new), :, new] = through.min(axis=2)
    return table


def least_rings(step_s: Floats, return_s: Floats) -> Floats:
    """For every subset, the least way round a ring: a path, and the return to its first node."""
    closed = path_table(step_s) + return_s.T[None, :, :]
    return np.asarray(closed.min(axis=(1, 2)), np.float64)


def trace_path(table: Floats, step_s: Floats, first: int, last: int) -> tuple[int, ...]:
    """The nodes of a least path through all of the table's nodes, read back from it."""
    mask, path = len(table) - 1, [last]
    while mask != 1 << first:
        last = path[-1]
        before = mask & ~(1 << last)
        path.append(int((table[before, first] + step_s[:, last]).argmin()))
        mask = before
    return tuple(reversed(path))


def short_path(step_s: Floats, first: int) -> tuple[int, ...]:
    """A short path from `first` through all nodes: nearest neighbour, then Or-opt moves."""
    n = len(step_s)
    path, left = [first], set(range(n)) - {first}
    while left:
        nearest = min(left, key=lambda node: (step_s[path[-1], node], node))
        path.append(nearest)
        left.remove(nearest)
    return _or_opt(step_s, path)


def _or_opt(step_s: Floats, path: list[int]) -> tuple[int, ...]:
    """Move single nodes to where they cost least, until no move helps; the first stays."""
    best, improved = path_s(step_s, path), True
    while improved and len(path) <= 40:
        improved = False
        for i in range(1, len(path)):
            rest = path[:i] + path[i + 1 :]
            for j in range(1, len(rest) + 1):
                moved = [*rest[:j], path[i], *rest[j:]]
                length = path_s(step_s, moved)
                if length < best - 1e-12:
                    path, best, improved = moved, length, True
                    break
            if improved:
                break
    return tuple(path)


def path_s(step_s: Floats, path: list[int] | tuple[int, ...]) -> float:
    """Sum of the steps along a path."""
    return float(step_s[list(path[:-1]), list(path[1:])].sum())


def groups_of(joined: Bools) -> list[tuple[int, ...]]:
    """Nodes by connected component; `joined` is symmetric, of shape (n, n)."""
    left, groups = set(range(len(joined))), []
    while left:
        group, open_nodes = set[int](), [min(left)]
        while open_nodes:
            node = open_nodes.pop()
            if node not in group:
                group.add(node)
                open_nodes.extend(int(i) for i in np.nonzero(joined[node])[0])
        left -= group
        groups.append(tuple(sorted(group)))
    return groups
