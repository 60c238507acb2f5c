"""Layers that see a window hold a window: what that saves, and what it refuses."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from planner.cost import kv_layer_bytes
from planner.facts import Lengths, ModelShape, Workload
from planner.kv_blocks import BLOCK_TOKENS, KvBlocks, Room, Wanted, kv_blocks
from planner.schedule import CHUNK_TOKENS, Ring, RingShape
from planner.windows import Window
from stages.config import Ring as RingSettings

STEP_TOKENS = 8 + 2 * CHUNK_TOKENS
LEAST = 21
"""Blocks of 16 that a row with a window of 40 needs at most: 40 + 31 + 264 - 1 positions."""


@given(st.integers(1, 3000), st.integers(0, 9000), st.integers(1, 600))
def test_what_is_kept_holds_all_that_is_seen_and_is_bounded(
    tokens: int, start: int, at_once: int
) -> None:
    window = Window(tokens, 0)
    first = window.kept_from(start)
    assert first <= max(0, start - tokens + 1)
    assert start + at_once - first <= window.most_tokens(at_once)


@pytest.mark.parametrize("window", [Window(40, LEAST - 1), Window(0, 99)])
def test_a_pool_that_one_row_could_exhaust_is_refused(window: Window) -> None:
    shape = RingShape(1, 8, 100, 16, STEP_TOKENS, window=Window(40, LEAST))
    with pytest.raises(ValueError, match=f"{window.blocks} blocks for a window of {window.tokens}"):
        replace(shape, window=window)


def test_a_spec_whose_pool_is_too_small_is_refused() -> None:
    settings = {"slots": 1, "slot_rows": 8, "blocks": 100, "block_tokens": 16,
                "step_tokens": STEP_TOKENS, "window_tokens": 40}  # fmt: skip
    assert RingSettings.model_validate(settings | {"window_blocks": LEAST}).shape().window
    with pytest.raises(ValidationError, match="a row that computes 264 at once needs 21"):
        RingSettings.model_validate(settings | {"window_blocks": LEAST - 1})


def most_live(shape: RingShape, prompt: int, new: int) -> int:
    """Rows that a ring has in flight at most, of many that are alike."""
    ring, most = Ring(shape), 0
    made = dict.fromkeys(range(60), 0)
    for number in made:
        ring.enqueue(number, prompt, prompt + new)
    while (step := ring.next_step()) is not None:
        most = max(most, ring.live)
        for span in step.spans:
            made[span.sequence] += span.samples
        ring.returned(step.slot, [s.sequence for s in step.spans if made[s.sequence] == new])
    assert set(made.values()) == {new}
    return most


def test_the_same_bytes_hold_more_rows_where_layers_keep_their_window() -> None:
    """One layer of six sees all; 2,000 tokens are 125 blocks, a window's 38 positions at most 21."""
    room = Room(6 * 500.0, 1, 5)
    wanted = Wanted(60, 1500, 500, 2000, STEP_TOKENS)
    alike, apart = (kv_blocks([room], window, wanted) for window in (0, 40))
    assert alike == KvBlocks(500)
    assert apart.whole + 5 * apart.windowed <= room.layer_blocks
    shape = RingShape(4, 8, alike.whole, BLOCK_TOKENS, STEP_TOKENS)
    windowed = replace(shape, blocks=apart.whole, window=Window(40, apart.windowed))
    assert most_live(shape, 1500, 500) == 4
    assert most_live(windowed, 1500, 500) >= 12


rooms = st.lists(
    st.builds(Room, st.floats(-10, 5000), st.integers(0, 4), st.integers(0, 4)).filter(
        lambda room: room.whole + room.windowed > 0
    ),
    min_size=1,
    max_size=3,
)
wishes = st.builds(
    Wanted, st.integers(1, 50), st.floats(1, 900), st.floats(1, 900), st.integers(1, 5000),
    st.just(STEP_TOKENS),
)  # fmt: skip


@given(rooms, st.integers(1, 600), wishes)
def test_every_stage_has_room_for_the_blocks_and_no_row_fits_less(
    rooms: list[Room], window: int, wanted: Wanted
) -> None:
    alike, found = kv_blocks(rooms, 0, wanted), kv_blocks(rooms, window, wanted)
    context = -(-wanted.context_tokens // BLOCK_TOKENS)
    assert found.whole >= alike.whole
    if found.windowed == 0:
        assert found == alike
        return
    for room in rooms:
        assert room.whole * found.whole + room.windowed * found.windowed <= room.layer_blocks
    RingShape(1, 8, found.whole, BLOCK_TOKENS, STEP_TOKENS, window=Window(window, found.windowed))
    assert context > -(-Window(window, 0).most_tokens(STEP_TOKENS) // BLOCK_TOKENS)
    best = Window(window, 0).most_tokens(STEP_TOKENS) / BLOCK_TOKENS + 1
    if all(room.whole * context + room.windowed * best <= room.layer_blocks for room in rooms):
        assert found.whole >= context, "a row that fills the context comes before many rows"


def test_a_context_that_a_window_holds_is_kept_like_any_other() -> None:
    wanted = Wanted(4, 200, 100, 16 * LEAST, STEP_TOKENS)
    assert kv_blocks([Room(1e4, 1, 5)], 40, wanted).windowed == 0
    assert kv_blocks([Room(1e4, 1, 5)], 40, replace(wanted, context_tokens=16 * LEAST + 1)).windowed


def test_a_row_that_fills_the_context_finds_room_at_once_beside_what_is_parked() -> None:
    resident = 0.4
    found = kv_blocks([Room(50.0, 1, 0, resident)], 0, Wanted(1, 10, 10, 640, STEP_TOKENS))
    assert resident * found.whole >= 640 / BLOCK_TOKENS


def test_a_plan_counts_windowed_layers_for_what_they_keep() -> None:
    shape = ModelShape(6, 8, 100, 2.0, 2, 100, 100, 100)
    work = Workload(9, Lengths(3000, 3000), Lengths(1000, 1000), shared_prefix_fraction=0.5)
    windowed = replace(shape, windows=(40, 40, 40, 40, 40, 0))
    near = Window(40, 0).most_tokens(128)
    assert kv_layer_bytes(shape, work, 10) == 2 * (10 * 2500 + 1500)
    assert kv_layer_bytes(windowed, work, 10) == pytest.approx(
        (kv_layer_bytes(shape, work, 10) + 5 * 2 * 10 * near) / 6
    )
