"""The imagined run: it answers every row once, keeps physics, and agrees with the planner."""

import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from planner.cost import tokens_per_round
from planner.facts import (
    Cluster,
    CodecRate,
    InfeasibleError,
    LayerTimes,
    Lengths,
    Link,
    ModelShape,
    Node,
    Workload,
)
from planner.leases import Desk, Pace
from planner.plan import LinkPlan, Pipeline, Plan, StagePlan
from planner.rehearse import candidates, rehearsed
from planner.rows import Row, arriving, sample_rows
from planner.simulate import NodesChange, simulate
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
    run = simulate(plan, facts, MODEL, work, rows=sample_rows(work, 3), trace=True)
    ended = [event.number for event in run.trace if event.what == "end"]
    assert sorted(ended) == list(range(work.rows))
    assert all(0 <= fraction <= 1 + 1e-9 for fraction in run.busy.values())
    assert max(run.busy.values()) > 0.5
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
    runs = [
        simulate(plan, cluster(1, 2), MODEL, work, rows=sample_rows(work, seed))
        for seed in (1, 1, 2)
    ]
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
    work = replace(WORK, rows=60, output_tokens=Lengths(32, 90))
    facts = cluster(1, 3, 2)
    samples = [sample_rows(work, seed) for seed in (5, 6)]
    others = candidates(facts, MODEL, work)

    def finish_s(plan: Plan) -> float:
        return sum(simulate(plan, facts, MODEL, work, rows=rows).finish_s for rows in samples)

    assert len(others) > 3
    assert finish_s(rehearsed(facts, MODEL, work, samples)) <= min(map(finish_s, others))


@pytest.mark.parametrize("seed", [5, 9, 10])
def test_what_only_suits_the_samples_does_not_outlive_other_rows(seed: int) -> None:
    work = replace(WORK, rows=60, output_tokens=Lengths(32, 90))
    facts = cluster(1, 3, 2)
    plan = solve(facts, MODEL, work)
    sample, *others = drawn = [sample_rows(work, 100 * seed + i) for i in range(5)]
    chosen = rehearsed(facts, MODEL, work, [sample], others=others, plans=[plan])

    def finish_s(plan: Plan) -> float:
        return sum(simulate(plan, facts, MODEL, work, rows=rows).finish_s for rows in drawn)

    assert finish_s(chosen) <= 1.005 * finish_s(plan), "what saves less is no reason"


def test_link_names_are_those_of_the_plan() -> None:
    stages = (StagePlan("n0", 0, 6), StagePlan("n1", 6, 12))
    links = (LinkPlan("n0", "n1"), LinkPlan("n1", "n0"))
    plan = replace(one_node_plan(1, 1), pipelines=(Pipeline(stages, links, 4, 3),))
    run = simulate(plan, cluster(1, 1), MODEL, replace(WORK, rows=20))
    assert set(run.busy) == {"n0", "n1", "n0 -> n1", "n1 -> n0"}


def drafting(acceptance: tuple[float, ...], draft_len: int) -> tuple[Plan, Workload]:
    plan = one_node_plan(8, 2)
    drafts = replace(plan.pipelines[0], draft_len=draft_len)
    return replace(plan, pipelines=(drafts,)), replace(WORK, rows=64, acceptance=acceptance)


def test_drafts_that_always_hold_save_their_rounds_and_those_that_never_do_save_none() -> None:
    facts = cluster(1)
    steps = {}
    for chance in (0.0, 0.6, 1.0):
        plan, work = drafting((chance, chance), 2)
        run = simulate(plan, facts, MODEL, work)
        assert run.output_tokens == 64 * 32
        steps[chance] = run.steps
    # 31 tokens after the prefill's own: one by one, or three in each round.
    assert steps[0.0] - steps[1.0] == pytest.approx(steps[0.0] * (31 - 11) / 33, rel=0.1)
    assert steps[1.0] < steps[0.6] < steps[0.0]


def test_mean_tokens_of_a_round_are_those_of_the_cost_model() -> None:
    plan, work = drafting((0.8, 0.5, 0.3), 3)
    work = replace(work, rows=400, output_tokens=Lengths(200, 200))
    run = simulate(replace(plan, pipelines=plan.pipelines), cluster(1), MODEL, work, trace=True)
    rounds = 199 / tokens_per_round(work.acceptance, 3)
    per_row = [e.at_s for e in run.trace if e.what == "step"]
    assert len(per_row) * 8 / 400 == pytest.approx(rounds + 1, rel=0.1)


def test_beginning_that_all_prompts_share_is_computed_once() -> None:
    facts = cluster(1)
    work = replace(WORK, rows=64, prompt_tokens=Lengths(400, 400))
    shared = replace(work, shared_prefix_fraction=0.8)
    alone, together = (simulate(one_node_plan(8, 2), facts, MODEL, w) for w in (work, shared))
    assert together.finish_s < 0.6 * alone.finish_s
    assert together.output_tokens == alone.output_tokens


def test_rows_that_outgrow_the_memory_make_way_and_are_answered_all_the_same() -> None:
    # Memory is planned for the 95 % length; many rows here are longer than any that ended before.
    rows = [Row(60, 8)] * 100 + [Row(50, 200)] * 40
    work = replace(WORK, prompt_tokens=Lengths(60, 60), output_tokens=Lengths(32, 40))
    run = simulate(one_node_plan(8, 2), cluster(1), MODEL, work, rows=rows, trace=True)
    assert sorted(e.number for e in run.trace if e.what == "end") == list(range(140))
    assert run.output_tokens == 100 * 8 + 40 * 200


def test_a_pipeline_that_has_run_dry_is_given_rows_that_another_has_not_begun() -> None:
    pipelines = tuple(Pipeline((StagePlan(name, 0, 12),), (), 8, 2) for name in ("n0", "n1"))
    plan = Plan(pipelines, 1.0, 1.0, 1.0, 1.0, "")
    # By their prompts, the first takes rows that turn out long, and more of them than it can begin.
    rows = [Row(100, 200)] * 32 + [Row(50, 4)] * 32
    run = simulate(plan, cluster(1, 1), MODEL, WORK, rows=rows, trace=True)
    leased = Counter(event.number for event in run.trace if event.what == "lease")
    assert sum(count > 1 for count in leased.values()) > 4
    assert sorted(e.number for e in run.trace if e.what == "end") == list(range(64))


def test_a_row_that_may_say_more_is_leased_before_one_that_asks_more() -> None:
    rows = [Row(100, 3, quota=8), Row(10, 3, quota=90), Row(300, 3, quota=8)]
    run = simulate(one_node_plan(1, 1), cluster(1), MODEL, WORK, rows=rows, trace=True)
    assert [event.number for event in run.trace if event.what == "end"] == [1, 2, 0]


def test_rows_of_a_node_that_leaves_are_answered_by_the_others() -> None:
    facts, work = cluster(1, 2, 1, 3), replace(WORK, rows=600)
    plan = solve(facts, MODEL, work)
    calm = simulate(plan, facts, MODEL, work)
    lost = plan.pipelines[0].stages[0].node
    fewer = replace(facts, nodes=tuple(n for n in facts.nodes if n.name != lost))
    change = NodesChange(calm.finish_s / 3, fewer)
    run = simulate(plan, facts, MODEL, work, changes=[change], trace=True)
    ended = [event.number for event in run.trace if event.what == "end"]
    assert sorted(ended) == list(range(600))
    assert run.replans == 1
    assert run.rows_again > 0
    assert run.finish_s > calm.finish_s
    assert run.output_tokens == calm.output_tokens


def test_node_that_joins_ends_the_job_sooner() -> None:
    facts, work = cluster(1, 2), replace(WORK, rows=900)
    plan = solve(facts, MODEL, work)
    alone = simulate(plan, facts, MODEL, work)
    change = NodesChange(alone.finish_s / 4, cluster(1, 2, 4, 4))
    run = simulate(plan, facts, MODEL, work, changes=[change])
    assert run.finish_s < 0.8 * alone.finish_s
    assert {"n2", "n3"} & set(run.busy)


def test_run_without_nodes_waits_for_one_or_says_so() -> None:
    facts, work = cluster(2, 1), replace(WORK, rows=300)
    plan = solve(facts, MODEL, work)
    tiny = Cluster((replace(facts.nodes[0], name="x", memory_bytes=1e9),), (), LINK)
    end_s = simulate(plan, facts, MODEL, work).finish_s
    gone = NodesChange(end_s / 2, tiny)
    with pytest.raises(InfeasibleError, match="rows are left"):
        simulate(plan, facts, MODEL, work, changes=[gone])
    back = NodesChange(end_s * 2, facts)
    run = simulate(plan, facts, MODEL, work, changes=[gone, back])
    assert run.finish_s > end_s * 2


def test_slow_pipeline_takes_no_row_that_the_job_would_wait_for() -> None:
    fast, slow = StagePlan("n0", 0, 12), StagePlan("n1", 0, 12)
    pipelines = (Pipeline((fast,), (), 16, 2), Pipeline((slow,), (), 16, 2))
    plan, facts = replace(one_node_plan(1, 1), pipelines=pipelines), cluster(20, 1)
    work = replace(WORK, rows=128)
    alone = simulate(replace(plan, pipelines=pipelines[:1]), facts, MODEL, work)
    greedy = simulate(plan, facts, MODEL, work, policy="first-free")
    careful = simulate(plan, facts, MODEL, work)
    assert careful.finish_s <= alone.finish_s * 1.01 < greedy.finish_s


def test_rows_given_out_as_they_come_go_where_they_end_first() -> None:
    fast, slow = StagePlan("n0", 0, 12), StagePlan("n1", 0, 12)
    pipelines = (Pipeline((slow,), (), 2, 2), Pipeline((fast,), (), 2, 2))
    plan, facts = replace(one_node_plan(1, 1), pipelines=pipelines), cluster(4, 1)
    rows = arriving([Row(100, 32)] * 60, rows_per_s=2.0, seed=1)
    assert np.diff([row.arrives_s for row in rows]).mean() == pytest.approx(0.5, rel=0.3)
    given = simulate(plan, facts, MODEL, WORK, rows=rows, policy="ws-rr", trace=True)
    lone = simulate(
        replace(plan, pipelines=pipelines[1:]), facts, MODEL, WORK, rows=rows, policy="ws-rr"
    )
    assert given.mean_latency_s <= lone.mean_latency_s
    taken = [event.pipeline for event in given.trace if event.what == "lease"]
    assert taken.count(1) > taken.count(0)


def test_ten_thousand_rows_on_24_nodes_take_seconds_not_minutes() -> None:
    facts = cluster(*([1, 2, 3] * 8))
    work = Workload(10_000, Lengths(64, 64), Lengths(8, 8))
    plan = solve(facts, MODEL, work)
    started = time.process_time()
    assert simulate(plan, facts, MODEL, work).rows == 10_000
    assert time.process_time() - started < 30.0


@pytest.mark.parametrize("bytes_per_s", [5e8, 2e7, 4e6])
def test_job_of_few_rows_ends_about_when_the_plan_says(bytes_per_s: float) -> None:
    # Links from those that never bind to those that only chunks of prompts fill.
    facts = replace(cluster(1, 3, 2), default_link=Link("", "", 0.02, bytes_per_s))
    work = Workload(300, Lengths(120, 300), Lengths(60, 150, 160))
    plan = solve(facts, MODEL, work)
    runs = [simulate(plan, facts, MODEL, work, rows=sample_rows(work, seed)) for seed in range(3)]
    seen_s = sum(run.finish_s for run in runs) / 3
    assert plan.finish_s == pytest.approx(seen_s, rel=0.2)


def test_no_row_is_longer_than_the_workloads_most() -> None:
    work = replace(WORK, rows=5_000, output_tokens=Lengths(60, 150, 160))
    outputs = np.array([row.output_tokens for row in sample_rows(work, 0)])
    assert outputs.max() == 160
    assert outputs.mean() == pytest.approx(60, rel=0.05)
    assert np.percentile(outputs, 95) == pytest.approx(150, rel=0.05)


def test_who_is_full_is_not_said_to_have_room_by_one_who_is_too_slow() -> None:
    desk = Desk(100.0)
    for number, pass_s in enumerate((0.1, 0.1, 9.0)):
        desk.enter(number, Pace(pass_s, pass_s, 1.0, rows=10))
    desk.held.update({0: 10, 1: 9})
    # The first is full and the third would take a quarter of an hour: the second is as quick as any.
    assert desk.worthwhile(1, waiting=5)
    assert not desk.worthwhile(2, waiting=5)
