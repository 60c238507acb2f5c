"""The fastest ring with replicas through few nodes, exactly over the ways to deal slots in DEAL_PARTS.

A ring is an ordered partition of its nodes into stages; the replicas of a stage get their slots in runs
or in turn, in any order, by whole parts; the links of one hop share a codec. For a time per row T a
partition is out of the question unless its stages, each replica with as many slots as it computes within
T, hold all layers; of what is left, every dealing is asked whether it beats the best ring so far, by one
split at that ring's time per row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations, pairwise, permutations

import numpy as np

from planner.bounds import capped_compute_bound, floor_of
from planner.chain import Ring, best_split, split_within
from planner.cost import Bools, Cell, Floats, Ints, Role, stage_table
from planner.network import NetworkCost, PortCost, network_cost, port_cost
from planner.problem import Found, Problem, roles
from planner.replicas import Dealt, in_runs, in_turn

REPLICA_NODES = 5
"""Up to so many nodes the search for rings with replicas is exact."""
DEAL_PARTS, FEWER_PARTS = 8, 4
"""A ring's slots are dealt in so many parts, as equal as whole slots come: in fewer where several of its
stages have replicas."""
SLOWEST_S = 1e30
"""Seconds per row that no ring takes."""
Groups = tuple[tuple[int, ...], ...]
"""The nodes of each stage, in ring order."""


@dataclass(slots=True)
class ReplicaCosts:
    """What nodes and links cost in the cells of one problem; mutable as it remembers."""

    given: Problem
    _rows: dict[tuple[Cell, Role], Floats] = field(default_factory=dict)
    _links: dict[tuple[int, int], tuple[NetworkCost, PortCost]] = field(default_factory=dict)
    _bounds: dict[tuple[int, int], float] = field(default_factory=dict)

    def busy_s(self, cell: Cell, role: Role, slots: int) -> Floats:
        """Seconds per row of all nodes that compute so many of the slots; (nodes, layers)."""
        own, given = replace(cell, in_flight=slots), self.given
        if (own, role) not in self._rows:
            table = stage_table(given.nodes, given.model, given.work, own, role)
            self._rows[own, role] = table.busy_s
        return self._rows[own, role]

    def links(self, cell: Cell) -> tuple[NetworkCost, PortCost]:
        """What all links and ports cost."""
        given, key = self.given, (cell.micro_batch_rows, cell.draft_len)
        if key not in self._links:
            net = network_cost(given.net, given.model, given.work, cell)
            self._links[key] = net, port_cost(given.nodes, given.model, given.work, cell)
        return self._links[key]

    def bound(self, cell: Cell) -> float:
        """Rows per second that no ring of all these nodes exceeds in a cell, whoever has which slots.

        The compute bound of the same micro-batches with one in flight: nobody holds less KV.
        """
        given, key = self.given, (cell.micro_batch_rows, cell.draft_len)
        if key not in self._bounds:
            one = replace(cell, in_flight=1)
            floor = floor_of(given.nodes, given.model, given.work, one)
            fits = bool(np.isfinite(floor.middle_s).any())
            self._bounds[key] = capped_compute_bound(floor) * (1 + 1e-9) if fits else 0.0
        return self._bounds[key]


def best_replicated(
    costs: ReplicaCosts, tried: Sequence[Cell], beat_s: float = np.inf
) -> Found | None:
    """The ring through all nodes, some of them replicas, of least seconds per row below `beat_s`."""
    best: Found | None = None
    beat_s = min(beat_s, SLOWEST_S)  # what does not fit takes for ever, and so is no answer
    for cell in sorted(tried, key=lambda cell: -costs.bound(cell)):
        if costs.bound(cell) * beat_s <= 1.0:
            break
        for groups in _partitions_worth_trying(costs, cell, beat_s):
            found = _best_dealt(costs, cell, groups, beat_s)
            if found:
                best, beat_s = found, found.split.row_s
    return best


def slot_counts(in_flight: int, replicas: int, parts: int = DEAL_PARTS) -> list[tuple[int, ...]]:
    """How many slots each of some replicas may have."""
    ends = sorted({round(part * in_flight / parts) for part in range(1, parts)})
    ends = [end for end in ends if 0 < end < in_flight]
    return [
        tuple(b - a for a, b in pairwise((0, *cuts, in_flight)))
        for cuts in combinations(ends, replicas - 1)
    ]


def dealings(in_flight: int, replicas: int) -> list[Dealt]:
    """All ways to deal a stage's slots beside another stage of replicas: by whole parts, in runs and
    in turn, in any order."""
    found: dict[Dealt, None] = {}
    for counts in slot_counts(in_flight, replicas, FEWER_PARTS):
        for order in permutations(range(replicas)):
            for dealt in (in_runs(counts), in_turn(counts)):
                found[tuple(dealt[order.index(who)] for who in range(replicas))] = None
    return list(found)


@lru_cache(maxsize=16)
def _partitions(nodes: int) -> dict[int, list[Groups]]:
    """Ordered partitions of the nodes into fewer stages than nodes and at least two, by stages."""
    found: dict[int, list[Groups]] = {}
    for groups in _ordered(tuple(range(nodes))):
        if 1 < len(groups) < nodes:
            found.setdefault(len(groups), []).append(groups)
    return found


def _ordered(nodes: tuple[int, ...]) -> Iterator[Groups]:
    if not nodes:
        yield ()
    for size in range(1, len(nodes) + 1):
        for first in combinations(nodes, size):
            rest = tuple(node for node in nodes if node not in first)
            yield from ((first, *others) for others in _ordered(rest))


def _partitions_worth_trying(costs: ReplicaCosts, cell: Cell, longest_s: float) -> list[Groups]:
    """Those whose stages, slots dealt as suits each alone, hold all layers, and whose hops are short
    enough; the roomiest first."""
    nodes, layers = len(costs.given.nodes), costs.given.model.layers
    used = (Role.FIRST, Role.MIDDLE, Role.LAST)
    held = {role: _held_by_groups(costs, cell, role, longest_s) for role in used}
    layer_s = _least_layer_s(costs, cell)
    hops = _least_hops(costs, cell, longest_s)
    found: list[tuple[int, Groups]] = []
    for stages, every in _partitions(nodes).items():
        masks = np.array([[sum(1 << node for node in group) for group in p] for p in every])
        by_stage = [held[role][masks[:, i]] for i, role in enumerate(roles(stages))]
        room = np.sum(by_stage, axis=0)
        fits = (np.min(by_stage, axis=0) > 0) & (room >= layers) & (stages <= layers)
        computed_s = _least_fill_s(layer_s[masks], np.stack(by_stage, axis=1), layers)
        links_s = sum(hops[0][masks[:, i], masks[:, i + 1]] for i in range(stages - 1))
        life_s = cell.micro_batch_rows * computed_s + links_s + hops[1][masks[:, -1], masks[:, 0]]
        fits &= life_s < longest_s * cell.rows
        found.extend((int(room[i]), every[i]) for i in np.nonzero(fits)[0])
    found.sort(key=lambda each: -each[0])
    return [groups for _, groups in found]


def _least_layer_s(costs: ReplicaCosts, cell: Cell) -> Floats:
    """Seconds per row of a layer on the fastest node of each group, at least."""
    busy = costs.busy_s(cell, Role.MIDDLE, 1)
    each = (busy / np.arange(1.0, busy.shape[1] + 1.0)).min(axis=1)
    least = np.full(1 << len(each), np.inf)
    for node, seconds in enumerate(each):
        least[1 << node : 2 << node] = np.minimum(least[: 1 << node], seconds)
    return least


def _least_hops(costs: ReplicaCosts, cell: Cell, longest_s: float) -> tuple[Floats, Floats]:
    """(forward, return) seconds of a row between groups at least; infinite where all of the links
    between them, each as busy as it may be, do not carry every row in time."""
    links, _ = costs.links(cell)
    found = []
    for occupied, hop in (
        (links.occupied_s.min(axis=0), links.hop_s.min(axis=0)),
        (links.return_occupied_s, links.return_hop_s),
    ):
        with np.errstate(divide="ignore"):
            carried, shortest = _between(1.0 / occupied, np.add), _between(hop, np.minimum)
        found.append(np.where(carried * longest_s >= 1 - 1e-9, shortest, np.inf))
    return found[0], found[1]


def _between(values: Floats, join: np.ufunc) -> Floats:
    """Values of pairs of nodes joined over all pairs of two groups; shape (2^n, 2^n)."""
    empty = 0.0 if join is np.add else np.inf
    for axis in (0, 1):
        values = np.moveaxis(values, axis, 0)
        n = len(values)
        joined = np.full((1 << n, *values.shape[1:]), empty)
        for node in range(n):
            joined[1 << node : 2 << node] = join(joined[: 1 << node], values[node])
        values = np.moveaxis(joined, 0, axis)
    return values


def _least_fill_s(layer_s: Floats, held: Ints, layers: int) -> Floats:
    """Seconds of all layers at least, the fastest stages filled first; of rings as (rings, stages)."""
    order = np.argsort(layer_s, axis=1)
    cost = np.take_along_axis(layer_s, order, axis=1)
    room = np.take_along_axis(held, order, axis=1)
    before = np.cumsum(room, axis=1) - room
    filled = np.clip(layers - before, 0, room)
    cost = np.where(filled > 0, cost, 0.0)  # what does not fit is not filled
    return np.asarray((filled * cost).sum(axis=1), np.float64)


def _held_by_groups(costs: ReplicaCosts, cell: Cell, role: Role, longest_s: float) -> Ints:
    """Layers that each group of nodes, as bit masks, passes as one stage within that time per row."""
    nodes, slots = len(costs.given.nodes), cell.in_flight
    most = np.zeros((nodes, costs.given.model.layers), np.int64)
    sizes = {n for r in range(1, nodes + 1) for counts in slot_counts(slots, r) for n in counts}
    for count in sorted(sizes):
        busy = costs.busy_s(cell, role, count)
        # The whole of a stage's slots is one node's only where it stands alone.
        most = np.where(busy * (count / slots) <= longest_s, count, most)
    # Groups with a node are those without it, once more: all masks by doubling.
    least, total = np.full((1, most.shape[1]), slots + 1), np.zeros((1, most.shape[1]), np.int64)
    size = np.zeros(1, np.int64)
    for able in most:
        least = np.concatenate((least, np.minimum(least, able)))
        total = np.concatenate((total, total + able))
        size = np.concatenate((size, size + 1))
    held = ((least > 0) & (total >= slots)).sum(axis=1)
    return np.where((size > 0) & (size <= slots), held, 0)


@dataclass(frozen=True, slots=True)
class _Options:
    """All dealings of one stage, and what they cost; arrays over dealings first."""

    dealt: list[Dealt]
    has: Floats
    """Whether a replica has a slot: (dealings, replicas, slots)."""
    busy_s: Floats
    stay_s: Floats
    """(dealings, layers), as in `Ring`."""


def _best_dealt(costs: ReplicaCosts, cell: Cell, groups: Groups, beat_s: float) -> Found | None:
    alone = sum(len(group) > 1 for group in groups) == 1
    stages = [
        _options(costs, cell, group, role, alone)
        for group, role in zip(groups, roles(len(groups)), strict=True)
    ]
    hops = [_hops(costs, cell, groups, stages, number) for number in range(len(stages))]
    best: Found | None = None
    for chosen in _worth_trying(cell, stages, hops, beat_s):
        ring = _ring_of(cell, stages, hops, chosen)
        within = split_within(ring, beat_s * (1 - 1e-12))
        if within is None or within.row_s >= beat_s * (1 - 1e-12):
            continue
        split = best_split(ring)
        assert split is not None, "it has just been split"
        order = tuple(node for group in groups for node in group)
        dealt = [s.dealt[choice] for s, choice in zip(stages, chosen, strict=True)]
        best = Found(cell, order, split, tuple(slots for part in dealt for slots in part))
        beat_s = split.row_s
    return best


def _options(
    costs: ReplicaCosts, cell: Cell, group: tuple[int, ...], role: Role, alone: bool
) -> _Options:
    """A stage's dealings; only how many slots each has matters where no other stage has replicas."""
    dealt = dealings(cell.in_flight, len(group))
    if alone:
        dealt = [in_runs(counts) for counts in slot_counts(cell.in_flight, len(group))]
    has = np.zeros((len(dealt), len(group), cell.in_flight))
    for number, parts in enumerate(dealt):
        for who, slots in enumerate(parts):
            has[number, who, list(slots)] = 1.0
    weighed = np.stack([
        [costs.busy_s(cell, role, len(slots))[node] * (len(slots) / cell.in_flight)
         for node, slots in zip(group, parts, strict=True)]
        for parts in dealt
    ])  # fmt: skip
    return _Options(dealt, has, weighed.max(axis=1), weighed.sum(axis=1))


def _hops(
    costs: ReplicaCosts, cell: Cell, groups: Groups, stages: list[_Options], number: int
) -> tuple[Floats, Floats]:
    """(occupied, hop) from a stage to the next for all dealings of both: (from, to, codecs)."""
    links, ports = costs.links(cell)
    to = (number + 1) % len(groups)
    a, b = list(groups[number]), list(groups[to])
    pairs = np.ix_(a, b)
    if to:
        occupied = np.stack([codec[pairs] for codec in links.occupied_s], axis=-1)
        hop = np.stack([codec[pairs] for codec in links.hop_s], axis=-1)
        out, into = ports.out_s[:, a].T, ports.into_s[:, b].T
    else:
        occupied, hop = (
            links.return_occupied_s[pairs][..., None],
            links.return_hop_s[pairs][..., None],
        )
        out, into = ports.return_out_s[a][:, None], ports.return_into_s[b][:, None]
    source, target = stages[number].has, stages[to].has
    flow = np.einsum("oat,pbt->opab", source, target)[..., None] / cell.in_flight
    with np.errstate(invalid="ignore"):  # a link that carries nothing may be none
        busiest = np.where(flow > 0, flow * occupied, 0.0).max(axis=(2, 3))
        mean = np.where(flow > 0, flow * hop, 0.0).sum(axis=(2, 3))
    left = (source.mean(axis=2)[..., None] * out).max(axis=1)[:, None]
    came = (target.mean(axis=2)[..., None] * into).max(axis=1)[None]
    return np.maximum(busiest, np.maximum(left, came)), mean


def _worth_trying(
    cell: Cell, stages: list[_Options], hops: list[tuple[Floats, Floats]], beat_s: float
) -> list[tuple[int, ...]]:
    """A dealing for each stage, where layers, links and a bound of a row's life allow `beat_s`."""
    count, layers = len(stages), stages[0].busy_s.shape[1]

    def spread(values: Floats | Ints, *axes: int) -> Floats:
        """Values over the dealings of some stages, as an array over those of all."""
        if len(axes) == 2 and axes[0] > axes[1]:
            values = values.T
        shape = [values.shape[sorted(axes).index(i)] if i in axes else 1 for i in range(count)]
        return np.asarray(values.reshape(shape), np.float64)

    held = sum(spread((s.busy_s <= beat_s).sum(axis=1), i) for i, s in enumerate(stages))
    ways = [np.where(occ <= beat_s, hop, np.inf).min(axis=2) for occ, hop in hops]
    links_s = sum(spread(way, i, (i + 1) % count) for i, way in enumerate(ways))
    # No layer takes less than on the stage where it takes least.
    each = np.arange(1.0, layers + 1.0)
    fastest = min(float((s.stay_s / each).min()) for s in stages)
    life_s = cell.micro_batch_rows * layers * fastest + links_s
    possible: Bools = np.asarray((held >= layers) & (life_s < beat_s * cell.rows))
    found = np.argwhere(possible)
    order = np.argsort(np.broadcast_to(life_s, possible.shape)[possible], kind="stable")
    return [tuple(int(i) for i in each) for each in found[order]]


def _ring_of(
    cell: Cell,
    stages: list[_Options],
    hops: list[tuple[Floats, Floats]],
    chosen: tuple[int, ...],
) -> Ring:
    """The costs of one dealing of every stage."""
    ends = list(zip(chosen, (*chosen[1:], chosen[0]), strict=True))
    occupied, hop = np.full((2, len(hops), max(o.shape[2] for o, _ in hops)), np.inf)
    for i, ((busiest, mean), end) in enumerate(zip(hops, ends, strict=True)):
        occupied[i, : busiest.shape[2]], hop[i, : busiest.shape[2]] = busiest[end], mean[end]
    return Ring(
        np.stack([s.busy_s[choice] for s, choice in zip(stages, chosen, strict=True)]),
        np.stack([s.stay_s[choice] for s, choice in zip(stages, chosen, strict=True)]),
        occupied,
        hop,
        cell.micro_batch_rows,
        cell.in_flight,
    )
