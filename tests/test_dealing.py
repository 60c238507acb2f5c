"""Rows among several pipelines: each is answered once, by whoever can, and nobody waits for long."""

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.activations import EXAMPLE
from benchmarks.ring_arithmetic import HIDDEN, stage_s
from benchmarks.ring_stage import Order, TimedCompute
from flows.dealing import Told
from planner.leases import Pace
from stages.codec import RAW
from stages.compute import StageCompute
from stages.config import StageSpec
from tests.dealt import dealt, plan_beside
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, row

PACE_S = {"a": 0.4, "b": 1.2}
"""Of each pipeline's stages, times C(n): the second is three times slower."""
SLOTS, SLOT_ROWS = 2, 4
PROPORTION = 0.07
"""By how much of all rows a pipeline's share may differ from its share of the speed."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def dragging(spec: StageSpec) -> StageCompute:
    """A stage that takes longer than it should, if it is the head of the first pipeline."""
    compute = StageCompute.load(spec)
    if spec.member == "a0":
        body = compute.shard.model.get_submodule("model")
        body.register_forward_pre_hook(lambda *_: time.sleep(0.1))
    return compute


def test_rows_over_unequal_pipelines_are_answered_once_as_by_one_process(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", seed=2)
    rows = [row(i, [(7 * i + j) % 256 for j in range(1 + 3 * i)], 4 + i % 9) for i in range(60)]
    alone = answers(tmp_path, rows, plan_of(4, 1), ring_settings(1, 60))
    # The pipeline of two stages is thought to be the faster, and has to give rows back at the end.
    paces = [Pace(0.01, 0.01, 1.0, 4), Pace(0.02, 0.02, 1.0, 4)]
    rings = [ring_settings(2, 2), ring_settings(1, 4)]
    found, source = dealt(tmp_path, rows, plan_beside(4, 2, 1), rings, paces, dragging)
    assert {n: told.answer.output_ids for n, told in found.items()} == {
        n: answer.output_ids for n, answer in alone.items()
    }
    said = Counter(told.pipeline for told in found.values())
    assert said.keys() == {0, 1}
    assert said[1] > source.taken[1], "no row was taken back"


def test_a_row_goes_to_a_pipeline_that_can_hold_it(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", seed=2)
    lengths = [10 if i % 3 else 200 for i in range(24)]
    rows = [row(i, [i % 256] * tokens, 6) for i, tokens in enumerate(lengths)]
    paces = [Pace(0.1, 0.1, 1.0, 4), Pace(1.0, 1.0, 1.0, 4)]
    small = ring_settings(1, 4).model_copy(update={"blocks": 8})
    rings = [small, ring_settings(1, 4)]
    found, _ = dealt(tmp_path, rows, plan_beside(4, 1, 1), rings, paces)
    assert len(found) == len(rows)
    assert {found[i].pipeline for i, tokens in enumerate(lengths) if tokens == 200} == {1}
    assert 0 in {told.pipeline for told in found.values()}


def test_a_row_goes_to_a_pipeline_that_can_seat_all_of_it_at_once(tmp_path: Path) -> None:
    """The first has 40 blocks, of which 24 are parked: a row of 17 is the second's."""
    write_random_model(tmp_path, "llama", seed=2)
    lengths = [10 if i % 3 else 264 for i in range(12)]
    rows = [row(i, [i % 256] * tokens, 6) for i, tokens in enumerate(lengths)]
    plan = plan_beside(4, 1, 1)
    parks, keeps = plan.pipelines
    parks = replace(parks, stages=tuple(replace(s, kv_offloaded=1.0) for s in parks.stages))
    paces = [Pace(0.1, 0.1, 1.0, 10), Pace(1.0, 1.0, 1.0, 4)]
    rings = [ring_settings(5, 2, row_tokens=64), ring_settings(1, 4)]
    found, _ = dealt(tmp_path, rows, replace(plan, pipelines=(parks, keeps)), rings, paces)
    assert {told.answer.error_type for told in found.values()} == {None}
    assert {found[i].pipeline for i, tokens in enumerate(lengths) if tokens == 264} == {1}
    assert 0 in {told.pipeline for told in found.values()}


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_pipelines_share_rows_as_they_are_fast_and_end_together(
    tmp_path: Path, known: bool
) -> None:
    activations = tmp_path / "activations.npy"
    np.save(activations, np.arange(64 * HIDDEN, dtype=np.uint16).reshape(1, 64, HIDDEN))

    def load(spec: StageSpec) -> TimedCompute:
        pace = PACE_S[spec.member[0]]
        return TimedCompute(Order("", str(activations), "", (RAW,), pace), spec)

    tokens = 4
    rows = [row(i, [i + 1], tokens) for i in range(96)]
    in_flight = SLOTS * SLOT_ROWS
    paces = [
        Pace(pass_s * (1 + tokens) / in_flight, pass_s, 1.0, in_flight)
        for pass_s in (SLOTS * pace * stage_s(SLOT_ROWS) for pace in PACE_S.values())
    ]
    if not known:  # both are thought to be as fast: at the end the slower one has to give rows back
        paces = [paces[0], paces[0]]
    ended: dict[int, float] = {}

    def meet(told: Told) -> None:
        ended[told.pipeline] = time.monotonic()

    rings = [ring_settings(SLOTS, SLOT_ROWS)] * 2
    found, _ = dealt(EXAMPLE, rows, plan_beside(1, 1, 1), rings, paces, load, meet)
    quick = sum(told.pipeline == 0 for told in found.values()) / len(rows)
    assert quick == pytest.approx(0.75, abs=PROPORTION)
    # Nobody waits for longer than the slower one takes for a row.
    assert abs(ended[0] - ended[1]) < SLOTS * PACE_S["b"] * stage_s(SLOT_ROWS) * (1 + tokens)
    assert found.keys() == set(range(len(rows)))
