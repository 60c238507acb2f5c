"""The exact solver against exhaustive search, and what must hold of any plan."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from planner.cost import Cell
from planner.exact import best_combination, solve_exactly
from planner.facts import Cluster, InfeasibleError, Lengths, Link, ModelShape, Node, Workload
from planner.finish import finish_s
from planner.grid import cells
from planner.large import Effort, solve_large
from planner.problem import judged, problem
from planner.solve import solve, solve_in_order, suited
from tests.planner_oracle import best_rate, random_case

GRID = (Cell(1, 1), Cell(4, 2), Cell(16, 8))


def grid_of(work: Workload) -> tuple[Cell, ...]:
    drafts = (0, 2) if work.acceptance else (0,)
    return tuple(replace(cell, draft_len=n) for cell in GRID for n in drafts)


def exact_rate(
    cluster: Cluster, model: ModelShape, work: Workload, grid: tuple[Cell, ...] | None = None
) -> float:
    rings = solve_exactly(problem(cluster, model, work), grid or grid_of(work))
    return sum(ring.rows_per_s for ring in rings)


@pytest.mark.parametrize(
    ("first", "count", "nodes", "layers"),
    [(0, 60, 2, 12), (1000, 110, 3, 12), (2000, 80, 4, 12), (3000, 42, 5, 12), (4000, 8, 6, 12)],
)
def test_plan_is_as_fast_as_exhaustive_search(
    first: int, count: int, nodes: int, layers: int
) -> None:
    combined = 0
    for seed in range(first, first + count):
        cluster, model, work = random_case(seed, nodes, layers)
        grid = grid_of(work)
        rings = solve_exactly(problem(cluster, model, work), grid)
        found = sum(ring.rows_per_s for ring in rings)
        assert found == pytest.approx(best_rate(cluster, model, work, grid), rel=1e-9), seed
        combined += len(rings) > 1
    assert combined, "no case had several pipelines"


@settings(max_examples=20, deadline=None)
@for_all(seed=st.integers(0, 10**6), factor=st.floats(1.0, 3.0), which=st.integers(0, 3))
def test_more_memory_never_slows_the_plan(seed: int, factor: float, which: int) -> None:
    cluster, model, work = random_case(seed, 4, 8)
    nodes = list(cluster.nodes)
    nodes[which] = replace(nodes[which], memory_bytes=nodes[which].memory_bytes * factor)
    richer = replace(cluster, nodes=tuple(nodes))
    assert exact_rate(richer, model, work) >= exact_rate(cluster, model, work) * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@for_all(seed=st.integers(0, 10**6), factor=st.floats(1.0, 10.0))
def test_more_bandwidth_never_slows_the_plan(seed: int, factor: float) -> None:
    cluster, model, work = random_case(seed, 4, 8)
    links = tuple(replace(link, bytes_per_s=link.bytes_per_s * factor) for link in cluster.links)
    faster = replace(cluster, links=links)
    assert exact_rate(faster, model, work) >= exact_rate(cluster, model, work) * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@for_all(seed=st.integers(0, 10**6))
def test_another_node_never_slows_the_plan(seed: int) -> None:
    cluster, model, work = random_case(seed, 5, 8)
    fewer = replace(cluster, nodes=cluster.nodes[:-1])
    assert exact_rate(cluster, model, work) >= exact_rate(fewer, model, work) * (1 - 1e-9)


@settings(max_examples=20, deadline=None)
@for_all(seed=st.integers(0, 10**6), turn=st.integers(1, 3))
def test_names_and_order_of_nodes_do_not_matter(seed: int, turn: int) -> None:
    cluster, model, work = random_case(seed, 4, 8)
    names = {node.name: f"other-{node.name}" for node in cluster.nodes}
    nodes = [replace(node, name=names[node.name]) for node in cluster.nodes]
    links = tuple(replace(e, source=names[e.source], target=names[e.target]) for e in cluster.links)
    turned = replace(cluster, nodes=(*nodes[turn:], *nodes[:turn]), links=links)
    assert exact_rate(turned, model, work) == pytest.approx(exact_rate(cluster, model, work))


@settings(max_examples=20, deadline=None)
@for_all(seed=st.integers(0, 10**6), factor=st.floats(0.1, 10.0))
def test_scaling_all_times_scales_the_rate(seed: int, factor: float) -> None:
    cluster, model, work = random_case(seed, 4, 8)
    work = replace(
        work,
        codec={n: replace(c, bytes_per_s=c.bytes_per_s / factor) for n, c in work.codec.items()},
    )
    base_codec = {n: replace(c, bytes_per_s=c.bytes_per_s * factor) for n, c in work.codec.items()}
    slower = replace(
        cluster,
        nodes=tuple(_slower(node, factor) for node in cluster.nodes),
        links=tuple(_slower_link(link, factor) for link in cluster.links),
        default_link=_slower_link(cluster.default_link, factor) if cluster.default_link else None,
    )
    expected = exact_rate(cluster, model, replace(work, codec=base_codec)) / factor
    assert exact_rate(slower, model, work) == pytest.approx(expected, rel=1e-6)


def _slower(node: Node, factor: float) -> Node:
    return replace(
        node,
        flop_per_s=node.flop_per_s / factor,
        memory_bytes_per_s=node.memory_bytes_per_s / factor,
        host_to_device_bytes_per_s=node.host_to_device_bytes_per_s / factor,
        disk_bytes_per_s=node.disk_bytes_per_s / factor,
        parked_kv_bytes_per_s=node.parked_kv_bytes_per_s / factor,
        up_bytes_per_s=node.up_bytes_per_s / factor,
        down_bytes_per_s=node.down_bytes_per_s / factor,
        step_s=node.step_s * factor,
    )


def _slower_link(link: Link, factor: float) -> Link:
    return replace(link, latency_s=link.latency_s * factor, bytes_per_s=link.bytes_per_s / factor)


@pytest.mark.parametrize("seed", range(6))
def test_no_plan_beats_its_bound_and_each_ring_runs_as_predicted(seed: int) -> None:
    cluster, model, work = random_case(seed, 4, 8)
    try:
        plan = solve(cluster, model, work)
        in_order = solve_in_order(cluster, model, work)
    except InfeasibleError:
        return
    assert plan.tokens_per_s <= plan.bound_tokens_per_s
    assert in_order.tokens_per_s <= in_order.bound_tokens_per_s
    facts = problem(cluster, model, work)
    rates = [1 / judged(facts, pipeline).split.row_s for pipeline in plan.pipelines]
    assert sum(rates) == pytest.approx(plan.rows_per_s)
    used = [stage.node for pipeline in plan.pipelines for stage in pipeline.stages]
    assert len(used) == len(set(used))


@settings(max_examples=8, deadline=None)
@for_all(seed=st.integers(0, 10**6), group_nodes=st.integers(2, 4))
def test_large_method_ends_between_its_start_and_the_exact_rate(
    seed: int, group_nodes: int
) -> None:
    cluster, model, work = random_case(seed, 5, 8)
    facts = problem(cluster, model, replace(work, rows=10_000, acceptance=()))
    start = solve_exactly(facts, GRID)
    effort = Effort(fills=2, group_nodes=group_nodes, cell_steps=1, subsets=64)
    found = sum(ring.rows_per_s for ring in solve_large(facts, start, effort))
    assert found >= sum(ring.rows_per_s for ring in start) * (1 - 1e-9)
    assert found <= sum(ring.rows_per_s for ring in solve_exactly(facts)) * (1 + 1e-9)


def test_combination_is_the_best_of_all_partitions() -> None:
    rates = [0.0, 3.0, 2.0, 6.0, 1.0, 4.5, 3.2, 6.5]
    chosen, total = best_combination(np.array(rates))
    assert (sorted(chosen), total[-1]) == ([3, 4], 7.0)


def test_slow_node_is_left_out() -> None:
    fast = Node("fast", 1e13, 1e11, 1e12)
    far = Node("far", 1e13, 1e11, 1e12)
    link = Link("", "", 5.0, 1e3)
    model = ModelShape(8, 4096, 1e9, 1e3, 2, 1e8, 2e9, 1e9)
    work = Workload(1000, Lengths(100, 100), Lengths(50, 50))
    poor = replace(far, memory_bytes=3e9)
    plan = solve(Cluster((fast, poor), (), link), model, work)
    assert [stage.node for p in plan.pipelines for stage in p.stages] == ["fast"]


def test_single_node_with_offload_may_beat_a_slow_link() -> None:
    tight = Node("tight", 1e14, 8e9, 1e12, host_bytes=6e10, host_to_device_bytes_per_s=2e10)
    model = ModelShape(12, 8192, 1e9, 1e3, 2, 1e8, 1e8, 1e9)
    work = Workload(1000, Lengths(100, 100), Lengths(50, 50))
    two = (tight, replace(tight, name="other"))
    slow = solve(Cluster(two, (), Link("", "", 0.05, 1e5)), model, work)
    assert all(p.stages[0].weights_offloaded for p in slow.pipelines)
    assert [len(p.stages) for p in slow.pipelines] == [1, 1]
    quick = solve(Cluster(two, (), Link("", "", 0.0001, 1e10)), model, work)
    assert len(quick.pipelines[0].stages) == 2


@pytest.mark.parametrize(
    ("memory", "links", "words"),
    [
        (5e8, Link("", "", 0.01, 1e8), "no node fits a layer: of the roomiest"),
        (3e9, Link("", "", 0.01, 1e8), r"memory is short by .* GB in all: with offload tried"),
        (8e9, None, "cannot send to node"),
    ],
)
def test_infeasible_clusters_say_what_is_missing(
    memory: float, links: Link | None, words: str
) -> None:
    nodes = tuple(Node(f"n{i}", 1e13, memory, 1e12) for i in range(2))
    model = ModelShape(12, 4096, 1e9, 1e3, 2, 1e8, 1e8, 1e9)
    with pytest.raises(InfeasibleError, match=words):
        solve(Cluster(nodes, (), links), model, Workload(9, Lengths(9, 9), Lengths(9, 9)))


def test_rate_without_output_tokens_beyond_the_first_is_finite() -> None:
    node = Node("n", 1e13, 1e11, 1e12)
    model = ModelShape(4, 1024, 1e9, 1e3, 2, 0.0, 0.0, 1e9)
    plan = solve(Cluster((node,)), model, Workload(9, Lengths(9, 9), Lengths(1, 1)))
    assert math.isfinite(plan.rows_per_s)


def test_job_of_few_rows_is_done_sooner_with_fewer_of_them_in_flight() -> None:
    quick = Node("", 8e13, 2.4e10, 9e11)
    nodes = tuple(
        replace(quick, name=f"n{i}", memory_bytes=2.4e10 * (0.7 + 0.05 * i)) for i in range(10)
    )
    model = ModelShape(40, 5120, 6.3e8, 20_480.0, 2, 3.3e8, 3.3e8, 6.3e8)
    work = Workload(100, Lengths(512, 1500), Lengths(128, 400))
    cluster = Cluster(nodes, (), Link("", "", 0.03, 2e7))
    facts = problem(cluster, model, work)
    fastest = suited(facts, cells(work), solve_exactly(facts))
    plan = solve(cluster, model, work)
    assert plan.finish_s < 0.95 * finish_s(facts, fastest)
    assert plan.bound_tokens_per_s >= sum(r.rows_per_s for r in fastest) * work.output_tokens.mean
