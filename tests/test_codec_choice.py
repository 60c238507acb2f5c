"""The choice of a level: right by the formulas, steady under noise, never slower than raw."""

from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from stages.codec import FAST, INT8, RAW
from stages.codec_choice import FIRST_PROBES, PROBE_EVERY, PROBING_SHARE, LevelChooser

FRAME = 192 * 1024
MBIT = 1e6 / 8


@dataclass(frozen=True)
class Level:
    ratio: float
    encode_bytes_per_s: float
    decode_bytes_per_s: float


LEVELS = {
    RAW: Level(1.0, 20e9, 10e9),
    FAST: Level(1.48, 1.0e9, 1.7e9),
    INT8: Level(1.9, 0.4e9, 0.6e9),
}


@dataclass
class Wire:
    """A link and a codec of known speeds; `spread` makes each observation noisy."""

    link_bytes_per_s: float
    spread: float = 0.0
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def noisy(self, seconds: float) -> float:
        return seconds * float(np.exp(self.random.normal(0, self.spread)))

    def goodput(self, level: str, overlapped: bool) -> float:
        facts = LEVELS[level]
        speeds = (
            facts.encode_bytes_per_s,
            facts.ratio * self.link_bytes_per_s,
            facts.decode_bytes_per_s,
        )
        return min(speeds) if overlapped else 1 / sum(1 / speed for speed in speeds)

    def send(self, chooser: LevelChooser, raw_bytes: int = FRAME) -> str:
        level = chooser.choose(raw_bytes)
        facts = LEVELS[level]
        sent = int(raw_bytes / facts.ratio)
        chooser.encoded(level, raw_bytes, sent, self.noisy(raw_bytes / facts.encode_bytes_per_s))
        chooser.decoded(level, raw_bytes, self.noisy(raw_bytes / facts.decode_bytes_per_s))
        chooser.delivered(sent, self.noisy(sent / self.link_bytes_per_s))
        return level


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("mbit", [1, 10, 100, 1000, 3000, 10_000, 100_000])
def test_choice_is_the_level_of_best_goodput(mbit: int, overlapped: bool) -> None:
    wire = Wire(mbit * MBIT)
    chooser = LevelChooser((RAW, FAST, INT8), overlapped=overlapped)
    for _ in range(40):
        chosen = wire.send(chooser)
    best = max(LEVELS, key=lambda level: wire.goodput(level, overlapped))
    gain = wire.goodput(best, overlapped) / wire.goodput(chosen, overlapped)
    assert gain <= 1.05
    assert wire.goodput(chosen, overlapped) >= wire.goodput(RAW, overlapped)


@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize("mbit", [1, 30, 300, 3000, 30_000])
def test_long_job_is_never_slower_than_raw(mbit: int, overlapped: bool) -> None:
    wire = Wire(mbit * MBIT, spread=0.2)
    chooser = LevelChooser(overlapped=overlapped)
    spent = sum(1 / wire.goodput(wire.send(chooser), overlapped) for _ in range(3000))
    assert spent <= 1.005 * 3000 / wire.goodput(RAW, overlapped)


def test_choice_follows_a_link_that_changes() -> None:
    chooser = LevelChooser(overlapped=False)
    wire = Wire(10_000 * MBIT, spread=0.1)
    before = [wire.send(chooser) for _ in range(200)]
    wire.link_bytes_per_s = 20 * MBIT
    after = [wire.send(chooser) for _ in range(200)]
    assert before[-PROBE_EVERY:].count(FAST) <= 1
    assert after[-PROBE_EVERY:].count(RAW) <= 1


def test_noise_does_not_make_the_choice_flicker() -> None:
    even = 1 / (1.48 / 0.48 * (1 / 1.0e9 + 1 / 1.7e9)) / 1.02  # serial: fast is 1 % ahead of raw
    wire = Wire(even, spread=0.02)
    chooser = LevelChooser(overlapped=False)
    chosen = [wire.send(chooser) for _ in range(1000)]
    changes = sum(a != b for a, b in pairwise(chosen[8:]))
    probes = 1000 // PROBE_EVERY
    assert changes <= 2 * probes + 4


def test_a_frame_that_was_kept_waiting_changes_nothing_but_a_slower_codec_does() -> None:
    wire, chooser = Wire(300 * MBIT), LevelChooser((RAW, FAST))
    assert [wire.send(chooser) for _ in range(40)][-20:].count(FAST) >= 19
    facts = LEVELS[FAST]
    sent, usual_s = int(FRAME / facts.ratio), FRAME / facts.encode_bytes_per_s
    chooser.encoded(FAST, FRAME, sent, 100 * usual_s)
    assert [wire.send(chooser) for _ in range(20)].count(FAST) >= 19
    for _ in range(20):
        chooser.encoded(FAST, FRAME, sent, 100 * usual_s)
    assert wire.send(chooser) == RAW


def test_nothing_known_means_raw_but_for_the_first_probes() -> None:
    chooser = LevelChooser((RAW, FAST))
    assert [chooser.choose(FRAME) for _ in range(2)] == [RAW, RAW]
    for level in (RAW, RAW, FAST, FAST):
        chooser.encoded(level, FRAME, FRAME, 0.0)
    assert [chooser.choose(FRAME) for _ in range(20)] == [RAW] * 20


def test_level_that_loses_by_far_is_tried_more_rarely() -> None:
    wire = Wire(100_000 * MBIT)
    chooser = LevelChooser(overlapped=False)
    tried = [n for n in range(20_000) if wire.send(chooser) == FAST]
    loss = wire.goodput(RAW, False) / wire.goodput(FAST, False) - 1
    gaps = np.diff(tried[FIRST_PROBES:])
    assert loss / PROBING_SHARE > 10 * PROBE_EVERY
    assert np.allclose(gaps, loss / PROBING_SHARE, rtol=0.01)


def test_sizes_are_judged_apart() -> None:
    chooser = LevelChooser(overlapped=False)
    wire = Wire(100 * MBIT)
    for _ in range(20):
        wire.send(chooser)
        small = chooser.choose(3000)
        slow = 40e-6 if small == FAST else 1e-6  # a small frame's coding costs Python, not bytes
        chooser.encoded(small, 3000, 2990 if small == FAST else 3000, slow)
    assert (chooser.choose(FRAME), chooser.choose(3000)) == (FAST, RAW)


def test_stage_that_needs_the_cpu_itself_counts_it() -> None:
    wire = Wire(1000 * MBIT)
    compute_s_per_byte = 1 / (1.48 * wire.link_bytes_per_s)  # alone it would just feed the link
    free, bound = LevelChooser(), LevelChooser(compute_s_per_byte=compute_s_per_byte)
    for _ in range(40):
        wire.send(free)
        wire.send(bound)
    at_fast, at_raw = (bound.predicted_bytes_per_s(level, FRAME) for level in (FAST, RAW))
    assert free.predicted_bytes_per_s(FAST, FRAME) > 1.1 * at_fast > at_raw
    assert at_fast == pytest.approx(1 / (1 / 1.0e9 + compute_s_per_byte), rel=0.01)


@pytest.mark.parametrize(("work_s", "level"), [(0.2, FAST), (0.002, RAW)])
def test_a_stage_that_computes_longer_than_its_link_sends_keeps_what_costs_it_nothing(
    work_s: float, level: str
) -> None:
    wire = Wire(1000 * MBIT)
    chooser = LevelChooser(start=FAST, compute_s_per_byte=work_s / FRAME)
    chosen = [wire.send(chooser) for _ in range(100)]
    assert chosen[-50:].count(level) >= 48


def test_prediction_is_infinite_while_nothing_costs() -> None:
    assert LevelChooser().predicted_bytes_per_s(FAST, FRAME) == float("inf")
