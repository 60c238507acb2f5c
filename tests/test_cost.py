"""Each term of the cost model against a case worked by hand."""

import numpy as np
import pytest

from planner.cost import (
    Cell,
    Role,
    decode_rounds,
    forward_link,
    kv_layer_bytes,
    mean_context,
    prefill_tokens,
    resident_kv,
    return_link,
    role_bytes,
    stage_table,
    tokens_per_round,
    workspace_bytes,
)
from planner.facts import CodecRate, Lengths, ModelShape, Node, Workload
from planner.layer_times import decode_layer_s, head_s, prefill_layer_s

# 2 layers of 1 GB, 1,000 wide, 2 bytes a value; 100 bytes of KV a token and layer; 1 GFLOP a token.
MODEL = ModelShape(2, 1000, 1e9, 100.0, 2, 3e8, 5e8, 1e9)
NODE = Node("n", 1e12, 8e9, 1e11)
WORK = Workload(100, Lengths(100, 100), Lengths(11, 11))
CELL = Cell(4, 2)


def test_chance_that_drafts_hold_gives_the_tokens_of_a_round() -> None:
    assert tokens_per_round((0.5, 0.5), 2) == 1 + 0.5 + 0.25
    assert tokens_per_round((0.5, 0.5), 0) == 1


def test_first_token_comes_with_the_prompt_and_each_other_takes_a_round() -> None:
    assert decode_rounds(WORK, 0) == 10
    drafted = Workload(100, Lengths(100, 100), Lengths(11, 11), acceptance=(0.25,))
    assert decode_rounds(drafted, 1) == 8  # 10 tokens at 1.25 a round


def test_shared_beginning_is_not_prefilled_again_but_attended_to() -> None:
    shared = Workload(100, Lengths(100, 100), Lengths(10, 10), shared_prefix_fraction=0.25)
    assert prefill_tokens(shared) == 75
    assert mean_context(shared) == 105


def test_prefill_takes_its_operations_or_one_reading_of_the_weights() -> None:
    # A token's layer: 1e9, and attention 4 x 1000 x 50 = 2e5 on average over a prompt of 100.
    assert prefill_layer_s(NODE, MODEL, 400, 100) == pytest.approx(400 * (1e9 + 2e5) / 1e12)
    assert prefill_layer_s(NODE, MODEL, 5, 100) == pytest.approx(1e9 / 1e11)


def test_decode_reads_weights_and_keys_and_values() -> None:
    # 1 GB and 4 rows x 105 tokens x 100 bytes at 100 GB/s; 4 GFLOP at 1 TFLOP/s are less.
    assert decode_layer_s(NODE, MODEL, 4, 105) == pytest.approx((1e9 + 42_000) / 1e11)
    # 64 rows of 1e9 and of 4 x 1000 x 105 FLOP take longer than the reading.
    assert decode_layer_s(NODE, MODEL, 64, 105) == pytest.approx(64 * (1e9 + 420_000) / 1e12)


def test_head_is_a_layer_in_proportion_to_its_weights() -> None:
    assert head_s(NODE, MODEL, 4) == pytest.approx(0.5 * 0.01)


def test_stage_is_busy_for_a_prefill_and_all_rounds() -> None:
    # Of 4 rows and 2 layers: prefill 2 x 0.40008 s, 10 rounds of 2 x (1e9 + 42,200) / 1e11 s.
    busy = stage_table((NODE,), MODEL, WORK, CELL, Role.MIDDLE).busy_s[0, 1]
    rounds = 10 * 2 * (1e9 + 4 * 105.5 * 100) / 1e11
    assert busy == pytest.approx((2 * 400 * (1e9 + 2e5) / 1e12 + rounds) / 4)


def test_streamed_layers_take_their_way_to_the_device_each_pass() -> None:
    # Beside 65.5 MB of workspace 3.2 GB hold 3 of 6 layers: 3 are too many, and 2 buffers for them.
    tight = Node("t", 1e12, 3.2e9, 1e11, host_bytes=1e11, host_to_device_bytes_per_s=1e10)
    six = ModelShape(6, 1000, 1e9, 100.0, 2, 0.0, 0.0, 1e9)
    table = stage_table((tight,), six, WORK, CELL, Role.MIDDLE)
    assert table.weights_offloaded[0, 5] == 5
    prefill = max(6 * 400 * (1e9 + 2e5) / 1e12, 5e9 / 1e10)
    assert table.busy_s[0, 5] == pytest.approx((prefill + 10 * 5e9 / 1e10) / 4)


def test_memory_beside_the_layers() -> None:
    assert workspace_bytes(MODEL, CELL) == 16 * 512 * 2000
    assert role_bytes(MODEL, Role.FIRST | Role.LAST) == 8e8
    assert kv_layer_bytes(MODEL, WORK, 8) == 8 * 111 * 100


def test_parked_slots_share_the_room_of_two() -> None:
    assert resident_kv(0.0, 8) == 1.0
    assert resident_kv(1.0, 8) == 2 / 8
    assert resident_kv(0.5, 8) == (0.5 * 7 + 2) / 8


def test_link_carries_each_position_once_and_its_codec_works_beside_it() -> None:
    # 100 + 10 positions of 2,000 bytes; 11 frames of 256 bytes for 4 rows, 12 bytes a row each.
    frames = 11 * (12 + 256 / 4)
    raw = forward_link(np.array(0.1), np.array(1e6), None, MODEL, WORK, CELL)
    assert raw.occupied_s == pytest.approx((220_000 + frames) / 1e6)
    assert raw.hop_s == pytest.approx(11 * 0.1 + 4 * (220_000 + frames) / 1e6)
    codec = CodecRate(2.0, 1e6)
    coded = forward_link(np.array(0.1), np.array(1e6), codec, MODEL, WORK, CELL)
    assert coded.occupied_s == pytest.approx(0.22)  # coding takes longer than 110 kB on the wire
    assert coded.hop_s == pytest.approx(1.1 + 4 * ((110_000 + frames) / 1e6 + 2 * 0.22))


def test_way_back_carries_four_bytes_a_token() -> None:
    back = return_link(np.array(0.1), np.array(1e6), WORK, CELL)
    assert back.occupied_s == pytest.approx((44 + 11 * (12 + 64)) / 1e6)
