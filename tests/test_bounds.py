"""Bounds hold: no plan, however found, is faster; and small jobs wait for no slow pipeline."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from planner import regions
from planner.classes import node_prices, ring_classes
from planner.cost import Cell
from planner.exact import best_combination, solve_exactly
from planner.facts import Cluster, Lengths, Link, ModelShape, Node, Workload
from planner.lengths import longest_tokens
from planner.packing import best_packing
from planner.problem import problem
from planner.regions import certified, parts
from planner.simulate import simulate
from planner.solve import compute_bound, solve
from tests.planner_oracle import random_case

GRID = (Cell(1, 1), Cell(4, 2), Cell(16, 8), Cell(32, 2))
WORK = Workload(900, Lengths(64, 90), Lengths(99, 120))
MODEL = ModelShape(16, 2048, 4e8, 2048.0, 2, 1e8, 1e8, 4e8)


@pytest.mark.parametrize("seeds", [range(0, 40), range(40, 80), range(80, 120)])
def test_no_exact_plan_beats_any_bound(seeds: range) -> None:
    for seed in seeds:
        given = problem(*random_case(seed, 2 + seed % 4, 8))
        rate = sum(ring.rows_per_s for ring in solve_exactly(given, GRID))
        priced = node_prices(ring_classes(given, GRID, math.inf), np.ones(len(given.nodes))).sum()
        assert rate <= compute_bound(given, GRID) * (1 + 1e-9), seed
        assert rate <= priced * (1 + 1e-9), seed
        assert rate <= certified(given, GRID).bound * (1 + 1e-9), seed


@pytest.mark.parametrize("most_nodes", [2, 3, 6])
def test_no_exact_plan_beats_the_bound_of_regions_however_they_are_cut(
    most_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "MOST_NODES", most_nodes)
    parted = 0
    for seed in range(30):
        given = problem(two_regions(seed), MODEL, replace(WORK, rows=10**6))
        parted += parts(given, GRID, 1.0) is not None
        known = certified(given, GRID)
        rate = sum(ring.rows_per_s for ring in solve_exactly(given, GRID))
        assert sum(ring.rows_per_s for ring in known.rings) <= rate * (1 + 1e-9), seed
        assert rate <= known.bound * (1 + 1e-9), seed
        assert rate <= compute_bound(given, GRID) * (1 + 1e-9), seed
    assert parted == 30


def test_groups_too_small_for_the_model_run_no_faster_than_the_links_between_them() -> None:
    nodes = tuple(Node(f"n{i}", 4e13, 2.2e9, 4e11) for i in range(6))
    pairs = [(a, b) for a in range(6) for b in range(6) if a != b and a % 2 == b % 2]
    links = tuple(Link(f"n{a}", f"n{b}", 0.001, 1e9) for a, b in pairs)
    apart = problem(Cluster(nodes, links, Link("", "", 0.001, 1e5)), MODEL, WORK)
    near = problem(Cluster(nodes, links, Link("", "", 0.001, 1e9)), MODEL, WORK)
    rate = sum(ring.rows_per_s for ring in solve_exactly(apart, GRID))
    assert 0 < rate <= compute_bound(apart, GRID) < compute_bound(near, GRID) / 2


def two_regions(seed: int) -> Cluster:
    """Two groups of three nodes each: fast links within, slow ones between."""
    pick = random.Random(seed)
    nodes = tuple(
        Node(f"n{i}", pick.uniform(5e12, 4e13), pick.choice([2.6e9, 4e9, 9e9]), 4e11, f"r{i % 2}")
        for i in range(6)
    )
    links = tuple(
        Link(a.name, b.name, 0.001, pick.uniform(5e7, 2e8))
        for a in nodes
        for b in nodes
        if a.region == b.region and a != b
    )
    return Cluster(nodes, links, Link("", "", 0.05, pick.choice([2e5, 2e6, 0.0])))


def test_price_of_what_is_in_flight_tightens_the_bound() -> None:
    nodes = tuple(Node(f"n{i}", 2e13, 2.6e9, 4e11) for i in range(6))
    cluster = Cluster(nodes, (), Link("", "", 0.02, 1e8))
    given = problem(cluster, MODEL, Workload(900, Lengths(9, 9), Lengths(99, 99)))
    alone = (Cell(16, 1),)
    prices = node_prices(ring_classes(given, alone, math.inf), np.ones(6))
    assert prices.sum() < compute_bound(given, alone) * 0.5


def test_packing_is_the_best_of_all_combinations() -> None:
    draw = np.random.default_rng(0)
    for n in (1, 4, 7, 8):
        for shift in (-1.0, 0.0, 1.0):
            value = draw.normal(shift, 1.0, 1 << n)
            value[0] = 0.0
            best, blocks = best_packing(value)
            assert best == pytest.approx(best_combination(np.maximum(value, 0.0))[1][-1])
            assert best == pytest.approx(sum(value[block] for block in blocks))
            assert sum(blocks) == np.bitwise_or.reduce(np.array([0, *blocks]))


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
    assert longest_tokens(Lengths(64, 64), 1000) == pytest.approx(64)
    assert longest_tokens(Lengths(128, 400, 500), 10_000) == 500
    assert longest_tokens(Lengths(128, 400), 20) == pytest.approx(400, rel=0.02)
