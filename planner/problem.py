"""One planning problem made ready: checked facts, links as matrices, and one pipeline's costs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from planner.chain import Ring, Split, best_split, split_as
from planner.checks import check_facts, smoothed, uneven
from planner.cost import Cell, Floats, Ints, Role, StageTable, decode_rounds, stage_table
from planner.facts import Cluster, ModelShape, Node, Workload
from planner.network import (
    Network,
    NetworkCost,
    codec_options,
    network,
    network_cost,
    port_cost,
)
from planner.plan import LinkPlan, Pipeline, StagePlan
from planner.replicas import Dealt, dealt_anew, dealt_ring, stages_of


@dataclass(frozen=True, slots=True)
class Problem:
    """Facts that passed the checks, with smoothed profiles, and their network."""

    cluster: Cluster
    model: ModelShape
    work: Workload
    net: Network
    notes: tuple[str, ...] = ()
    """What was changed in the facts before planning, for people."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        return self.cluster.nodes


def problem(cluster: Cluster, model: ModelShape, work: Workload) -> Problem:
    """The facts, checked; raises InfeasibleError where they cannot be true."""
    check_facts(cluster, model, work)
    nodes = tuple(smoothed(node) for node in cluster.nodes)
    notes = tuple(
        f"node {node.name}: its {' and '.join(dips)} profile was uneven; where more work took less "
        "time, the longer time before it counts"
        for node in cluster.nodes
        if (dips := uneven(node))
    )
    cluster = replace(cluster, nodes=nodes)
    return Problem(cluster, model, work, network(cluster), notes)


@dataclass(frozen=True, slots=True)
class Found:
    """A ring: its nodes in order, its split, and the cell it is in."""

    cell: Cell
    order: tuple[int, ...]
    """Nodes, by their number in the cluster; replicas side by side."""
    split: Split
    """Layers by stage; codecs by hop from a stage to the next."""
    dealt: Dealt = ()

    @property
    def rows_per_s(self) -> float:
        return 1.0 / self.split.row_s


@dataclass(frozen=True, slots=True)
class CellCosts:
    """All stage tables, by what a stage does beside its layers, and all links, of one cell."""

    cell: Cell
    stages: dict[Role, StageTable]
    links: NetworkCost

    def ring(self, order: tuple[int, ...]) -> Ring:
        """The costs of a ring through the nodes of those numbers, in that order."""
        busy = np.stack(
            [self.stages[r].busy_s[i] for r, i in zip(roles(len(order)), order, strict=True)]
        )
        source, target = list(order), [*order[1:], order[0]]
        links = NetworkCost(
            self.links.occupied_s[:, source, target],
            self.links.hop_s[:, source, target],
            self.links.return_occupied_s[source, target],
            self.links.return_hop_s[source, target],
        )
        return _ring(self.cell, busy, links)


def _ring(cell: Cell, busy_s: Floats, links: NetworkCost) -> Ring:
    """A ring of these stages; of all links from each stage to the next, the last returns ids."""
    if len(busy_s) == 1:
        none = np.empty((0, 1))
        return Ring(busy_s, busy_s, none, none, cell.micro_batch_rows, cell.in_flight)
    occupied, hop = links.occupied_s.T.copy(), links.hop_s.T.copy()
    # The return link carries token ids only: raw, whatever the codec's column.
    occupied[-1], hop[-1] = np.inf, np.inf
    occupied[-1, 0], hop[-1, 0] = links.return_occupied_s[-1], links.return_hop_s[-1]
    return Ring(busy_s, busy_s, occupied, hop, cell.micro_batch_rows, cell.in_flight)


def roles(stages: int) -> tuple[Role, ...]:
    """What each stage of a ring does beside its layers."""
    if stages == 1:
        return (Role.FIRST | Role.LAST,)
    return (Role.FIRST, *([Role.MIDDLE] * (stages - 2)), Role.LAST)


def cell_costs(given: Problem, cell: Cell) -> CellCosts:
    """Everything that one cell costs on every node and link."""
    tables = {
        role: stage_table(given.nodes, given.model, given.work, cell, role)
        for role in (Role.MIDDLE, Role.FIRST, Role.LAST, Role.FIRST | Role.LAST)
    }
    return CellCosts(cell, tables, network_cost(given.net, given.model, given.work, cell))


def ring_in(given: Problem, cell: Cell, order: tuple[int, ...], dealt: Dealt = ()) -> Ring:
    """The costs of one ring alone, without those of all other nodes and links."""
    busy = np.stack([t.busy_s[row] for t, row in stages_in(given, cell, order, dealt)])
    if dealt:
        nodes = tuple(given.nodes[i] for i in order)
        ports = port_cost(nodes, given.model, given.work, cell)
        square = np.ix_(list(order), list(order))
        return dealt_ring(cell, busy, _links(given, cell, square), ports, dealt)
    return _ring(cell, busy, _links(given, cell, (np.array(order), np.roll(order, -1))))


def _links(given: Problem, cell: Cell, at: tuple[Ints, ...]) -> NetworkCost:
    """What some links cost."""
    net = Network(given.net.latency_s[at], given.net.bytes_per_s[at])
    return network_cost(net, given.model, given.work, cell)


def stages_in(
    given: Problem, cell: Cell, order: tuple[int, ...], dealt: Dealt = ()
) -> Iterator[tuple[StageTable, int]]:
    """The table of every node of a ring, and its row there; of replicas for their own slots' KV."""
    stages = stages_of(len(order), dealt)
    places = [
        (role, replace(cell, in_flight=len(dealt[place])) if dealt else cell, order[place])
        for role, stage in zip(roles(len(stages)), stages, strict=True)
        for place in stage
    ]
    for (role, own), group in groupby(places, key=lambda each: each[:2]):
        nodes = tuple(given.nodes[number] for *_, number in group)
        table = stage_table(nodes, given.model, given.work, own, role)
        yield from ((table, row) for row in range(len(nodes)))


def again(given: Problem, ring: Found, cell: Cell) -> Found | None:
    """The ring in another cell, its slots dealt in the same shares and its layers split anew.

    None where it cannot run so.
    """
    same = cell.in_flight == ring.cell.in_flight
    dealt = ring.dealt if same else dealt_anew(len(ring.order), ring.dealt, cell.in_flight)
    if dealt is None:
        return None
    split = best_split(ring_in(given, cell, ring.order, dealt))
    return replace(ring, cell=cell, split=split, dealt=dealt) if split else None


def among(given: Problem, chosen: tuple[int, ...]) -> Problem:
    """The same problem on some of the nodes, in that order."""
    square = np.ix_(list(chosen), list(chosen))
    net = Network(given.net.latency_s[square], given.net.bytes_per_s[square])
    nodes = tuple(given.nodes[i] for i in chosen)
    return replace(given, cluster=replace(given.cluster, nodes=nodes), net=net)


def pipeline_of(given: Problem, ring: Found) -> Pipeline:
    """The pipeline that a ring is, with the offload that its layers and slots call for."""
    places = stages_of(len(ring.order), ring.dealt)
    ends = np.cumsum(ring.split.layers).tolist()
    of = [stage for stage, nodes in enumerate(places) for _ in nodes]
    stages = []
    for place, (table, row) in enumerate(stages_in(given, ring.cell, ring.order, ring.dealt)):
        layers = ring.split.layers[of[place]]
        own = ring.dealt[place] if ring.dealt else ()
        stages.append(
            StagePlan(
                given.nodes[ring.order[place]].name,
                ends[of[place]] - layers,
                ends[of[place]],
                int(table.weights_offloaded[row, layers - 1]),
                float(table.kv_offloaded[row, layers - 1]),
                own if len(own) < ring.cell.in_flight else (),
            )
        )
    cell = ring.cell
    links = tuple(_links_of(given, ring, places))
    return Pipeline(tuple(stages), links, cell.micro_batch_rows, cell.in_flight, cell.draft_len)


def _links_of(
    given: Problem, ring: Found, places: tuple[tuple[int, ...], ...]
) -> Iterator[LinkPlan]:
    """From every node of a stage to those of the next that have slots of its own; the last, back."""
    names = [given.nodes[i].name for i in ring.order]
    for stage, codec in enumerate(ring.split.codecs):
        for a in places[stage]:
            for b in places[(stage + 1) % len(places)]:
                if not ring.dealt or set(ring.dealt[a]) & set(ring.dealt[b]):
                    yield LinkPlan(names[a], names[b], codec_options(given.work)[codec][0])


def cell_of(pipeline: Pipeline) -> Cell:
    """The settings that a pipeline's stages share."""
    return Cell(pipeline.micro_batch_rows, pipeline.in_flight, pipeline.draft_len)


def order_of(given: Problem, pipeline: Pipeline) -> tuple[int, ...]:
    """The numbers of a pipeline's nodes, in ring order; KeyError for a node that is not there."""
    at = {node.name: i for i, node in enumerate(given.nodes)}
    return tuple(at[stage.node] for stage in pipeline.stages)


def dealt_of(pipeline: Pipeline) -> Dealt:
    """Who of a pipeline's stages has which slots; empty where all have all."""
    if not pipeline.replicated:
        return ()
    return tuple(stage.slots or tuple(range(pipeline.in_flight)) for stage in pipeline.stages)


def judged(given: Problem, pipeline: Pipeline) -> Found:
    """What a given pipeline costs, with the offload that suits it; infinite where it cannot run."""
    cell, order, dealt = cell_of(pipeline), order_of(given, pipeline), dealt_of(pipeline)
    ranges = pipeline.ranges
    names = [name for name, _ in codec_options(given.work)]
    # All links of one hop have one codec.
    codec = {link.source: names.index(link.codec) for link in pipeline.links}
    codecs = tuple(codec[stages[0].node] for stages in ranges if pipeline.links)
    layers = tuple(stages[0].layers for stages in ranges)
    ring = ring_in(given, cell, order, dealt)
    return Found(cell, order, split_as(ring, layers, codecs), dealt)


def load_s(given: Problem, pipeline: Pipeline) -> float:
    """Seconds until every stage has read its shard; nodes of unknown disks count nothing."""
    return max(_shard_s(given, stage) for stage in pipeline.stages)


def _shard_s(given: Problem, stage: StagePlan) -> float:
    disk, model = given.cluster.node(stage.node).disk_bytes_per_s, given.model
    weights = stage.layers * model.layer_bytes
    weights += model.embedding_bytes if stage.first_layer == 0 else 0.0
    weights += model.head_bytes if stage.end_layer == model.layers else 0.0
    return weights / disk if disk > 0 else 0.0


def pass_s(given: Problem, cell: Cell, life_s: float) -> float:
    """Mean seconds of one way round the ring: a row's life over its passes."""
    return life_s / (1.0 + decode_rounds(given.work, cell.draft_len))
