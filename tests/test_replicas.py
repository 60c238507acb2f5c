"""Rings with replicas: as fast as exhaustive search says, and as the simulator runs them."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given as for_all
from hypothesis import settings
from hypothesis import strategies as st

from planner import replica_search
from planner.chain import best_split
from planner.cost import Cell
from planner.exact import solve_exactly
from planner.explain import explain
from planner.facts import Cluster, CodecRate, Lengths, Link, ModelShape, Node, Workload
from planner.grid import cells
from planner.plan import Plan, as_mapping
from planner.problem import Found, judged, problem, ring_in
from planner.replan import replan
from planner.replica_search import with_replicas
from planner.ring import rings_of
from planner.simulate import NodesChange, simulate
from planner.solve import capped_bound, plan_of, solve
from tests.replica_oracle import best_rate

GRID = (Cell(1, 4), Cell(16, 3))
MODEL = ModelShape(12, 2048, 4e8, 2048.0, 2, 1e8, 1e8, 4e8)
WORK = Workload(3000, Lengths(100, 100), Lengths(64, 100))


def uneven_case(seed: int, nodes: int, layers: int) -> tuple[Cluster, ModelShape, Workload]:
    """Nodes and links that differ much, and a model that fills a good part of all memory."""
    pick = random.Random(seed)
    machines = tuple(
        Node(
            f"n{i}",
            flop_per_s=pick.uniform(2e13, 1.5e14),
            memory_bytes=pick.choice([1.4e10, 2.2e10, 7e10]),
            memory_bytes_per_s=pick.uniform(2e11, 1.5e12),
            up_bytes_per_s=pick.choice([math.inf, 2e7]),
            down_bytes_per_s=pick.choice([math.inf, 3e7]),
        )
        for i in range(nodes)
    )
    links = tuple(
        Link(a.name, b.name, pick.uniform(0.0005, 0.1), pick.choice([3e6, 1e7, 8e7]))
        for a in machines
        for b in machines
        if a != b
    )
    layer_bytes = sum(m.memory_bytes for m in machines) / layers * pick.uniform(0.25, 0.75)
    model = ModelShape(
        layers, 8192, layer_bytes, 40_000.0, 2, layer_bytes / 20, layer_bytes / 9, layer_bytes
    )
    prompt, output = pick.choice([64.0, 512.0]), pick.choice([32.0, 128.0])
    codec = {"lossless": CodecRate(1.5, 5e8)} if pick.random() < 0.3 else {}
    lengths = Lengths(prompt, 2 * prompt), Lengths(output, 2 * output)
    return Cluster(machines, links), model, Workload(10_000, *lengths, codec=codec)


def exact_rate(cluster: Cluster, model: ModelShape, work: Workload, replicate: bool) -> float:
    rings = solve_exactly(problem(cluster, model, work), GRID, replicate=replicate)
    return sum(ring.rows_per_s for ring in rings)


@pytest.mark.parametrize(("first", "count", "nodes", "layers"), [(0, 60, 3, 8), (106, 9, 4, 5)])
def test_plan_with_replicas_is_as_fast_as_exhaustive_search(
    first: int, count: int, nodes: int, layers: int
) -> None:
    gained = 0
    for seed in range(first, first + count):
        case = uneven_case(seed, nodes, layers)
        found = exact_rate(*case, replicate=True)
        assert found == pytest.approx(best_rate(*case, GRID), rel=1e-9), seed
        gained += found > exact_rate(*case, replicate=False) * (1 + 1e-6)
    assert gained, "no case gained by replicas"


def test_two_stages_of_replicas_are_dealt_as_exhaustive_search_says() -> None:
    case, grid = uneven_case(204, 5, 4), (Cell(16, 4),)
    rings = solve_exactly(problem(*case), grid, replicate=True)
    assert sum(ring.rows_per_s for ring in rings) == pytest.approx(best_rate(*case, grid), rel=1e-9)


@settings(max_examples=10, deadline=None)
@for_all(seed=st.integers(0, 10**6))
def test_another_node_never_slows_a_plan_with_replicas(seed: int) -> None:
    cluster, model, work = uneven_case(seed, 4, 5)
    fewer = replace(cluster, nodes=cluster.nodes[:-1])
    rate = exact_rate(cluster, model, work, replicate=True)
    assert rate >= exact_rate(fewer, model, work, replicate=True) * (1 - 1e-9)
    assert rate >= exact_rate(cluster, model, work, replicate=False) * (1 - 1e-9)
    assert rate <= capped_bound(problem(cluster, model, work), GRID) * (1 + 1e-9)


@settings(max_examples=10, deadline=None)
@for_all(seed=st.integers(0, 10**6), order=st.permutations(range(4)))
def test_names_and_order_of_nodes_do_not_matter_to_replicas(seed: int, order: list[int]) -> None:
    cluster, model, work = uneven_case(seed, 4, 5)
    names = {node.name: f"z{order[i]}" for i, node in enumerate(cluster.nodes)}
    nodes = [replace(cluster.nodes[i], name=names[cluster.nodes[i].name]) for i in order]
    links = tuple(
        replace(link, source=names[link.source], target=names[link.target])
        for link in cluster.links
    )
    renamed = replace(cluster, nodes=tuple(nodes), links=links)
    rate = exact_rate(cluster, model, work, replicate=True)
    assert exact_rate(renamed, model, work, replicate=True) == pytest.approx(rate, rel=1e-9)


def test_search_ends_between_its_start_and_the_exact_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, gained = cells(uneven_case(0, 4, 6)[2]), 0
    for seed in (1, 3):
        given = problem(*uneven_case(seed, 4, 6))
        plain = solve_exactly(given, tried)
        most = sum(ring.rows_per_s for ring in solve_exactly(given, tried, replicate=True))
        monkeypatch.setattr(replica_search, "GROUPS", 0)
        found = sum(ring.rows_per_s for ring in with_replicas(given, tried, plain))
        start = sum(ring.rows_per_s for ring in plain)
        assert start * (1 - 1e-9) <= found <= most * (1 + 1e-9), seed
        gained += found > start * (1 + 1e-6)
    assert gained, "no search gained anything"


def replicated_plan() -> tuple[Plan, Cluster]:
    """A fast node, and two slow ones that share the other stage's slots unevenly."""
    speeds = {"a": 4.0, "b": 3.0, "c": 1.0}
    nodes = [
        Node(name, 1e13 * s, 4e9, 2e11 * s, disk_bytes_per_s=1e8) for name, s in speeds.items()
    ]
    cluster = Cluster(tuple(nodes), (), Link("", "", 0.004, 5e7))
    given, cell, dealt = problem(cluster, MODEL, WORK), Cell(16, 4), ((0, 1, 2, 3), (0, 1, 2), (3,))
    split = best_split(ring_in(given, cell, (0, 1, 2), dealt))
    assert split is not None
    return plan_of(given, [Found(cell, (0, 1, 2), split, dealt)], 0.0), cluster


def test_replicas_run_as_fast_as_their_plan_predicts() -> None:
    plan, cluster = replicated_plan()
    run = simulate(plan, cluster, MODEL, WORK, trace=True)
    assert run.finish_s == pytest.approx(plan.finish_s, rel=0.1)
    assert set(run.busy) == {"a", "b", "c", "a -> b", "a -> c", "b -> a", "c -> a"}
    ended = sorted(event.number for event in run.trace if event.what == "end")
    assert ended == list(range(WORK.rows))
    # Three slots in four pass by b, and go round no slower than the one that passes by c.
    assert run.busy["a -> b"] > 2.9 * run.busy["a -> c"]


def test_links_of_one_port_share_it() -> None:
    plan, cluster = replicated_plan()
    narrow = replace(cluster.nodes[0], up_bytes_per_s=3e6)
    cluster = replace(cluster, nodes=(narrow, *cluster.nodes[1:]))
    ring = judged(problem(cluster, MODEL, WORK), plan.pipelines[0])
    run = simulate(plan, cluster, MODEL, WORK)
    sent = WORK.rows * 163 * MODEL.activation_bytes_per_token  # 100 of a prompt and 63 decoded
    assert run.finish_s > sent / 3e6
    assert ring.rows_per_s < WORK.rows / (sent / 3e6)
    assert run.rows_per_s == pytest.approx(ring.rows_per_s, rel=0.1)


def test_plan_of_replicas_says_who_has_which_slots() -> None:
    plan, cluster = replicated_plan()
    stages = as_mapping(plan)["pipelines"][0]["stages"]  # type: ignore[index]
    assert [stage.get("slots") for stage in stages] == [None, (0, 1, 2), (3,)]
    assert rings_of(problem(cluster, MODEL, WORK), plan)[0].dealt == ((0, 1, 2, 3), (0, 1, 2), (3,))
    words = explain(plan)
    assert "b layers" in words
    assert "for 3 slots" in words
    assert "are replicas" in words


def test_replicas_that_are_left_take_over_the_slots_of_one_that_is_gone() -> None:
    plan, cluster = replicated_plan()
    left = replace(cluster, nodes=cluster.nodes[:2])
    change = replan(plan, left, MODEL, replace(WORK, rows=500))
    assert [stage.node for stage in change.plan.pipelines[0].stages] == ["a", "b"]
    assert not change.layers_to_load
    changes = [NodesChange(1.0, left)]
    assert simulate(plan, cluster, MODEL, replace(WORK, rows=300), changes=changes).rows == 300


def test_plans_have_replicas_only_if_asked_for_and_are_done_no_later_with_them() -> None:
    case = uneven_case(3, 4, 6)
    plain, replicated = solve(*case), solve(*case, replicate=True)
    assert not any(pipeline.replicated for pipeline in plain.pipelines)
    assert replicated.finish_s <= plain.finish_s
    assert plain.tokens_per_s <= replicated.bound_tokens_per_s
    assert (plain.bound_over, replicated.bound_over) == (
        "without replicas",
        "with replicas or without",
    )
