"""The published methods as planners of whole rings, so that they can be simulated beside ours.

A method decides which nodes form a pipeline, in which order, and with how many layers each; where it
has no word for the ring's settings, it gets the best micro-batch and number in flight of our grid.
Its links stay raw. Placements with overlapping blocks become disjoint chains, shortest first; so do
Helix's flows, widest first. Integer programs get their first MILP_LIMIT_S, and say where they stopped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.chain import split_as
from planner.cost import Cell, Role, kv_layer_bytes, mean_context, stage_table
from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.grid import MICRO_BATCH_ROWS, cells
from planner.layer_times import decode_layer_s
from planner.leases import POLICIES, Policy
from planner.milp_bprr import bprr
from planner.milp_helix import helix, widest_ways
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
from planner.problem import Found, Problem, problem, ring_in
from planner.routing import Hop, chains_by_capacity, shortest_route
from planner.solve import compute_bound, plan_of

Chain = tuple[tuple[int, ...], tuple[int, ...]]
"""Nodes in order, and the layers of each."""
DESIGN_SESSIONS = 32
"""Requests in flight that placements reserve caches for, where memory allows."""
MILP_LIMIT_S = 20.0
MILP_REQUESTS = 2
"""Routes of the BPRR program, each of half of the design's sessions: more would not be solved."""


@dataclass(frozen=True, slots=True)
class Placed:
    """What a method decides, and what must be said of it."""

    chains: list[Chain]
    notes: tuple[str, ...] = ()
    sessions: tuple[int, ...] = ()
    """Rows in flight of each chain at most, where the method has a word for that."""
    why: str = "it covers no chain of all layers"
    """Where there are no chains: what of the method's own rules stands against them."""


def baseline(method: str, cluster: Cluster, model: ModelShape, workload: Workload) -> Plan:
    """The plan that a published method gives, under a bound on all plans; METHODS names them.

    Raises:
        InfeasibleError: the method finds no pipeline that holds the model on these nodes.
        KeyError: there is no such method.
        MissingSolverError: the method is an integer program, and HiGHS is not installed.
    """
    given = problem(cluster, model, workload)
    tried = cells(workload)
    placed = METHODS[method](given)
    most = placed.sessions or (workload.rows,) * len(placed.chains)
    rings = [
        ring
        for chain, rows in zip(placed.chains, most, strict=True)
        if (ring := _ring(given, [cell for cell in tried if cell.rows <= rows], chain))
    ]
    if not rings:
        reason = _why_none_runs(given, placed) if placed.chains else placed.why
        raise InfeasibleError(f"{method} forms no pipeline on these nodes: {reason}")
    plan = plan_of(given, rings, compute_bound(given, tried))
    return replace(plan, basis=(*placed.notes, *plan.basis))


def _why_none_runs(given: Problem, placed: Placed) -> str:
    order, layers = placed.chains[0]
    chain = " -> ".join(f"{given.nodes[i].name} {k}" for i, k in zip(order, layers, strict=True))
    return (
        f"of its {len(placed.chains)} none runs, the first with layers {chain}: a node has no room "
        "for its layers and a row beside them, or a link carries 0 bytes per second"
    )


def _ring(given: Problem, tried: Sequence[Cell], chain: Chain) -> Found | None:
    """The chain as it is, in the cell where it is fastest."""
    order, layers = chain
    best: Found | None = None
    for cell in tried:
        if cell.draft_len:
            continue
        ring = ring_in(given, cell, order)
        split = split_as(ring, layers, (0,) * len(ring.occupied_s))
        if split.row_s < (best.split.row_s if best else float("inf")):
            best = Found(cell, order, split)
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


def _cg_bp(given: Problem) -> Placed:
    sessions = _sessions(given)
    spans = cg_bp(_servers(given), _sizes(given), sessions)
    return Placed(_disjoint(given, spans or []), why=_caches_too(given, sessions))


def _caches_too(given: Problem, sessions: int) -> str:
    """Why a method that reserves caches for so many sessions on each node may cover too little."""
    each = given.model.layer_bytes + sessions * _sizes(given).cache_bytes
    rooms = [int(_room(given, i) // each) for i in range(len(given.nodes))]
    return (
        f"with room for the embedding, the LM head and caches of {sessions} sessions on every node, "
        f"{sum(rooms)} of {given.model.layers} layers fit"
    )


def _bprr(given: Problem) -> Placed:
    """Sessions in MILP_REQUESTS bundles, each routed as one."""
    sizes, bundle = _sizes(given), -(-_sessions(given) // MILP_REQUESTS)
    bundled = replace(sizes, cache_bytes=sizes.cache_bytes * bundle)
    found = bprr(_servers(given), bundled, MILP_REQUESTS, MILP_LIMIT_S)
    if found is None:
        return Placed(
            [], why=f"its program has no solution, or none was found in {MILP_LIMIT_S:g} s"
        )
    gap = 1.0 - found.bound_s / found.seconds
    return Placed(_disjoint(given, list(found.spans)), _stopped("bprr", found.proved, gap))


def _stopped(method: str, proved: bool, gap: float) -> tuple[str, ...]:
    if proved:
        return ()
    return (f"{method}: stopped after {MILP_LIMIT_S:g} s, at most {gap:.0%} from its optimum",)


def _petals(given: Problem) -> Placed:
    servers, model = _servers(given), given.model
    held = [petals_blocks(s, model.layer_bytes, model.hidden) for s in servers]
    why = f"its servers choose {sum(held)} of {model.layers} layers' blocks by their memory"
    return Placed(_disjoint(given, petals(servers, model.layers, held)), why=why)


def _gbp_cr(given: Problem) -> Placed:
    chains = [_chain_of(given, [Hop(span, span.blocks) for span in c]) for c in _chains(given)]
    return Placed(chains, why=_caches_too(given, _sessions(given)))


def _gca(given: Problem) -> Placed:
    """GBP-CR's blocks; chains over them, and the sessions of each, as GCA allocates caches."""
    spans = [span for chain in _chains(given) for span in chain]
    chains: list[Chain] = []
    sessions: list[int] = []
    used: set[int] = set()
    for route, held in chains_by_capacity(spans, _sizes(given)):
        chain = _chain_of(given, route)
        if used.isdisjoint(chain[0]):  # a ring has its nodes to itself
            chains.append(chain)
            sessions.append(held)
            used.update(chain[0])
    return Placed(chains, sessions=tuple(sessions), why=_caches_too(given, _sessions(given)))


def _chains(given: Problem) -> list[list[Span]]:
    return gbp_cr(_servers(given), _sizes(given), _sessions(given))


def _chain_of(given: Problem, route: Sequence[Hop]) -> Chain:
    at = {node.name: i for i, node in enumerate(given.nodes)}
    return tuple(at[hop.span.server.name] for hop in route), tuple(hop.blocks for hop in route)


def _disjoint(given: Problem, spans: list[Span]) -> list[Chain]:
    """Shortest routes, each over spans that no earlier one uses."""
    chains: list[Chain] = []
    while True:
        route = shortest_route(spans, given.model.layers)
        if route is None:
            return chains
        chains.append(_chain_of(given, route))
        used = {hop.span for hop in route}
        spans = [span for span in spans if span not in used]


def _parallax(given: Problem) -> Placed:
    """Half of a node's memory for weights, water-filled by FLOP/s."""
    capacity = [
        int(_room(given, i) * 0.5 // given.model.layer_bytes) for i in range(len(given.nodes))
    ]
    chains = []
    for group in parallax(capacity, given.model.layers):
        speed = [given.nodes[i].flop_per_s for i in group]
        layers = water_fill([capacity[i] for i in group], speed, given.model.layers)
        chains.append((tuple(group), tuple(layers)))
    return Placed(chains, why=_half_of_memory(given, sum(capacity)))


def _half_of_memory(given: Problem, layers: int) -> str:
    """Why a method that leaves half of each memory to keys and values may hold too little."""
    return (
        f"it gives weights half of each node's memory, and so {layers} of {given.model.layers} "
        "layers fit"
    )


def _helix(given: Problem) -> Placed:
    """At most half of a node's memory for weights; rates at the batch that its KV memory allows."""
    able = [i for i in range(len(given.nodes)) if _helix_rates(given, i)]
    why = _half_of_memory(given, sum(len(_helix_rates(given, i)) for i in able))
    if not able:
        return Placed([], why=why)
    links = given.net.bytes_per_s[np.ix_(able, able)] / given.model.activation_bytes_per_token
    rates = [_helix_rates(given, i) for i in able]
    found = helix(rates, links, given.model.layers, MILP_LIMIT_S)
    if found is None:
        return Placed([], why=why)
    chains = [
        (tuple(able[i] for i in way), tuple(found.layers[i][1] - found.layers[i][0] for i in way))
        for way in widest_ways(found, given.model.layers)
    ]
    gap = 1.0 - found.tokens_per_s / found.bound if found.bound else 0.0
    return Placed(chains, _stopped("helix", found.proved, gap), why=why)


def _helix_rates(given: Problem, node: int) -> list[float]:
    """Tokens/s by number of layers, at the decode batch that fits beside them."""
    model, room, rates = given.model, _room(given, node), []
    context = mean_context(given.work)
    for layers in range(1, model.layers + 1):
        weights = layers * model.layer_bytes
        rows = int((room - weights) // (layers * kv_layer_bytes(model, given.work, 1)))
        if weights > room / 2 or rows < 1:
            break
        rows = min(rows, MICRO_BATCH_ROWS[-1], given.work.rows)
        step_s = layers * decode_layer_s(given.nodes[node], model, rows, context)
        rates.append(rows / step_s)
    return rates


def _equal(given: Problem) -> Placed:
    """All nodes in the given order, the same number of layers each."""
    cell = cells(given.work)[0]
    table = stage_table(given.nodes, given.model, given.work, cell, Role.MIDDLE).busy_s
    usable = [i for i in range(len(given.nodes)) if np.isfinite(table[i, 0])]
    usable = usable[: given.model.layers]
    if not usable:
        return Placed([], why="no node has memory for one layer and one row")
    return Placed([(tuple(usable), tuple(equal_split(len(usable), given.model.layers)))])


METHODS: dict[str, Callable[[Problem], Placed]] = {
    "cg-bp": _cg_bp,
    "ws-rr": _cg_bp,
    "gbp-cr": _gbp_cr,
    "gca": _gca,
    "petals": _petals,
    "parallax": _parallax,
    "equal": _equal,
    "bprr": _bprr,
    "helix": _helix,
}
"""`ws-rr` is `cg-bp` with a second time scale: its routing is a policy of the run, not of the plan."""
PROGRAMS = ("bprr", "helix")
"""Methods that are integer programs: they need HiGHS, and up to MILP_LIMIT_S."""


def policy_of(method: str) -> Policy:
    """Who takes the next row in a run of the method's plan."""
    return "ws-rr" if method == "ws-rr" else POLICIES[0]
