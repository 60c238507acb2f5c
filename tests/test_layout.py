"""Processes form the pipelines that were asked for, or those that are done first."""

from itertools import chain, permutations

import pytest

from flows.errors import JobError
from flows.layout import Layout, layout_of
from flows.measure import Measured
from flows.planning import make_plan, paces_of
from planner.facts import Cluster, CodecRate, Lengths, Link, ModelShape, Node, Workload


@pytest.fixture
def four() -> Measured:
    """Four nodes that can each hold the whole model, near one another."""
    nodes = tuple(
        Node(name=f"local-{i}", flop_per_s=1e11, memory_bytes=4e9, memory_bytes_per_s=1e10)
        for i in range(4)
    )
    links = tuple(Link(x.name, y.name, 1e-4, 1e9) for x, y in permutations(nodes, 2))
    shape = ModelShape(
        layers=4, hidden=512, layer_bytes=1e8, kv_bytes_per_token_layer=1e4,
        activation_value_bytes=4, embedding_bytes=1e7, head_bytes=1e7, flop_per_token_layer=5e7,
    )  # fmt: skip
    return Measured(Cluster(nodes, links), shape, CodecRate(1.5, 1e9), "fast", 1, ())


MANY = Workload(3000, Lengths(50.0, 60.0), Lengths(20.0, 30.0))


@pytest.mark.parametrize(("stages", "pipelines"), [(1, 4), (2, 2), (4, 1)])
def test_pipelines_are_of_as_many_stages_as_was_asked_and_no_node_is_in_two(
    four: Measured, stages: int, pipelines: int
) -> None:
    plan = make_plan(four, MANY, Layout(stages, pipelines))
    names = [[stage.node for stage in each.stages] for each in plan.pipelines]
    assert [len(each) for each in names] == [stages] * pipelines
    assert sorted(chain(*names)) == [f"local-{i}" for i in range(4)]
    assert all(each.stages[-1].end_layer == 4 for each in plan.pipelines)
    assert plan.tokens_per_s <= plan.bound_tokens_per_s
    for pace, pipeline in zip(paces_of(plan, four, MANY), plan.pipelines, strict=True):
        assert pace.rows == pipeline.micro_batch_rows * pipeline.in_flight


def test_left_to_the_planner_processes_form_the_pipelines_that_are_done_first(
    four: Measured,
) -> None:
    chosen = make_plan(four, MANY, Layout(4, None))
    asked = [make_plan(four, MANY, Layout(*each)) for each in ((1, 4), (2, 2), (4, 1))]
    assert chosen.finish_s <= 1.01 * min(plan.finish_s for plan in asked)


def test_what_does_not_go_together_is_said() -> None:
    assert layout_of(None, None, None, None) == Layout(1, 1)
    assert layout_of(3, None, None, None) == Layout(3, 1)
    assert layout_of(None, None, 3, 1e9) == Layout(3, None, 1e9)
    with pytest.raises(JobError, match="--processes leaves"):
        layout_of(2, None, 4, None)
    with pytest.raises(JobError, match="130 processes"):
        layout_of(13, 10, None, None)
