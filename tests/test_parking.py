"""Stages that hold a part of their keys and values say what those that hold all of them say."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from planner.plan import Plan
from planner.schedule import Grant, Ring, RingShape, Span, Step
from stages.compute import StageCompute
from stages.config import Ring as RingSettings
from stages.config import StageSpec
from stages.control import Capacity, LeasedRow
from stages.errors import KvRoomError
from stages.halving import Halving
from stages.kv_cache import KvCache, LayerKv
from stages.parking import Parking
from stages.shard import Shard, ShardSpec
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, windowed_settings
from tests.test_devices import DEVICES
from tests.test_halving import tight
from tests.test_shard import cut_into, generate, ragged_prompts
from tests.test_window_ring import WINDOW, assert_greedy, rows_that_share, with_stops

LAYERS = 4


def parked(stages: int) -> Plan:
    """A plan whose stages have room for the keys and values of two slots."""
    plan = plan_of(LAYERS, stages)
    [pipeline] = plan.pipelines
    placed = tuple(replace(stage, kv_offloaded=1.0) for stage in pipeline.stages)
    return replace(plan, pipelines=(replace(pipeline, stages=placed),))


def said(
    folder: Path, rows: list[LeasedRow], plan: Plan, ring: RingSettings, limit: int = 10**6
) -> tuple[dict[int, tuple[int, ...]], list[Parking], int]:
    """What each row says, what the stages parked, and how many positions were computed twice."""
    stages: list[StageCompute] = []

    def load(spec: StageSpec) -> StageCompute:
        stages.append(tight(limit, spec))
        return stages[-1]

    found = answers(folder, rows, plan, ring, load=load)
    parkings = [stage.cache.parking for stage in stages if stage.cache.parking is not None]
    replayed = sum(answer.replayed_tokens for answer in found.values())
    return {i: answer.output_ids for i, answer in found.items()}, parkings, replayed


@pytest.mark.parametrize("stages", [1, 2])
def test_a_ring_that_parks_writes_the_tokens_of_one_process(tmp_path: Path, stages: int) -> None:
    model = write_random_model(tmp_path, "llama", seed=5)
    rows = rows_that_share(20)
    # Micro-batches may be added on the way.
    ring = ring_settings(5, 4, row_tokens=120).model_copy(update={"most_slots": 8})
    found, parkings, _ = said(tmp_path, rows, parked(stages), ring)
    for each in rows:
        assert_greedy(model, each.token_ids, found[each.row])
    assert len(parkings) == stages
    assert all(p.counts.bytes_out and p.counts.bytes_back for p in parkings), "nothing was parked"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_parking_changes_no_token_of_rows_that_share_make_way_and_are_halved(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_that_share(18)
    if family == "llama":
        write_random_model(tmp_path, family, seed=5)
        calm_ring, ring = (
            ring_settings(1, 18),
            ring_settings(4, 3).model_copy(update={"blocks": 32}),
        )
    else:
        write_random_model(tmp_path, family, seed=5, sliding_window=WINDOW)
        calm_ring = windowed_settings(1, 18, blocks=400, window=WINDOW, rows=5)
        ring = windowed_settings(4, 3, blocks=32, window=WINDOW, rows=4)
    calm = answers(tmp_path, rows, plan_of(LAYERS, 1), calm_ring)
    monkeypatch.setattr("planner.admission.LEARNED_ROWS", 2)
    stopped = with_stops(rows, calm)
    # A row may hold 16 blocks, and the frames are no more: many a slot is computed in parts.
    found, parkings, replayed = said(tmp_path, stopped, parked(2), ring, limit=140)
    for i, ids in found.items():
        assert ids == calm[i].output_ids[: len(ids) if stopped[i].stop else None]
    assert replayed, "nobody had to make way"
    assert all(p.counts.bytes_out and p.counts.bytes_back for p in parkings), "nothing was parked"


def test_micro_batches_that_come_and_go_change_no_token_of_a_stage_that_parks(
    tmp_path: Path,
) -> None:
    write_random_model(tmp_path, "llama", seed=5)
    shape = RingShape(2, 4, blocks=120, block_tokens=16, step_tokens=260, most_slots=9)
    pipeline, dice = cut_into(tmp_path, 2, LAYERS, shape, "float32"), random.Random(1)
    prompts = ragged_prompts(32, vocab=256, longest=150)
    calm = generate(pipeline, shape, prompts, new_tokens=20)
    pipeline.caches = [
        shard.new_cache(shape.blocks, shape.block_tokens, frames=48) for shard in pipeline.shards
    ]
    found = generate(
        pipeline, shape, prompts, new_tokens=20, pace=lambda ring: ring.open(dice.randint(1, 9))
    )
    assert found == calm
    parkings = [cache.parking for cache in pipeline.caches]
    assert all(p is not None and p.counts.bytes_back for p in parkings), "nothing was parked"


def filled(device: str, slots: int, share: float) -> tuple[KvCache, dict[int, Tensor]]:
    """A cache in which each slot's sequence has written four blocks; and what it wrote."""
    kv = LayerKv(layer=3, kv_heads=2, key_dim=8, value_dim=8)
    blocks = 5 * slots
    frames = blocks - int(share * blocks)
    cache = KvCache((kv,), blocks, 16, torch.float32, torch.device(device), frames=frames)
    written = {}
    for slot in range(slots):
        span = Span(slot, 0, 64, samples=False)
        step = Step(slot, slot, (span,), (Grant(slot, tuple(range(5 * slot, 5 * slot + 5))),))
        cache.apply(step)
        cache.bring(step)
        written[slot] = torch.randn(1, 2, 64, 8, device=device)
        write(cache, span, written[slot])
    return cache, written


def write(cache: KvCache, span: Span, what: Tensor) -> Tensor:
    """Write as keys, and half of it as values; the keys of the sequence come back."""
    places = torch.from_numpy(cache.places(False, [span])).to(what.device)
    keys, _ = cache.write(3, places, what, what / 2)
    return cache.rows(3, span.sequence, 0, span.start + span.tokens).of(keys)


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_parked_is_there_when_its_slot_comes_round(device: str) -> None:
    cache, written = filled(device, slots=6, share=0.6)
    assert cache.parking is not None
    for frame in range(6, 42):
        slot = frame % 6
        step = Step(frame, slot, (Span(slot, 64 + frame // 6, 1, samples=False),))
        cache.apply(step)
        cache.bring(step)
        more = torch.randn(1, 2, 1, 8, device=device)
        seen = write(cache, step.spans[0], more)
        written[slot] = torch.cat([written[slot], more], dim=2)
        assert torch.equal(seen[:, :, :64], written[slot][:, :, :64])
        assert torch.equal(seen[:, :, 65:], written[slot][:, :, 64:])


def test_parked_blocks_take_no_memory_where_layers_compute() -> None:
    whole, _ = filled("cpu", slots=8, share=0.0)
    part, _ = filled("cpu", slots=8, share=0.75)
    assert whole.parking is None
    assert part.parking is not None
    assert part.bytes - part.parking.staging_bytes == whole.bytes / 4


def test_a_step_that_sees_more_than_fits_at_once_is_computed_in_parts() -> None:
    cache, written = filled("cpu", slots=4, share=0.5)
    halving = Halving()

    def compute(part: Step, states: Tensor) -> int:
        cache.bring(part)
        for span in part.spans:
            seen = write(cache, span, torch.zeros(1, 2, 1, 8))
            assert torch.equal(seen[:, :, :64], written[span.sequence])
        return len(states)

    for frame in (9, 10):
        whole = Step(frame, 0, tuple(Span(n, 64, 1, samples=False) for n in range(4)))
        cache.apply(whole)
        assert halving.run(whole, torch.zeros(4, 8), compute) == [2, 2]
    assert halving.limit_tokens is None, "a smaller step would not have helped"


def test_one_row_may_hold_what_the_tightest_stage_has_room_for_at_once(tmp_path: Path) -> None:
    """A row of 17 blocks is for nobody who seats 16, and stages say so before they meet it."""
    write_random_model(tmp_path, "llama", seed=5)
    shard = Shard.load(ShardSpec(tmp_path, 0, LAYERS, "float32"))
    asked = RingShape(slots=5, slot_rows=2, blocks=40, block_tokens=16, step_tokens=256)
    parking = StageCompute(shard, asked, epoch=1, parked_kv=0.6)
    assert Capacity.of(parking.ring) == Capacity(blocks=40, row_blocks=16)
    ring = parking.ring
    assert Ring(ring).fits(256) and not Ring(ring).fits(257)
    # Another stage has fewer blocks; this one seats as many of them as it said.
    parking.settle(asked.holding(30, 0, 16))
    assert (parking.cache.blocks, parking.cache.frames) == (30, 16)
    assert parking.ring.row_tokens == 256


def test_a_row_that_never_fits_is_named() -> None:
    cache, _ = filled("cpu", slots=4, share=0.5)
    step = Step(9, 2, (Span(7, 0, 1, samples=False),), (Grant(7, tuple(range(20))),))
    cache.apply(step)
    with pytest.raises(KvRoomError, match="hold 20 blocks, and the device has room for 10"):
        cache.bring(step)
