"""Published ways to route requests over placed blocks; our yardsticks beside `placement`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(slots=True)
class Online:
    """WS-RR: routes requests as they come, each on the path of least waiting plus service.

    Mutable: remembers when the sessions at every span end, as the paper's two time scales ask:
    the placement stays, the routing follows the load.
    """

    spans: Sequence[Span]
    sizes: Sizes
    ends: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    """By span: (time it ends, blocks it caches) of the sessions there."""

    def route(self, now_s: float, tokens: int) -> tuple[list[Hop], float] | None:
        """A request's route and the seconds it waits first; None where no route exists.

        Its caches are held from its start until its last token.
        """
        waits = {
            i: [self._wait_s(i, k, now_s) / tokens for k in range(1, span.blocks + 1)]
            for i, span in enumerate(self.spans)
        }
        route = shortest_route(self.spans, self.sizes.blocks, waits)
        if route is None:
            return None
        numbers = [self.spans.index(hop.span) for hop in route]
        wait = max(
            self._wait_s(i, hop.blocks, now_s) for i, hop in zip(numbers, route, strict=True)
        )
        end = now_s + wait + tokens * route_s(route)
        for i, hop in zip(numbers, route, strict=True):
            self.ends.setdefault(i, []).append((end, hop.blocks))
        return route, wait

    def _wait_s(self, number: int, blocks: int, now_s: float) -> float:
        """Until enough sessions at a span have ended for `blocks` more caches."""
        span = self.spans[number]
        free = span.server.memory_bytes - self.sizes.block_bytes * span.blocks
        slots = int(free // self.sizes.cache_bytes)
        live = sorted(end for end in self.ends.get(number, []) if end[0] > now_s)
        used = sum(cached for _, cached in live)
        if blocks > slots:
            return float("inf")
        wait = 0.0
        for end, cached in live:
            if slots - used >= blocks:
                break
            used -= cached
            wait = end - now_s
        return wait


def chains_by_capacity(spans: Sequence[Span], sizes: Sizes) -> list[tuple[list[Hop], int]]:
    """GCA: the shortest chain takes all the sessions it can, saturated spans go, and so on.

    Each chain comes with its sessions; the rate they carry is the sum of sessions / chain time
    (Little's law).
    """
    slots = {
        i: int((s.server.memory_bytes - sizes.block_bytes * s.blocks) // sizes.cache_bytes)
        for i, s in enumerate(spans)
    }
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
