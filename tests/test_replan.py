"""From a running plan to the next: what is kept, what it costs, and whether it pays."""

from dataclasses import replace

import pytest

from planner.facts import Cluster, InfeasibleError, Lengths, Link, ModelShape, Node, Workload
from planner.replan import replan
from planner.solve import solve

MODEL = ModelShape(16, 2048, 1e9, 2048.0, 2, 2e8, 2e8, 1e9)
WORK = Workload(2000, Lengths(100, 150), Lengths(64, 100))
LINK = Link("", "", 0.005, 1e8)


def cluster(count: int) -> Cluster:
    nodes = tuple(Node(f"n{i}", 2e13, 9e9, 5e11, disk_bytes_per_s=1e9) for i in range(count))
    return Cluster(nodes, (), LINK)


def test_node_that_left_is_replaced_and_healthy_pipelines_stay() -> None:
    before = solve(cluster(7), MODEL, WORK)
    assert len(before.pipelines) > 1
    gone = before.pipelines[0].stages[0].node
    left = replace(cluster(7), nodes=tuple(n for n in cluster(7).nodes if n.name != gone))
    change = replan(before, left, MODEL, replace(WORK, rows=500))
    used = {stage.node for p in change.plan.pipelines for stage in p.stages}
    assert gone not in used
    assert set(before.pipelines[1:]) & set(change.plan.pipelines)
    assert change.finish_s <= change.keep_s * 1.2


def test_nothing_changed_keeps_the_plan_and_loads_nothing() -> None:
    before = solve(cluster(6), MODEL, WORK)
    change = replan(before, cluster(6), MODEL, WORK)
    assert change.layers_to_load == {}
    assert change.rows_prefilled_again == 0
    assert change.plan.rows_per_s == pytest.approx(before.rows_per_s, rel=0.01)


def test_new_node_pays_when_many_rows_remain_and_not_when_few_do() -> None:
    slow_disks = replace(
        cluster(6), nodes=tuple(replace(n, disk_bytes_per_s=1e6) for n in cluster(6).nodes)
    )
    few_nodes = replace(slow_disks, nodes=slow_disks.nodes[:3])
    before = solve(few_nodes, MODEL, WORK)
    many = replan(before, slow_disks, MODEL, replace(WORK, rows=10**7))
    assert many.pays
    assert many.layers_to_load
    few = replan(before, slow_disks, MODEL, replace(WORK, rows=3))
    assert not few.pays


def test_too_few_nodes_left_say_what_is_missing() -> None:
    before = solve(cluster(3), MODEL, WORK)
    no_disks = replace(cluster(1).nodes[0], disk_bytes_per_s=0.0)
    with pytest.raises(InfeasibleError, match="memory is short by"):
        replan(before, Cluster((no_disks,), (), LINK), MODEL, WORK)


def test_remaining_rows_end_when_the_plan_itself_says_for_shards_that_are_there() -> None:
    # Disks of unknown rate load in no time: keeping a plan and starting it anew then take the same.
    ready = replace(
        cluster(6), nodes=tuple(replace(n, disk_bytes_per_s=0.0) for n in cluster(6).nodes)
    )
    few = replace(WORK, rows=60)
    before = solve(ready, MODEL, few)
    change = replan(before, ready, MODEL, few)
    assert change.keep_s == pytest.approx(before.finish_s)
    assert change.keep_s > 1.2 * few.rows / before.rows_per_s
    assert change.finish_s <= change.keep_s * (1 + 1e-9)
