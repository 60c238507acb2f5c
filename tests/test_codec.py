"""The codec's promises: exact to the bit, never longer than raw, int8 as near as it says."""

import struct
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from stages.codec import (
    FAST,
    INT8,
    ITEM_BYTES,
    RAW,
    SMALLEST_CODED_BYTES,
    decode,
    encode,
)
from stages.codec_profile import Profile
from stages.errors import FrameError
from tests.coded import FLOATS, LIMIT, hidden_states, returned

HEADER_AT_MOST = 16 + 4 * 8


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("level", [RAW, FAST])
def test_frame_returns_every_bit(dtype: str, level: str) -> None:
    x = hidden_states(dtype, 64, 96)
    frame = encode(x, dtype, x.shape, level)
    decoded = decode(frame.tobytes(), max_bytes=x.nbytes)
    assert (decoded.dtype, decoded.shape, decoded.level) == (dtype, x.shape, level)
    assert decoded.buffer.tobytes() == x.tobytes()
    assert (frame.nbytes, frame.level) == (len(frame.tobytes()), level)


@pytest.mark.parametrize("dtype", FLOATS)
def test_fast_frame_of_hidden_states_is_smaller(dtype: str) -> None:
    x = hidden_states(dtype, 128, 96)
    frame = encode(x, dtype, x.shape, FAST)
    assert frame.nbytes < {"float32": 0.88, "bfloat16": 0.76, "float16": 0.97}[dtype] * x.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("profiled", [False, True])
def test_every_pattern_of_16_bits_comes_back(dtype: str, profiled: bool) -> None:
    patterns = np.arange(65536, dtype=np.uint16).reshape(-1, 64)
    profile = Profile.learned(hidden_states(dtype, 64, 64), dtype, (64, 64))
    frame = encode(patterns, dtype, patterns.shape, FAST, profile if profiled else None)
    assert frame.level == FAST
    assert returned(frame, profile) == patterns.tobytes()


def test_float32_oddities_come_back() -> None:
    odd = [0x7FC00001, 0xFFC0DEAD, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 0, 1, 0x007FFFFF]
    x = np.resize(np.array(odd, np.uint32), (37, 64))
    assert returned(encode(x, "float32", x.shape, FAST)) == x.tobytes()


@pytest.mark.parametrize(
    ("lowest", "highest"), [(0, 255), (0, 127), (0, 128), (100, 227), (128, 255)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_any_spread_of_exponents_comes_back(dtype: str, lowest: int, highest: int) -> None:
    rng = np.random.default_rng(5)
    exponents = rng.integers(lowest, highest + 1, (64, 96), np.uint32)
    exponents[0, :2] = lowest, highest
    noise = rng.integers(0, 2**32, (64, 96), np.uint32) & 0x807FFFFF
    x = (exponents % 4 * (highest - lowest) // 3 + lowest << 23 | noise).astype(np.uint32)
    bits = x if dtype == "float32" else (x >> 16).astype(np.uint16)
    frame = encode(bits, dtype, bits.shape, FAST)
    assert frame.level == FAST
    assert returned(frame) == bits.tobytes()


def test_upcast_bfloat16_costs_what_bfloat16_costs() -> None:
    narrow = hidden_states("bfloat16", 128, 96)
    wide = narrow.astype(np.uint32) << 16
    frame = encode(wide, "float32", wide.shape, FAST)
    assert returned(frame) == wide.tobytes()
    assert frame.nbytes <= encode(narrow, "bfloat16", narrow.shape, FAST).nbytes + 8


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize(
    "shape",
    [(), (0, 64), (64, 0), (1, 1), (1, 7), (5, 4097), (2, 3, 5, 7, 11), (4096,), (2, 131073)],
)
def test_any_shape_comes_back(dtype: str, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape)) * ITEM_BYTES[dtype]
    buffer = np.random.default_rng(1).integers(60, 70, size, np.uint8).tobytes()
    frame = encode(buffer, dtype, shape, FAST)
    decoded = decode(frame.tobytes(), max_bytes=LIMIT)
    assert (decoded.shape, decoded.buffer.tobytes()) == (shape, buffer)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(list(ITEM_BYTES)),
    level=st.sampled_from([RAW, FAST]),
    pool=st.binary(min_size=1, max_size=40),
    count=st.integers(0, 3000),
)
def test_any_bytes_come_back(dtype: str, level: str, pool: bytes, count: int) -> None:
    buffer = np.resize(np.frombuffer(pool, np.uint8), count * ITEM_BYTES[dtype]).tobytes()
    frame = encode(buffer, dtype, (count,), level)
    assert returned(frame) == buffer
    assert frame.nbytes <= len(buffer) + HEADER_AT_MOST


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("size", [64, SMALLEST_CODED_BYTES, 2**18])
def test_noise_travels_raw(dtype: str, size: int) -> None:
    noise = np.random.default_rng(2).bytes(size)
    frame = encode(noise, dtype, (size // ITEM_BYTES[dtype],), FAST)
    assert (frame.level, frame.nbytes) == (RAW, size + 20)
    assert returned(frame) == noise


def test_small_frame_travels_raw() -> None:
    zeros = bytes(SMALLEST_CODED_BYTES - 2)
    assert encode(zeros, "bfloat16", (len(zeros) // 2,), FAST).level == RAW


@pytest.mark.parametrize("dtype", ITEM_BYTES)
def test_equal_elements_cost_a_header(dtype: str) -> None:
    zeros = bytes(2**16)
    frame = encode(zeros, dtype, (2**16 // ITEM_BYTES[dtype],), FAST)
    assert frame.nbytes < 64
    assert returned(frame) == zeros


def test_repeated_text_is_found_in_opaque_bytes() -> None:
    text = b"a row of activations, " * 500
    frame = encode(text, "opaque", (len(text),), FAST)
    assert frame.nbytes < 200
    assert returned(frame) == text


@pytest.mark.parametrize("dtype", FLOATS)
def test_profile_makes_frames_smaller(dtype: str) -> None:
    x = hidden_states(dtype, 512, 96)
    profile = Profile.learned(x[:256], dtype, (256, 96))
    frame = encode(x[256:], dtype, (256, 96), FAST, profile)
    assert returned(frame, profile) == x[256:].tobytes()
    assert frame.nbytes < encode(x[256:], dtype, (256, 96), FAST).nbytes


def test_profile_survives_its_announcement() -> None:
    profile = Profile.learned(hidden_states("bfloat16", 64, 96), "bfloat16", (64, 96))
    again = Profile.parsed(profile.tobytes(), max_channels=96)
    assert (again, again.id) == (profile, profile.id)
    with pytest.raises(FrameError, match="99 bytes"):
        Profile.parsed(profile.tobytes()[:99], max_channels=80)
    for flipped in (b"XP", b"W\0", b"WP\2", b"WP\1\3"):
        with pytest.raises(FrameError, match="profile"):
            Profile.parsed(flipped + profile.tobytes()[len(flipped) :], max_channels=96)


def test_profile_of_another_width_or_dtype_is_left_unused() -> None:
    profile = Profile.learned(hidden_states("bfloat16", 64, 96), "bfloat16", (64, 96))
    for dtype, shape in (("bfloat16", (64, 95)), ("float16", (64, 96)), ("bfloat16", (6144,))):
        x = hidden_states(dtype, 64, 96).reshape(-1)[: int(np.prod(shape))]
        assert returned(encode(x, dtype, shape, FAST, profile)) == x.tobytes()


def test_unannounced_profile_is_refused() -> None:
    x = hidden_states("bfloat16", 64, 96)
    profile = Profile.learned(x, "bfloat16", x.shape)
    other = Profile("bfloat16", bytes(95))
    frame = encode(x, "bfloat16", x.shape, FAST, profile).tobytes()
    for known in ({}, {other.id: profile}, {profile.id: other}):
        with pytest.raises(FrameError, match="profile"):
            decode(frame, max_bytes=LIMIT, profiles=known)


def test_too_few_rows_teach_nothing() -> None:
    for dtype, shape in (("bfloat16", (63, 8)), ("opaque", (64, 8)), ("float32", (64, 0))):
        rows = np.zeros(int(np.prod(shape)) * ITEM_BYTES[dtype], np.uint8)
        with pytest.raises(ValueError, match="too little"):
            Profile.learned(rows, dtype, shape)


def test_zeros_among_the_rows_teach_nothing_but_are_coded() -> None:
    x = hidden_states("bfloat16", 128, 96)
    profile = Profile.learned(x, "bfloat16", x.shape)
    x[7, 7] = 0
    with pytest.raises(ValueError, match="too far apart"):
        Profile.learned(x, "bfloat16", x.shape)
    frame = encode(x, "bfloat16", x.shape, FAST, profile)
    assert frame.nbytes < 0.8 * x.nbytes
    assert returned(frame) == x.tobytes()


def test_views_are_coded_as_they_read() -> None:
    x = hidden_states("bfloat16", 128, 96)
    for view in (x[::2], x[:, 8:72], x.T, x[::-1, ::-1]):
        assert returned(encode(view, "bfloat16", view.shape, FAST)) == view.tobytes()
    every_other = memoryview(x.tobytes())[::2]
    assert (
        returned(encode(every_other, "opaque", (len(every_other),), FAST)) == every_other.tobytes()
    )


def test_input_is_read_only_and_unchanged() -> None:
    x = hidden_states("bfloat16", 128, 96)
    x.flags.writeable = False
    before = x.tobytes()
    profile = Profile.learned(x, "bfloat16", x.shape)
    for level in (RAW, FAST, INT8):
        encode(x, "bfloat16", x.shape, level, profile)
    assert x.tobytes() == before


def test_unaligned_buffers_are_coded() -> None:
    x = hidden_states("float32", 64, 96)
    shifted = memoryview(b"!" + x.tobytes())[1:]
    frame = b"!" + encode(shifted, "float32", x.shape, FAST).tobytes()
    assert decode(memoryview(frame)[1:], max_bytes=LIMIT).buffer.tobytes() == x.tobytes()


def test_decoded_elements_may_be_written() -> None:
    x = hidden_states("bfloat16", 64, 96)
    for level in (RAW, FAST, INT8):
        frame = encode(x, "bfloat16", x.shape, level).tobytes()
        assert decode(frame, max_bytes=LIMIT).buffer.flags.writeable


def test_wrong_use_is_named() -> None:
    for size, dtype, shape, level in (
        (10, "bfloat16", (6,), FAST),
        (10, "float64", (5,), FAST),
        (10, "bfloat16", (5,), "denser"),
        (4, "bfloat16", (-1, -2), FAST),
        (2, "bfloat16", (1,) * 9, FAST),
    ):
        with pytest.raises(ValueError, match=r"no such|too much|are not"):
            encode(bytes(size), dtype, shape, level)


def test_two_threads_do_not_disturb_each_other() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for step in range(60):
            x = hidden_states(FLOATS[(seed + step) % 3], 96, 96, seed=100 * seed + step)
            dtype = FLOATS[(seed + step) % 3]
            if returned(encode(x, dtype, x.shape, FAST)) != x.tobytes():
                wrong.append(step)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# int8


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [96, 97])
def test_int8_moves_no_element_far(dtype: str, channels: int) -> None:
    x = hidden_states(dtype, 64, channels)
    frame = encode(x, dtype, x.shape, INT8)
    decoded = decode(frame.tobytes(), max_bytes=LIMIT)
    before, after = as_float(x, dtype), as_float(decoded.buffer.view(x.dtype), dtype)
    padded = np.pad(before.reshape(64, -1), ((0, 0), (0, -channels % 64)))
    largest = np.abs(padded.reshape(64, -1, 64)).max(axis=2)
    bound = np.repeat(largest, 64, axis=1)[:, :channels].reshape(-1) / 126 * 0.5
    assert decoded.level == INT8
    assert (np.abs(after - before) <= bound + np.abs(before) / 256).all()
    assert frame.nbytes <= x.size + 2 * 64 * 2 + 64


def test_int8_keeps_zeros_extremes_and_tiny_numbers() -> None:
    for dtype, largest in (("float32", 0x7F7FFFFF), ("bfloat16", 0x7F7F), ("float16", 0x7BFF)):
        x = np.zeros((64, 64), np.uint32 if dtype == "float32" else np.uint16)
        x[1], x[2, ::2] = largest, 1
        decoded = decode(encode(x, dtype, x.shape, INT8).tobytes(), max_bytes=LIMIT)
        after = as_float(decoded.buffer.view(x.dtype), dtype).reshape(64, 64)
        assert decoded.level == INT8
        assert np.isfinite(after).all()
        assert (after[3:] == 0).all()
        assert (after[1] >= 0.99 * as_float(x[1], dtype)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 5, 64, 96])
def test_int8_makes_the_same_of_a_row_whoever_travels_with_it(dtype: str, channels: int) -> None:
    x = hidden_states(dtype, 64, channels)
    together = returned(encode(x, dtype, x.shape, INT8))
    alone = [encode(x[row : row + 1], dtype, (1, channels), INT8) for row in range(64)]
    assert {frame.level for frame in alone} == {INT8}
    assert b"".join(map(returned, alone)) == together


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_int8_keeps_a_row_that_is_not_finite_from_being_numbers_and_spares_the_others(
    bits: int,
) -> None:
    x = hidden_states("bfloat16", 64, 96)
    whole = np.frombuffer(returned(encode(x, "bfloat16", x.shape, INT8)), np.uint16)
    x[5, 5] = bits
    frame = encode(x, "bfloat16", x.shape, INT8)
    rows = np.frombuffer(returned(frame), np.uint16).reshape(64, 96)
    assert frame.level == INT8
    assert np.isnan(as_float(rows[5], "bfloat16")).all()
    others = np.arange(64) != 5
    assert (rows[others] == whole.reshape(64, 96)[others]).all()


@pytest.mark.parametrize("scale", [0x0000, 0x007F, 0x7F80, 0x7FC0, 0x7FC1, 0x8080, 0xFFFF], ids=hex)
def test_int8_refuses_a_scale_that_none_would_send(scale: int) -> None:
    x = hidden_states("bfloat16", 2, 96)
    frame = bytearray(encode(x, "bfloat16", x.shape, INT8).tobytes())
    frame[-2:] = struct.pack("<H", scale)  # of the second row's second group
    frame[8:16] = struct.pack("<Q", xxh3_64_intdigest(frame[:8] + frame[16:]))
    with pytest.raises(FrameError, match="scale"):
        decode(frame, max_bytes=LIMIT)


def test_decoding_int8_takes_memory_in_proportion_to_what_comes_of_it() -> None:
    narrow = np.ones((2**18, 1), np.float32)
    frame = encode(narrow, "float32", narrow.shape, INT8).tobytes()
    tracemalloc.start()
    decode(frame, max_bytes=LIMIT)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 * narrow.nbytes


def as_float(bits: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.float64]:
    flat = bits.reshape(-1)
    if dtype == "bfloat16":
        return (flat.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return flat.view(dtype).astype(np.float64)


GOLDEN = {
    ("opaque", RAW): 0xE0011908B7F25AB2,
    ("float32", RAW): 0xCF7BAE4518F9BB42,
    ("float32", FAST): 0x45BCBC975E038437,
    ("bfloat16", RAW): 0x091BE39F388A7980,
    ("bfloat16", FAST): 0xB6E7C61DDC885E96,
    ("float16", RAW): 0xF64EA12F6CE6ED38,
    ("float16", FAST): 0x83E0A9DF0EC36200,
}


GOLDEN_INT8 = {
    "float32": 0x7E505DF4BF018F4F,
    "bfloat16": 0x30964A62A9CC8261,
    "float16": 0xD224CE7F73894EC5,
}
GOLDEN_PROFILED = {
    "float32": 0xFB6F89A0F44DADC5,
    "bfloat16": 0x33826F6E6E33F7D1,
    "float16": 0x5A403C9BE26ECD58,
}
GOLDEN_ROWS, GOLDEN_CHANNELS = 128, 100


@pytest.mark.parametrize("dtype", FLOATS)
def test_int8s_wire_format_has_not_drifted(dtype: str) -> None:
    """Whole numbers and scales of 1, so that nothing is rounded; one row is not finite."""
    noise = (np.arange(GOLDEN_ROWS * GOLDEN_CHANNELS) * 2654435761 >> 9) % 255 - 127
    whole = noise.reshape(-1, GOLDEN_CHANNELS).astype(np.float32)
    whole[:, ::64] = 127  # the largest of each group: the scale is 1
    whole[3, 70] = np.nan
    bits = whole.view(np.uint32) >> 16 if dtype == "bfloat16" else whole.astype(dtype)
    x = bits.astype(np.uint16) if dtype == "bfloat16" else bits
    frame = encode(x, dtype, x.shape, INT8)
    after = as_float(np.frombuffer(returned(frame), f"u{ITEM_BYTES[dtype]}"), dtype)
    whole[3] = np.nan
    assert np.array_equal(after.reshape(whole.shape), whole, equal_nan=True)
    assert frame.nbytes > x.size, "no plane is coded, so zstd's own version plays no part"
    assert xxh3_64_intdigest(frame.tobytes()) == GOLDEN_INT8[dtype]


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_wire_format_of_a_profile_and_its_frames_has_not_drifted(dtype: str) -> None:
    """Exponents that are their channel's base, so that no plane is coded."""
    word = np.dtype(f"u{ITEM_BYTES[dtype]}")
    channels = np.arange(GOLDEN_CHANNELS, dtype=word)
    exponents = {"float32": 0x3E000000, "bfloat16": 0x3E00, "float16": 0x2C00}[dtype] + (
        channels % 3 << {"float32": 23, "bfloat16": 7, "float16": 10}[dtype]
    )
    signs = np.arange(GOLDEN_ROWS * GOLDEN_CHANNELS, dtype=word) * 40503 >> 3 & 1
    noise = signs.reshape(-1, GOLDEN_CHANNELS) << 8 * word.itemsize - 1
    x = (noise | exponents).astype(word)
    profile = Profile.learned(x, dtype, x.shape)
    frame = encode(x, dtype, x.shape, FAST, profile)
    assert frame.level == FAST
    assert returned(frame, profile) == x.tobytes()
    assert Profile.parsed(profile.tobytes(), 2**17) == profile
    digest = xxh3_64_intdigest(profile.tobytes() + frame.tobytes())
    assert digest == GOLDEN_PROFILED[dtype]


@pytest.mark.parametrize(("dtype", "level"), GOLDEN)
def test_wire_format_has_not_drifted(dtype: str, level: str) -> None:
    """Frames of version 2 by their digests; a new layout needs a new version number.

    All exponents are the same, so no plane is coded, and zstd's own version plays no part.
    """
    noise = (np.arange(6144, dtype=np.uint32) * 2654435761 >> 9).astype(np.uint8)
    elements = noise.reshape(-1, ITEM_BYTES[dtype])
    elements[:, -1] = elements[:, -1] & 0x80 | 0x3F
    elements[:, -2:-1] |= 0xC0
    frame = encode(elements, dtype, (2, len(elements) // 2), level)
    assert frame.level == level
    assert returned(frame) == elements.tobytes()
    assert xxh3_64_intdigest(frame.tobytes()) == GOLDEN[dtype, level]
