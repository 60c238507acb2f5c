"""Rings with replicas on more nodes than can be searched exactly: from a plan without, move by move.

Small groups of rings and idle nodes are solved exactly. In larger rings a spare node joins a stage, a
weak ring's nodes join those of a stronger one, neighbouring stages become one of replicas, or a replica
becomes a stage; slots are dealt by speed and dealt again by parts, and layers are split anew. Whatever
is not faster in all is not done, so the end is never slower than the start; how far it is from the best
of all plans with replicas, only a bound tells.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from planner.chain import best_split, split_within
from planner.cost import Cell
from planner.exact import solve_exactly
from planner.grid import near_cells
from planner.problem import Found, Problem, among, roles
from planner.replica_exact import DEAL_PARTS, REPLICA_NODES, Groups, ReplicaCosts
from planner.replicas import Dealt, dealt_ring, in_runs, in_turn, shared, stages_of

SPARE_NODES = 6
"""Nodes nearest to a ring, idle or of weaker rings, that may join it."""
LARGE_RING = 12
"""Rings of more nodes are left as they are."""
TRIALS, FEWER_TRIALS = 12_000, 4_000
"""Rings that are costed, in all, on few nodes and on more; each takes a fraction of a millisecond."""
FEW_NODES = 24
GROUPS = 24
"""Small groups that are solved exactly, in all."""
MOVES = 6
"""Moves in a row, and the rings that go on after each."""
WIDTH = 10
CELL_STEPS = 2
"""Cells so many steps from a ring's own are tried for it."""
GAIN = 1e-6
"""What a move must gain at least, as a fraction."""


@dataclass(slots=True)
class _Budget:
    """What the search may still try; counted down."""

    trials: int
    groups: int


def with_replicas(given: Problem, tried: tuple[Cell, ...], rings: Sequence[Found]) -> list[Found]:
    """Disjoint rings, with replicas where that was found to be faster; never slower than `rings`."""
    trials = TRIALS if len(given.nodes) <= FEW_NODES else FEWER_TRIALS
    best, budget = list(rings), _Budget(trials, GROUPS)
    changed = True
    while changed and budget.trials > 0:
        changed = False
        for ring in sorted(best, key=lambda ring: -ring.rows_per_s):
            if ring not in best or budget.trials <= 0:
                continue
            other = _regrouped(given, tried, best, ring, budget) or _moved(
                given, tried, best, ring, budget
            )
            if other:
                best, changed = other, True
    return best


def _rate(rings: Sequence[Found]) -> float:
    return sum(ring.rows_per_s for ring in rings)


def _nearest(given: Problem, rings: list[Found], ring: Found) -> list[tuple[Found | None, int]]:
    """Nodes that may join a ring, nearest first, and the weaker ring that each would leave."""
    used = {node for other in rings for node in other.order}
    spare: list[tuple[Found | None, int]] = [
        (None, node) for node in range(len(given.nodes)) if node not in used
    ]
    weaker = (r for r in rings if r is not ring and r.rows_per_s < ring.rows_per_s)
    spare.extend((other, node) for other in weaker if len(other.order) < 3 for node in other.order)
    latency = given.net.latency_s[list(ring.order)].min(axis=0)
    spare.sort(key=lambda each: (float(latency[each[1]]), each[1]))
    return spare[:SPARE_NODES]


def _regrouped(
    given: Problem, tried: tuple[Cell, ...], rings: list[Found], ring: Found, budget: _Budget
) -> list[Found] | None:
    """The rings with a small one, and some who are near it, solved exactly; None if no faster."""
    room = REPLICA_NODES - len(ring.order)
    spare = _nearest(given, rings, ring) if room >= 0 else []
    for joining in combinations(spare, min(room, len(spare))) if room >= 0 else ():
        parts = [ring, *{id(other): other for other, _ in joining if other}.values()]
        nodes = [*ring.order, *(node for _, node in joining)]
        if budget.groups <= 0 or not 2 < len(nodes) <= REPLICA_NODES:
            return None
        budget.groups -= 1
        some = near_cells(tried, {part.cell for part in parts}, CELL_STEPS)
        found = solve_exactly(among(given, tuple(nodes)), some, replicate=True)
        if _rate(found) > _rate(parts) * (1 + GAIN):
            moved = [replace(f, order=tuple(nodes[i] for i in f.order)) for f in found]
            return [*(r for r in rings if r not in parts), *moved]
    return None


@dataclass(slots=True)
class _Bench:
    """One ring and the nodes that may join it, in numbers of their own; mutable as it remembers."""

    costs: ReplicaCosts
    tried: tuple[Cell, ...]
    lost: tuple[float, ...]
    """By node: rows per second that are lost with the ring that it would leave."""
    leaves: tuple[int, ...]
    """By node: which ring that is; nodes of one leave together."""
    budget: _Budget
    seen: set[Groups] = field(default_factory=set)

    def worth(self, ring: Found) -> float:
        """Rows per second, less those of the rings that must be given up for it."""
        given_up = {self.leaves[node]: self.lost[node] for node in ring.order}
        return ring.rows_per_s - sum(given_up.values())


def _moved(
    given: Problem, tried: tuple[Cell, ...], rings: list[Found], ring: Found, budget: _Budget
) -> list[Found] | None:
    """The rings with a few moves of one of them; None if none were found that gain."""
    if len(ring.order) > LARGE_RING:
        return None
    spare = _nearest(given, rings, ring)
    nodes = (*ring.order, *(node for _, node in spare))
    from_rings = [None] * len(ring.order) + [other for other, _ in spare]
    bench = _Bench(
        ReplicaCosts(among(given, nodes)),
        tried,
        tuple(other.rows_per_s if other else 0.0 for other in from_rings),
        tuple(rings.index(other) if other else -1 for other in from_rings),
        budget,
    )
    best = _best_moves(bench, replace(ring, order=tuple(range(len(ring.order)))))
    if bench.worth(best) <= ring.rows_per_s * (1 + GAIN):
        return None
    leaving = {bench.leaves[node] for node in best.order}
    moved = replace(best, order=tuple(nodes[i] for i in best.order))
    kept = [r for i, r in enumerate(rings) if i not in leaving and r is not ring]
    return [moved, *kept]


def _best_moves(bench: _Bench, ring: Found) -> Found:
    """The best ring within some moves: after each the best few go on, slower ones too."""
    best, few = ring, [ring]
    for _ in range(MOVES):
        shapes = {shape: each.cell for each in few for shape in _shapes(bench, each)}
        fresh = [(shape, cell) for shape, cell in shapes.items() if shape not in bench.seen]
        bench.seen.update(shapes)
        found = [r for shape, cell in fresh if (r := _in_cell(bench, cell, shape))]
        found.sort(key=bench.worth, reverse=True)
        few = [_dealt_again(bench, _best_cell(bench, each)) for each in found[:WIDTH]]
        if not few or bench.budget.trials <= 0:
            break
        best = max([best, *few], key=bench.worth)
    return best


def _shapes(bench: _Bench, ring: Found) -> Iterator[Groups]:
    """Stages after one move: a node comes, leaves or changes its stage, or two stages swap places."""
    groups = tuple(
        tuple(ring.order[i] for i in stage) for stage in stages_of(len(ring.order), ring.dealt)
    )
    spare = [node for node in range(len(bench.lost)) if node not in ring.order]
    for node in spare:
        yield from _with_node(groups, node)
    for i, group in enumerate(groups):
        if i + 1 < len(groups):
            yield (*groups[:i], groups[i + 1], group, *groups[i + 2 :])
        for node in group:
            rest = tuple(other for other in group if other != node)
            without = (*groups[:i], *((rest,) if rest else ()), *groups[i + 1 :])
            yield without
            yield from _with_node(without, node)


def _with_node(groups: Groups, node: int) -> Iterator[Groups]:
    """A node as a replica in each stage, and as a stage of its own at each place."""
    for i, group in enumerate(groups):
        yield (*groups[:i], tuple(sorted((*group, node))), *groups[i + 1 :])
    for i in range(len(groups) + 1):
        yield (*groups[:i], (node,), *groups[i:])


def _in_cell(bench: _Bench, cell: Cell, groups: Groups) -> Found | None:
    """The ring of these stages in a cell, slots dealt by speed; None if it cannot run."""
    alone = len(groups) < 2 and len(groups[0]) > 1 if groups else True  # rings of one node each
    if alone or len(groups) > bench.costs.given.model.layers:
        return None
    if max(map(len, groups)) > cell.in_flight or bench.budget.trials <= 0:
        return None
    found = [_ring(bench, cell, groups, dealt) for dealt in _by_speed(bench.costs, cell, groups)]
    return max((each for each in found if each), key=bench.worth, default=None)


def _best_cell(bench: _Bench, ring: Found) -> Found:
    """The ring in the best of the cells near its own."""
    groups = tuple(
        tuple(ring.order[i] for i in stage) for stage in stages_of(len(ring.order), ring.dealt)
    )
    near = near_cells(bench.tried, {ring.cell}, CELL_STEPS)
    found = [_in_cell(bench, cell, groups) for cell in near]
    return max([ring, *(each for each in found if each)], key=bench.worth)


def _by_speed(costs: ReplicaCosts, cell: Cell, groups: Groups) -> Iterator[Dealt]:
    """Slots dealt to each stage's nodes by their speed: in runs, and every other stage in turn."""
    counts = []
    layers = costs.given.model.layers
    for group, role in zip(groups, roles(len(groups)), strict=True):
        own = costs.busy_s(cell, role, max(cell.in_flight // len(group), 1))[list(group)]
        held = np.isfinite(own).all(axis=0).sum()
        if not held:
            return
        at = min(max(layers // len(groups), 1), int(held)) - 1
        counts.append(shared(cell.in_flight, [1.0 / float(row[at]) for row in own]))
    replicated = [i for i, group in enumerate(groups) if len(group) > 1]
    yield tuple(slots for each in counts for slots in in_runs(each))
    if len(replicated) > 1:
        turned = set(replicated[1::2])
        deals = [(in_turn if i in turned else in_runs)(each) for i, each in enumerate(counts)]
        yield tuple(slots for deal in deals for slots in deal)


def _ring(
    bench: _Bench, cell: Cell, groups: Groups, dealt: Dealt, beat_s: float = np.inf
) -> Found | None:
    """The ring of these stages and slots, if it can run and takes less than `beat_s`."""
    bench.budget.trials -= 1
    order = [node for group in groups for node in group]
    role = [r for group, r in zip(groups, roles(len(groups)), strict=True) for _ in group]
    busy = np.stack([
        bench.costs.busy_s(cell, r, len(slots))[node]
        for node, r, slots in zip(order, role, dealt, strict=True)
    ])  # fmt: skip
    links, ports = bench.costs.links(cell)
    ring = dealt_ring(cell, busy, links.among(order), ports.among(order), dealt)
    if np.isfinite(beat_s):
        within = split_within(ring, beat_s)
        if within is None or within.row_s >= beat_s:
            return None
    split = best_split(ring)
    replicated = any(len(group) > 1 for group in groups)
    return Found(cell, tuple(order), split, dealt if replicated else ()) if split else None


def _dealt_again(bench: _Bench, ring: Found) -> Found:
    """The ring with parts of its slots moved between replicas as long as that helps."""
    part = max(ring.cell.in_flight // DEAL_PARTS, 1)
    places = stages_of(len(ring.order), ring.dealt)
    groups = tuple(tuple(ring.order[i] for i in stage) for stage in places)
    moves = [(s, a, b) for s in places for a in s for b in s if a != b]
    improved = bool(moves)
    while improved and bench.budget.trials > 0:
        improved = False
        for stage, a, b in moves:
            counts = [len(ring.dealt[i]) for i in stage]
            counts[stage.index(a)] -= part
            counts[stage.index(b)] += part
            for deal in (in_runs, in_turn) if min(counts) > 0 else ():
                dealt = list(ring.dealt)
                dealt[stage[0] : stage[-1] + 1] = deal(counts)
                found = _ring(bench, ring.cell, groups, tuple(dealt), ring.split.row_s / (1 + GAIN))
                if found:
                    ring, improved = found, True
                    counts = [len(ring.dealt[i]) for i in stage]
    return ring
