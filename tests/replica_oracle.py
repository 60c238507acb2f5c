"""Exhaustive search over rings with replicas: all partitions, dealings, splits and codecs, in loops."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from planner.cost import Cell, Floats, Ints, Role, decode_rounds, prefill_tokens
from planner.facts import Cluster, ModelShape, Workload
from tests.planner_oracle import (
    best_partition,
    best_stage_s,
    link_costs,
    rates_of_subsets,
    return_cost,
    splits,
)

Slots = tuple[int, ...]
"""The replica, by its place in its stage, that computes each slot."""
PARTS, FEWER_PARTS = 8, 4


def best_rate(
    cluster: Cluster, model: ModelShape, work: Workload, tried: tuple[Cell, ...]
) -> float:
    """The greatest total rate of disjoint rings, with and without replicas."""
    rate = rates_of_subsets(cluster, model, work, tried)
    for size in range(3, len(cluster.nodes) + 1):
        for nodes in itertools.combinations(cluster.nodes, size):
            own, key = replace(cluster, nodes=nodes), frozenset(node.name for node in nodes)
            rate[key] = max(rate[key], *(_ring_rate(own, model, work, cell) for cell in tried))
    return best_partition(frozenset(node.name for node in cluster.nodes), rate)


def _ring_rate(cluster: Cluster, model: ModelShape, work: Workload, cell: Cell) -> float:
    """Rows per second of the best ring through all nodes of which some are replicas."""
    facts, nodes = _Facts(cluster, model, work, cell), len(cluster.nodes)
    rings = (stages for stages in _ordered(tuple(range(nodes))) if 1 < len(stages) < nodes)
    return max(1.0 / facts.row_s(stages) for stages in rings)


def _ordered(nodes: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every ordered partition; nodes of a stage in every order, as slots are dealt by it."""
    if not nodes:
        yield ()
    for size in range(1, len(nodes) + 1):
        for first in itertools.permutations(nodes, size):
            rest = tuple(node for node in nodes if node not in first)
            yield from ((first, *others) for others in _ordered(rest))


def _dealings(slots: int, replicas: int, parts: int) -> set[Slots]:
    """Slots dealt by whole parts: in runs, and each replica's spread evenly."""
    ends = {round(part * slots / parts) for part in range(1, parts)} - {0, slots}
    found: set[Slots] = set()
    for cuts in itertools.combinations(sorted(ends), replicas - 1):
        counts = [b - a for a, b in itertools.pairwise((0, *cuts, slots))]
        found.add(tuple(who for who, n in enumerate(counts) for _ in range(n)))
        turns = sorted(((i + 0.5) / n, who) for who, n in enumerate(counts) for i in range(n))
        found.add(tuple(who for _, who in turns))
    return found


class _Facts:
    """One cell of one problem; what was computed is kept."""

    def __init__(self, cluster: Cluster, model: ModelShape, work: Workload, cell: Cell) -> None:
        self.cluster, self.model, self.work, self.cell = cluster, model, work, cell
        self._tables: dict[tuple[int, Role, int], Floats] = {}
        self._links: dict[tuple[int, int, bool], list[tuple[float, float]]] = {}

    def row_s(self, stages: tuple[tuple[int, ...], ...]) -> float:
        """Least seconds per row of a ring of these stages."""
        layers, slots = self.model.layers, self.cell.in_flight
        if len(stages) > layers:
            return math.inf
        chosen = np.array(list(splits(layers, len(stages))))
        best = math.inf
        parts = PARTS if sum(len(stage) > 1 for stage in stages) == 1 else FEWER_PARTS
        for dealt in itertools.product(*(_dealings(slots, len(s), parts) for s in stages)):
            longest, life = self._computing(stages, dealt, chosen)
            for occupied, hop in self._hops(stages, dealt):
                whole_s = self.cell.micro_batch_rows * life + hop
                row_s = np.maximum(np.maximum(longest, occupied), whole_s / self.cell.rows)
                best = min(best, float(row_s.min()))
        return best

    def _computing(
        self, stages: tuple[tuple[int, ...], ...], dealt: tuple[Slots, ...], chosen: Ints
    ) -> tuple[Floats, Floats]:
        """(busiest node, whole way) of a row in seconds, for every split."""
        longest, life = np.zeros((2, len(chosen)))
        for place, (stage, owners) in enumerate(zip(stages, dealt, strict=True)):
            for who, node in enumerate(stage):
                own = owners.count(who)
                table = self._table(node, place, len(stages), own)[chosen[:, place] - 1]
                part = table * own / self.cell.in_flight
                longest, life = np.maximum(longest, part), life + part
        return longest, life

    def _table(self, node: int, place: int, stages: int, slots: int) -> Floats:
        role = Role.MIDDLE if place else Role.FIRST
        if place == stages - 1:
            role |= Role.LAST
        if (node, role, slots) not in self._tables:
            cell = Cell(self.cell.micro_batch_rows, slots, self.cell.draft_len)
            self._tables[node, role, slots] = np.array([
                best_stage_s(self.cluster.nodes[node], self.model, self.work, cell, role, k)
                for k in range(1, self.model.layers + 1)
            ])  # fmt: skip
        return self._tables[node, role, slots]

    def _hops(
        self, stages: tuple[tuple[int, ...], ...], dealt: tuple[Slots, ...]
    ) -> set[tuple[float, float]]:
        """(busiest link or port, mean way) over all links, for every choice of a codec per hop."""
        found = {(0.0, 0.0)}
        for place in range(len(stages)):
            last = place == len(stages) - 1
            to = 0 if last else place + 1
            each = []
            for codec in range(1 if last else 1 + len(self.work.codec)):
                busy, way = dict[object, float](), 0.0
                for a, b in zip(dealt[place], dealt[to], strict=True):
                    source, target = stages[place][a], stages[to][b]
                    occupied, hop = self._link(source, target, last)[codec]
                    out, into = self._ports(source, target, codec, last)
                    for key, seconds in (
                        ((source, target), occupied), ((source, "out"), out), ((target, "in"), into)
                    ):  # fmt: skip
                        busy[key] = busy.get(key, 0.0) + seconds / self.cell.in_flight
                    way += hop / self.cell.in_flight
                each.append((max(busy.values()), way))
            found = {(max(x, o), y + h) for x, y in found for o, h in each}
        return found

    def _link(self, a: int, b: int, last: bool) -> list[tuple[float, float]]:
        if (a, b, last) not in self._links:
            ends = self.cluster.nodes[a], self.cluster.nodes[b]
            link = self.cluster.link(ends[0].name, ends[1].name)
            costs = (
                [return_cost(link, ends, self.work, self.cell)]
                if last
                else link_costs(link, ends, self.model, self.work, self.cell)
            )
            self._links[a, b, last] = costs
        return self._links[a, b, last]

    def _ports(self, a: int, b: int, codec: int, last: bool) -> tuple[float, float]:
        """Seconds that a row keeps the way out of one node, and into the other, busy."""
        work, cell = self.work, self.cell
        rounds = decode_rounds(work, cell.draft_len)
        level = [None, *work.codec.values()][codec]
        raw = (prefill_tokens(work) + rounds * (cell.draft_len + 1)) * self.model.hidden
        raw = work.output_tokens.mean * 4 if last else raw * self.model.activation_value_bytes
        coding = raw / level.bytes_per_s if level else 0.0
        sent = raw / (level.ratio if level else 1.0)
        sent += (1 + rounds) * (12 + 256 / cell.micro_batch_rows)
        rates = self.cluster.nodes[a].up_bytes_per_s, self.cluster.nodes[b].down_bytes_per_s
        return max(sent / rates[0], coding), max(sent / rates[1], coding)
