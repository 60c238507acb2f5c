"""One ring through all nodes in order: as fast as exhaustive search, with numbers when it fails."""

import math
from dataclasses import replace

import pytest

from planner.cost import Cell, mean_context
from planner.explain import explain
from planner.facts import (
    Cluster,
    InfeasibleError,
    LayerTimes,
    Lengths,
    Link,
    ModelShape,
    Node,
    Workload,
)
from planner.layer_times import decode_layer_s
from planner.solve import solve_in_order
from tests.planner_oracle import random_case, ring_row_s

MODEL = ModelShape(12, 512, 4e7, 1024.0, 4, 1e7, 6e7, 2e7)
WORK = Workload(400, Lengths(60, 90), Lengths(40, 64))
FAST = Link("", "", 0.0005, 1e9)


def node(name: str, speed: float = 1.0, memory_bytes: float = 4e9) -> Node:
    return Node(name, 5e10 * speed, memory_bytes, 1e10 * speed)


def three(*speeds: float) -> Cluster:
    return Cluster(tuple(node(f"n{i}", s) for i, s in enumerate(speeds)), (), FAST)


@pytest.mark.parametrize("seed", range(60))
def test_ring_in_order_is_as_fast_as_exhaustive_search(seed: int) -> None:
    cluster, model, work = random_case(seed, nodes=1 + seed % 4, layers=7)
    for cell in (Cell(1, 1), Cell(4, 3), Cell(16, 8)):
        best = ring_row_s(cluster, model, work, cell)
        try:
            plan = solve_in_order(
                cluster, model, work,
                micro_batch_rows=cell.micro_batch_rows, in_flight=cell.in_flight,
            )  # fmt: skip
        except InfeasibleError:
            fits = cell.rows < work.rows + cell.in_flight
            assert math.isinf(best) or not fits, "a ring exists that was not found"
            continue
        assert 1 / plan.rows_per_s == pytest.approx(best, rel=1e-9)
        assert plan.tokens_per_s <= plan.bound_tokens_per_s


def test_faster_nodes_hold_more_layers() -> None:
    plan = solve_in_order(three(1, 3, 2), MODEL, WORK)
    slow, fast, middle = (stage.layers for stage in plan.pipelines[0].stages)
    assert slow < middle + 2  # the last one also has the LM head
    assert slow < fast


def test_enough_is_in_flight_to_keep_the_slowest_stage_busy() -> None:
    plan = solve_in_order(three(1, 1, 1), MODEL, WORK)
    assert plan.pipelines[0].in_flight >= 3


def test_rows_in_flight_never_exceed_the_jobs_rows_by_a_slot() -> None:
    plan = solve_in_order(three(1, 1, 1), MODEL, replace(WORK, rows=7))
    ring = plan.pipelines[0]
    assert (ring.micro_batch_rows - 1) * ring.in_flight < 7


def test_one_node_needs_no_links() -> None:
    plan = solve_in_order(Cluster((node("only"),)), MODEL, WORK)
    assert plan.pipelines[0].links == ()
    assert plan.gap < 1e-6


def test_plan_rests_on_the_profile_where_there_is_one() -> None:
    times = LayerTimes(prefill=((128, 0.064),), decode=((8, 80, 0.004),))
    profiled = replace(node("only"), layer_s=times)
    plan = solve_in_order(
        Cluster((profiled,)), replace(MODEL, head_bytes=0.0), WORK, micro_batch_rows=8, in_flight=1
    )
    # A row: 60 prompt tokens of 0.5 ms, and 39 decode rounds of 4 ms shared by 8 rows; 12 layers.
    assert 1 / plan.rows_per_s == pytest.approx(12 * (60 * 0.0005 + 39 * 0.004 / 8), rel=1e-3)


def test_explanation_names_the_limit_and_the_facts() -> None:
    words = explain(solve_in_order(three(1, 2, 1), MODEL, WORK))
    assert "What limits it: node n" in words
    assert "link n0 -> n1: 0.5 ms, 1e+03 MB/s" in words


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (Cluster(()), "no nodes"),
        (Cluster((node("a"), node("a")), (), FAST), "2 nodes are called 'a'"),
        (Cluster((node("a"), node("b"))), "a cannot send to node b"),
        (Cluster((node("a", memory_bytes=3e7),)), "no layer fits on node a: it has 0.03 GB free"),
        (Cluster((node("a", memory_bytes=4e8),)), r"memory is short by 0.\d+ GB"),
        (Cluster((node("a", speed=math.nan),)), "flop_per_s is NaN"),
        (Cluster((node("a", memory_bytes=-1.0),)), "memory_bytes is -1; it cannot be negative"),
        (Cluster((node("a", memory_bytes=1e30),)), "absurdly large"),
        (Cluster((node("a", speed=0.0),)), "flop_per_s is 0; it must be above 0"),
        (Cluster((node("a"), node("b")), (), Link("", "", 0.0, 1e9, 1.0)), "loss is 1"),
        (Cluster(tuple(node(f"n{i}") for i in range(13)), (), FAST), "13 stages cannot share 12"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_numbers(cluster: Cluster, words: str) -> None:
    with pytest.raises(InfeasibleError, match=words):
        solve_in_order(cluster, MODEL, WORK)


def test_windows_as_wide_as_the_longest_row_change_nothing() -> None:
    wide = replace(MODEL, windows=(1000, 0) * 6)
    plain, windowed = (solve_in_order(three(1, 2, 1), model, WORK) for model in (MODEL, wide))
    assert windowed.rows_per_s == pytest.approx(plain.rows_per_s)


def test_layers_that_see_a_window_read_no_more_than_that() -> None:
    # Long contexts: decoding is bound by reading KV, of which half of the layers have an eighth.
    work = replace(WORK, prompt_tokens=Lengths(4096, 4096), output_tokens=Lengths(64, 64))
    heavy = replace(MODEL, kv_bytes_per_token_layer=65_536.0)
    windowed = replace(heavy, windows=(516, 0) * 6)
    slow, fast = (
        decode_layer_s(node("a"), model, 8, mean_context(work)) for model in (heavy, windowed)
    )
    read = 8 * 65_536.0 * (516 + mean_context(work)) / 2
    assert fast == pytest.approx((MODEL.layer_bytes + read) / 1e10)
    assert slow > 1.7 * fast


def test_prompt_positions_see_what_came_before_them_within_the_window() -> None:
    model = replace(MODEL, windows=(10,) * 12)
    exact = sum(min(10, i + 0.5) for i in range(40)) / 40
    assert model.seen_in_prompt(40) == pytest.approx(exact)
    assert model.seen_in_prompt(6) == pytest.approx(3.0)
