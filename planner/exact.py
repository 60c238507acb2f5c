"""The best set of disjoint pipelines on up to 12 nodes, exactly over the grid of cells.

On up to REPLICA_NODES stages may have replicas too; beyond, exact means among rings without any.

Every subset of nodes gets an upper bound on the rate of a ring through all of it, and only the
subsets that an optimal combination would use are then solved exactly: as long as the best
combination of bounds contains a bound that is not yet exact, that subset is solved and the
combination is sought again. When it contains none, it is the optimum.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from planner.cost import Cell, Floats, Ints
from planner.grid import cells
from planner.orders import widest_paths
from planner.problem import CellCosts, Found, Problem, among, cell_costs
from planner.replica_exact import REPLICA_NODES, ReplicaCosts, best_replicated
from planner.ring import solve_ring
from planner.subset_bounds import least_hops, subset_bounds

EXACT_NODES = 12
"""Up to so many nodes the search is exact: 2^12 subsets, each bounded in every cell."""


@dataclass(slots=True)
class _Search:
    """What is known of every subset; `bound` falls to the exact rate where `solved` has it."""

    given: Problem
    costs: tuple[CellCosts, ...]
    cell_bound: Floats
    """Rows per second, shape (cells, subsets)."""
    bound: Floats
    rest: Floats
    """What the nodes of a subset can reach at most in any combination; shape (subsets,)."""
    solved: dict[int, Found | None]
    replicas: dict[int, ReplicaCosts] = field(default_factory=dict)
    """Of the subsets whose rings may have replicas."""
    reached: float = 0.0
    """The best total of subsets that are solved."""


def solve_exactly(
    given: Problem, tried: tuple[Cell, ...] | None = None, *, replicate: bool = False
) -> list[Found]:
    """Disjoint rings of the greatest total rate; empty if none fits.

    With `replicate` their stages may have replicas, on REPLICA_NODES nodes at most.
    """
    search = _start(given, tried if tried is not None else cells(given.work))
    if replicate:
        _let_replicate(search)
    whole = len(search.bound) - 1
    everything = np.arange(whole + 1)
    while True:
        # A block is of use only if, with the best of the rest, it beats what is reached.
        needed = search.reached * (1 - 1e-12) - search.rest[whole ^ everything]
        search.bound[search.bound < needed] = 0.0
        chosen, search.rest = best_combination(search.bound)
        unsolved = [subset for subset in chosen if subset not in search.solved]
        if not unsolved:
            return [found for s in chosen if (found := search.solved[s])]
        for subset in unsolved:
            rest = float(search.rest[whole ^ subset])
            _solve_subset(search, subset, search.reached * (1 - 1e-12) - rest)
        total = sum(float(search.bound[s]) for s in chosen if s in search.solved)
        search.reached = max(search.reached, total)


def _start(given: Problem, tried: tuple[Cell, ...]) -> _Search:
    widest = widest_paths(given.net.bytes_per_s)
    costs = tuple(cell_costs(given, cell) for cell in tried)
    rings = {n: least_hops(given, n) for n in {cell.draft_len for cell in tried}}
    bounds = [subset_bounds(given, c, widest, rings[c.cell.draft_len]) for c in costs]
    cell_bound = np.stack(bounds) if bounds else np.zeros((1, 1 << len(given.nodes)))
    bound = cell_bound.max(axis=0)
    return _Search(given, costs, cell_bound, bound, best_combination(bound)[1], {})


def _let_replicate(search: _Search) -> None:
    """Have rings of three nodes or more have replicas; their bound is that of all compute."""
    assert len(search.given.nodes) <= REPLICA_NODES, "beyond, rings with replicas are searched for"
    for subset in range(len(search.bound)):
        members = _members(search.given, subset)
        if len(members) > 2:
            search.replicas[subset] = ReplicaCosts(among(search.given, members))
            bounds = [search.replicas[subset].bound(costs.cell) for costs in search.costs]
            search.bound[subset] = max(search.bound[subset], *bounds)
    search.rest = best_combination(search.bound)[1]


def _members(given: Problem, subset: int) -> tuple[int, ...]:
    return tuple(i for i in range(len(given.nodes)) if subset >> i & 1)


def _solve_subset(search: _Search, subset: int, needed: float) -> None:
    """The best ring through exactly these nodes, over all cells, most promising first.

    One that is not above `needed` rows per second is of no use, and is not looked for.
    """
    members = _members(search.given, subset)
    best: Found | None = None
    beat_s = 1.0 / needed if needed > 0 else np.inf
    for index in np.argsort(-search.cell_bound[:, subset], kind="stable"):
        bound = float(search.cell_bound[index, subset])
        if bound <= 0 or bound * beat_s <= 1 + 1e-12:
            break
        found = solve_ring(search.costs[index], members, 1.0 / bound, beat_s)
        if found:
            best, beat_s = found, found.split.row_s
    if subset in search.replicas:
        cells_of = [costs.cell for costs in search.costs]
        dealt = best_replicated(search.replicas[subset], cells_of, beat_s)
        best = replace(dealt, order=tuple(members[i] for i in dealt.order)) if dealt else best
    if best or needed <= 0:
        search.solved[subset] = best
    search.bound[subset] = best.rows_per_s if best else 0.0


def best_combination(rate: Floats) -> tuple[list[int], Floats]:
    """Disjoint subsets of the greatest total rate, and that total within every subset.

    Blocks are taken by rising highest bit, so each combination is met once: O(3^n) in all.
    """
    n = len(rate).bit_length() - 1
    total = np.zeros(len(rate))
    choice = np.zeros(len(rate), np.int64)
    useful = _undominated(rate)
    for high in range(n):
        size = 1 << high
        total[size : 2 * size] = total[:size]
        choice[size : 2 * size] = 0
        for block in useful[(useful >= size) & (useful < 2 * size)]:
            others = _subsets(size - 1 & ~int(block))
            union = others | int(block)
            value = total[others] + rate[block]
            better = value > total[union] * (1 + 1e-12)
            total[union[better]] = value[better]
            choice[union[better]] = block
    return _read_back(choice, total), total


def _undominated(rate: Floats) -> Ints:
    """Subsets that beat all of their own subsets with one node less."""
    n = len(rate).bit_length() - 1
    masks = np.arange(len(rate))
    inside = np.zeros(len(rate))
    cumulative = rate.copy()
    for bit in range(n):
        has = masks & (1 << bit) != 0
        inside[has] = np.maximum(inside[has], cumulative[masks[has] ^ (1 << bit)])
        cumulative[has] = np.maximum(cumulative[has], cumulative[masks[has] ^ (1 << bit)])
    return masks[rate > inside]


@lru_cache(maxsize=1 << EXACT_NODES)
def _subsets(mask: int) -> Ints:
    """All subsets of a mask, as an array."""
    found = np.zeros(1, np.int64)
    while mask:
        bit = mask & -mask
        found = np.concatenate([found, found | bit])
        mask ^= bit
    return found


def _read_back(choice: Ints, total: Floats) -> list[int]:
    mask, blocks = len(choice) - 1, []
    while mask and total[mask] > 0:
        block = int(choice[mask])
        if block:
            blocks.append(block)
            mask ^= block
        else:
            mask ^= 1 << (mask.bit_length() - 1)
    return blocks
