"""The published evaluations' world: routes by Petals, retries, and the two-cluster testbed."""

import itertools
import random

import pytest

from benchmarks.published import ADDED_S, INITIAL_S, Cell, petals_s, theirs_s
from planner.online import Prefill, retried_s, whole_request
from planner.placement import Server, Sizes, Span, blocks_held, cg_bp
from planner.routing import hop_blocks, petals_route, route_s, shortest_route
from tests.test_placement import servers


@pytest.mark.parametrize(
    ("wait_s", "starts_s"), [(0.0, 0.0), (0.4, 1.0), (1.0, 1.0), (1.1, 3.0), (130.0, 183.0)]
)
def test_request_starts_at_the_first_retry_that_finds_room(wait_s: float, starts_s: float) -> None:
    assert retried_s(wait_s) == starts_s


def test_retries_are_at_most_a_minute_apart() -> None:
    assert retried_s(400.0) == 63.0 + 6 * 60.0


def test_whole_request_takes_its_prefill_and_its_other_tokens() -> None:
    server = whole_request(Server("s", 1.0, 0.1, 0.01), Prefill(0.5, 0.2), tokens=11)
    assert route_s(shortest_route([Span(server, 0, 4)], 4) or []) == pytest.approx(
        0.5 + 4 * 0.2 + 10 * (0.1 + 4 * 0.01)
    )


@pytest.mark.parametrize("seed", range(20))
def test_petals_route_is_the_best_of_all_by_its_own_measure(seed: int) -> None:
    pick = random.Random(seed)
    blocks = pick.randint(3, 7)
    spans = []
    for server in servers(seed, pick.randint(1, 5)):
        first = pick.randrange(blocks)
        spans.append(Span(server, first, pick.randint(first + 1, blocks)))
    names = ["", *(span.server.name for span in spans)]
    ways = {pair: pick.uniform(0.001, 0.2) for pair in itertools.product(names, names)}
    penalties = [pick.choice([0.0, 10.0]) for _ in spans]

    def cheapest(done: int, last: str) -> float:
        if done == blocks:
            return 0.0
        costs = [
            ways[last, s.server.name]
            + penalties[i]
            + s.server.block_s * hop_blocks(done, s)
            + cheapest(s.end, s.server.name)
            for i, s in enumerate(spans)
            if hop_blocks(done, s)
        ]
        return min(costs, default=float("inf"))

    route = petals_route(spans, blocks, lambda a, b: ways[a, b], penalties)
    best = cheapest(0, "")
    assert (route is None) == (best == float("inf"))
    if route is not None:
        total, last = 0.0, ""
        for hop in route:
            name = hop.span.server.name
            total += ways[last, name] + penalties[spans.index(hop.span)]
            total += hop.span.server.block_s * hop.blocks
            last = name
        assert total == pytest.approx(best)


def test_cap_on_a_servers_blocks_is_kept() -> None:
    assert blocks_held(Server("s", 100.0, 0.1, 0.1, most_blocks=4), Sizes(70, 1.0, 0.1), 1) == 4


def test_two_a100_of_the_testbed_take_455_ms_a_token() -> None:
    cell = Cell(client=0, tokens=64, requests_per_s=0.5)
    placed = cg_bp(cell.servers(), cell.sizes, 10)
    assert placed is not None
    assert route_s(shortest_route(placed, 70) or []) == pytest.approx(0.455, abs=5e-4)


@pytest.mark.parametrize(("tokens", "simulated"), [(64, 1.59), (128, 0.92)])
def test_published_cells_of_the_method_are_met_with_its_constant(
    tokens: int, simulated: float
) -> None:
    cell = Cell(client=0, tokens=tokens, requests_per_s=0.5)
    per_token_s, _ = theirs_s(cell, run=0, added_s=ADDED_S["cg-bp + ws-rr"])
    assert per_token_s == pytest.approx(simulated, rel=0.15)


def test_constants_are_in_every_request_and_nothing_else_is() -> None:
    cell = Cell(client=1, tokens=64, requests_per_s=0.001)
    for method in (petals_s, theirs_s):
        bare, _ = method(cell, 0, 0.0)
        padded, _ = method(cell, 0, 100.0)
        assert padded - bare == pytest.approx(100.0 / 64, rel=0.02)
        assert bare > INITIAL_S / 64
