"""Requests one by one over blocks that are placed, as the published evaluations count them.

The client is in the middle: every hop is a round trip to it. A request holds its caches from its start
to its end; servers compute for all their sessions at once, at the same speed. There is no batching and
no link that could be busy: what this says of a method is what its authors could say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from planner.placement import Server, Sizes, Span
from planner.routing import Hop, cache_slots, petals_route, route_s, shortest_route

RETRY_MOST_S = 60.0
"""Petals' clients try again after 1, 2, 4, ... and at last every 60 seconds."""
PETALS_HOP_S = 0.018
PETALS_SHORT_S = 10.0
"""What Petals' router charges for a hop, and for a server that is short of cache."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """A server's first pass over a prompt: its round trip, and its seconds per block."""

    round_trip_s: float
    block_s: float


def whole_request(server: Server, prefill: Prefill, tokens: int) -> Server:
    """The server with the seconds of a request of so many tokens in place of those of one token."""
    return replace(
        server,
        round_trip_s=prefill.round_trip_s + (tokens - 1) * server.round_trip_s,
        block_s=prefill.block_s + (tokens - 1) * server.block_s,
    )


def retried_s(wait_s: float) -> float:
    """The first of Petals' retries that finds the memory free."""
    tried, pause = 0.0, 1.0
    while tried < wait_s:
        tried += pause
        pause = min(2.0 * pause, RETRY_MOST_S)
    return tried


@dataclass(slots=True)
class Sessions:
    """Who holds caches where until when; mutable, owned by a router."""

    spans: Sequence[Span]
    slots: Sequence[int]
    """Caches by span: one session in one block takes one."""
    ends: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    """By span: (time it ends, blocks it caches) of the sessions there."""

    def wait_s(self, number: int, blocks: int, now_s: float) -> float:
        """Until enough sessions at a span have ended for `blocks` more caches."""
        live = sorted(end for end in self.ends.get(number, []) if end[0] > now_s)
        used = sum(cached for _, cached in live)
        if blocks > self.slots[number]:
            return float("inf")
        wait = 0.0
        for end, cached in live:
            if self.slots[number] - used >= blocks:
                break
            used -= cached
            wait = end - now_s
        return wait

    def free(self, number: int, now_s: float) -> int:
        """Caches that are free at a span."""
        held = self.ends.get(number, [])
        return self.slots[number] - sum(cached for end, cached in held if end > now_s)

    def route_wait_s(self, route: Sequence[Hop], now_s: float) -> float:
        """Until all of a route has room."""
        return max(self.wait_s(self.spans.index(h.span), h.blocks, now_s) for h in route)

    def hold(self, route: Sequence[Hop], until_s: float) -> None:
        """Keep a route's caches until then."""
        for hop in route:
            self.ends.setdefault(self.spans.index(hop.span), []).append((until_s, hop.blocks))


@dataclass(slots=True)
class WaitAware:
    """WS-RR: each request on the route of least waiting plus service (arXiv 2512.21884).

    The other of the paper's two time scales is the placement, which stays.
    """

    sessions: Sessions
    blocks: int
    retry_s: Callable[[float], float] = lambda wait_s: wait_s
    """When a request that must wait so long does start."""

    @classmethod
    def over(cls, spans: Sequence[Span], sizes: Sizes) -> "WaitAware":
        """On servers whose memory beside the weights is all for caches."""
        return cls(Sessions(spans, cache_slots(spans, sizes)), sizes.blocks)

    def route(
        self, now_s: float, tokens: int = 1, added_s: float = 0.0
    ) -> tuple[list[Hop], float] | None:
        """A request's route and the seconds it waits first; None where no route exists.

        Its caches are held from its start until its last token, and `added_s` longer.
        """
        waits = {
            i: [self.sessions.wait_s(i, k, now_s) / tokens for k in range(1, span.blocks + 1)]
            for i, span in enumerate(self.sessions.spans)
        }
        route = shortest_route(self.sessions.spans, self.blocks, waits)
        if route is None:
            return None
        wait = self.retry_s(self.sessions.route_wait_s(route, now_s))
        self.sessions.hold(route, now_s + wait + tokens * route_s(route) + added_s)
        return route, wait


@dataclass(slots=True)
class PetalsRouting:
    """Petals' router: the quickest way by round trips, servers short of cache charged 10 s."""

    sessions: Sessions
    blocks: int
    way_s: Callable[[str, str], float]
    """Half a round trip between two servers, or from the client ("")."""
    token_block_s: dict[str, float]
    """Seconds per token and block by server, which the router goes by."""

    def route(self, now_s: float, added_s: float = 0.0) -> tuple[list[Hop], float] | None:
        """A request's route and the seconds it waits first; None where no route exists."""
        spans = self.sessions.spans
        penalties = [
            PETALS_SHORT_S if 2 * span.blocks > self.sessions.free(i, now_s) else 0.0
            for i, span in enumerate(spans)
        ]
        seen = [
            replace(s, server=replace(s.server, block_s=self.token_block_s[s.server.name]))
            for s in spans
        ]
        way = petals_route(
            seen, self.blocks, lambda a, b: self.way_s(a, b) + PETALS_HOP_S, penalties
        )
        if way is None:
            return None
        route = [Hop(spans[seen.index(hop.span)], hop.blocks) for hop in way]
        wait = retried_s(self.sessions.route_wait_s(route, now_s))
        self.sessions.hold(route, now_s + wait + route_s(route) + added_s)
        return route, wait
