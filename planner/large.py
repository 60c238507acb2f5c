"""Many pipelines on clusters too large for exact search: scan the grid, grow rings, then repair.

1. Every (cell, target seconds per row) is valued by what its nodes could carry in all.
2. For the best few, rings are grown from seeds along cheap links until they hold all layers.
3. Nodes left over form slower rings; each ring moves to the cell that suits it best.
4. Small groups of neighbouring rings and idle nodes are solved again, exactly.
"""

from dataclasses import dataclass, replace

import numpy as np

from planner.chain import best_split
from planner.cost import Bools, Cell, Floats, Ints, Role, forward_link, stage_table
from planner.exact import solve_exactly
from planner.grid import cells
from planner.network import Network, codec_options
from planner.problem import CellCosts, Problem, among, cell_costs
from planner.ring import Found

TARGETS = 40
"""Seconds per row that are tried in each cell, from its fastest stage to its slowest."""
GROWN = 8
"""Cells for which rings are really grown."""
SLOWER = (1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
"""Leftover nodes may form rings of so many times the target's seconds per row."""
GROUP_NODES = 11
"""Nodes of a group that is solved again exactly."""
GROUP_SUBSETS = 2**14
"""Subsets that all groups together may have: what bounds the time that repairs take."""


@dataclass(frozen=True, slots=True)
class _Aim:
    """A cell and a target, and the total rate that they promise."""

    cell: Cell
    row_s: float
    promise: float


def solve_large(given: Problem, start: list[Found] | None = None) -> list[Found]:
    """Disjoint rings of a high total rate; never below `start`'s, where one is given."""
    tried = cells(given.work)
    best = list(start or [])
    for aim in _aims(given, tried):
        rings = _grow_all(given, aim)
        if _rate(rings) > _rate(best):
            best = rings
    best = [_best_cell(given, tried, ring) for ring in best]
    return _regroup(given, tried, best)


def _rate(rings: list[Found]) -> float:
    return sum(ring.rows_per_s for ring in rings)


def _aims(given: Problem, tried: tuple[Cell, ...]) -> list[_Aim]:
    """The most promising target of each cell, the best cells first."""
    reach = _reach(given.net)
    best: list[_Aim] = []
    for cell in tried:
        aim = _best_target(given, cell, reach)
        if aim:
            best.append(aim)
    best.sort(key=lambda aim: -aim.promise)
    return best[:GROWN]


def _reach(net: Network) -> tuple[Floats, Floats]:
    """Each node's widest way out, and its least latency, to any other node."""
    n = len(net.latency_s)
    other = ~np.eye(n, dtype=bool)
    open_links = other & (net.bytes_per_s > 0)
    rate = np.where(open_links, net.bytes_per_s, 0.0).max(axis=1)
    return rate, np.where(open_links, net.latency_s, np.inf).min(axis=1)


def _best_target(given: Problem, cell: Cell, reach: tuple[Floats, Floats]) -> _Aim | None:
    table = stage_table(given.nodes, given.model, given.work, cell, Role.MIDDLE).busy_s
    finite = table[np.isfinite(table)]
    if not len(finite):
        return None
    out = [
        forward_link(reach[1], reach[0], codec, given.model, given.work, cell)
        for _, codec in codec_options(given.work)
    ]
    occupied = np.min([cost.occupied_s for cost in out], axis=0)
    hop = np.min([cost.hop_s for cost in out], axis=0)
    whole = np.isfinite(table[:, -1])
    aims = [
        _Aim(cell, float(t), _promise(given, cell, table, (occupied, hop, whole), float(t)))
        for t in np.geomspace(finite.min(), finite.max(), TARGETS)
    ]
    best = max(aims, key=lambda aim: aim.promise)
    return best if best.promise > 0 else None


def _promise(
    given: Problem, cell: Cell, table: Floats, links: tuple[Floats, Floats, Bools], row_s: float
) -> float:
    """Rows per second of rings at this target, if nothing were lost at their ends."""
    occupied, hop, whole = links
    layers = given.model.layers
    held = (table <= row_s).sum(axis=1)
    usable = (held > 0) & ((occupied <= row_s) | whole)
    if held[usable].sum() < layers:
        return 0.0
    rings = held[usable].sum() / layers
    stages = usable.sum() / rings
    busy = np.take_along_axis(table, np.maximum(held - 1, 0)[:, None], 1)[:, 0][usable].mean()
    life = stages * (cell.micro_batch_rows * busy + np.where(whole, 0.0, hop)[usable].mean())
    return float(rings / max(row_s, life / cell.rows))


def _grow_all(given: Problem, aim: _Aim) -> list[Found]:
    """Rings at the target, then slower ones from the nodes that are left."""
    costs = cell_costs(given, aim.cell)
    free = np.ones(len(given.nodes), dtype=bool)
    rings: list[Found] = []
    for slower in SLOWER:
        rings.extend(_grow(costs, free, aim.row_s * slower))
    return rings


def _grow(costs: CellCosts, free: Bools, row_s: float) -> list[Found]:
    """Rings within `row_s`, as many as can be grown; takes their nodes out of `free`."""
    held = {role: (t.busy_s <= row_s).sum(axis=1) for role, t in costs.stages.items()}
    hops = np.where(costs.links.occupied_s <= row_s, costs.links.hop_s, np.inf).min(axis=0)
    np.fill_diagonal(hops, np.inf)
    rings: list[Found] = []
    # Isolated and roomy nodes seed first: the others are easier to place later.
    for seed in np.argsort(-held[Role.MIDDLE], kind="stable"):
        if not free[seed] or not held[Role.MIDDLE][seed]:
            continue
        order = _grow_one(costs, free, int(seed), held, hops)
        split = best_split(costs.ring(order)) if order else None
        if order and split and split.row_s <= row_s * 1.2:
            rings.append(Found(costs.cell, order, split))
            free[list(order)] = False
    return rings


def _grow_one(
    costs: CellCosts,
    free: Bools,
    seed: int,
    held: dict[Role, Ints],
    hops: Floats,
) -> tuple[int, ...] | None:
    """From the seed along the cheapest hops until all layers are held; None where it gets stuck."""
    layers = costs.stages[Role.MIDDLE].busy_s.shape[1]
    if held[Role.FIRST | Role.LAST][seed] >= layers:
        return (seed,)
    middle, last = held[Role.MIDDLE], held[Role.LAST]
    order, left = [seed], layers - int(held[Role.FIRST][seed])
    open_nodes = free & (middle > 0)
    open_nodes[seed] = False
    while len(order) < layers:
        way = np.where(open_nodes, hops[order[-1]], np.inf)
        near = way <= way.min() * 2.0
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
    own, place = among(given, ring.order), tuple(range(len(ring.order)))
    improved = True
    while improved:
        improved = False
        for cell in _neighbours(tried, ring.cell):
            split = best_split(cell_costs(own, cell).ring(place))
            if split and split.row_s < ring.split.row_s * (1 - 1e-6):
                ring, improved = Found(cell, ring.order, split), True
    return ring


def _neighbours(tried: tuple[Cell, ...], cell: Cell) -> list[Cell]:
    """Cells one step away in each setting."""
    found: list[Cell] = []
    for name in ("micro_batch_rows", "in_flight", "draft_len"):
        line = sorted(
            (c for c in tried if replace(c, **{name: getattr(cell, name)}) == cell),
            key=lambda c: int(getattr(c, name)),
        )
        at = line.index(cell)
        found.extend(line[max(at - 1, 0) : at] + line[at + 1 : at + 2])
    return found


def _regroup(given: Problem, tried: tuple[Cell, ...], rings: list[Found]) -> list[Found]:
    """Solve small groups again exactly: each ring with what is idle or rings near it."""
    left = GROUP_SUBSETS
    for seed in range(len(rings)):
        if seed >= len(rings):
            break
        group, nodes = _group(given, rings, seed)
        if len(nodes) < 2 or len(nodes) > GROUP_NODES or left < 2 ** len(nodes):
            continue
        left -= 2 ** len(nodes)
        near = {rings[i].cell for i in group} | set(_neighbours(tried, rings[seed].cell))
        again = solve_exactly(among(given, nodes), tuple(sorted(near, key=lambda c: c.rows)))
        if _rate(again) > _rate([rings[i] for i in group]) * (1 + 1e-9):
            kept = [ring for i, ring in enumerate(rings) if i not in group]
            moved = [replace(f, order=tuple(nodes[i] for i in f.order)) for f in again]
            rings = [*moved, *kept]
    return rings


def _group(given: Problem, rings: list[Found], seed: int) -> tuple[set[int], tuple[int, ...]]:
    """A ring, then the nearest idle nodes and whole rings while the group stays small."""
    used = {node for ring in rings for node in ring.order}
    parts: list[tuple[int | None, tuple[int, ...]]] = [
        (None, (node,)) for node in range(len(given.nodes)) if node not in used
    ]
    parts.extend((i, ring.order) for i, ring in enumerate(rings) if i != seed)
    home = list(rings[seed].order)
    parts.sort(key=lambda part: float(given.net.latency_s[np.ix_(home, list(part[1]))].min()))
    group, nodes = {seed}, list(home)
    for ring_number, members in parts:
        if len(nodes) + len(members) <= GROUP_NODES:
            nodes.extend(members)
            if ring_number is not None:
                group.add(ring_number)
    return group, tuple(nodes)
