"""The published integer programs, against exhaustive search and their own bounds."""

import itertools
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from planner.milp import MissingSolverError, Program
from planner.milp_bprr import bprr, routed
from planner.milp_helix import helix
from planner.placement import Server, Sizes, Span, cg_bp
from planner.routing import hop_blocks, route_s, shortest_route
from tests.test_placement import servers as crowd

LIMIT_S = 60.0


def placements(servers: list[Server], sizes: Sizes) -> Iterator[list[Span]]:
    """Every way to put consecutive blocks on every server."""
    windows = [(a, e) for a in range(sizes.blocks) for e in range(a + 1, sizes.blocks + 1)]
    for chosen in itertools.product(windows, repeat=len(servers)):
        yield [Span(s, a, e) for s, (a, e) in zip(servers, chosen, strict=True)]


def every_route(spans: list[Span], blocks: int, done: int = 0) -> Iterator[list[tuple[int, int]]]:
    """Every feasible route, as (server's number, blocks processed)."""
    if done == blocks:
        yield []
        return
    for number, span in enumerate(spans):
        count = hop_blocks(done, span)
        if count:
            for rest in every_route(spans, blocks, span.end):
                yield [(number, count), *rest]


def least_s(spans: list[Span], sizes: Sizes, requests: int) -> float:
    """Least total time of all requests over this placement, memory respected."""
    routes = list(every_route(spans, sizes.blocks))
    best = float("inf")
    for chosen in itertools.combinations_with_replacement(routes, requests):
        used = [sizes.block_bytes * span.blocks for span in spans]
        total = 0.0
        for number, count in itertools.chain(*chosen):
            used[number] += sizes.cache_bytes * count
            total += spans[number].server.round_trip_s + spans[number].server.block_s * count
        if all(u <= s.server.memory_bytes + 1e-9 for u, s in zip(used, spans, strict=True)):
            best = min(best, total)
    return best


def three_servers(seed: int) -> tuple[list[Server], Sizes]:
    pick = random.Random(seed)
    servers = [
        Server(f"s{i}", pick.uniform(6, 16), pick.uniform(0.05, 0.4), pick.uniform(0.01, 0.2))
        for i in range(3)
    ]
    return servers, Sizes(4, 2.5, pick.uniform(0.2, 0.8))


@pytest.mark.parametrize("seed", range(4))
def test_placement_and_routing_equal_exhaustive_search(seed: int) -> None:
    servers, sizes = three_servers(seed)
    best = min(least_s(spans, sizes, 2) for spans in placements(servers, sizes))
    answer = bprr(servers, sizes, 2, LIMIT_S)
    if best == float("inf"):
        assert answer is None
        return
    assert answer is not None
    assert answer.proved
    assert answer.seconds == pytest.approx(best, rel=1e-5)
    # Its placement is worth what it says.
    assert least_s(list(answer.spans), sizes, 2) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_conservative_greedy_is_never_better_than_the_program(seed: int) -> None:
    servers, sizes = three_servers(seed)
    spans = cg_bp(servers, sizes, 2)
    answer = bprr(servers, sizes, 2, LIMIT_S)
    if spans is None or answer is None:
        return
    greedy = least_s(spans, sizes, 2)
    assert greedy >= answer.seconds * (1 - 1e-6)
    assert answer.bound_s <= answer.seconds * (1 + 1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_within_the_design_the_routing_program_gives_everyone_the_shortest_route(seed: int) -> None:
    sizes, requests = Sizes(6, 4.0, 0.4), 3
    spans = cg_bp(crowd(seed, 4), sizes, requests)
    if spans is None:
        return
    route = shortest_route(spans, sizes.blocks)
    answer = routed(spans, sizes, requests, LIMIT_S)
    assert route is not None
    assert answer is not None
    assert answer.seconds == pytest.approx(requests * route_s(route), rel=1e-6)
    assert answer.seconds == pytest.approx(least_s(spans, sizes, requests), rel=1e-6)


def max_flow(capacity: dict[tuple[str, str], float]) -> float:
    """Edmonds and Karp, source `s` to sink `t`."""
    left = dict(capacity)
    names = {name for edge in left for name in edge}
    total = 0.0
    while True:
        came: dict[str, str] = {"s": ""}
        queue = ["s"]
        for u in queue:
            for v in names:
                if v not in came and left.get((u, v), 0.0) > 1e-9:
                    came[v] = u
                    queue.append(v)
        if "t" not in came:
            return total
        path, v = [], "t"
        while came[v]:
            path.append((came[v], v))
            v = came[v]
        least = min(left[edge] for edge in path)
        for u, v in path:
            left[u, v] -= least
            left[v, u] = left.get((v, u), 0.0) + least
        total += least


def best_flow(rates: list[list[float]], links: np.ndarray, layers: int) -> float:
    """The greatest flow over all placements."""
    windows = [
        [(a, a + k) for k in range(1, len(node) + 1) for a in range(layers - k + 1)]
        for node in rates
    ]
    best = 0.0
    for chosen in itertools.product(*windows):
        edges: dict[tuple[str, str], float] = {}
        for i, (a, e) in enumerate(chosen):
            edges[f"in{i}", f"out{i}"] = rates[i][e - a - 1]
            if a == 0:
                edges["s", f"in{i}"] = 1e9
            if e == layers:
                edges[f"out{i}", "t"] = 1e9
            for j, (b, _) in enumerate(chosen):
                if i != j and e == b:
                    edges[f"out{i}", f"in{j}"] = float(links[i, j])
        best = max(best, max_flow(edges))
    return best


@pytest.mark.parametrize("seed", range(5))
def test_flow_equals_the_best_over_all_placements(seed: int) -> None:
    pick = random.Random(seed)
    layers, nodes = 4, 3 + seed % 2
    speed = [pick.uniform(5, 40) for _ in range(nodes)]
    rates = [[s / k for k in range(1, pick.randint(2, 4) + 1)] for s in speed]
    links = np.array([[pick.choice([0.0, 3.0, 8.0, 50.0]) for _ in speed] for _ in speed])
    placed = helix(rates, links, layers, LIMIT_S)
    assert placed is not None
    assert placed.proved
    assert placed.tokens_per_s == pytest.approx(best_flow(rates, links, layers), abs=1e-4)
    most = sum(max(k * rate for k, rate in enumerate(node, 1)) for node in rates)
    assert placed.tokens_per_s <= most / layers * (1 + 1e-6)


def test_without_highs_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(MissingSolverError, match=r"helix .* pip install 'wagonway\[milp\]'"):
        Program().solve("helix", 1.0)


def test_published_methods_load_highs_only_when_they_solve() -> None:
    code = "import sys, planner.baselines; print('highspy' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
