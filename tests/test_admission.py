"""Who may enter where memory is short: as many as all fit until each ends, and no more."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.admission import LEARNED_ROWS, Growth, rows_that_fit
from planner.schedule import CHUNK_TOKENS, Ring, RingShape

rows = st.tuples(st.integers(1, 50), st.integers(1, 40))


def most_until(last: int, rows: list[tuple[int, int]]) -> int:
    """Tokens that rows hold together at most, (tokens now, tokens to come) of each, up to a round."""
    return max(sum(now + past for now, more in rows if past <= more) for past in range(last + 1))


@given(st.lists(rows, max_size=8), rows, st.integers(1, 600))
def test_as_many_enter_as_fit_in_every_round_until_all_have_ended(
    others: list[tuple[int, int]], own: tuple[int, int], room: int
) -> None:
    held, left = [float(now) for now, _ in others], [float(more) for _, more in others]
    count = rows_that_fit(room, held, left, *own)
    if count:
        assert most_until(own[1], [*others, *[own] * count]) <= room
    assert most_until(own[1], [*others, *[own] * (count + 1)]) > room


def test_rows_are_expected_to_come_as_far_as_those_did_that_came_so_far() -> None:
    growth = Growth()
    assert growth.expected(0, 100) == 100
    for number in range(LEARNED_ROWS):
        growth.saw(20 if number % 2 else 80, 100)
    assert growth.expected(0, 100) == pytest.approx(50)
    assert growth.expected(0, 200) == pytest.approx(100)
    assert growth.expected(30, 100) == pytest.approx(80)
    assert growth.expected(90, 100) == 100
    assert growth.expected(80, 100) == 81


def test_what_rows_are_expected_to_come_to_grows_as_they_do() -> None:
    dice, growth = random.Random(0), Growth()
    for _ in range(500):
        growth.saw(dice.randint(1, 100), 100)
    expected = [growth.expected(made, 100) for made in range(100)]
    assert all(made < tokens <= 100 for made, tokens in enumerate(expected))
    assert all(after >= before for before, after in pairwise(expected))


def played(blocks: int, ends: list[int]) -> tuple[float, int]:
    """A ring of four slots, rows of 16 tokens that may make 120: its mean live rows, and who made way.

    Of its second half of steps, when it has learned what rows make.
    """
    ring = Ring(RingShape(4, 32, blocks, 16, 32 + 2 * CHUNK_TOKENS))
    left = dict(enumerate(ends))
    for number in left:
        ring.enqueue(number, 16, 136)
    numbers, live, made_way = len(left), [], 0
    flying, made = [], dict.fromkeys(left, 0)
    while left:
        step = ring.next_step()
        for number in ring.take_preempted():
            made_way += 1
            known = 16 + made.pop(number)
            ring.enqueue(numbers, known, 136)
            left[numbers], made[numbers] = left.pop(number), known - 16
            numbers += 1
        if step is not None:
            live.append(ring.live)
            flying.append(step)
            if len(flying) < 3:
                continue
        back = flying.pop(0)
        here = [span.sequence for span in back.spans if span.samples and span.sequence in left]
        for number in here:
            made[number] += 1
        ended = [number for number in here if made[number] == left[number]]
        ring.returned(back.slot, ended)
        for number in ended:
            del left[number]
    half = live[len(live) // 2 : -len(live) // 8]
    return sum(half) / len(half), made_way


def test_a_ring_short_of_memory_holds_more_rows_than_their_ends_would_let_in() -> None:
    dice = random.Random(1)
    ends = [dice.randint(50, 110) for _ in range(1500)]
    live, made_way = played(160, ends)
    # Given room for a quarter more than they make, as where memory is ample, they were 20.
    by_their_ends = 160 // -(-(16 + 1.25 * 80) // 16)
    assert live > 1.2 * by_their_ends
    assert made_way < 0.02 * len(ends)
