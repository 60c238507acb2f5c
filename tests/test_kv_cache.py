"""Blocks lie where the head says, and come back as they were written."""

import pytest
import torch
from torch import Tensor

from planner.schedule import Grant, Span, Step
from planner.windows import Window
from stages.errors import ProtocolError
from stages.kv_cache import KvCache, LayerKv

LAYER = LayerKv(layer=3, kv_heads=2, key_dim=8, value_dim=4)


@pytest.fixture
def cache() -> KvCache:
    other = LayerKv(layer=4, kv_heads=1, key_dim=8, value_dim=8)
    return KvCache((LAYER, other), 10, 4, torch.float32, torch.device("cpu"))


def step(*spans: Span, grants: tuple[Grant, ...] = (), ended: tuple[int, ...] = ()) -> Step:
    return Step(frame=7, slot=0, spans=spans, grants=grants, ended=ended)


def span(sequence: int, start: int, tokens: int) -> Span:
    return Span(sequence, start, tokens, samples=False)


def store(cache: KvCache, where: Span) -> tuple[Tensor, Tensor]:
    """Random keys and values, written at a span's places."""
    key, value = torch.randn(1, 2, where.tokens, 8), torch.randn(1, 2, where.tokens, 4)
    cache.write(3, torch.from_numpy(cache.places(False, [where])), key, value)
    return key, value


def pools(cache: KvCache) -> tuple[Tensor, Tensor]:
    nowhere = torch.empty(0, dtype=torch.int64)
    return cache.write(3, nowhere, torch.empty(1, 2, 0, 8), torch.empty(1, 2, 0, 4))


def test_pools_are_sized_by_kv_heads(cache: KvCache) -> None:
    assert LAYER.bytes_per_token(itemsize=4) == 2 * (8 + 4) * 4
    assert cache.bytes == 10 * 4 * (2 * (8 + 4) + 1 * (8 + 8)) * 4


def test_consecutive_blocks_are_read_in_place(cache: KvCache) -> None:
    cache.apply(step(span(1, 0, 9), grants=(Grant(1, (4, 5)), Grant(1, (6,)))))
    keys, _ = pools(cache)
    read = cache.rows(3, 1, 2, 9).of(keys)
    assert read.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()


@pytest.mark.parametrize("blocks", [(4, 5, 6), (6, 2, 9), (3, 2, 1), (0, 1, 7)])
def test_what_was_written_is_read_wherever_it_lies(cache: KvCache, blocks: tuple[int, ...]) -> None:
    cache.apply(step(span(1, 0, 12), grants=(Grant(0, (8,)), Grant(1, blocks))))
    first, second = store(cache, span(1, 0, 7)), store(cache, span(1, 7, 5))
    store(cache, span(0, 0, 4))
    for pool, early, late in zip(pools(cache), first, second, strict=True):
        whole = torch.cat([early, late], dim=2)
        assert torch.equal(cache.rows(3, 1, 0, 12).of(pool), whole)
        assert torch.equal(cache.rows(3, 1, 5, 11).of(pool), whole[:, :, 5:11])


def test_a_grant_adds_to_the_end_of_the_table(cache: KvCache) -> None:
    cache.apply(step(span(1, 0, 4), grants=(Grant(1, (2,)),)))
    cache.apply(step(span(1, 4, 4), grants=(Grant(1, (9,)),)))
    assert cache.places(False, [span(1, 3, 3)]).tolist() == [11, 36, 37]


def test_ended_sequences_go_before_new_ones_come(cache: KvCache) -> None:
    cache.apply(step(span(1, 0, 8), grants=(Grant(1, (2, 3)),)))
    cache.apply(step(span(1, 0, 4), grants=(Grant(1, (5,)),), ended=(1, 99)))
    assert cache.places(False, [span(1, 0, 1)]).tolist() == [20]
    with pytest.raises(
        ProtocolError, match=r"sequence 1 computes positions 4 to 5, .* and holds blocks for 0 to 4"
    ):
        cache.apply(step(span(1, 4, 1)))


def test_two_sequences_may_share_a_prefix(cache: KvCache) -> None:
    cache.apply(step(span(1, 0, 4), grants=(Grant(1, (2, 3)), Grant(5, (2, 7)))))
    key, _ = store(cache, span(1, 0, 4))
    assert torch.equal(cache.rows(3, 5, 0, 4).of(pools(cache)[0]), key)


@pytest.mark.parametrize("wrong", [span(1, 0, 5), span(1, 4, 1), span(2, 0, 1), span(1, 0, 0)])
def test_a_span_without_blocks_is_refused(cache: KvCache, wrong: Span) -> None:
    with pytest.raises(ProtocolError, match="frame 7: sequence"):
        cache.apply(step(wrong, grants=(Grant(1, (0,)),)))


@pytest.mark.parametrize("block", [10, -1])
def test_a_block_outside_the_pool_is_refused(cache: KvCache, block: int) -> None:
    with pytest.raises(ProtocolError, match=f"block {block} of 10"):
        cache.apply(step(grants=(Grant(1, (block,)),)))


def test_a_new_epoch_begins_empty(cache: KvCache) -> None:
    cache.apply(step(grants=(Grant(1, (0,)),)))
    cache.clear()
    assert cache.sequences == ()


NEAR = LayerKv(layer=5, kv_heads=2, key_dim=8, value_dim=4, window=40)


def windowed(blocks: int = 12) -> KvCache:
    return KvCache(
        (LAYER, NEAR), 30, 8, torch.float32, torch.device("cpu"), window=Window(40, blocks)
    )


def test_a_windowed_layers_pool_is_the_smaller_one() -> None:
    assert windowed().bytes == (30 + 12) * 8 * 2 * (8 + 4) * 4
    far = LayerKv(layer=5, kv_heads=2, key_dim=8, value_dim=4, window=41)
    cache = KvCache((far,), 30, 8, torch.float32, torch.device("cpu"), window=Window(40, 12))
    assert cache.bytes == 30 * 8 * 2 * (8 + 4) * 4, "a layer that sees more than is kept keeps all"


def test_a_windowed_table_goes_on_where_blocks_before_the_window_went() -> None:
    cache = windowed()
    whole = Grant(1, tuple(range(25)))
    cache.apply(step(span(1, 0, 60), grants=(whole, Grant(1, tuple(range(30, 38))))))
    assert cache.places(True, [span(1, 0, 64)]).tolist() == list(range(64))
    # Position 103 still sees 64: the blocks of units 0 and 1 are another's by now.
    cache.apply(step(span(1, 103, 1), grants=(Grant(1, (41, 30, 31, 32, 33)),)))
    assert cache.places(True, [span(1, 64, 10)]).tolist() == [88, 89, 90, 91, 92, 93, 94, 95, 0, 1]
    assert cache.rows(5, 1, 64, 104).runs == ((88, 8), (0, 32))
    assert cache.places(False, [span(1, 103, 1)]).tolist() == [103]


def test_a_windowed_table_begins_with_the_window_before_a_shared_end() -> None:
    cache = windowed()
    cache.apply(step(span(1, 128, 8), grants=(Grant(1, (*range(20), *range(30, 39))),)))
    # Position 128 sees 89 to 128; whole units are kept, from 64 on.
    assert cache.places(True, [span(1, 64, 1)]).tolist() == [0]
    assert cache.places(True, [span(1, 135, 1)]).tolist() == [71]


@pytest.mark.parametrize(("start", "near"), [(0, ()), (0, (30,)), (40, (30, 31, 32))])
def test_a_span_whose_window_has_no_blocks_is_refused(start: int, near: tuple[int, ...]) -> None:
    grants = (Grant(1, tuple(range(10))), Grant(1, near))
    with pytest.raises(ProtocolError, match=r"frame 7: sequence 1 .* and holds blocks for 0 to"):
        windowed().apply(step(span(1, start, 9), grants=grants))


def test_a_block_that_neither_pool_has_is_refused() -> None:
    with pytest.raises(ProtocolError, match="block 42 of 42"):
        windowed().apply(step(grants=(Grant(1, (42,)),)))
