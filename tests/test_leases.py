"""Who takes the next row, and who gives rows back: the policy that driver and simulator share."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.leases import SEEN_ROWS, Desk, Move, Pace

TOKENS = 9.0


def pace(pass_s: float, rows: int = 10) -> Pace:
    """A pipeline that is always full: of its rows, one ends every so often."""
    return Pace(pass_s * (1 + TOKENS) / rows, pass_s, 1.0, rows)


def desk_of(*passes_s: float, held: tuple[int, ...], ahead_s: float = 1e9) -> Desk:
    desk = Desk(TOKENS, ahead_s)
    for number, (pass_s, rows) in enumerate(zip(passes_s, held, strict=True)):
        desk.enter(number, pace(pass_s))
        desk.held[number] = rows
    return desk


def test_a_row_goes_to_whoever_ends_it_first() -> None:
    desk = desk_of(0.1, 0.3, held=(0, 0))
    for waiting in range(120, 94, -1):
        taker = desk.taker((0, 1), waiting)
        assert taker is not None
        desk.held[taker] += 1
    assert desk.held == {0: 20, 1: 6}, (
        "the quicker one ends even its last row before the other does"
    )


def test_nobody_takes_a_row_that_others_would_end_before() -> None:
    desk = desk_of(0.1, 9.0, held=(20, 0))
    assert desk.taker((0, 1), waiting=5) is None, "the first is full, the second too slow"
    assert desk.taker((0, 1), waiting=5_000) == 1


def test_who_has_run_dry_takes_what_another_has_not_begun_until_both_end_together() -> None:
    desk = desk_of(0.1, 0.1, held=(0, 20))
    # 10 rows have begun; the other 10 end sooner where there are free places, every one of them.
    assert desk.move((0, 1), (0, 1)) == Move(giver=1, taker=0, rows=10)
    slow = desk_of(0.25, 0.1, held=(0, 20))
    move = slow.move((0, 1), (0, 1))
    assert move is None or move.rows < 10
    assert desk_of(2.0, 0.1, held=(0, 20)).move((0, 1), (0, 1)) is None, "it would be too slow"
    assert desk_of(0.1, 0.1, held=(9, 10)).move((0, 1), (0, 1)) is None, "all have begun"


def test_who_was_asked_or_waits_for_an_answer_is_left_alone() -> None:
    desk = desk_of(0.1, 0.1, 0.1, held=(0, 20, 20))
    assert desk.move((0, 1), (0, 1)) == Move(1, 0, 10)
    assert desk.move((2,), ()) is None
    assert desk.move((2,), (0,)) == Move(2, 0, 10)


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.integers(0, 40)), min_size=2, max_size=6),
)
def test_moves_end_and_leave_nobody_idle_who_would_be_quicker(
    lines: list[tuple[float, int]],
) -> None:
    desk = desk_of(*(pass_s for pass_s, _ in lines), held=tuple(rows for _, rows in lines))
    everybody, moved = range(len(lines)), 0
    while (move := desk.move(everybody, everybody)) is not None:
        assert desk.free(move.giver) <= -move.rows
        assert desk.free(move.taker) > 0
        desk.held[move.giver] -= move.rows
        desk.held[move.taker] += move.rows
        moved += move.rows
        assert moved <= 40 * len(lines), "rows go round and round"


def test_a_pace_is_as_seen_once_some_rows_have_ended() -> None:
    desk = desk_of(0.1, held=(10,))
    for _ in range(SEEN_ROWS):
        desk.saw(0, seconds=3 * 0.1 * (1 + TOKENS), tokens=TOKENS)
    desk.resize(0, rows=20)
    assert desk.paces[0].pass_s == pytest.approx(0.3)
    assert desk.paces[0].row_s == pytest.approx(3 * pace(0.1).row_s / 2), "twice as many at once"


def test_what_was_seen_long_ago_is_forgotten() -> None:
    desk = desk_of(0.1, held=(10,))
    for seconds in [1.0] * 100 + [5.0] * 300:
        desk.saw(0, seconds, TOKENS)
    desk.resize(0, rows=10)
    assert desk.paces[0].pass_s == pytest.approx(0.5, rel=0.05)


def test_a_pipeline_has_rows_to_begin_for_a_while_and_no_more() -> None:
    desk = desk_of(0.1, held=(10,), ahead_s=0.35)
    assert desk.room(0) == 4, "one begins every 0.1 s"
    assert desk.runs_low(0)
    desk.held[0] = 13
    assert not desk.runs_low(0)
    assert desk_of(0.1, held=(10,), ahead_s=60.0).room(0) == 10, "never more than are in flight"
    assert desk_of(0.1, held=(10,), ahead_s=0.0).room(0) == 0


def test_pipeline_with_few_rows_left_ends_a_further_one_before_a_slow_one_would() -> None:
    # Full, a round of the quick one takes 1 s; with one row, 0.1 s. 500 tokens are 50 to 500 s of it.
    quick, slow = Pace(1.0, 1.0, 1.0, 10, alone_s=0.1), Pace(10.0, 0.3, 1.0, 4)
    desk = Desk(500.0)
    desk.enter(0, quick)
    desk.enter(1, slow)
    desk.held[1] = 4
    assert desk.taker([0], 30) == 0
    desk.held[0] = 9
    assert desk.taker([0], 30) is None
    assert quick.service_s(500.0) == quick.service_s(500.0, 10) == 501.0
    assert quick.service_s(9.0, 5) == pytest.approx(5.5)
    assert quick.slower(2.0).service_s(9.0, 5) == pytest.approx(11.0)
