"""The ring's benchmark measures what it says: its sums, and stages that only take their time."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import record as recording
from benchmarks.activations import EXAMPLE
from benchmarks.record import Claim, record
from benchmarks.ring_arithmetic import HIDDEN, NETWORKS, ROWS, Cell, stage_s
from benchmarks.ring_hosts import Lap, Ran
from benchmarks.ring_stage import Order, TimedCompute
from stages.codec import RAW
from stages.config import StageSpec
from stages.worker import Worker
from tests.ring import answers, plan_of, ring_settings, row


@pytest.mark.parametrize(
    ("tokens", "seconds"), [(1, 0.045), (8, 0.058), (20, 0.089), (32, 0.120), (56, 0.182)]
)
def test_a_stage_takes_longer_linearly_between_the_given_steps_and_beyond(
    tokens: int, seconds: float
) -> None:
    assert stage_s(tokens) == pytest.approx(seconds)


def test_the_longer_a_link_the_more_a_full_ring_of_two_gains_on_one_batch() -> None:
    gains = [0.9 * cell.loop_s() / cell.bottleneck_s for cell in (Cell(n, 2) for n in NETWORKS)]
    assert [round(gain, 1) for gain in gains] == [1.9, 2.2, 2.6, 3.1, 3.9]


def test_timed_stages_answer_every_row_and_count_what_they_wait_as_busy_not_as_processor_time(
    tmp_path: Path,
) -> None:
    activations = tmp_path / "activations.npy"
    np.save(activations, np.arange(64 * HIDDEN, dtype=np.uint16).reshape(1, 64, HIDDEN))
    stages: list[TimedCompute] = []
    workers: list[Worker] = []

    def load(spec: StageSpec) -> TimedCompute:
        stages.append(TimedCompute(Order("", str(activations), "", (RAW,), pace=0.2), spec))
        return stages[-1]

    rows = [row(i, [i + 1], 3 + i % 3) for i in range(12)]
    found = answers(EXAMPLE, rows, plan_of(2, 2), ring_settings(3, 2), workers.append, load)
    assert [found[i].output_tokens for i in range(12)] == [3 + i % 3 for i in range(12)]
    asked = [tokens for _, _, tokens in stages[0].steps]
    assert asked == [tokens for _, _, tokens in stages[1].steps]
    for worker in workers:
        assert worker.done.tokens == sum(asked)
        assert worker.done.busy_s >= 0.2 * sum(stage_s(tokens) for tokens in asked)
        assert worker.done.cpu_s < 0.5 * worker.done.busy_s


def test_a_run_is_rated_between_its_first_rounds_and_its_first_ended_row() -> None:
    ends = np.array([5.0, 7.0, 9.0, *np.arange(10.0, 20.0), 30.0])
    tokens = np.array([ROWS] * 12 + [3, 1])
    steps = np.stack([ends - 0.5, ends, tokens], axis=1)
    ran = Ran(Lap((1.0,), NETWORKS[0].path, 1, ()), {}, 4.0, 27.0, [steps], 1.0)
    assert ran.steady_rows_per_s == pytest.approx(ROWS)
    assert ran.early_rows_per_s == pytest.approx(11 * ROWS / 13)
    assert ran.busy(1.0)[0, 6] == pytest.approx(0.5)
    assert ran.busy(1.0).sum() == pytest.approx(14 * 0.5)


def test_cells_that_are_measured_again_replace_their_own_rows_of_the_record_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    record("ring", [Claim(name, 1.0, "ratio") for name in ("E1x2: a", "E5x2: a", "E5x2 begun")])
    record("ring", [Claim("E5x2: b", 2.0, "ratio")], again=["E5x2:"])
    rows = json.loads((tmp_path / "ring.json").read_text(encoding="utf-8"))
    assert [row["claim"] for row in rows] == ["E1x2: a", "E5x2 begun", "E5x2: b"]
