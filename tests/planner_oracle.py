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


def stage_busy_s(
    node: Node,
    model: ModelShape,
    work: Workload,
    cell: Cell,
    role: Role,
    layers: int,
    offload: tuple[int, float],
) -> float:
    """Seconds per row of one stage with a given offload; infinite if it does not fit."""
    streamed, parked = offload
    kv = kv_layer_bytes(model, work, cell.rows)
    resident = layers - streamed + min(streamed, STREAM_BUFFERS)
    device = resident * model.layer_bytes + layers * (1 - parked) * kv
    device += workspace_bytes(model, cell) + role_bytes(model, role)
    host = streamed * model.layer_bytes + layers * parked * kv
    if device > node.memory_bytes or host > node.host_bytes:
        return math.inf
    if parked and (1 - parked) * cell.in_flight < STREAM_BUFFERS:
        return math.inf
    if (streamed or parked) and node.host_to_device_bytes_per_s <= 0:
        return math.inf
    b, width, rounds = (
        cell.micro_batch_rows,
        cell.draft_len + 1,
        decode_rounds(work, cell.draft_len),
    )
    weights = streamed * model.layer_bytes
    fetched = parked * layers * b * mean_context(work) * model.kv_bytes_per_token_layer
    to_device = node.host_to_device_bytes_per_s
    stream_s = (weights + fetched) / to_device if weights + fetched else 0.0
    mean_prompt = work.prompt_tokens.mean
    prefill = layers * prefill_layer_s(node, model, b * prefill_tokens(work), mean_prompt)
    decode = layers * decode_layer_s(node, model, b, mean_context(work), width)
    life = max(prefill, weights / to_device if weights else 0.0) + rounds * max(decode, stream_s)
    life += (1 + rounds) * node.step_s
    if Role.LAST in role:
        life += head_s(node, model, b) + rounds * head_s(node, model, b * width)
    return life / b


def best_stage_s(
    node: Node, model: ModelShape, work: Workload, cell: Cell, role: Role, layers: int
) -> float:
    """The same with the best of all offload choices, each one tried."""
    choices = itertools.product(range(layers + 1), PARKED_KV)
    return min(stage_busy_s(node, model, work, cell, role, layers, c) for c in choices)


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


def ring_row_s(
    cluster: Cluster,
    model: ModelShape,
    work: Workload,
    cell: Cell,
    order: tuple[Node, ...],
    known: Tables | None = None,
) -> float:
    """Least seconds per row of a ring in this order: all splits, offloads and codecs tried.

    `known` keeps the stages' tables between calls for one problem.
    """
    n = len(order)
    tables = np.array(_table(order, model, work, cell, {} if known is None else known))
    chosen = np.array(list(splits(model.layers, n)), np.int64).reshape(-1, n)
    if not len(chosen):
        return math.inf
    busy = tables[np.arange(n)[None, :], chosen - 1]
    longest_stage, stages_s = busy.max(axis=1), busy.sum(axis=1)
    best = math.inf
    for codecs in itertools.product(*_ring_links(cluster, model, work, cell, order)):
        longest = np.maximum(longest_stage, max((c[0] for c in codecs), default=0.0))
        life = cell.micro_batch_rows * stages_s + sum(c[1] for c in codecs)
        best = min(best, float(np.maximum(longest, life / cell.rows).min()))
    return best


def _ring_links(
    cluster: Cluster, model: ModelShape, work: Workload, cell: Cell, order: tuple[Node, ...]
) -> list[list[tuple[float, float]]]:
    if len(order) == 1:
        return []
    links = [
        link_costs(cluster.link(a.name, b.name), (a, b), model, work, cell)
        for a, b in itertools.pairwise(order)
    ]
    a, b = order[-1], order[0]
    return [*links, [return_cost(cluster.link(a.name, b.name), (a, b), work, cell)]]


def best_rate(
    cluster: Cluster, model: ModelShape, work: Workload, tried: tuple[Cell, ...]
) -> float:
    """The greatest total rate of disjoint rings: all subsets, orders, splits and combinations."""
    nodes = cluster.nodes
    rate: dict[frozenset[str], float] = {}
    known: Tables = {}
    for size in range(1, len(nodes) + 1):
        for order in itertools.permutations(nodes, size):
            key = frozenset(node.name for node in order)
            for cell in tried:
                row_s = ring_row_s(cluster, model, work, cell, order, known)
                rate[key] = max(rate.get(key, 0.0), 1.0 / row_s)
    return _best_partition(frozenset(node.name for node in nodes), rate)


def _best_partition(left: frozenset[str], rate: dict[frozenset[str], float]) -> float:
    if not left:
        return 0.0
    one = min(left)
    best = _best_partition(left - {one}, rate)
    rest = sorted(left - {one})
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            block = frozenset((one, *others))
            best = max(best, rate[block] + _best_partition(left - block, rate))
    return best


def _table(
    order: tuple[Node, ...], model: ModelShape, work: Workload, cell: Cell, known: Tables
) -> list[list[float]]:
    tables = []
    for place, node in enumerate(order):
        role = Role.FIRST if place == 0 else Role.MIDDLE
        if place == len(order) - 1:
            role |= Role.LAST
        key = (node.name, role, cell)
        if key not in known:
            counts = range(1, model.layers + 1)
            known[key] = [best_stage_s(node, model, work, cell, role, k) for k in counts]
        tables.append(known[key])
    return tables


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
        up_bytes_per_s=pick.choice([math.inf, 1e7]),
        step_s=pick.choice([0.0, 1e-3]),
    )
