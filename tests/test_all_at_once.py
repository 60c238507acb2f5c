"""Everything that saves time or memory, at once: and every row says what one process says."""

from dataclasses import replace
from pathlib import Path

import pytest

from planner.leases import Pace
from planner.plan import Plan
from stages.compute import StageCompute
from stages.config import Ring, StageSpec
from stages.control import Answer, LeasedRow
from tests.dealt import dealt, plan_beside
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, windowed_settings
from tests.test_halving import tight
from tests.test_window_ring import WINDOW, rows_that_share, with_stops

LAYERS = 4
ROWS = 18
LARGEST_PART = 140
"""Positions that stages have memory to compute at once."""


def without_memory(plan: Plan) -> Plan:
    """The plan's stages with room for two slots' keys and values, and some or all layers on disk."""
    pipelines = []
    for pipeline in plan.pipelines:
        stages = tuple(
            replace(stage, kv_offloaded=1.0, weights_offloaded=min(stage.layers, number + 1))
            for number, stage in enumerate(pipeline.stages)
        )
        pipelines.append(replace(pipeline, stages=stages))
    return replace(plan, pipelines=tuple(pipelines))


def written(folder: Path, family: str) -> tuple[list[LeasedRow], dict[int, Answer], Ring]:
    """A model in the folder, rows for it, what one calm stage says to them, and a tight ring."""
    if family == "llama":
        write_random_model(folder, family, seed=5)
        calm, ring = ring_settings(1, ROWS), ring_settings(4, 3)
        ring = ring.model_copy(update={"blocks": 32})
    else:
        write_random_model(folder, family, seed=5, sliding_window=WINDOW)
        calm = windowed_settings(1, ROWS, blocks=400, window=WINDOW, rows=5)
        ring = windowed_settings(4, 3, blocks=32, window=WINDOW, rows=4)
    rows = rows_that_share(ROWS)
    said = answers(folder, rows, plan_of(LAYERS, 1), calm)
    return with_stops(rows, said), said, ring.model_copy(update={"most_slots": 8})


def assert_all_happened(stages: list[StageCompute]) -> None:
    """Layers were read from disk, keys and values parked and fetched."""
    for stage in stages:
        assert stage.shard.stream is not None and stage.shard.stream.counts.layers
        assert stage.cache.parking is not None and stage.cache.parking.counts.bytes_back


def differing(
    rows: list[LeasedRow], found: dict[int, Answer], said: dict[int, Answer]
) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Rows whose tokens are not what was said, or a beginning of it where they stop; with both."""
    pairs = {
        number: (
            answer.output_ids,
            said[number].output_ids[: answer.output_tokens if rows[number].stop else None],
        )
        for number, answer in found.items()
    }
    return {number: pair for number, pair in pairs.items() if pair[0] != pair[1]}


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_all_that_saves_memory_and_time_changes_no_token(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, said, ring = written(tmp_path, family)
    monkeypatch.setattr("planner.admission.LEARNED_ROWS", 2)
    monkeypatch.setattr("flows.launch.PACE_EVERY_S", 0.1)
    stages: list[StageCompute] = []

    def load(spec: StageSpec) -> StageCompute:
        stages.append(tight(LARGEST_PART, spec))
        return stages[-1]

    found = answers(tmp_path, rows, without_memory(plan_of(LAYERS, 2)), ring, load=load)
    assert not differing(rows, found, said)
    assert any(answer.replayed_tokens for answer in found.values()), "nobody had to make way"
    assert_all_happened(stages)


def test_two_pipelines_with_all_that_saves_memory_say_what_one_process_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, said, ring = written(tmp_path, "llama")
    monkeypatch.setattr("planner.admission.LEARNED_ROWS", 2)
    stages: list[StageCompute] = []

    def load(spec: StageSpec) -> StageCompute:
        stages.append(tight(LARGEST_PART, spec))
        return stages[-1]

    plan, paces = without_memory(plan_beside(LAYERS, 2, 1)), [Pace(0.1, 0.1, 1.0, 6)] * 2
    found, _ = dealt(tmp_path, rows, plan, [ring, ring], paces, load)
    assert {told.pipeline for told in found.values()} == {0, 1}
    assert not differing(rows, {n: told.answer for n, told in found.items()}, said)
    assert_all_happened(stages)
