"""Published ways to route requests over placed blocks; our yardsticks beside `placement`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from planner.placement import Sizes, Span


@dataclass(frozen=True, slots=True)
class Hop:
    """Part of a route: the span that is visited, and how many blocks it processes."""

    span: Span
    blocks: int


def hop_blocks(done: int, span: Span) -> int:
    """Blocks that a span adds after `done` are done; 0 where it may not follow (BPRR, lemma 1)."""
    return span.end - done if span.first <= done < span.end else 0


def shortest_route(
    spans: Sequence[Span], blocks: int, waits_s: Mapping[int, Sequence[float]] | None = None
) -> list[Hop] | None:
    """The route of least time per token through all blocks; None if there is none.

    Dijkstra over how many blocks are done. A visited span processes all that it has left; this is
    optimal for a placement (BPRR, lemma 3). `waits_s[i][k - 1]` is charged beside span i's own
    time where it processes k blocks.
    """
    best: dict[int, float] = {0: 0.0}
    came: dict[int, tuple[int, Hop]] = {}
    open_ends: list[tuple[float, int]] = [(0.0, 0)]
    while open_ends:
        time, done = heappop(open_ends)
        if done == blocks:
            return _trace(came, blocks)
        if time > best[done]:
            continue
        for number, span in enumerate(spans):
            count = hop_blocks(done, span)
            if not count:
                continue
            wait = waits_s[number][count - 1] if waits_s else 0.0
            total = time + wait + span.server.round_trip_s + span.server.block_s * count
            if total < best.get(span.end, float("inf")):
                best[span.end] = total
                came[span.end] = (done, Hop(span, count))
                heappush(open_ends, (total, span.end))
    return None


def _trace(came: dict[int, tuple[int, Hop]], blocks: int) -> list[Hop]:
    route: list[Hop] = []
    while blocks:
        blocks, hop = came[blocks]
        route.append(hop)
    return route[::-1]


def route_s(route: Sequence[Hop]) -> float:
    """Seconds per token of a route."""
    return sum(h.span.server.round_trip_s + h.span.server.block_s * h.blocks for h in route)


def cache_slots(spans: Sequence[Span], sizes: Sizes) -> list[int]:
    """Caches of one session in one block that fit beside every span's weights."""
    free = [s.server.memory_bytes - sizes.block_bytes * s.blocks for s in spans]
    return [int(bytes_left // sizes.cache_bytes) for bytes_left in free]


def petals_route(
    spans: Sequence[Span],
    blocks: int,
    way_s: Callable[[str, str], float],
    penalty_s: Sequence[float],
) -> list[Hop] | None:
    """Petals' own route of least latency: half a round trip a hop, and every span to its end.

    `way_s(a, b)` is that half between two servers, or from the client (""); `penalty_s[i]` what span
    i is charged for being short of cache.
    """
    best: dict[int, float] = {}
    came: dict[int, tuple[int, Hop]] = {}
    ends: list[tuple[float, int, int]] = [(0.0, 0, -1)]
    while ends:
        time, done, last = heappop(ends)
        if done == blocks:
            return _trace_spans(came, last)
        if time > best.get(last, 0.0):
            continue
        here = spans[last].server.name if last >= 0 else ""
        for number, span in enumerate(spans):
            count = hop_blocks(done, span)
            if not count:
                continue
            total = time + way_s(here, span.server.name) + penalty_s[number]
            total += span.server.block_s * count
            if total < best.get(number, float("inf")):
                best[number], came[number] = total, (last, Hop(span, count))
                heappush(ends, (total, span.end, number))
    return None


def _trace_spans(came: dict[int, tuple[int, Hop]], last: int) -> list[Hop]:
    route: list[Hop] = []
    while last >= 0:
        last, hop = came[last]
        route.append(hop)
    return route[::-1]


def chains_by_capacity(spans: Sequence[Span], sizes: Sizes) -> list[tuple[list[Hop], int]]:
    """GCA: the shortest chain takes all the sessions it can, saturated spans go, and so on.

    Each chain comes with its sessions; the rate they carry is the sum of sessions / chain time
    (Little's law).
    """
    slots = dict(enumerate(cache_slots(spans, sizes)))
    chains: list[tuple[list[Hop], int]] = []
    alive = set(range(len(spans)))
    while True:
        numbers = sorted(alive)
        route = shortest_route([spans[i] for i in numbers], sizes.blocks)
        if route is None:
            return chains
        used = {i: hop.blocks for hop in route for i in numbers if spans[i] is hop.span}
        sessions = min(slots[i] // blocks for i, blocks in used.items())
        if sessions:
            chains.append((route, sessions))
        for i, blocks in used.items():
            slots[i] -= sessions * blocks
        stuck = {i for i, blocks in used.items() if slots[i] < blocks}
        alive -= stuck
