"""Published routing: shortest paths equal exhaustive search, and nobody waits within the design."""

import random
from collections.abc import Sequence

import pytest

from planner.online import WaitAware
from planner.placement import Server, Sizes, Span, cg_bp
from planner.routing import (
    cache_slots,
    chains_by_capacity,
    hop_blocks,
    route_s,
    shortest_route,
)
from tests.test_placement import servers


def every_route_s(spans: Sequence[Span], blocks: int, done: int = 0) -> list[float]:
    """Times of all feasible routes."""
    if done == blocks:
        return [0.0]
    times: list[float] = []
    for span in spans:
        count = hop_blocks(done, span)
        if count:
            here = span.server.round_trip_s + span.server.block_s * count
            times.extend(here + rest for rest in every_route_s(spans, blocks, span.end))
    return times


@pytest.mark.parametrize("seed", range(40))
def test_shortest_route_is_the_best_of_all(seed: int) -> None:
    pick = random.Random(seed)
    blocks = pick.randint(3, 8)
    spans = []
    for server in servers(seed, pick.randint(1, 6)):
        first = pick.randrange(blocks)
        spans.append(Span(server, first, pick.randint(first + 1, blocks)))
    route = shortest_route(spans, blocks)
    best = min(every_route_s(spans, blocks), default=None)
    assert (route is None) == (best is None)
    if route is not None and best is not None:
        assert route_s(route) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(20))
def test_nobody_waits_within_the_design_and_routes_are_the_shortest(seed: int) -> None:
    sizes, sessions = Sizes(10, 4.0, 0.2), 5
    spans = cg_bp(servers(seed, 6), sizes, sessions)
    if spans is None:
        return
    best = shortest_route(spans, sizes.blocks)
    assert best is not None
    online = WaitAware.over(spans, sizes)
    for _ in range(sessions):
        routed = online.route(0.0, tokens=100)
        assert routed is not None
        route, wait = routed
        assert wait == 0.0
        assert route_s(route) == pytest.approx(route_s(best))


def test_request_beyond_the_memory_waits_for_a_session_to_end() -> None:
    server = Server("s", 10.0, 0.1, 0.1)
    online = WaitAware.over([Span(server, 0, 4)], Sizes(4, 2.0, 0.5))
    first = online.route(0.0, tokens=10)
    second = online.route(1.0, tokens=10)
    assert first is not None
    assert second is not None
    assert first[1] == 0.0
    assert second[1] == pytest.approx(10 * 0.5 - 1.0)


def test_chains_take_sessions_until_memory_is_full() -> None:
    fast, slow = Server("fast", 10.0, 0.1, 0.1), Server("slow", 12.0, 0.1, 0.3)
    spans = [Span(fast, 0, 4), Span(slow, 0, 4)]
    chains = chains_by_capacity(spans, Sizes(4, 2.0, 0.25))
    assert [(c[0][0].span.server.name, c[1]) for c in chains] == [("fast", 2), ("slow", 4)]


@pytest.mark.parametrize("seed", range(20))
def test_chains_hold_no_more_sessions_than_memory_and_leave_no_route_that_could_hold_one(
    seed: int,
) -> None:
    pick = random.Random(seed)
    sizes = Sizes(4, 2.0, 0.25)
    crowd = [Server(str(i), pick.uniform(4, 12), pick.random(), pick.random()) for i in range(6)]
    spans = cg_bp(crowd, sizes, 1) or []
    slots = dict(zip(spans, cache_slots(spans, sizes), strict=True))
    times = []
    for route, sessions in chains_by_capacity(spans, sizes):
        times.append(route_s(route))
        for hop in route:
            slots[hop.span] -= sessions * hop.blocks
    assert times == sorted(times)
    assert min(slots.values(), default=0) >= 0
    # A span that cannot hold one session of what it adds is out; the others form no route.
    left = [span for span, free in slots.items() if free >= span.blocks]
    assert shortest_route(left, sizes.blocks) is None


def test_two_a100_chain_of_the_paper_takes_455_ms_a_token() -> None:
    one, two = (Server(n, 86.13e9, 0.15, 2.2197e-3) for n in "ab")
    route = shortest_route([Span(one, 0, 35), Span(two, 35, 70)], 70)
    assert route is not None
    assert route_s(route) == pytest.approx(0.455, abs=5e-4)
