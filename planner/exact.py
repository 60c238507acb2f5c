"""The best set of disjoint pipelines on up to 12 nodes, exactly over the grid of cells.

Every subset of nodes gets an upper bound on the rate of a ring through all of it, and only the
subsets that an optimal combination would use are then solved exactly: as long as the best
combination of bounds contains a bound that is not yet exact, that subset is solved and the
combination is sought again. When it contains none, it is the optimum.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.cost import Bools, Cell, Floats, Ints, Role, decode_rounds
from planner.grid import cells
from planner.network import network_cost
from planner.orders import least_rings, widest_paths
from planner.problem import CellCosts, Problem, cell_costs
from planner.ring import Found, solve_ring

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
    reached: float = 0.0
    """The best total of subsets that are solved."""


def solve_exactly(given: Problem, tried: tuple[Cell, ...] | None = None) -> list[Found]:
    """Disjoint rings of the greatest total rate; empty if none fits."""
    search = _start(given, tried if tried is not None else cells(given.work))
    whole = len(search.bound) - 1
    while True:
        # A block is of use only if, with the best of the rest, it beats what is reached.
        useful = search.bound + search.rest[whole ^ np.arange(whole + 1)]
        open_bound = np.where(useful >= search.reached * (1 - 1e-12), search.bound, 0.0)
        chosen = best_combination(open_bound)[0]
        unsolved = [subset for subset in chosen if subset not in search.solved]
        if not unsolved:
            return [found for s in chosen if (found := search.solved[s])]
        for subset in unsolved:
            _solve_subset(search, subset)
        total = sum(float(search.bound[subset]) for subset in chosen)
        search.reached = max(search.reached, total)


def _start(given: Problem, tried: tuple[Cell, ...]) -> _Search:
    widest = widest_paths(given.net.bytes_per_s)
    costs = tuple(cell_costs(given, cell) for cell in tried)
    rings = {n: _least_hops(given, n) for n in {cell.draft_len for cell in tried}}
    bounds = [subset_bounds(given, c, widest, rings[c.cell.draft_len]) for c in costs]
    cell_bound = np.stack(bounds) if bounds else np.zeros((1, 1 << len(given.nodes)))
    bound = cell_bound.max(axis=0)
    return _Search(given, costs, cell_bound, bound, best_combination(bound)[1], {})


def _solve_subset(search: _Search, subset: int) -> None:
    """The best ring through exactly these nodes, over all cells, most promising first."""
    members = tuple(i for i in range(len(search.given.nodes)) if subset >> i & 1)
    best: Found | None = None
    for index in np.argsort(-search.cell_bound[:, subset], kind="stable"):
        bound = search.cell_bound[index, subset]
        if bound <= 0 or (best and bound <= best.rows_per_s * (1 + 1e-12)):
            break
        beat_s = best.split.row_s if best else np.inf
        found = solve_ring(search.costs[index], members, 1.0 / float(bound), beat_s)
        best = found or best
    search.solved[subset] = best
    search.bound[subset] = best.rows_per_s if best else 0.0


@dataclass(frozen=True, slots=True)
class _LeastHops:
    """For every subset, least latency and least wire seconds of a row on a way round it."""

    latency_s: Floats
    wire_s: Floats


def _least_hops(given: Problem, draft_len: int) -> _LeastHops:
    # So large a micro-batch that frames weigh nothing: below every cell's own cost.
    links = network_cost(given.net, given.model, given.work, Cell(10**9, 1, draft_len))
    passes = 1.0 + decode_rounds(given.work, draft_len)
    latency = np.where(given.net.bytes_per_s > 0, passes * given.net.latency_s, np.inf)
    wire = links.occupied_s.min(axis=0)
    return _LeastHops(least_rings(latency, latency), least_rings(wire, links.return_occupied_s))


def subset_bounds(given: Problem, costs: CellCosts, widest: Floats, hops: _LeastHops) -> Floats:
    """Rows per second that a ring through a subset cannot exceed in this cell; shape (2^n,).

    The least T at which the layers that fit within T add up, the widest path's slowest link, and
    Little's law with the least latency, the least wire time and the fastest layers.
    """
    cell, layers = costs.cell, given.model.layers
    members = (np.arange(len(widest))[:, None] >> np.arange(len(given.nodes))[None, :]) & 1 == 1
    row_s = _compute_row_s(costs, members)
    row_s = np.maximum(row_s, _widest_row_s(costs, given, widest))
    sizes = members.sum(axis=1)
    ring_s = hops.latency_s + cell.micro_batch_rows * hops.wire_s
    life = cell.micro_batch_rows * _least_compute_s(costs, members)
    life = life + np.where(sizes > 1, ring_s, 0.0)
    row_s = np.maximum(row_s, life / cell.rows)
    row_s[0] = np.inf
    row_s[sizes > layers] = np.inf
    return np.asarray((1.0 / row_s) * (1.0 + 1e-12), np.float64)


def _least_compute_s(costs: CellCosts, members: Bools) -> Floats:
    """Seconds per row of all layers on the fastest members, each as full as its memory allows."""
    busy = costs.stages[Role.MIDDLE].busy_s
    per_layer = (busy / np.arange(1.0, busy.shape[1] + 1.0)).min(axis=1)
    most = np.isfinite(busy).sum(axis=1)
    left = np.full(len(members), float(busy.shape[1]))
    total = np.zeros(len(members))
    for node in np.argsort(per_layer, kind="stable"):
        if most[node]:
            taken = np.where(members[:, node], np.minimum(left, most[node]), 0.0)
            total += taken * per_layer[node]
            left -= taken
    return np.where(left > 0, np.inf, total)


def _compute_row_s(costs: CellCosts, members: Bools) -> Floats:
    """Least T at which the members hold all layers, one of them also the LM head."""
    middle, last = costs.stages[Role.MIDDLE].busy_s, costs.stages[Role.LAST].busy_s
    values = np.unique(np.concatenate([middle.ravel(), last.ravel()]))
    values = values[np.isfinite(values)]
    if not len(values):
        return np.full(len(members), np.inf)
    most = np.stack([np.searchsorted(row, values, side="right") for row in middle])
    more = np.stack([np.searchsorted(row, values, side="right") for row in last]) - most
    low = np.zeros(len(members), np.int64)
    high = np.full(len(members), len(values))
    while (low < high).any():
        middle_at = np.minimum((low + high) // 2, len(values) - 1)
        held = np.where(members, most[:, middle_at].T, 0)
        head = np.where(members, more[:, middle_at].T, -middle.shape[1]).max(axis=1)
        enough = held.sum(axis=1) + head >= middle.shape[1]
        enough &= np.where(members, held, 1).min(axis=1) >= 1
        searching = low < high
        high = np.where(searching & enough, middle_at, high)
        low = np.where(searching & ~enough, middle_at + 1, low)
    return np.append(values, np.inf)[low]


def _widest_row_s(costs: CellCosts, given: Problem, widest: Floats) -> Floats:
    """Seconds per row of the slowest link on the widest path; links of more bytes/s cost less."""
    occupied = costs.links.occupied_s.min(axis=0)
    rate = given.net.bytes_per_s
    order = np.argsort(rate.ravel(), kind="stable")
    at = np.searchsorted(rate.ravel()[order], widest)
    slowest = occupied.ravel()[order][np.minimum(at, len(order) - 1)]
    return np.where(np.isinf(widest), 0.0, np.where(widest > 0, slowest, np.inf))


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
