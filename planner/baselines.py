"""The published methods as planners of whole rings, so that they can be simulated beside ours.

A method decides which nodes form a pipeline, in which order, and with how many layers each; where it
has no word for the ring's settings, it gets the best micro-batch and number in flight of our grid.
Its links stay raw. Placements with overlapping blocks become disjoint chains, shortest first.
"""

from collections.abc import Callable

import numpy as np

from planner.chain import Split
from planner.cost import Cell, Role, kv_layer_bytes, mean_context, stage_table
from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.grid import cells
from planner.infeasible import why_none
from planner.layer_times import decode_layer_s
from planner.placement import (
    Server,
    Sizes,
    Span,
    cg_bp,
    equal_split,
    gbp_cr,
    most_sessions,
    parallax,
    petals,
    petals_blocks,
    water_fill,
)
from planner.plan import Plan
from planner.problem import Problem, among, cell_costs, problem
from planner.ring import Found
from planner.routing import shortest_route
from planner.solve import plan_of

Chain = tuple[tuple[int, ...], tuple[int, ...]]
"""Nodes in order, and the layers of each."""
DESIGN_SESSIONS = 32
"""Requests in flight that placements reserve caches for, where memory allows."""


def baseline(method: str, cluster: Cluster, model: ModelShape, workload: Workload) -> Plan:
    """The plan that a published method gives; METHODS names them.

    Raises:
        InfeasibleError: the method finds no pipeline that holds the model on these nodes.
        KeyError: there is no such method.
    """
    given = problem(cluster, model, workload)
    tried = cells(workload)
    rings = [ring for chain in METHODS[method](given) if (ring := _ring(given, tried, chain))]
    if not rings:
        reason = why_none(given, tried)
        raise InfeasibleError(f"{method} forms no pipeline on these nodes: {reason}")
    return plan_of(given, rings, 0.0)


def _ring(given: Problem, tried: tuple[Cell, ...], chain: Chain) -> Found | None:
    """The chain as it is, in the cell where it is fastest."""
    order, layers = chain
    own, best = among(given, order), None
    for cell in tried:
        if cell.draft_len:
            continue
        ring = cell_costs(own, cell).ring(tuple(range(len(order))))
        stages = ring.busy_s[np.arange(len(order)), np.array(layers) - 1]
        occupied, hops = ring.occupied_s[:, 0], ring.hop_s[:, 0]
        life = float(stages.sum()) * cell.micro_batch_rows + float(hops.sum())
        row_s = max(float(stages.max()), float(occupied.max(initial=0.0)), life / cell.rows)
        if row_s < (best.split.row_s if best else float("inf")):
            best = Found(cell, order, Split(row_s, life, layers, (0,) * len(occupied)))
    return best


def _servers(given: Problem) -> list[Server]:
    """Nodes as the published methods see them: a client in the middle of the network."""
    context, n = mean_context(given.work), len(given.nodes)
    token_bytes = given.model.activation_bytes_per_token
    with np.errstate(divide="ignore"):
        hop = given.net.latency_s + token_bytes / given.net.bytes_per_s
    servers = []
    for i, node in enumerate(given.nodes):
        ways = [float(hop[i, j]) for j in range(n) if j != i and np.isfinite(hop[i, j])]
        round_trip = 2.0 * float(np.median(ways)) if ways else 0.0
        block_s = decode_layer_s(node, given.model, 1, context)
        servers.append(Server(node.name, _room(given, i), round_trip, block_s))
    return servers


def _room(given: Problem, node: int) -> float:
    """Memory that a method may fill: what our own tables leave beside embedding and LM head."""
    model = given.model
    beside = model.embedding_bytes + model.head_bytes + 16 * 512 * model.activation_bytes_per_token
    return max(given.nodes[node].memory_bytes - beside, 0.0)


def _sizes(given: Problem) -> Sizes:
    return Sizes(
        given.model.layers, given.model.layer_bytes, kv_layer_bytes(given.model, given.work, 1)
    )


def _sessions(given: Problem) -> int:
    return max(
        1, min(DESIGN_SESSIONS, given.work.rows, most_sessions(_servers(given), _sizes(given)))
    )


def _cg_bp(given: Problem) -> list[Chain]:
    spans = cg_bp(_servers(given), _sizes(given), _sessions(given))
    return _disjoint(given, spans or [])


def _petals(given: Problem) -> list[Chain]:
    servers, model = _servers(given), given.model
    held = [petals_blocks(s, model.layer_bytes, model.hidden) for s in servers]
    return _disjoint(given, petals(servers, model.layers, held))


def _gbp_cr(given: Problem) -> list[Chain]:
    chains = gbp_cr(_servers(given), _sizes(given), _sessions(given))
    at = {node.name: i for i, node in enumerate(given.nodes)}
    return [
        (tuple(at[s.server.name] for s in chain), tuple(s.blocks for s in chain))
        for chain in chains
    ]


def _disjoint(given: Problem, spans: list[Span]) -> list[Chain]:
    """Shortest routes, each over spans that no earlier one uses."""
    at = {node.name: i for i, node in enumerate(given.nodes)}
    chains: list[Chain] = []
    while True:
        route = shortest_route(spans, given.model.layers)
        if route is None:
            return chains
        order = tuple(at[hop.span.server.name] for hop in route)
        chains.append((order, tuple(hop.blocks for hop in route)))
        used = {hop.span for hop in route}
        spans = [span for span in spans if span not in used]


def _parallax(given: Problem) -> list[Chain]:
    """Half of a node's memory for weights, water-filled by FLOP/s."""
    capacity = [
        int(_room(given, i) * 0.5 // given.model.layer_bytes) for i in range(len(given.nodes))
    ]
    chains = []
    for group in parallax(capacity, given.model.layers):
        speed = [given.nodes[i].flop_per_s for i in group]
        layers = water_fill([capacity[i] for i in group], speed, given.model.layers)
        chains.append((tuple(group), tuple(layers)))
    return chains


def _equal(given: Problem) -> list[Chain]:
    """All nodes in the given order, the same number of layers each."""
    cell = cells(given.work)[0]
    table = stage_table(given.nodes, given.model, given.work, cell, Role.MIDDLE).busy_s
    usable = [i for i in range(len(given.nodes)) if np.isfinite(table[i, 0])]
    usable = usable[: given.model.layers]
    if not usable:
        return []
    return [(tuple(usable), tuple(equal_split(len(usable), given.model.layers)))]


METHODS: dict[str, Callable[[Problem], list[Chain]]] = {
    "cg-bp": _cg_bp,
    "gbp-cr": _gbp_cr,
    "petals": _petals,
    "parallax": _parallax,
    "equal": _equal,
}
