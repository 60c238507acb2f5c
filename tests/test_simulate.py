"""The imagined run: it answers every row once, keeps physics, and agrees with the planner."""

from dataclasses import replace

import numpy as np
import pytest

from planner.facts import Cluster, CodecRate, LayerTimes, Lengths, Link, ModelShape, Node, Workload
from planner.plan import LinkPlan, Pipeline, Plan, StagePlan
from planner.rehearse import candidates, rehearsed
from planner.simulate import Row, sample_rows, simulate
from planner.solve import solve, solve_in_order

MODEL = ModelShape(12, 2048, 4e8, 2048.0, 2, 1e8, 1e8, 4e8)
WORK = Workload(1200, Lengths(100, 100), Lengths(32, 32))
LINK = Link("", "", 0.004, 5e7)


def cluster(*speeds: float) -> Cluster:
    nodes = tuple(Node(f"n{i}", 2e13 * s, 6e9, 4e11 * s) for i, s in enumerate(speeds))
    return Cluster(nodes, (), LINK)


def one_node_plan(rows: int, slots: int) -> Plan:
    stage = StagePlan("n0", 0, 12)
    return Plan((Pipeline((stage,), (), rows, slots),), 1.0, 1.0, 1.0, 1.0, "")


def test_one_row_takes_its_prefill_and_its_rounds_and_nothing_else() -> None:
    times = LayerTimes(prefill=((100, 0.01),), decode=((8, 64, 0.002),))
    node = replace(cluster(1).nodes[0], layer_s=times)
    model = replace(MODEL, head_bytes=0.0)
    run = simulate(one_node_plan(1, 1), Cluster((node,)), model, WORK, rows=[Row(100, 32)])
    reads_s = sum(-(-n // 32) * 32 - 64 for n in range(100, 131)) * 2048.0 / 4e11
    assert run.finish_s == pytest.approx(12 * (0.01 + 31 * 0.002 + reads_s), rel=1e-6)
    assert run.steps == 32


def test_every_row_ends_once_whatever_the_pipelines() -> None:
    facts = cluster(1, 2, 1, 3)
    work = replace(WORK, prompt_tokens=Lengths(100, 300), output_tokens=Lengths(32, 90))
    plan = solve(facts, MODEL, work)
    run = simulate(plan, facts, MODEL, work, seed=3, trace=True)
    ended = [event.number for event in run.trace if event.what == "end"]
    assert sorted(ended) == list(range(work.rows))
    assert all(0 < fraction <= 1 + 1e-9 for fraction in run.busy.values())
    times = {event.number: event.at_s for event in run.trace if event.what == "lease"}
    assert all(times[event.number] <= event.at_s for event in run.trace if event.what == "end")


@pytest.mark.parametrize("speeds", [(1.0,), (1.0, 1.0, 1.0), (1.0, 3.0, 2.0)])
def test_long_job_runs_as_fast_as_the_plan_predicts(speeds: tuple[float, ...]) -> None:
    # On slower links prefills would be bound by links and decodes by stages: where all rows are
    # equally long, these phases do not mix, and the run takes up to a third longer.
    facts = replace(cluster(*speeds), default_link=replace(LINK, bytes_per_s=5e8))
    plan = solve_in_order(facts, MODEL, WORK)
    run = simulate(plan, facts, MODEL, WORK)
    assert run.finish_s == pytest.approx(plan.finish_s, rel=0.1)


def test_slow_link_binds_and_a_codec_relieves_it() -> None:
    facts = replace(cluster(1, 1), default_link=Link("", "", 0.004, 2e6))
    raw = simulate(solve_in_order(facts, MODEL, WORK), facts, MODEL, WORK)
    assert raw.busy["n0 -> n1"] > 0.95
    coded_work = replace(WORK, codec={"half": CodecRate(2.0, 1e9)})
    coded = simulate(solve_in_order(facts, MODEL, coded_work), facts, MODEL, coded_work)
    assert coded.finish_s == pytest.approx(raw.finish_s / 2, rel=0.1)


def test_one_micro_batch_in_flight_leaves_stages_idle() -> None:
    facts = cluster(1, 1, 1)
    few = solve_in_order(facts, MODEL, WORK, micro_batch_rows=8, in_flight=1)
    many = solve_in_order(facts, MODEL, WORK, micro_batch_rows=8, in_flight=6)
    slow, fast = (simulate(plan, facts, MODEL, WORK) for plan in (few, many))
    assert slow.finish_s > 2 * fast.finish_s


def test_rows_that_come_later_are_answered_after_they_come() -> None:
    rows = [Row(100, 8, arrives_s=float(i)) for i in range(5)]
    run = simulate(one_node_plan(4, 2), cluster(1), MODEL, WORK, rows=rows)
    assert run.finish_s > 4.0
    assert run.row_latency_s[0] < 1.0


def test_same_seed_same_run() -> None:
    work = replace(WORK, rows=300, output_tokens=Lengths(32, 90))
    plan = solve(cluster(1, 2), MODEL, work)
    runs = [simulate(plan, cluster(1, 2), MODEL, work, seed=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_sampled_lengths_have_the_asked_mean_and_tail() -> None:
    work = replace(WORK, rows=20_000, output_tokens=Lengths(128, 400))
    outputs = np.array([row.output_tokens for row in sample_rows(work, 0)])
    assert outputs.mean() == pytest.approx(128, rel=0.05)
    assert np.percentile(outputs, 95) == pytest.approx(400, rel=0.05)


def test_parked_kv_and_streamed_weights_take_their_time() -> None:
    node = replace(cluster(1).nodes[0], host_bytes=1e11, host_to_device_bytes_per_s=1e10)
    facts = Cluster((node,))
    resident = one_node_plan(8, 4)
    stage = StagePlan("n0", 0, 12, weights_offloaded=12)
    streamed = replace(resident, pipelines=(Pipeline((stage,), (), 8, 4),))
    fast, slow = (simulate(plan, facts, MODEL, WORK) for plan in (resident, streamed))
    # 12 layers of 0.4 GB at 10 GB/s: no step is shorter than 0.48 s.
    assert slow.finish_s >= slow.steps * 0.48
    assert slow.finish_s > fast.finish_s


def test_rehearsal_picks_a_plan_that_no_other_candidate_beats() -> None:
    work = replace(WORK, rows=200, output_tokens=Lengths(32, 90))
    facts = cluster(1, 3, 2)
    best = simulate(rehearsed(facts, MODEL, work, seed=5), facts, MODEL, work, seed=5)
    others = [simulate(plan, facts, MODEL, work, seed=5) for plan in candidates(facts, MODEL, work)]
    assert len(others) > 3
    assert best.finish_s == min(run.finish_s for run in others)


def test_link_names_are_those_of_the_plan() -> None:
    stages = (StagePlan("n0", 0, 6), StagePlan("n1", 6, 12))
    links = (LinkPlan("n0", "n1"), LinkPlan("n1", "n0"))
    plan = replace(one_node_plan(1, 1), pipelines=(Pipeline(stages, links, 4, 3),))
    run = simulate(plan, cluster(1, 1), MODEL, replace(WORK, rows=20))
    assert set(run.busy) == {"n0", "n1", "n0 -> n1", "n1 -> n0"}
