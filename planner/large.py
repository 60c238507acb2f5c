"""Many pipelines on clusters too large for exact search: scan the grid, grow rings, then repair.

1. Every (cell, target seconds per row) is valued by what its nodes could carry in all.
2. For the best few, rings are grown from seeds along cheap links until they hold all layers.
3. Nodes left over form slower rings; each ring moves to the cell that suits it best.
4. Small groups of neighbouring rings and idle nodes are solved again, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.chain import Split, best_split, split_within
from planner.cost import Bools, Cell, Floats, Ints, Role, forward_link, stage_table
from planner.exact import EXACT_NODES, solve_exactly
from planner.grid import cells, near_cells, neighbours
from planner.network import Network, codec_options
from planner.orders import groups_of
from planner.problem import CellCosts, Found, Problem, again, among, cell_costs
from planner.ring import solve_ring
from planner.subset_bounds import at_most_held, held_within

TARGETS = 40
"""Seconds per row that are tried in each cell, from its fastest stage to its slowest."""
GROWTH_WORK = 30_000
"""Growths are tried until they have visited so many nodes: many on small clusters, few on large."""
LEAST_GROWTHS, MOST_GROWTHS = 5, 60
NEAR = (2.0, 1.2, 8.0)
"""How much dearer than the cheapest a hop may be to be chosen for its node's room."""
SLOWER = (1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
"""Leftover nodes may form rings of so many times the target's seconds per row."""
REPAIRS = 3
"""Times that all groups are gone through, while that helps."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much time the search may take."""

    fills: int
    """Times that rings are grown from the nodes that others leave."""
    group_nodes: int
    """Of a group that is solved again exactly."""
    cell_steps: int
    """In the cells within so many steps of its rings' own."""
    subsets: int
    """That all groups together may have, each time they are gone through."""


THOROUGH = Effort(fills=9, group_nodes=12, cell_steps=99, subsets=2**12)
STEADY = Effort(fills=9, group_nodes=12, cell_steps=2, subsets=2**14)
HASTY = Effort(fills=1, group_nodes=8, cell_steps=1, subsets=2**12)
EFFORTS = {24: THOROUGH, 300: STEADY}
"""By the most nodes; HASTY beyond."""


@dataclass(frozen=True, slots=True)
class _Aim:
    """A cell and a target, and the total rate that they promise."""

    cell: Cell
    row_s: float
    promise: float
    near: float


def solve_large(
    given: Problem, start: Sequence[Found] = (), effort: Effort | None = None
) -> list[Found]:
    """Disjoint rings of a high total rate; never below `start`'s, where one is given."""
    tried, nodes = cells(given.work), len(given.nodes)
    effort = effort or next((e for most, e in EFFORTS.items() if nodes <= most), HASTY)
    starts = [[], list(start)] if start else [[]]
    filled = [_filled(given, tried, rings, effort.fills) for rings in starts]
    best = [_reordered(given, _best_cell(given, tried, ring)) for ring in max(filled, key=_rate)]
    done: set[object] = set()
    for _ in range(REPAIRS):
        before = _rate(best)
        best = _regroup(given, tried, best, effort, done)
        if _rate(best) <= before * (1 + 1e-9):
            break
    return best


def _filled(given: Problem, tried: tuple[Cell, ...], rings: list[Found], times: int) -> list[Found]:
    """These rings, and rings grown from the nodes that they leave, again and again."""
    for _ in range(times):
        rest = _idle(given, rings)
        grown = _grown(among(given, rest), tried) if rest else []
        if not grown:
            break
        rings = [*rings, *(replace(f, order=tuple(rest[i] for i in f.order)) for f in grown)]
    return rings


def _idle(given: Problem, rings: list[Found]) -> tuple[int, ...]:
    used = {node for ring in rings for node in ring.order}
    return tuple(i for i in range(len(given.nodes)) if i not in used)


def _grown(given: Problem, tried: tuple[Cell, ...]) -> list[Found]:
    """The best rings of all growths that are tried."""
    best: list[Found] = []
    growths = int(np.clip(GROWTH_WORK // len(given.nodes) ** 2, LEAST_GROWTHS, MOST_GROWTHS))
    known: dict[Cell, CellCosts] = {}
    for aim in _aims(given, tried)[:growths]:
        if aim.cell not in known:
            # Costs of large clusters are large: only the last cell's are kept there.
            known = (
                {**known, aim.cell: cell_costs(given, aim.cell)}
                if growths > 50
                else {aim.cell: cell_costs(given, aim.cell)}
            )
        rings = _grow_all(known[aim.cell], aim)
        if _rate(rings) > _rate(best):
            best = rings
    return best


def _rate(rings: list[Found]) -> float:
    return sum(ring.rows_per_s for ring in rings)


def _aims(given: Problem, tried: tuple[Cell, ...]) -> list[_Aim]:
    """Targets of all cells and ways to choose neighbours, the most promising first."""
    reach = _reach(given.net)
    aims = [aim for cell in tried for aim in _targets(given, cell, reach)]
    aims.sort(key=lambda aim: -aim.promise)
    return aims


def _reach(net: Network) -> tuple[Floats, Floats]:
    """Each node's widest way out, and its least latency, to any other node."""
    n = len(net.latency_s)
    other = ~np.eye(n, dtype=bool)
    open_links = other & (net.bytes_per_s > 0)
    rate = np.where(open_links, net.bytes_per_s, 0.0).max(axis=1)
    return rate, np.where(open_links, net.latency_s, np.inf).min(axis=1)


def _targets(given: Problem, cell: Cell, reach: tuple[Floats, Floats]) -> list[_Aim]:
    """A cell's best target, and those beside it."""
    table = stage_table(given.nodes, given.model, given.work, cell, Role.MIDDLE).busy_s
    finite = table[np.isfinite(table)]
    if not len(finite):
        return []
    out = [
        forward_link(reach[1], reach[0], codec, given.model, given.work, cell)
        for _, codec in codec_options(given.work)
    ]
    occupied = np.min([cost.occupied_s for cost in out], axis=0)
    hop = np.min([cost.hop_s for cost in out], axis=0)
    links = (occupied, hop, np.isfinite(table[:, -1]))
    table = table[:, np.isfinite(table).any(axis=0)]
    targets = np.geomspace(finite.min(), finite.max(), TARGETS)
    promises = _promises(given, cell, table, links, targets)
    best = int(np.argmax(promises))
    return [
        _Aim(cell, float(targets[i]), float(promises[i]), near)
        for i in range(max(best - 2, 0), min(best + 4, TARGETS))
        for near in NEAR
        if promises[i] > 0
    ]


def _promises(
    given: Problem, cell: Cell, table: Floats, links: tuple[Floats, Floats, Bools], targets: Floats
) -> Floats:
    """Rows per second of rings at these targets, if nothing were lost at their ends."""
    occupied, hop, whole = links
    held = held_within(table, targets)
    usable = (held > 0) & ((occupied[None, :] <= targets[:, None]) | whole)
    nodes = np.maximum(usable.sum(axis=1), 1)
    rings = np.where(usable, held, 0.0).sum(axis=1) / given.model.layers
    busy = np.where(usable, at_most_held(table, held), 0.0).sum(axis=1) / nodes
    hops = np.where(usable & ~whole, hop, 0.0).sum(axis=1) / nodes
    life = nodes / np.maximum(rings, 1.0) * (cell.micro_batch_rows * busy + hops)
    return np.where(rings >= 1.0, rings / np.maximum(targets, life / cell.rows), 0.0)


def _grow_all(costs: CellCosts, aim: _Aim) -> list[Found]:
    """Rings at the target, then slower ones from the nodes that are left."""
    free = np.ones(costs.links.return_hop_s.shape[0], dtype=bool)
    rings: list[Found] = []
    for slower in SLOWER:
        rings.extend(_grow(costs, free, aim.row_s * slower, aim.near))
    return rings


def _grow(costs: CellCosts, free: Bools, row_s: float, near: float) -> list[Found]:
    """Rings within `row_s`, as many as can be grown; takes their nodes out of `free`."""
    held = {role: (t.busy_s <= row_s).sum(axis=1) for role, t in costs.stages.items()}
    hops = np.where(costs.links.occupied_s <= row_s, costs.links.hop_s, np.inf).min(axis=0)
    np.fill_diagonal(hops, np.inf)
    room = _Room(held[Role.MIDDLE], free, np.isfinite(hops) | np.isfinite(hops.T))
    rings: list[Found] = []
    # Isolated and roomy nodes seed first: the others are easier to place later.
    for seed in np.argsort(-held[Role.MIDDLE], kind="stable"):
        if not free[seed] or room.left(seed) < costs.stages[Role.MIDDLE].busy_s.shape[1]:
            continue
        order = _grow_one(costs, free, int(seed), held, (hops, near))
        split = _split(costs, order, row_s * 1.2) if order else None
        if order and split:
            rings.append(Found(costs.cell, order, split))
            free[list(order)] = False
            room.take(order)
    return rings


def _split(costs: CellCosts, order: tuple[int, ...], most_s: float) -> Split | None:
    """The best split of a ring; None where it takes longer, which one look at that time tells."""
    ring = costs.ring(order)
    within = split_within(ring, most_s)
    return best_split(ring) if within and within.row_s <= most_s else None


class _Room:
    """Layers that free nodes hold, by who can reach whom; mutable, of one growth."""

    def __init__(self, held: Ints, free: Bools, joined: Bools) -> None:
        self._held = np.where(free, held, 0)
        self._group = np.zeros(len(held), np.int64)
        for number, nodes in enumerate(groups_of(joined)):
            self._group[list(nodes)] = number
        self._room = np.bincount(self._group, weights=self._held)

    def left(self, node: int) -> float:
        """Layers that all free nodes hold in this node's group."""
        return float(self._room[self._group[node]])

    def take(self, order: tuple[int, ...]) -> None:
        """Count these nodes no more."""
        self._room[self._group[order[0]]] -= self._held[list(order)].sum()


def _grow_one(
    costs: CellCosts,
    free: Bools,
    seed: int,
    held: dict[Role, Ints],
    choice: tuple[Floats, float],
) -> tuple[int, ...] | None:
    """From the seed along the cheapest hops until all layers are held; None where it gets stuck."""
    layers = costs.stages[Role.MIDDLE].busy_s.shape[1]
    if held[Role.FIRST | Role.LAST][seed] >= layers:
        return (seed,)
    hops, dearer = choice
    middle, last = held[Role.MIDDLE], held[Role.LAST]
    order, left = [seed], layers - int(held[Role.FIRST][seed])
    open_nodes = free & (middle > 0)
    open_nodes[seed] = False
    while len(order) < layers:
        way = np.where(open_nodes, hops[order[-1]], np.inf)
        near = way <= way.min() * dearer
        if not np.isfinite(way.min()):
            return None
        closing = np.nonzero(near & (last >= left))[0]
        if len(closing):
            # The smallest that completes the ring leaves the roomy ones to others.
            return (*order, int(closing[last[closing].argmin()]))
        candidates = np.nonzero(near)[0]
        chosen = int(candidates[middle[candidates].argmax()])
        order.append(chosen)
        open_nodes[chosen] = False
        left = max(left - int(middle[chosen]), 1)
    return None


def _best_cell(given: Problem, tried: tuple[Cell, ...], ring: Found) -> Found:
    """The ring with the micro-batch and in-flight steps that suit it best, by hill climbing."""
    improved = True
    while improved:
        improved = False
        for cell in neighbours(tried, ring.cell):
            other = again(given, ring, cell)
            if other and other.split.row_s < ring.split.row_s * (1 - 1e-6):
                ring, improved = other, True
    return ring


def _reordered(given: Problem, ring: Found) -> Found:
    """The ring in the best order of its nodes, where they are few enough to know it."""
    if not 2 < len(ring.order) <= EXACT_NODES or ring.dealt:
        return ring
    own, place = among(given, ring.order), tuple(range(len(ring.order)))
    found = solve_ring(cell_costs(own, ring.cell), place, 0.0, ring.split.row_s)
    return replace(found, order=tuple(ring.order[i] for i in found.order)) if found else ring


def _regroup(
    given: Problem, tried: tuple[Cell, ...], rings: list[Found], effort: Effort, done: set[object]
) -> list[Found]:
    """Solve small groups again exactly: each ring with what is idle or rings near it.

    `done` has the groups that were solved, and is added to: once is enough.
    """
    left = effort.subsets
    for seed in range(len(rings)):
        if seed >= len(rings):
            break
        group, nodes = _group(given, rings, seed, effort.group_nodes)
        if not 2 <= len(nodes) <= effort.group_nodes or left < 2 ** len(nodes):
            continue
        some = near_cells(tried, {rings[i].cell for i in group}, effort.cell_steps)
        if (question := (frozenset(nodes), some)) in done:
            continue
        done.add(question)
        left -= 2 ** len(nodes)
        again = solve_exactly(among(given, nodes), some)
        if _rate(again) > _rate([rings[i] for i in group]) * (1 + 1e-9):
            kept = [ring for i, ring in enumerate(rings) if i not in group]
            moved = [replace(f, order=tuple(nodes[i] for i in f.order)) for f in again]
            rings = [*moved, *kept]
    return rings


def _group(
    given: Problem, rings: list[Found], seed: int, most: int
) -> tuple[set[int], tuple[int, ...]]:
    """A ring, then the nearest idle nodes and whole rings while the group stays small."""
    parts: list[tuple[int | None, tuple[int, ...]]] = [
        (None, (node,)) for node in _idle(given, rings)
    ]
    parts.extend((i, ring.order) for i, ring in enumerate(rings) if i != seed)
    home = list(rings[seed].order)
    parts.sort(key=lambda part: float(given.net.latency_s[np.ix_(home, list(part[1]))].min()))
    group, nodes = {seed}, list(home)
    for ring_number, members in parts:
        if len(nodes) + len(members) <= most:
            nodes.extend(members)
            if ring_number is not None:
                group.add(ring_number)
    return group, tuple(nodes)
