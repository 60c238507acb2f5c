"""Memory for rows in flight: what they come to together, not each at its longest."""

import random
import statistics
from dataclasses import replace

import pytest

from planner.cost import kv_tokens
from planner.facts import Lengths, Workload
from planner.lengths import met_tokens, spread_tokens
from planner.rows import sample_rows

WORK = Workload(500, Lengths(256, 700), Lengths(96, 250, 256))


def test_one_row_has_room_for_a_long_one() -> None:
    assert kv_tokens(WORK, 1) == 950


def test_equal_rows_have_room_for_each() -> None:
    equal = Workload(500, Lengths(256, 256), Lengths(96, 96))
    assert kv_tokens(equal, 8) == 8 * 352


def test_shared_beginning_has_room_once() -> None:
    shared = Workload(500, Lengths(200, 200), Lengths(50, 50), shared_prefix_fraction=0.5)
    assert kv_tokens(shared, 8) == 100 + 8 * 150


@pytest.mark.parametrize("rows", [16, 64, 250])
def test_rows_that_start_together_come_to_more_about_one_time_in_twenty(rows: int) -> None:
    over, times, work = 0, 200, replace(WORK, rows=rows)
    for seed in range(times):
        drawn = sample_rows(WORK, seed)[:rows]
        over += sum(r.prompt_tokens + r.output_tokens for r in drawn) > kv_tokens(work, rows)
    assert 0.01 <= over / times <= 0.10
    assert kv_tokens(work, rows) < 0.6 * rows * 950


def test_rows_that_came_as_others_ended_are_met_on_their_way_and_hold_less() -> None:
    lengths, dice, rows = Lengths(256, 400), random.Random(0), 64
    work = Workload(10_000, Lengths(100, 100), lengths)
    ends = [row.output_tokens for row in sample_rows(work, 0)]
    over, times = 0, 400
    for _ in range(times):
        met = (dice.random() * end for end in dice.choices(ends, weights=ends, k=rows))
        over += rows * 100 + sum(met) > kv_tokens(work, rows)
    assert over / times <= 0.05
    assert kv_tokens(work, rows) < 0.9 * kv_tokens(replace(work, rows=rows), rows)


@pytest.mark.parametrize("lengths", [Lengths(128, 200), Lengths(96, 140, 256), Lengths(9, 9)])
def test_rows_met_at_random_are_where_drawn_ones_are(lengths: Lengths) -> None:
    dice = random.Random(0)
    ends = [r.output_tokens for r in sample_rows(Workload(40_000, Lengths(9, 9), lengths), 1)]
    met = [dice.random() * end for end in dice.choices(ends, weights=ends, k=40_000)]
    mean, spread = met_tokens(lengths)
    assert mean == pytest.approx(statistics.fmean(met), rel=0.03)
    assert spread == pytest.approx(statistics.stdev(met), rel=0.05)


@pytest.mark.parametrize("lengths", [Lengths(128, 400), Lengths(96, 250, 256), Lengths(9, 9)])
def test_spread_is_that_of_drawn_lengths(lengths: Lengths) -> None:
    drawn = [r.output_tokens for r in sample_rows(Workload(40_000, Lengths(9, 9), lengths), 1)]
    mean = sum(drawn) / len(drawn)
    spread = (sum((x - mean) ** 2 for x in drawn) / len(drawn)) ** 0.5
    assert spread_tokens(lengths) == pytest.approx(spread, rel=0.1, abs=0.5)
