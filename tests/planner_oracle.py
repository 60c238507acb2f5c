"""The planner's formulas in plain loops, and exhaustive search over everything it decides."""

import itertools
import math
import random
from collections.abc import Iterator

import numpy as np

from planner.cost import (
    PARKED_KV,
    STREAM_BUFFERS,
    Cell,
    Floats,
    Ints,
    Role,
    decode_rounds,
    kv_layer_bytes,
    mean_context,
    prefill_tokens,
    role_bytes,
    workspace_bytes,
)
from planner.facts import Cluster, CodecRate, Lengths, Link, ModelShape, Node, Workload
from planner.layer_times import decode_layer_s, head_s, prefill_layer_s

Tables = dict[tuple[str, Role, Cell], list[float]]


def best_stage_s(
    node: Node, model: ModelShape, work: Workload, cell: Cell, role: Role, layers: int
) -> float:
    """Seconds per row of one stage with the best of all offload choices, each one tried."""
    b, width, rounds = (
        cell.micro_batch_rows,
        cell.draft_len + 1,
        decode_rounds(work, cell.draft_len),
    )
    mean_prompt = work.prompt_tokens.mean
    prefill = layers * prefill_layer_s(node, model, b * prefill_tokens(work), mean_prompt)
    decode = layers * decode_layer_s(node, model, b, mean_context(work), width)
    beside = (1 + rounds) * node.step_s
    if Role.LAST in role:
        beside += head_s(node, model, b) + rounds * head_s(node, model, b * width)
    kv = kv_layer_bytes(model, work, cell.rows)
    fixed = workspace_bytes(model, cell) + role_bytes(model, role)
    best = math.inf
    for streamed, parked in itertools.product(range(layers + 1), PARKED_KV):
        if not _fits(node, model, cell, (layers, streamed, parked), kv, fixed):
            continue
        weights = streamed * model.layer_bytes
        fetched = parked * layers * b * mean_context(work) * model.kv_bytes_per_token_layer
        to_device = node.host_to_device_bytes_per_s if node.host_bytes else node.disk_bytes_per_s
        stream_s = weights / to_device if weights else 0.0
        stream_s += fetched / (node.parked_kv_bytes_per_s or to_device) if fetched else 0.0
        life = max(prefill, weights / to_device if weights else 0.0)
        life += rounds * max(decode, stream_s) + beside
        best = min(best, life / b)
    return best


def _fits(
    node: Node,
    model: ModelShape,
    cell: Cell,
    choice: tuple[int, int, float],
    kv: float,
    fixed: float,
) -> bool:
    """Whether (layers, streamed ones, parked fraction of KV) fits in device and host memory."""
    layers, streamed, parked = choice
    resident = layers - streamed + min(streamed, STREAM_BUFFERS)
    if parked and model.window:
        return False
    # Slots that a round fetches share the room of two; the others have their own.
    staying = (1 - parked) * (cell.in_flight - 1)
    room = min(1.0, (staying + 2) / cell.in_flight) if parked else 1.0
    device = resident * model.layer_bytes + layers * room * kv + fixed
    host = streamed * model.layer_bytes + (layers * kv if parked else 0.0)
    if device > node.memory_bytes:
        return False
    if not node.host_bytes:
        may_park = not parked or node.parked_kv_bytes_per_s > 0
        return may_park and (not streamed or node.disk_bytes_per_s > 0)
    if host > node.host_bytes:
        return False
    may_park = not parked or max(node.parked_kv_bytes_per_s, node.host_to_device_bytes_per_s) > 0
    return may_park and (not streamed or node.host_to_device_bytes_per_s > 0)


def link_costs(
    link: Link | None, ends: tuple[Node, Node], model: ModelShape, work: Workload, cell: Cell
) -> list[tuple[float, float]]:
    """(occupied, hop) of a forward link for every codec."""
    return [
        _one_link(link, ends, work, cell, model.activation_bytes_per_token, codec)
        for codec in (None, *work.codec.values())
    ]


def return_cost(
    link: Link | None, ends: tuple[Node, Node], work: Workload, cell: Cell
) -> tuple[float, float]:
    """(occupied, hop) of the link that brings token ids home."""
    return _one_link(link, ends, work, cell, None, None)


def _one_link(
    link: Link | None,
    ends: tuple[Node, Node],
    work: Workload,
    cell: Cell,
    token_bytes: float | None,
    codec: CodecRate | None,
) -> tuple[float, float]:
    rounds = decode_rounds(work, cell.draft_len)
    rate = min(ends[0].up_bytes_per_s, ends[1].down_bytes_per_s)
    rate = min(rate, link.bytes_per_s * (1 - link.loss)) if link else 0.0
    if link is None or rate <= 0:
        return math.inf, math.inf
    if token_bytes is None:
        raw = work.output_tokens.mean * 4
    else:
        raw = (prefill_tokens(work) + rounds * (cell.draft_len + 1)) * token_bytes
    coding = raw / codec.bytes_per_s if codec else 0.0
    sent = raw / (codec.ratio if codec else 1.0)
    sent += (1 + rounds) * (12 + 256 / cell.micro_batch_rows)
    wire = sent / rate
    hop = (1 + rounds) * link.latency_s + cell.micro_batch_rows * (wire + 2 * coding)
    return max(wire, coding), hop


def splits(layers: int, stages: int) -> Iterator[tuple[int, ...]]:
    """Every way to give each stage at least one of the layers."""
    for cuts in itertools.combinations(range(1, layers), stages - 1):
        ends = (0, *cuts, layers)
        yield tuple(b - a for a, b in itertools.pairwise(ends))


def ring_row_s(cluster: Cluster, model: ModelShape, work: Workload, cell: Cell) -> float:
    """Least seconds per row of a ring through all nodes in their order."""
    order = np.arange(len(cluster.nodes))[None, :]
    return float(_rings_row_s(cluster, model, work, cell, order, {})[0])


def best_rate(
    cluster: Cluster, model: ModelShape, work: Workload, tried: tuple[Cell, ...]
) -> float:
    """The greatest total rate of disjoint rings: all subsets, orders, splits and combinations."""
    names = frozenset(node.name for node in cluster.nodes)
    return best_partition(names, rates_of_subsets(cluster, model, work, tried))


def rates_of_subsets(
    cluster: Cluster, model: ModelShape, work: Workload, tried: tuple[Cell, ...]
) -> dict[frozenset[str], float]:
    """The rate of the best ring through each subset, by its nodes' names."""
    names = [node.name for node in cluster.nodes]
    rate: dict[frozenset[str], float] = {}
    known: Tables = {}
    for size in range(1, len(names) + 1):
        orders = np.array(list(itertools.permutations(range(len(names)), size)))
        row_s = np.full(len(orders), np.inf)
        for cell in tried:
            row_s = np.minimum(row_s, _rings_row_s(cluster, model, work, cell, orders, known))
        for order, seconds in zip(orders, row_s, strict=True):
            key = frozenset(names[i] for i in order)
            rate[key] = max(rate.get(key, 0.0), 1.0 / float(seconds))
    return rate


def _rings_row_s(
    cluster: Cluster,
    model: ModelShape,
    work: Workload,
    cell: Cell,
    orders: Ints,
    known: Tables,
) -> Floats:
    """Least seconds per row of a ring in each order: all splits, offloads and codecs tried.

    `orders` has shape (orders, nodes); `known` keeps the stages' tables between calls.
    """
    n = orders.shape[1]
    chosen = np.array(list(splits(model.layers, n)), np.int64).reshape(-1, n)
    if not len(chosen):
        return np.full(len(orders), np.inf)
    longest, total = np.zeros((2, len(orders), len(chosen)))
    for place in range(n):
        table = np.array(_tables(cluster.nodes, model, work, cell, (place, n), known))
        busy = table[orders[:, place]][:, chosen[:, place] - 1]
        longest, total = np.maximum(longest, busy), total + busy
    best = np.full(len(orders), np.inf)
    links = _all_links(cluster, model, work, cell)
    returns = len(links[0]) - 1
    choices = [range(returns)] * (n - 1) + [range(returns, returns + 1)] * (n > 1)
    for codecs in itertools.product(*choices):
        slowest, hops = np.zeros((2, len(orders)))
        for place, codec in enumerate(codecs):
            a, b = orders[:, place], orders[:, (place + 1) % n]
            occupied, hop = links[0][codec][a, b], links[1][codec][a, b]
            slowest, hops = np.maximum(slowest, occupied), hops + hop
        life = cell.micro_batch_rows * total + hops[:, None]
        row_s = np.maximum(np.maximum(longest, slowest[:, None]), life / cell.rows)
        best = np.minimum(best, row_s.min(axis=1))
    return best


def _all_links(
    cluster: Cluster, model: ModelShape, work: Workload, cell: Cell
) -> tuple[list[Floats], list[Floats]]:
    """(occupied, hop) of every pair of nodes, by codec and at last for the return."""
    nodes = cluster.nodes
    kinds = 2 + len(work.codec)
    occupied, hop = np.full((2, kinds, len(nodes), len(nodes)), np.inf)
    for (i, a), (j, b) in itertools.permutations(enumerate(nodes), 2):
        link = cluster.link(a.name, b.name)
        forward = link_costs(link, (a, b), model, work, cell)
        for kind, cost in enumerate([*forward, return_cost(link, (a, b), work, cell)]):
            occupied[kind, i, j], hop[kind, i, j] = cost
    return list(occupied), list(hop)


def best_partition(left: frozenset[str], rate: dict[frozenset[str], float]) -> float:
    """The greatest sum of rates of disjoint subsets."""
    if not left:
        return 0.0
    one = min(left)
    best = best_partition(left - {one}, rate)
    rest = sorted(left - {one})
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            block = frozenset((one, *others))
            best = max(best, rate[block] + best_partition(left - block, rate))
    return best


def _tables(
    nodes: tuple[Node, ...],
    model: ModelShape,
    work: Workload,
    cell: Cell,
    place: tuple[int, int],
    known: Tables,
) -> list[list[float]]:
    """Each node's seconds per row of 1..layers layers, as this stage of so many."""
    stage, stages = place
    role = Role.FIRST if stage == 0 else Role.MIDDLE
    if stage == stages - 1:
        role |= Role.LAST
    for node in nodes:
        if (node.name, role, cell) not in known:
            counts = range(1, model.layers + 1)
            busy = [best_stage_s(node, model, work, cell, role, k) for k in counts]
            known[node.name, role, cell] = busy
    return [known[node.name, role, cell] for node in nodes]


def random_case(seed: int, nodes: int, layers: int) -> tuple[Cluster, ModelShape, Workload]:
    """A small heterogeneous problem; some nodes lack memory, some links are slow or missing."""
    pick = random.Random(seed)
    layer_bytes = pick.uniform(0.5e9, 2e9)
    hidden = pick.choice([1024, 4096])
    model = ModelShape(
        layers, hidden, layer_bytes, pick.choice([512.0, 4096.0]), 2,
        pick.choice([0.0, 0.5]) * layer_bytes, pick.choice([0.2, 1.5]) * layer_bytes, layer_bytes,
    )  # fmt: skip
    machines = tuple(_random_node(pick, i, layer_bytes, layers, nodes) for i in range(nodes))
    names = [m.name for m in machines]
    links = [
        Link(a, b, pick.choice([0.001, 0.03, 0.2]), pick.choice([0.0, 3e6, 3e7, 1e9]))
        for a, b in itertools.permutations(names, 2)
        if pick.random() < 0.7
    ]
    default = Link("", "", pick.uniform(0.005, 0.1), pick.choice([2e6, 2e7]), pick.choice([0, 0.1]))
    codec = {"lossless": CodecRate(1.5, 5e8)} if pick.random() < 0.5 else {}
    acceptance = (0.7, 0.6) if pick.random() < 0.3 else ()
    prompt, output = pick.choice([32.0, 400.0]), pick.choice([1.0, 16.0, 120.0])
    work = Workload(
        pick.choice([3, 500, 10_000]), Lengths(prompt, prompt * 2), Lengths(output, output * 2),
        pick.choice([0.0, 0.3]), acceptance, codec,
    )  # fmt: skip
    return Cluster(machines, tuple(links), default if pick.random() < 0.8 else None), model, work


def _random_node(pick: random.Random, i: int, layer_bytes: float, layers: int, n: int) -> Node:
    share = pick.choice([0.3, 0.8, 1.5, 4.0]) * layer_bytes * layers / n
    return Node(
        name=f"n{i}",
        flop_per_s=pick.uniform(1e12, 3e13),
        memory_bytes=share + 2.5 * layer_bytes,
        memory_bytes_per_s=pick.uniform(5e10, 1e12),
        host_bytes=pick.choice([0.0, 4.0]) * share,
        host_to_device_bytes_per_s=pick.choice([0.0, 1e10, 3e10]),
        disk_bytes_per_s=pick.choice([0.0, 2e9]),
        parked_kv_bytes_per_s=pick.choice([0.0, 5e9]),
        up_bytes_per_s=pick.choice([math.inf, 1e7]),
        step_s=pick.choice([0.0, 1e-3]),
    )
