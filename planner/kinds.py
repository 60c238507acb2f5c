"""The best disjoint pipelines of a cluster of few kinds of node with equal links, exactly, by counts.

Where all links are equal, nodes of equal facts can be told apart by nothing: a ring is then how many
of each kind it has, and which kinds stand first and last. Subsets become counts, and the search is
the one over subsets: every count is bounded, and only those that a best combination uses are solved.
Rings have no replicas here.
"""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from planner.chain import best_split
from planner.cost import Cell, Floats, Ints, Role
from planner.problem import CellCosts, Found, Problem, cell_costs
from planner.subset_bounds import least_row_s, row_times

MOST_COUNTS = 1_000
"""Above so many combinations of counts the search takes too long: 3 kinds of 9 nodes fit."""


@dataclass(frozen=True, slots=True)
class Kinds:
    """Nodes by kind, and every combination of how many of each; shape (combinations, kinds)."""

    members: tuple[tuple[int, ...], ...]
    counts: Ints


@dataclass(slots=True)
class _Search:
    """What is known of every count; `bound` falls to the exact rate where `solved` has it."""

    kinds: Kinds
    costs: list[CellCosts]
    cell_bound: Floats
    bound: Floats
    solved: dict[int, tuple[Found, tuple[int, ...]] | None]


def kinds_of(given: Problem) -> Kinds | None:
    """The cluster's kinds; None where links differ or there are too many combinations."""
    away = ~np.eye(len(given.nodes), dtype=bool)
    for fact in (given.net.latency_s, given.net.bytes_per_s):
        if away.any() and np.ptp(fact[away]) > 0:
            return None
    groups: dict[object, list[int]] = {}
    for i, node in enumerate(given.nodes):
        groups.setdefault(replace(node, name="", region="", kind=""), []).append(i)
    members = tuple(tuple(group) for group in groups.values())
    if np.prod([len(group) + 1.0 for group in members]) > MOST_COUNTS:
        return None
    counts = np.array(list(product(*(range(len(group) + 1) for group in members))), np.int64)
    return Kinds(members, counts)


def solve_by_kinds(given: Problem, kinds: Kinds, tried: tuple[Cell, ...]) -> list[Found]:
    """Disjoint rings of the greatest total rate; empty if none fits."""
    search = started(given, kinds, tried)
    reached, rest = 0.0, best_counts(search.bound, kinds.counts)[1]
    while True:
        # What is left beside a count is the count at the mirrored place.
        needed = reached * (1 - 1e-12) - rest[::-1]
        search.bound[search.bound < needed] = 0.0
        chosen, rest = best_counts(search.bound, kinds.counts)
        unsolved = [count for count in set(chosen) if count not in search.solved]
        if not unsolved:
            return _rings(search, chosen)
        for count in unsolved:
            solve_count(search, count)
        reached = max(reached, sum(float(search.bound[c]) for c in chosen))


def best_counts(rate: Floats, counts: Ints) -> tuple[list[int], Floats]:
    """Counts, repeated as often as they fit, of the greatest total rate; that total within each.

    `counts` is in lexicographic order, so a difference of counts has the difference of places.
    """
    total, choice = np.zeros(len(rate)), np.zeros(len(rate), np.int64)
    blocks = np.nonzero(rate > 0)[0]
    steps = [int(np.nonzero((counts == unit).all(axis=1))[0][0]) for unit in _units(counts)]
    for at in range(1, len(rate)):
        for step, kind in zip(steps, range(counts.shape[1]), strict=True):
            if counts[at, kind] and total[at - step] > total[at]:
                total[at], choice[at] = total[at - step], -step
        inside = blocks[(counts[blocks] <= counts[at]).all(axis=1)]
        if len(inside):
            value = rate[inside] + total[at - inside]
            best = int(value.argmax())
            if value[best] > total[at] * (1 + 1e-12):
                total[at], choice[at] = value[best], inside[best]
    chosen, at = [], len(rate) - 1
    while total[at] > 0:
        step = int(choice[at])
        if step > 0:
            chosen.append(step)
        at -= abs(step)
    return chosen, total


def _units(counts: Ints) -> Ints:
    return np.eye(counts.shape[1], dtype=np.int64)


def started(given: Problem, kinds: Kinds, tried: tuple[Cell, ...]) -> _Search:
    """A search that knows bounds alone."""
    costs = [cell_costs(given, cell) for cell in tried]
    bounds = [_bounds(one, kinds) for one in costs]
    cell_bound = np.stack(bounds) if bounds else np.zeros((1, len(kinds.counts)))
    return _Search(kinds, costs, cell_bound, cell_bound.max(axis=0), {})


def _bounds(costs: CellCosts, kinds: Kinds) -> Floats:
    """Rows per second that a ring of each count cannot exceed in this cell."""
    at = [group[0] for group in kinds.members]
    middle, last = (costs.stages[role].busy_s[at] for role in (Role.MIDDLE, Role.LAST))
    sizes = kinds.counts.sum(axis=1)
    if not np.isfinite(middle).any() or not np.isfinite(last).any():
        return np.zeros(len(sizes))
    many = sizes > 1
    occupied_s = hop_s = back_s = 0.0
    if many.any() and len(costs.links.return_hop_s) > 1:
        occupied_s = float(costs.links.occupied_s[:, 0, 1].min())
        hop_s = float(costs.links.hop_s[:, 0, 1].min())
        back_s = float(costs.links.return_hop_s[0, 1])
    ring_s = np.where(many, np.maximum(sizes - 1, 0) * hop_s + back_s, 0.0)
    present = kinds.counts > 0

    def total(added: Floats) -> Floats:
        # A kind that has no node adds nothing, even if it could not take part.
        finite = np.where(np.isfinite(added), added, 0.0)
        never = (present[None] & ~np.isfinite(added)[:, None, :]).any(axis=-1)
        return np.where(never, np.inf, finite @ kinds.counts.T)

    def greatest(values: Floats) -> Floats:
        shown = np.where(present, values[..., None, :], -np.inf)
        return np.asarray(shown.max(axis=-1), np.float64)

    times = row_times(middle.repeat(np.maximum(kinds.counts[-1], 1), axis=0), last)
    row_s = least_row_s(costs.cell, (middle, last), times, ring_s, (total, greatest))
    row_s = np.where(many, np.maximum(row_s, occupied_s), row_s)
    row_s[(sizes == 0) | (sizes > middle.shape[1])] = np.inf
    return np.asarray((1.0 + 1e-12) / row_s, np.float64)


def solve_count(search: _Search, count: int) -> None:
    """The best ring of exactly these counts: over all cells, and kinds at its two ends."""
    best: tuple[Found, tuple[int, ...]] | None = None
    for i in np.argsort(-search.cell_bound[:, count], kind="stable"):
        bound = float(search.cell_bound[i, count])
        if bound <= 0 or (best and bound <= best[0].rows_per_s * (1 + 1e-12)):
            break
        for kinds in _orders(search.kinds.counts[count]):
            order = _take(search.kinds, kinds, np.zeros(len(search.kinds.members), np.int64))
            split = best_split(search.costs[i].ring(order))
            if split and (best is None or split.row_s < best[0].split.row_s):
                best = (Found(search.costs[i].cell, order, split), kinds)
    search.solved[count] = best
    search.bound[count] = best[0].rows_per_s if best else 0.0


def _orders(count: Ints) -> list[tuple[int, ...]]:
    """Kinds in ring order, one for every choice of the first and the last."""
    every = [kind for kind, times in enumerate(count) for _ in range(int(times))]
    if len(every) == 1:
        return [tuple(every)]
    orders = []
    for first in dict.fromkeys(every):
        rest = list(every)
        rest.remove(first)
        for last in dict.fromkeys(rest):
            middle = list(rest)
            middle.remove(last)
            orders.append((first, *middle, last))
    return orders


def _take(kinds: Kinds, order: tuple[int, ...], taken: Ints) -> tuple[int, ...]:
    """A node for each of these kinds, after those taken of each, which are counted on."""
    nodes = []
    for kind in order:
        nodes.append(kinds.members[kind][int(taken[kind])])
        taken[kind] += 1
    return tuple(nodes)


def _rings(search: _Search, chosen: list[int]) -> list[Found]:
    taken = np.zeros(len(search.kinds.members), np.int64)
    rings = []
    for count in chosen:
        solved = search.solved[count]
        if solved:
            rings.append(replace(solved[0], order=_take(search.kinds, solved[1], taken)))
    return rings
