"""A stage states what it can hold, and its pipeline grants no more than the smallest of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from planner.schedule import RingShape
from planner.windows import Window
from stages.compute import StageCompute
from stages.config import StageSpec
from stages.errors import OutOfMemoryError
from stages.kv_room import largest_cache, new_cache
from stages.shard import Shard, ShardSpec
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, row, windowed_settings
from tests.test_devices import DEVICES
from tests.test_halving import spare_memory

LAYERS = 4
WINDOW = 8


def cramped(spec: StageSpec) -> StageCompute:
    """A second stage that has memory for fewer blocks of either kind than it is asked for."""
    if spec.member == "n1":
        shape = spec.ring.shape()
        windowed = shape.window.blocks - 3 if shape.window else 0
        fewer = {"blocks": 20, "window_blocks": windowed}
        spec = spec.model_copy(update={"ring": spec.ring.model_copy(update=fewer)})
    return StageCompute.load(spec)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_are_granted_what_the_smallest_stage_holds_and_say_the_same(
    tmp_path: Path, family: str
) -> None:
    if family == "gemma3":
        write_random_model(tmp_path, family, seed=4, sliding_window=WINDOW)
        ring = windowed_settings(2, 6, blocks=240, window=WINDOW, rows=6)
    else:
        write_random_model(tmp_path, family, seed=4)
        ring = ring_settings(2, 6)
    rows = [row(i, [(7 * i + j) % 256 for j in range(2 + 9 * i)], 12) for i in range(12)]
    calm = answers(tmp_path, rows, plan_of(LAYERS, 1), ring)
    found = answers(tmp_path, rows, plan_of(LAYERS, 3), ring, load=cramped)
    assert {n: a.output_ids for n, a in found.items()} == {n: a.output_ids for n, a in calm.items()}


def test_a_stage_holds_as_much_as_it_has_memory_for(tmp_path: Path) -> None:
    write_random_model(tmp_path, "gemma3", seed=4, sliding_window=WINDOW)
    shard = Shard.load(ShardSpec(tmp_path, 0, LAYERS, "float32"))
    asked = RingShape(
        slots=1, slot_rows=4, blocks=2**16, block_tokens=16, step_tokens=256,
        window=Window(WINDOW, 2**16),
    )  # fmt: skip
    small = shard.new_cache(2**6, 16, Window(WINDOW, 2**6)).bytes
    with spare_memory(600 * small):  # of the 1,024 times as much that is asked for
        cache, held = largest_cache(shard, asked)
        assert 300 * small < cache.bytes < 700 * small
        assert held.window is not None
        assert (cache.blocks, held.block_tokens) == (held.blocks, 16)
    wide = Window(2**34, 2**31)  # of which one row needs half
    with pytest.raises(OutOfMemoryError, match="keys and values of"):
        largest_cache(shard, replace(asked, window=wide))


@pytest.mark.parametrize("device", DEVICES)
def test_memory_that_is_only_promised_is_not_counted_on(tmp_path: Path, device: str) -> None:
    write_random_model(tmp_path, "llama", seed=4)
    shard = Shard.load(ShardSpec(tmp_path, 0, LAYERS, "float32", device))
    asked = RingShape(slots=1, slot_rows=4, blocks=2**36, block_tokens=16, step_tokens=256)
    with pytest.raises(OutOfMemoryError, match="GB free"):
        new_cache(shard, asked, asked.blocks)
