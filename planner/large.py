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
from planner.exact import EXACT_NODES, solve_exactly
from planner.grid import cells
from planner.network import Network, codec_options
from planner.problem import CellCosts, Problem, among, cell_costs
from planner.ring import Found, solve_ring

TARGETS = 40
"""Seconds per row that are tried in each cell, from its fastest stage to its slowest."""
GROWTH_WORK = 30_000
"""Growths are tried until they have visited so many nodes: many on small clusters, few on large."""
LEAST_GROWTHS = 5
NEAR = (2.0, 1.2, 8.0)
"""How much dearer than the cheapest a hop may be to be chosen for its node's room."""
SLOWER = (1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
"""Leftover nodes may form rings of so many times the target's seconds per row."""
GROUP_NODES = 12
"""Nodes of a group that is solved again exactly, in a cluster of at most SMALL nodes."""
SMALL = 24
GROUP_NODES_OF_LARGE = 8
GROUP_SUBSETS = 2**12
"""Subsets that all groups together may have: what bounds the time that repairs take."""
REPAIRS = 3
"""Times that all groups are gone through, while that helps."""


@dataclass(frozen=True, slots=True)
class _Aim:
    """A cell and a target, and the total rate that they promise."""

    cell: Cell
    row_s: float
    promise: float
    near: float


def solve_large(given: Problem, start: list[Found] | None = None) -> list[Found]:
    """Disjoint rings of a high total rate; never below `start`'s, where one is given."""
    tried = cells(given.work)
    best = max((_grown(given, tried), _with_the_rest(given, tried, start or [])), key=_rate)
    best = [_reordered(given, _best_cell(given, tried, ring)) for ring in best]
    for _ in range(REPAIRS):
        before = _rate(best)
        best = _regroup(given, tried, best)
        if _rate(best) <= before * (1 + 1e-9):
            break
    return best


def _with_the_rest(given: Problem, tried: tuple[Cell, ...], start: list[Found]) -> list[Found]:
    """The start's rings, and rings grown from the nodes that they leave."""
    used = {node for ring in start for node in ring.order}
    rest = tuple(i for i in range(len(given.nodes)) if i not in used)
    if not start or not rest:
        return start
    grown = _grown(among(given, rest), tried)
    return [*start, *(replace(f, order=tuple(rest[i] for i in f.order)) for f in grown)]


def _grown(given: Problem, tried: tuple[Cell, ...]) -> list[Found]:
    """The best rings of all growths that are tried."""
    best: list[Found] = []
    growths = max(LEAST_GROWTHS, GROWTH_WORK // len(given.nodes) ** 2)
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
    targets = np.geomspace(finite.min(), finite.max(), TARGETS)
    promises = [_promise(given, cell, table, links, float(t)) for t in targets]
    best = int(np.argmax(promises))
    return [
        _Aim(cell, float(targets[i]), promises[i], near)
        for i in range(max(best - 2, 0), min(best + 4, TARGETS))
        for near in NEAR
        if promises[i] > 0
    ]


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
    rings: list[Found] = []
    # Isolated and roomy nodes seed first: the others are easier to place later.
    for seed in np.argsort(-held[Role.MIDDLE], kind="stable"):
        if not free[seed] or not held[Role.MIDDLE][seed]:
            continue
        order = _grow_one(costs, free, int(seed), held, (hops, near))
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
    own, place = among(given, ring.order), tuple(range(len(ring.order)))
    improved = True
    while improved:
        improved = False
        for cell in _neighbours(tried, ring.cell):
            split = best_split(cell_costs(own, cell).ring(place))
            if split and split.row_s < ring.split.row_s * (1 - 1e-6):
                ring, improved = Found(cell, ring.order, split), True
    return ring


def _reordered(given: Problem, ring: Found) -> Found:
    """The ring in the best order of its nodes, where they are few enough to know it."""
    if not 2 < len(ring.order) <= EXACT_NODES:
        return ring
    own, place = among(given, ring.order), tuple(range(len(ring.order)))
    found = solve_ring(cell_costs(own, ring.cell), place, 0.0, ring.split.row_s)
    return replace(found, order=tuple(ring.order[i] for i in found.order)) if found else ring


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
    left, most = GROUP_SUBSETS, _most_in_group(given)
    for seed in range(len(rings)):
        if seed >= len(rings):
            break
        group, nodes = _group(given, rings, seed)
        if len(nodes) < 2 or len(nodes) > most or left < 2 ** len(nodes):
            continue
        left -= 2 ** len(nodes)
        again = solve_exactly(among(given, nodes), _cells_for(given, tried, rings, group))
        if _rate(again) > _rate([rings[i] for i in group]) * (1 + 1e-9):
            kept = [ring for i, ring in enumerate(rings) if i not in group]
            moved = [replace(f, order=tuple(nodes[i] for i in f.order)) for f in again]
            rings = [*moved, *kept]
    return rings


def _cells_for(
    given: Problem, tried: tuple[Cell, ...], rings: list[Found], group: set[int]
) -> tuple[Cell, ...]:
    """Cells in which a group is solved again: in large clusters its rings' own and those beside."""
    if len(given.nodes) <= SMALL:
        return tried
    near = {rings[i].cell for i in group}
    near.update(cell for i in group for cell in _neighbours(tried, rings[i].cell))
    return tuple(sorted(near, key=lambda c: c.rows))


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
        if len(nodes) + len(members) <= _most_in_group(given):
            nodes.extend(members)
            if ring_number is not None:
                group.add(ring_number)
    return group, tuple(nodes)


def _most_in_group(given: Problem) -> int:
    return GROUP_NODES if len(given.nodes) <= SMALL else GROUP_NODES_OF_LARGE
