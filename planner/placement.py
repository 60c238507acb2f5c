"""Published ways to place a model's blocks on servers, each from its formulas; our yardsticks.

Blocks are layers, sessions are requests in flight. Times are per token, as these methods see them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Server:
    """A node as the published methods know it."""

    name: str
    memory_bytes: float
    round_trip_s: float
    """Per token between a client and the server, overhead included; the worst client's."""
    block_s: float
    """Per token and block."""
    most_blocks: int | None = None
    """A cap that some evaluations put on small servers, beside their memory."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one block's weights, and of one session's cache in one block."""

    blocks: int
    block_bytes: float
    cache_bytes: float


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks [first, end) on one server."""

    server: Server
    first: int
    end: int

    @property
    def blocks(self) -> int:
        return self.end - self.first


def blocks_held(server: Server, sizes: Sizes, sessions: int) -> int:
    """Blocks that fit with a cache for so many sessions in each (BPRR, step 1)."""
    each = sizes.block_bytes + sizes.cache_bytes * sessions
    most = sizes.blocks if server.most_blocks is None else min(server.most_blocks, sizes.blocks)
    return min(int(server.memory_bytes // each), most)


def sessions_held(server: Server, sizes: Sizes, blocks: int) -> int:
    """Sessions whose caches fit beside so many blocks."""
    free = server.memory_bytes - sizes.block_bytes * blocks
    return max(int(free // (sizes.cache_bytes * blocks)), 0)


def most_sessions(servers: Sequence[Server], sizes: Sizes) -> int:
    """Design sessions up to which CG-BP is surely feasible (BPRR, corollary 1)."""
    slots = sizes.blocks + len(servers)
    free = sum(s.memory_bytes for s in servers) - sizes.block_bytes * slots
    return max(int(free // (sizes.cache_bytes * slots)), 0)


def cg_bp(servers: Sequence[Server], sizes: Sizes, sessions: int) -> list[Span] | None:
    """Conservative greedy block placement (Sun et al. 2025, arXiv 2512.21884); None if infeasible.

    Servers by rising time per block; each takes the window with the most time still to be saved
    among those with a block short of sessions, or, with none short, the least covered one.
    """
    held = _by_time_per_block(servers, sizes, sessions)
    if sum(blocks for _, blocks, _ in held) < sizes.blocks:
        return None
    slowest = max(per_block for *_, per_block in held) + 1.0
    covered = [0] * sizes.blocks
    time = [sessions * slowest] * sizes.blocks
    spans = []
    for server, blocks, per_block in held:
        first = _window(covered, time, blocks, sessions)
        capacity = sessions_held(server, sizes, blocks)
        for block in range(first, first + blocks):
            short = max(sessions - covered[block], 0)
            time[block] -= (slowest - per_block) * min(short, capacity)
            covered[block] += capacity
        spans.append(Span(server, first, first + blocks))
    return spans if min(covered) >= sessions else None


def _by_time_per_block(
    servers: Sequence[Server], sizes: Sizes, sessions: int
) -> list[tuple[Server, int, float]]:
    """(server, blocks, seconds per token and block) of those that hold any, fastest first."""
    held = []
    for server in servers:
        blocks = blocks_held(server, sizes, sessions)
        if blocks:
            held.append((server, blocks, server.round_trip_s / blocks + server.block_s))
    return sorted(held, key=lambda one: one[2])


def _window(covered: list[int], time: list[float], blocks: int, sessions: int) -> int:
    starts = range(len(covered) - blocks + 1)
    if min(covered) < sessions:
        short = [a for a in starts if min(covered[a : a + blocks]) < sessions]
        return max(short, key=lambda a: (sum(time[a : a + blocks]), -a))
    return min(starts, key=lambda a: (sorted(covered[a : a + blocks]), a))


def cg_bp_bound_s(servers: Sequence[Server], sizes: Sizes, sessions: int) -> float:
    """Seconds per token that CG-BP's routes do not exceed on average (theorem 2).

    Over the first K servers that together cover every block for all sessions: the sum of their
    times, less what the K-th computes beyond the last block.
    """
    held = _by_time_per_block(servers, sizes, sessions)
    for count in range(1, len(held) + 1):
        first = held[:count]
        spans = cg_bp([server for server, *_ in first], sizes, sessions)
        if spans is not None:
            total = sum(per_block * blocks for _, blocks, per_block in first)
            beyond = sum(blocks for _, blocks, _ in first) - sizes.blocks
            return total - first[-1][0].block_s * beyond
    return float("inf")


def petals_blocks(server: Server, block_bytes: float, hidden: int, kv_groups: int = 1) -> int:
    """Blocks that Petals places on a server: memory less a reserve, by weights and a fixed cache."""
    cache_tokens = 16_384 if kv_groups > 1 else 4_096
    cache = 2.0 * hidden * cache_tokens * 2.0 / kv_groups
    return int((server.memory_bytes - 2 * GIB * hidden / 14_336) // (block_bytes + cache))


def petals(servers: Sequence[Server], blocks: int, held: Sequence[int]) -> list[Span]:
    """Petals' greedy placement: each server in turn takes the worst served window.

    The window whose sorted summed throughputs are least in lexicographic order; ties go left.
    """
    served = [0.0] * blocks
    spans = []
    for server, want in zip(servers, held, strict=True):
        count = min(want, blocks)
        if count < 1:
            continue
        first = min(range(blocks - count + 1), key=lambda a: (sorted(served[a : a + count]), a))
        throughput = 1.0 / (server.block_s * (count + 1) / 2.0)
        for block in range(first, first + count):
            served[block] += throughput
        spans.append(Span(server, first, first + count))
    return spans


def gbp_cr(
    servers: Sequence[Server], sizes: Sizes, sessions: int, rate_per_s: float = float("inf")
) -> list[list[Span]]:
    """Disjoint chains in order of time per block (arXiv 2604.14993), until their rate suffices.

    Each chain serves `sessions` at once, so it carries sessions / its time.
    """
    chains: list[list[Span]] = []
    chain: list[Span] = []
    rate = 0.0
    for server, blocks, _ in _by_time_per_block(servers, sizes, sessions):
        if rate >= rate_per_s:
            break
        first = chain[-1].end if chain else 0
        chain.append(Span(server, first, min(first + blocks, sizes.blocks)))
        if chain[-1].end == sizes.blocks:
            chains.append(chain)
            rate += sessions / chain_s(chain)
            chain = []
    return chains


def chain_s(chain: Sequence[Span]) -> float:
    """Seconds per token through a chain."""
    return sum(span.server.round_trip_s + span.server.block_s * span.blocks for span in chain)


def parallax(capacity: Sequence[int], layers: int) -> list[list[int]]:
    """Pipelines by node number, as Parallax's greedy forms them (arXiv 2509.26182).

    For k pipelines, nodes by falling capacity go to the pipeline that lacks most; of all k, the
    one that maximises k^2 / stages.
    """
    order = sorted(range(len(capacity)), key=lambda i: (-capacity[i], i))
    best: list[list[int]] = []
    best_value = 0.0
    for count in range(1, sum(capacity) // layers + 1):
        lacking, groups = [layers] * count, [[] for _ in range(count)]  # type: list[int], list[list[int]]
        for node in order:
            poorest = max(range(count), key=lambda g: (lacking[g], -g))
            if lacking[poorest] > 0 and capacity[node] > 0:
                groups[poorest].append(node)
                lacking[poorest] -= capacity[node]
        stages = sum(len(group) for group in groups)
        if max(lacking) <= 0 and count**2 / stages > best_value:
            best, best_value = groups, count**2 / stages
    return best


def water_fill(capacity: Sequence[int], speed: Sequence[float], layers: int) -> list[int]:
    """Layers in proportion to speed, capped by capacity; floors, then the largest remainders."""
    low, high = 0.0, layers / min(speed)
    for _ in range(60):
        level = (low + high) / 2.0
        filled = sum(min(c, level * f) for c, f in zip(capacity, speed, strict=True))
        low, high = (level, high) if filled < layers else (low, level)
    ideal = [min(c, high * f) for c, f in zip(capacity, speed, strict=True)]
    counts = [max(int(x), 1) for x in ideal]
    by_remainder = sorted(range(len(ideal)), key=lambda i: (int(ideal[i]) - ideal[i], i))
    while sum(counts) < layers:
        open_nodes = [i for i in by_remainder if counts[i] < capacity[i]]
        for i in open_nodes[: layers - sum(counts)]:
            counts[i] += 1
    while sum(counts) > layers:
        counts[max(range(len(counts)), key=lambda i: counts[i])] -= 1
    return counts


def equal_split(nodes: int, layers: int) -> list[int]:
    """The same number of layers for every node, the first ones one more."""
    return [layers // nodes + (i < layers % nodes) for i in range(nodes)]
