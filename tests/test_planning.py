"""What a plan is made from, and what its ring is told: lengths that can occur, room for every row."""

import json
import shutil
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from flows.errors import JobError
from flows.job import Job
from flows.layout import Layout
from flows.measure import Measured
from flows.model import ModelFolder, open_model
from flows.planning import make_plan, ring_of, workload
from planner.cost import resident_kv
from planner.facts import Cluster, CodecRate, Lengths, Link, ModelShape, Node, Workload
from planner.plan import Pipeline, StagePlan
from storage.prompts import PromptRow
from tests.conftest import TINY_CONTEXT


@pytest.fixture
def job(tiny_model: Path) -> Job:
    document = {"name": "a", "model": str(tiny_model), "prompts": {"uri": "none"}}
    return Job.model_validate_json(json.dumps(document))


@pytest.fixture
def model(job: Job) -> ModelFolder:
    return open_model(job)


def asking(prompt: str, **sampling: int | float | list[str]) -> PromptRow:
    return PromptRow(0, "a", "hash", prompt, None, sampling, "prefix", len(prompt))


@pytest.mark.parametrize("asked", [TINY_CONTEXT, 10**6, 1e300])
def test_an_answer_is_expected_to_end_with_the_context(
    job: Job, model: ModelFolder, asked: float
) -> None:
    work = workload(1, [asking("p" * 60, max_new_tokens=asked)], job, model)
    assert work.output_tokens.p95 == TINY_CONTEXT - 60


@pytest.mark.parametrize("prompt", ["", "p" * (TINY_CONTEXT + 1)])
def test_a_prompt_that_will_be_its_rows_error_counts_for_nothing(
    job: Job, model: ModelFolder, prompt: str
) -> None:
    work = workload(2, [asking("ten tokens"), asking(prompt)], job, model)
    assert work.prompt_tokens.mean == 10


def test_beginnings_that_rows_share_are_planned_to_be_computed_once(
    job: Job, model: ModelFolder
) -> None:
    prompts = ["i" * 70 + str(n) * 20 for n in range(4)]
    work = workload(4, [asking(prompt) for prompt in prompts], job, model)
    assert work.shared_prefix_fraction == 3 * 64 / (4 * 90)
    assert workload(1, [asking("one alone")], job, model).shared_prefix_fraction == 0


def test_a_ring_of_one_row_holds_the_whole_context() -> None:
    node = Node(name="n", flop_per_s=1e9, memory_bytes=1e9, memory_bytes_per_s=1e9)
    shape = ModelShape(
        layers=2, hidden=8, layer_bytes=100, kv_bytes_per_token_layer=8.0,
        activation_value_bytes=4, embedding_bytes=100, head_bytes=100, flop_per_token_layer=100.0,
    )  # fmt: skip
    measured = Measured(Cluster((node,)), shape, CodecRate(1.5, 1e9), "fast", 1, ())
    pipeline = Pipeline((StagePlan("n", 0, 2),), (), 1, 1)
    work = Workload(1, Lengths(50.0, 50.0), Lengths(50.0, 50.0))
    ring = ring_of(pipeline, measured, TINY_CONTEXT, work)
    assert ring.blocks * ring.block_tokens >= TINY_CONTEXT


@pytest.mark.parametrize(("window", "kept"), [(32, True), (TINY_CONTEXT, False), (0, False)])
def test_a_ring_keeps_windows_that_are_shorter_than_the_context(window: int, kept: bool) -> None:
    node = Node(name="n", flop_per_s=1e9, memory_bytes=1e6, memory_bytes_per_s=1e9)
    shape = ModelShape(
        layers=6, hidden=8, layer_bytes=100, kv_bytes_per_token_layer=8.0,
        activation_value_bytes=4, embedding_bytes=100, head_bytes=100, flop_per_token_layer=100.0,
        windows=(window,) * 5 + (0,),
    )  # fmt: skip
    measured = Measured(Cluster((node,)), shape, CodecRate(1.5, 1e9), "fast", 1, ())
    pipeline = Pipeline((StagePlan("n", 0, 6),), (), 2, 1)
    work = Workload(9, Lengths(1500.0, 1500.0), Lengths(500.0, 500.0))
    context = 4 * TINY_CONTEXT
    ring = ring_of(pipeline, measured, context if kept else TINY_CONTEXT, work)
    assert (ring.window_tokens, ring.window_blocks > 0) == (window if kept else 0, kept)


@pytest.mark.parametrize(("level", "bytes_per_s"), [("int8", 1e12), ("int8", 1e5), ("fast", 1e5)])
def test_a_job_that_asks_for_int8_has_it_on_every_link_that_carries_activations(
    level: str, bytes_per_s: float
) -> None:
    nodes = tuple(
        Node(name=name, flop_per_s=1e9, memory_bytes=1.5e9, memory_bytes_per_s=1e9)
        for name in ("a", "b")
    )
    links = tuple(Link(x.name, y.name, 0.001, bytes_per_s) for x, y in permutations(nodes, 2))
    shape = ModelShape(
        layers=2, hidden=8, layer_bytes=1e9, kv_bytes_per_token_layer=0.01,
        activation_value_bytes=4, embedding_bytes=100, head_bytes=100, flop_per_token_layer=100.0,
    )  # fmt: skip
    measured = Measured(Cluster(nodes, links), shape, CodecRate(3.0, 1e9), level, 1, ())
    work = Workload(9, Lengths(5.0, 5.0), Lengths(5.0, 5.0))
    [pipeline] = make_plan(measured, work, Layout(2)).pipelines
    codecs = {(link.source, link.target): link.codec for link in pipeline.links}
    assert codecs["a", "b"] == level
    assert codecs.get(("b", "a"), "raw") != "int8"


@pytest.fixture
def tight() -> Measured:
    """A node with memory for six of eight layers, which reads a layer a second from its disk."""
    node = Node(
        name="n", flop_per_s=1e12, memory_bytes=6.5e9, memory_bytes_per_s=1e10, disk_bytes_per_s=1e9
    )
    shape = ModelShape(
        layers=8, hidden=64, layer_bytes=1e9, kv_bytes_per_token_layer=1e4,
        activation_value_bytes=4, embedding_bytes=1e8, head_bytes=1e8, flop_per_token_layer=5e8,
    )  # fmt: skip
    return Measured(Cluster((node,)), shape, CodecRate(1.5, 1e9), "fast", 1, ())


NINETY = Workload(100, Lengths(50.0, 60.0), Lengths(20.0, 30.0))
"""Rows of 90 tokens at most, or nearly so."""


def test_a_stage_whose_layers_do_not_all_fit_streams_some_and_has_room_for_its_rows(
    tight: Measured,
) -> None:
    [pipeline] = make_plan(tight, NINETY, Layout()).pipelines
    [stage], shape = pipeline.stages, tight.model
    ring = ring_of(pipeline, tight, TINY_CONTEXT, NINETY)
    resident = (stage.layers - stage.weights_offloaded + 2) * shape.layer_bytes + 2e8
    kept = ring.blocks * ring.block_tokens * stage.layers * shape.kv_bytes_per_token_layer
    assert stage.weights_offloaded >= 4
    assert ring.blocks * ring.block_tokens >= 90 * pipeline.micro_batch_rows * pipeline.in_flight
    assert resident + kept <= tight.cluster.node("n").memory_bytes


def test_a_node_without_a_disk_to_stream_from_says_what_it_lacks(tight: Measured) -> None:
    [node] = tight.cluster.nodes
    diskless = replace(tight, cluster=Cluster((replace(node, disk_bytes_per_s=0.0),)))
    with pytest.raises(JobError, match=r"no plan fits: memory is short by .* GB"):
        make_plan(diskless, NINETY, Layout())


def far_apart(parked_kv_bytes_per_s: float) -> Measured:
    """Two nodes with memory for their four layers and a few rows each, a second's way apart."""
    nodes = tuple(
        Node(
            name=name, flop_per_s=1e12, memory_bytes=5.2e9, memory_bytes_per_s=1e10,
            parked_kv_bytes_per_s=parked_kv_bytes_per_s,
        )
        for name in ("a", "b")
    )  # fmt: skip
    links = tuple(Link(x.name, y.name, 1.0, 1e9) for x, y in permutations(nodes, 2))
    shape = ModelShape(
        layers=8, hidden=64, layer_bytes=1e9, kv_bytes_per_token_layer=1e5,
        activation_value_bytes=4, embedding_bytes=1e8, head_bytes=1e8, flop_per_token_layer=5e8,
    )  # fmt: skip
    return Measured(Cluster(nodes, links), shape, CodecRate(1.5, 1e9), "fast", 1, ())


def test_stages_park_where_memory_for_rows_in_flight_binds_and_it_pays() -> None:
    without, slow, quick = (
        make_plan(far_apart(rate), NINETY, Layout(2)) for rate in (0.0, 1e7, 1e9)
    )
    assert slow.tokens_per_s == without.tokens_per_s
    assert not any(stage.kv_offloaded for stage in slow.pipelines[0].stages)
    assert quick.tokens_per_s > 2 * without.tokens_per_s
    measured, [pipeline] = far_apart(1e9), quick.pipelines
    ring = ring_of(pipeline, measured, TINY_CONTEXT, NINETY)
    for stage in pipeline.stages:
        room = resident_kv(stage.kv_offloaded, pipeline.in_flight)
        kept = room * ring.blocks * ring.block_tokens * stage.layers * 1e5
        assert stage.kv_offloaded
        assert kept + stage.layers * 1e9 + 1e8 <= 5.2e9


def test_a_job_with_room_for_its_rows_parks_nothing() -> None:
    measured = far_apart(1e9)
    roomy = tuple(replace(node, memory_bytes=1e11) for node in measured.cluster.nodes)
    cluster = replace(measured.cluster, nodes=roomy)
    plan = make_plan(replace(measured, cluster=cluster), NINETY, Layout(2))
    assert not any(stage.kv_offloaded for stage in plan.pipelines[0].stages)


def test_a_models_digest_is_of_its_weights_as_they_are_now(
    job: Job, model: ModelFolder, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model.folder, tmp_path / "copy"))
    copied = job.model_copy(update={"model": str(folder)})
    assert open_model(copied).digest == model.digest
    [weights] = folder.glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[2**15] ^= 1
    weights.write_bytes(content)
    assert open_model(copied).digest != model.digest
