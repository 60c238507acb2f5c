"""One planning problem made ready: checked facts, links as matrices, and one pipeline's costs."""

from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from planner.chain import Ring, Split
from planner.checks import check_facts, smoothed
from planner.cost import Cell, Floats, Role, StageTable, decode_rounds, stage_table
from planner.facts import Cluster, ModelShape, Node, Workload
from planner.network import Network, NetworkCost, codec_options, network, network_cost
from planner.plan import LinkPlan, Pipeline, StagePlan


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
        f"node {new.name}: its profile was uneven; where more work took less time, the longer time "
        "before it counts"
        for old, new in zip(cluster.nodes, nodes, strict=True)
        if old.layer_s and new.layer_s and sorted(old.layer_s.decode) != list(new.layer_s.decode)
    )
    cluster = replace(cluster, nodes=nodes)
    return Problem(cluster, model, work, network(cluster), notes)


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
        return Ring(
            busy_s, np.empty((0, 1)), np.empty((0, 1)), cell.micro_batch_rows, cell.in_flight
        )
    occupied, hop = links.occupied_s.T.copy(), links.hop_s.T.copy()
    # The return link carries token ids only: raw, whatever the codec's column.
    occupied[-1], hop[-1] = np.inf, np.inf
    occupied[-1, 0], hop[-1, 0] = links.return_occupied_s[-1], links.return_hop_s[-1]
    return Ring(busy_s, occupied, hop, cell.micro_batch_rows, cell.in_flight)


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


def ring_in(given: Problem, cell: Cell, order: tuple[int, ...]) -> Ring:
    """The costs of one ring alone, without those of all other nodes and links."""
    model, work = given.model, given.work
    stages: list[Floats] = []
    for role, places in groupby(range(len(order)), key=lambda place: roles(len(order))[place]):
        nodes = tuple(given.nodes[order[place]] for place in places)
        stages.append(stage_table(nodes, model, work, cell, role).busy_s)
    way = list(order), [*order[1:], order[0]]
    hops = Network(given.net.latency_s[way], given.net.bytes_per_s[way])
    return _ring(cell, np.concatenate(stages), network_cost(hops, model, work, cell))


def among(given: Problem, chosen: tuple[int, ...]) -> Problem:
    """The same problem on some of the nodes, in that order."""
    square = np.ix_(list(chosen), list(chosen))
    net = Network(given.net.latency_s[square], given.net.bytes_per_s[square])
    nodes = tuple(given.nodes[i] for i in chosen)
    return replace(given, cluster=replace(given.cluster, nodes=nodes), net=net)


def pipeline_of(given: Problem, costs: CellCosts, order: tuple[int, ...], split: Split) -> Pipeline:
    """The pipeline that a split over nodes in order describes, with its offload choices."""
    names = [given.nodes[i].name for i in order]
    stages, first = [], 0
    for role, node, name, layers in zip(roles(len(order)), order, names, split.layers, strict=True):
        table = costs.stages[role]
        stages.append(
            StagePlan(
                name,
                first,
                first + layers,
                int(table.weights_offloaded[node, layers - 1]),
                float(table.kv_offloaded[node, layers - 1]),
            )
        )
        first += layers
    codecs = [codec_options(given.work)[c][0] for c in split.codecs]
    ends = [*names[1:], names[0]]
    links = tuple(LinkPlan(*link) for link in zip(names, ends, codecs, strict=False))
    cell = costs.cell
    return Pipeline(tuple(stages), links, cell.micro_batch_rows, cell.in_flight, cell.draft_len)


def cell_of(pipeline: Pipeline) -> Cell:
    """The settings that a pipeline's stages share."""
    return Cell(pipeline.micro_batch_rows, pipeline.in_flight, pipeline.draft_len)


def order_of(given: Problem, pipeline: Pipeline) -> tuple[int, ...]:
    """The numbers of a pipeline's nodes, in ring order; KeyError for a node that is not there."""
    at = {node.name: i for i, node in enumerate(given.nodes)}
    return tuple(at[stage.node] for stage in pipeline.stages)


def judged(given: Problem, pipeline: Pipeline) -> Split:
    """What a given pipeline costs, with the offload that suits it; infinite where it cannot run."""
    ring = ring_in(given, cell_of(pipeline), order_of(given, pipeline))
    layers = tuple(stage.layers for stage in pipeline.stages)
    stages_s = ring.busy_s[np.arange(len(layers)), np.array(layers) - 1]
    names = [name for name, _ in codec_options(given.work)]
    codecs = tuple(names.index(link.codec) for link in pipeline.links)
    at = np.arange(len(codecs))
    occupied, hops = ring.occupied_s[at, list(codecs)], ring.hop_s[at, list(codecs)]
    life = float(stages_s.sum()) * ring.micro_batch_rows + float(hops.sum())
    rows = ring.micro_batch_rows * ring.in_flight
    row_s = max(float(stages_s.max()), float(occupied.max(initial=0.0)), life / rows)
    return Split(row_s, life, layers, codecs)


def load_s(given: Problem, pipeline: Pipeline) -> float:
    """Seconds until every stage has read its shard; nodes of unknown disks count nothing."""
    layers = tuple(stage.layers for stage in pipeline.stages)
    return ring_load_s(given, order_of(given, pipeline), layers)


def ring_load_s(given: Problem, order: tuple[int, ...], layers: tuple[int, ...]) -> float:
    """The same for a ring that is not a pipeline yet."""
    weights = [count * given.model.layer_bytes for count in layers]
    weights[0] += given.model.embedding_bytes
    weights[-1] += given.model.head_bytes
    disks = [given.nodes[node].disk_bytes_per_s for node in order]
    return max(size / disk if disk > 0 else 0.0 for size, disk in zip(weights, disks, strict=True))


def pass_s(given: Problem, cell: Cell, life_s: float) -> float:
    """Mean seconds of one way round the ring: a row's life over its passes."""
    return life_s / (1.0 + decode_rounds(given.work, cell.draft_len))
