"""A ring gets as many micro-batches as it is seen to need, and loses none of its rows by that."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.activations import EXAMPLE
from benchmarks.ring_arithmetic import HIDDEN, NETWORKS, ROWS, Cell, Network, stage_s
from benchmarks.ring_stage import Order, TimedCompute
from flows.pacing import ROUNDS, Pacer
from planner.schedule import CHUNK_TOKENS, Ring, RingShape
from planner.tempo import MOST, Passage, micro_batches
from stages.codec import RAW
from stages.config import StageSpec
from stages.control import Heartbeat, LinkReport
from stages.wire import SampleFrame, StepFrame
from tests.ring import answers, plan_of, ring_settings, row

SHAPE = RingShape(slots=2, slot_rows=4, blocks=256, block_tokens=16,
                  step_tokens=4 + CHUNK_TOKENS, most_slots=5)  # fmt: skip


def passages(cell: Cell, frames: int) -> list[Passage]:
    """A cell's ring after so many frames, every stage and link undisturbed."""
    path, forward_bytes = cell.network.path, 10_240 * ROWS
    on = Passage(frames, frames * stage_s(ROWS), frames * forward_bytes,
                 path.rate_bit_per_s / 8, 2 * path.delay_s)  # fmt: skip
    return [on] * (cell.stages - 1) + [replace(on, sent_bytes=0)]


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda n: n.name)
def test_a_ring_needs_its_time_over_the_bottlenecks_and_one_that_waits(
    network: Network, stages: int
) -> None:
    cell = Cell(network, stages)
    wanted = micro_batches(passages(cell, 10), passages(cell, 50))
    assert wanted == int(np.ceil(cell.loop_s() / cell.bottleneck_s - 1e-9)) + 1


def test_nothing_is_concluded_while_a_stage_has_no_frame() -> None:
    before = passages(Cell(NETWORKS[0], 2), 10)
    assert micro_batches(before, [before[0], replace(before[1], frames=11)]) is None


def beats(frames: int, delay_s: float) -> Mapping[str, Heartbeat]:
    """Two stages that took 10 ms for each frame, far apart."""
    counts = dict.fromkeys(LinkReport.model_fields, 0)
    return {
        name: Heartbeat(
            frames=frames,
            busy_s=0.010 * frames,
            links=(
                LinkReport.model_validate(
                    counts
                    | {"peer": peer, "purpose": "data", "congestion_control": "bbr", "level": "",
                       "payload_bytes_sent": frames, "rtt_s": 2 * delay_s}
                ),
            ),
        )
        for name, peer in (("a", "b"), ("b", "a"))
    }  # fmt: skip


def test_a_slower_network_opens_slots_a_faster_one_closes_them_and_the_plan_is_the_least() -> None:
    pacer = Pacer(("a", "b"), ring_settings(3, 4).model_copy(update={"most_slots": 12}))
    assert not pacer.heard(beats(0, 0.0))
    assert not pacer.heard(beats(30, 0.0)), "as planned"
    assert pacer.heard(beats(60, 0.030))
    assert pacer.slots == 9  # (2 x 10 + 2 x 30) / 10, and one
    assert not pacer.heard(beats(60 + 9 * ROUNDS - 1, 0.5)), "too early to tell"
    assert not pacer.heard(beats(200, 0.025)), "one too many is left alone"
    assert pacer.heard(beats(300, 0.5))
    assert pacer.slots == 12
    assert pacer.heard(beats(600, 0.0))
    assert pacer.slots == 3


def test_a_stage_that_is_silent_or_a_ring_that_cannot_grow_changes_nothing() -> None:
    pacer = Pacer(("a", "b"), ring_settings(3, 4).model_copy(update={"most_slots": 12}))
    assert not pacer.heard({"a": beats(30, 0.5)["a"]})
    fixed = Pacer(("a", "b"), ring_settings(3, 4))
    assert not any(fixed.heard(beats(100 * i, 0.5)) for i in range(4))


@given(
    rows=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=30),
    opened=st.lists(st.integers(1, 7), min_size=1, max_size=30),
)
@settings(max_examples=100, deadline=None)
def test_slots_that_open_and_close_lose_and_repeat_nothing(
    rows: list[tuple[int, int]], opened: list[int]
) -> None:
    ring = Ring(SHAPE)
    quotas = {number: quota for number, (_, quota) in enumerate(rows)}
    for number, (prompt, quota) in enumerate(rows):
        ring.enqueue(number, prompt, prompt + quota)
    computed, made = dict.fromkeys(quotas, 0), dict.fromkeys(quotas, 0)
    for turn in range(10_000):
        ring.open(opened[turn % len(opened)])
        step = ring.next_step()
        if step is None:
            break
        for span in step.spans:
            assert span.start == computed[span.sequence]
            computed[span.sequence] += span.tokens
            made[span.sequence] += span.samples
        numbers = [span.sequence for span in step.spans]
        ring.returned(step.slot, [n for n in numbers if made[n] == quotas[n]])
    assert made == quotas


def test_rows_enter_open_slots_alone() -> None:
    ring = Ring(SHAPE)
    for number in range(100):
        ring.enqueue(number, 8, 40)

    def slots() -> set[int]:
        steps = []
        while (step := ring.next_step()) is not None:
            steps.append(step)
        for step in steps:
            ring.returned(step.slot, [span.sequence for span in step.spans])
        return {step.slot for step in steps}

    assert slots() == {0, 1}
    ring.open(5)
    assert slots() == {0, 1, 2, 3, 4}
    ring.open(99)
    assert slots() == {0, 1, 2, 3, 4}
    ring.open(1)
    assert slots() == {0}


def test_a_run_opens_the_slots_that_its_stages_leave_idle(tmp_path: Path) -> None:
    activations = tmp_path / "activations.npy"
    np.save(activations, np.arange(64 * HIDDEN, dtype=np.uint16).reshape(1, 64, HIDDEN))
    used: list[int] = []

    class Noting(TimedCompute):
        """Notes which slots come by."""

        def go_on(self, frame: StepFrame) -> StepFrame | SampleFrame:
            used.append(frame.step.slot)
            return super().go_on(frame)

    def load(spec: StageSpec) -> TimedCompute:
        return Noting(Order("", str(activations), "", (RAW,), pace=0.2), spec)

    ring = ring_settings(1, 2).model_copy(update={"most_slots": MOST, "blocks": 256})
    rows = [row(i, [i + 1], 40) for i in range(16)]
    found = answers(EXAMPLE, rows, plan_of(3, 3), ring, load=load)
    assert {answer.output_tokens for answer in found.values()} == {40}
    assert set(used[:40]) == {0}
    assert set(used) == set(range(MOST)), "three equal stages keep three busy, and one waits"
