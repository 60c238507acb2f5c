"""Bounds hold: no plan, however found, is faster; and small jobs wait for no slow pipeline."""

from dataclasses import replace

import pytest

from planner.cost import Cell
from planner.exact import solve_exactly
from planner.facts import Cluster, Lengths, Link, ModelShape, Node, Workload
from planner.lengths import longest_tokens
from planner.priced_bound import priced_bound
from planner.problem import problem
from planner.simulate import simulate
from planner.solve import compute_bound, solve
from tests.planner_oracle import random_case

GRID = (Cell(1, 1), Cell(4, 2), Cell(16, 8), Cell(32, 2))
MODEL = ModelShape(16, 2048, 4e8, 2048.0, 2, 1e8, 1e8, 4e8)


@pytest.mark.parametrize("seeds", [range(0, 40), range(40, 80), range(80, 120)])
def test_no_exact_plan_beats_either_bound(seeds: range) -> None:
    for seed in seeds:
        given = problem(*random_case(seed, 2 + seed % 4, 8))
        rate = sum(ring.rows_per_s for ring in solve_exactly(given, GRID))
        assert rate <= compute_bound(given, GRID) * (1 + 1e-9), seed
        assert rate <= priced_bound(given, GRID) * (1 + 1e-9), seed


def test_price_of_what_is_in_flight_tightens_the_bound() -> None:
    nodes = tuple(Node(f"n{i}", 2e13, 2.6e9, 4e11) for i in range(6))
    given = problem(
        Cluster(nodes, (), Link("", "", 0.02, 1e8)),
        MODEL,
        Workload(900, Lengths(9, 9), Lengths(99, 99)),
    )
    alone = (Cell(16, 1),)
    assert priced_bound(given, alone) < compute_bound(given, alone) * 0.5


def test_small_job_drops_the_pipeline_it_would_wait_for() -> None:
    fast = Node("fast", 1e14, 3e10, 1e12)
    slow = Node("slow", 2e11, 3e10, 5e9)
    cluster = Cluster((fast, slow), (), Link("", "", 0.5, 1e5))
    work = Workload(40, Lengths(50, 50), Lengths(200, 200))
    few = solve(cluster, MODEL, work)
    assert [p.stages[0].node for p in few.pipelines] == ["fast"]
    many = solve(cluster, MODEL, replace(work, rows=100_000))
    assert {p.stages[0].node for p in many.pipelines} == {"fast", "slow"}
    with_slow = replace(few, pipelines=many.pipelines)
    alone_s = simulate(few, cluster, MODEL, work).finish_s
    assert alone_s <= simulate(with_slow, cluster, MODEL, work).finish_s


def test_longest_of_equal_rows_is_as_long_as_the_others() -> None:
    assert longest_tokens(Lengths(64, 64), 1000) == 64
    assert longest_tokens(Lengths(128, 400), 20) == pytest.approx(400, rel=0.02)
