"""A bound, and rings, from the regions that slow links part.

Above some rate no ring can cross a slow link, so the rings that are faster lie in one region each. A
region of few nodes is looked at subset by subset; slower rings are priced node by node. For valid
prices p of the slower ones, no plan is faster than

    sum over regions of the best of  sum of bounds of disjoint fast rings + prices of its other nodes

Of plans without replicas only: with them many slow links share what crosses between regions.
"""

from dataclasses import dataclass, replace

import numpy as np

from planner.chain import best_split
from planner.classes import node_prices, ring_classes
from planner.cost import Cell, Floats, Role, stage_table
from planner.network import network_cost
from planner.orders import groups_of, short_path
from planner.packing import best_packing
from planner.problem import CellCosts, Found, Problem, among, cell_costs
from planner.subset_bounds import (
    MEMBERS,
    fastest_row_s,
    held_within,
    least_life_s,
    least_row_s,
    most_over_subsets,
    over_subsets,
    row_times,
)

MOST_NODES = 16
"""Nodes of a region whose subsets are looked at: 65,536 of them."""
MOST_WORK = 30_000
"""Nodes times layers above which the bound takes too long to be worth it."""
SPAN = 200.0
"""The rates that subsets are looked at for lie within this factor."""
CLOSE_TIMES = 300
"""Seconds per row that are tried for a subset that is looked at closely."""
LEAST_GAP = 1.5
"""How much slower than the links within groups those between them must be."""
RATIOS = {13: 1.03, MOST_NODES: 1.06}
"""Ratio of the rates that subsets are tried at, by the most nodes: bounds are so much too high."""
MOST_SPARE = 4
"""Nodes that a region may have beyond those."""
PRICES = 3
"""Prices of a layer that are tried for all subsets."""
ROUNDS = 3
"""Times that prices and regions' best rings are found from one another."""
TAKEN = 0.03
"""How much the price of a node matters that a fast ring takes."""
SOLVED = 24
"""Subsets of a region that are looked at closely before its bound stands as it is."""


@dataclass(slots=True)
class _Region:
    """The nodes that fast rings share, and what they can reach."""

    nodes: tuple[int, ...]
    spare: tuple[int, ...]
    """Nodes of little worth beyond MOST_NODES; in bounds every ring has them for nothing."""
    bound: Floats
    """Rows per second that a ring of each subset cannot exceed; 0 where it is no faster than slow."""
    cells: dict[Cell, float]
    """Those in which a ring may be fast, and the rate that none of them exceeds."""
    solved: dict[int, Found | None]


@dataclass(frozen=True, slots=True)
class Certified:
    """A bound on all plans, and fast rings that come near it, where regions tell of any."""

    bound: float
    rings: list[Found]


def certified(given: Problem, tried: tuple[Cell, ...]) -> Certified:
    """The bound and the fast rings; a bound of infinity where it would take too long."""
    if len(given.nodes) * given.model.layers > MOST_WORK:
        return Certified(np.inf, [])
    parted = parts(given, tried, _fastest_rate(given, tried))
    if parted is None:
        classes = ring_classes(given, tried, np.inf)
        return Certified(float(node_prices(classes, np.ones(len(given.nodes))).sum()), [])
    slow, groups = parted
    most = MOST_NODES + MOST_SPARE
    small = [_region(given, group) for group in groups if len(group) <= most]
    regions = _fast_bounds(given, tried, small, slow)
    floor = _prices_inside(given, tried, [g for g in groups if len(g) > most])
    prices = _prices(given, tried, slow, regions, floor)
    for region in regions:
        _tighten(given, region, prices)
    bound = float(prices.sum()) + sum(_gain(region, prices)[0] for region in regions)
    return Certified(bound, [ring for region in regions for ring in _best_rings(region, prices)])


def parts(
    given: Problem, tried: tuple[Cell, ...], fastest_rate: float
) -> tuple[float, list[tuple[int, ...]]] | None:
    """A rate above which no ring crosses between groups of nodes, and the groups.

    It is the one below the widest gap between the rates at which groups join, and not much below
    the fastest rate that matters.
    """
    rate = np.zeros(given.net.bytes_per_s.shape)
    for draft_len in {cell.draft_len for cell in tried}:
        # So large a micro-batch that frames weigh nothing: no cell's links are faster.
        links = network_cost(given.net, given.model, given.work, Cell(10**9, 1, draft_len))
        rate = np.maximum(rate, 1.0 / np.maximum(links.occupied_s.min(axis=0), 1e-12))
    np.fill_diagonal(rate, 0.0)
    joins = _join_rates(np.maximum(rate, rate.T))
    if len(joins) < 2 or joins[0] <= 0:
        return None
    gaps = joins[:-1] / np.maximum(joins[1:], 1e-300)
    at = int(gaps.argmax())
    if gaps[at] < LEAST_GAP:
        return None
    slow = float(joins[at + 1])
    return max(slow, fastest_rate / SPAN), groups_of(np.maximum(rate, rate.T) > slow)


def _fastest_rate(given: Problem, tried: tuple[Cell, ...]) -> float:
    """Rows per second that all nodes together cannot exceed in any cell."""
    tables = (stage_table(given.nodes, given.model, given.work, c, Role.MIDDLE) for c in tried)
    return max(
        (1.0 / fastest_row_s(t.busy_s) for t in tables if np.isfinite(t.busy_s).any()), default=0.0
    )


def _join_rates(rate: Floats) -> Floats:
    """Rates at which a growing group is joined by its next node, falling (Prim 1957)."""
    n = len(rate)
    best, inside = rate[0].copy(), np.zeros(n, dtype=bool)
    inside[0] = True
    joins = []
    for _ in range(n - 1):
        node = int(np.where(inside, -1.0, best).argmax())
        joins.append(best[node])
        inside[node] = True
        best = np.maximum(best, rate[node])
    return np.sort(np.array(joins))[::-1]


def _region(given: Problem, group: tuple[int, ...]) -> _Region:
    """A group of nodes, those of least memory spare where there are too many."""
    by_memory = sorted(group, key=lambda i: (-given.nodes[i].memory_bytes, i))
    nodes = tuple(sorted(by_memory[:MOST_NODES]))
    return _Region(nodes, tuple(by_memory[MOST_NODES:]), np.zeros(1 << len(nodes)), {}, {})


def _fast_bounds(
    given: Problem, tried: tuple[Cell, ...], regions: list[_Region], slow: float
) -> list[_Region]:
    """Every group's subsets, bounded for rings faster than `slow`, over all cells."""
    for cell in tried:
        middle, last = (
            stage_table(given.nodes, given.model, given.work, cell, role).busy_s
            for role in (Role.MIDDLE, Role.LAST)
        )
        links = network_cost(given.net, given.model, given.work, cell)
        hops = np.where(links.occupied_s < 1.0 / slow, links.hop_s, np.inf).min(axis=0)
        np.fill_diagonal(hops, np.inf)
        for region in regions:
            at = [*region.nodes, *region.spare]
            hop = hops[np.ix_(at, at)].min(axis=1, initial=np.inf)
            found = _fast_rates(cell, (middle[at], last[at]), hop, slow, len(region.spare))
            if found is not None:
                region.cells[cell] = float(found.max())
                np.maximum(region.bound, found, out=region.bound)
    return regions


def _fast_rates(
    cell: Cell, stages: tuple[Floats, Floats], hop_s: Floats, slow: float, spare: int
) -> Floats | None:
    """Rates above `slow` that rings of each subset cannot exceed in one cell; None if none has one.

    The last `spare` nodes belong to every subset as far as they are of use.
    """
    middle = stages[0]
    if not np.isfinite(middle).any():
        return None
    ratio = next(ratio for nodes, ratio in RATIOS.items() if len(middle) - spare <= nodes)
    steps = np.log(1.0 / (slow * fastest_row_s(middle))) / np.log(ratio)
    times = ratio ** np.arange(-np.ceil(max(steps, 0.0)), 1.0) / slow
    # Who cannot send on can only stand last, or alone.
    hop_s = np.where(np.isfinite(hop_s), hop_s, 0.0)
    held = held_within(middle, times).sum(axis=1) >= middle.shape[1]
    life_s = least_life_s(cell, middle, hop_s, times) - hop_s.max()
    possible = np.nonzero(held & (life_s <= times * cell.rows))[0]
    if not len(possible):
        return None
    own = hop_s[: len(hop_s) - spare]
    ring_s = over_subsets(own) - (most_over_subsets(own) if not spare else hop_s.max())
    ring_s[0] = 0.0
    times = times[max(int(possible[0]) - 1, 0) :]
    row_s = least_row_s(cell, stages, times, ring_s, spare_s=hop_s[len(own) :], prices=PRICES)
    return np.where(row_s * slow <= 1.0, (1.0 + 1e-12) / row_s, 0.0)


def _prices_inside(
    given: Problem, tried: tuple[Cell, ...], groups: list[tuple[int, ...]]
) -> Floats:
    """Prices for all rings within groups too large to look at subset by subset; 0 elsewhere."""
    prices = np.zeros(len(given.nodes))
    for group in groups:
        classes = ring_classes(among(given, group), tried, np.inf)
        prices[list(group)] = node_prices(classes, np.ones(len(group)))
    return prices


def _prices(
    given: Problem, tried: tuple[Cell, ...], slow: float, regions: list[_Region], floor: Floats
) -> Floats:
    """Prices for slow rings, low for the nodes that the best fast rings leave to them."""
    classes = ring_classes(given, tried, slow)
    matters = np.ones(len(given.nodes))
    best, best_total = floor, np.inf
    for _ in range(ROUNDS):
        prices = np.maximum(node_prices(classes, matters), floor)
        total = float(prices.sum())
        idle = np.where(floor > 0, TAKEN, 1.0)
        for region in regions:
            gain, blocks = _gain(region, prices)
            total += gain
            for i, node in enumerate(region.nodes):
                if any(block >> i & 1 for block in blocks):
                    idle[node] = TAKEN
        if total < best_total:
            best, best_total = prices, total
        matters = (matters + idle) / 2.0
    return best


def _gain(region: _Region, prices: Floats) -> tuple[float, list[int]]:
    """What the best disjoint fast rings bring above the prices of their nodes, and their blocks."""
    cost = over_subsets(prices[list(region.nodes)])
    value = np.where(region.bound > 0, region.bound - cost, 0.0)
    value[0] = 0.0
    total, blocks = best_packing(value)
    # Rings of spare nodes alone: there are no more of them than such nodes.
    return total + len(region.spare) * float(region.bound[0]), blocks


def _tighten(given: Problem, region: _Region, prices: Floats) -> None:
    """Look closer at the blocks that set the region's bound, as many as are worth their time."""
    everyone = (*region.nodes, *region.spare)
    own = among(given, everyone)
    cells = sorted(region.cells, key=lambda cell: -region.cells[cell])
    costs = [cell_costs(own, cell) for cell in cells]
    while len(region.solved) < SOLVED:
        unsolved = [b for b in _gain(region, prices)[1] if b not in region.solved]
        if not unsolved:
            return
        for block in unsolved:
            members = tuple(i for i in range(len(region.nodes)) if block >> i & 1)
            ring, most = _with_spare(costs, members, region)
            if ring:
                ring = replace(ring, order=tuple(everyone[i] for i in ring.order))
            region.solved[block] = ring
            region.bound[block] = min(float(region.bound[block]), most)


def _with_spare(
    costs: list[CellCosts], members: tuple[int, ...], region: _Region
) -> tuple[Found | None, float]:
    """A good ring through these nodes and spare ones, and the rate that none exceeds."""
    spare = tuple(range(len(region.nodes), len(region.nodes) + len(region.spare)))
    floors = np.array([_whole_row_s(one, members, spare) for one in costs])
    best = _good_ring(costs, members, floors, None)
    for added in [*((one,) for one in spare), spare][: len(spare) + 1 if spare else 0]:
        best = _good_ring(costs, (*members, *added), floors, best)
    return best, (1.0 + 1e-12) / float(floors.min())


def _good_ring(
    costs: list[CellCosts], members: tuple[int, ...], floors: Floats, best: Found | None
) -> Found | None:
    """A ring through these nodes along short ways, in the cells where it may beat the best known."""
    for i in np.argsort(floors, kind="stable"):
        if best and not floors[i] < best.split.row_s:
            break
        hops = costs[i].links.hop_s[:, list(members)][:, :, list(members)].min(axis=0)
        np.fill_diagonal(hops, np.inf)
        start = int(np.argmax(hops.min(axis=0)))
        order = tuple(members[place] for place in short_path(hops, start))
        split = best_split(costs[i].ring(order))
        if split and (best is None or split.row_s < best.split.row_s):
            best = Found(costs[i].cell, order, split)
    return best


def _whole_row_s(costs: CellCosts, members: tuple[int, ...], spare: tuple[int, ...]) -> float:
    """Seconds per row that a ring through all members, and spare nodes, needs at least."""
    at = [*members, *spare]
    middle, last = (costs.stages[role].busy_s[at] for role in (Role.MIDDLE, Role.LAST))
    if not np.isfinite(middle).any() or not np.isfinite(last).any():
        return np.inf
    hops = costs.links.hop_s[:, at][:, :, at].min(axis=0)
    np.fill_diagonal(hops, np.inf)
    hop_s = hops.min(axis=1, initial=np.inf)
    hop_s = np.where(np.isfinite(hop_s), hop_s, 0.0)
    own, beside = hop_s[: len(members)], hop_s[len(members) :]
    ring_s = np.array([own.sum() - hop_s.max()])
    times = row_times(middle, last, CLOSE_TIMES)
    return float(least_row_s(costs.cell, (middle, last), times, ring_s, MEMBERS, beside)[0])


def _best_rings(region: _Region, prices: Floats) -> list[Found]:
    """The best disjoint rings of those solved, worth more than their nodes' prices."""
    value = np.zeros(len(region.bound))
    for block, ring in region.solved.items():
        if ring:
            value[block] = ring.rows_per_s
    cost = over_subsets(prices[list(region.nodes)])
    blocks = best_packing(np.where(value > 0, value - cost, 0.0))[1]
    rings: list[Found] = []
    for block in blocks:
        ring, used = region.solved[block], {node for ring in rings for node in ring.order}
        if ring and used.isdisjoint(ring.order):  # two may have taken the same spare node
            rings.append(ring)
    return rings
