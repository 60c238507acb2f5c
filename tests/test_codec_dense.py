"""The dense level: exact to the bit, denser where channels depend on one another, safe to decode."""

import contextlib
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

pytest.importorskip("numba", reason="the dense level takes the extra `dense`")

from stages.codec import DENSE, FAST, RAW, decode, encode
from stages.codec_dense_learning import SMALLEST_ROWS, learned
from stages.codec_dense_profile import (
    CONTEXTS,
    ESCAPE,
    MAX_BIAS,
    SLOTS,
    SYMBOLS,
    DenseProfile,
    Model,
)
from stages.codec_profile import Profile
from stages.errors import FrameError
from tests.coded import DENSE_CHANNELS, FLOATS, LIMIT, dense_profile, related_states, returned


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_frames_return_every_bit_and_are_denser(dtype: str) -> None:
    profile = dense_profile(dtype)
    x = related_states(dtype, 96, seed=5)
    frame = encode(x, dtype, x.shape, DENSE, profile)
    usual = encode(x, dtype, x.shape, FAST, Profile.learned(x, dtype, x.shape))
    assert frame.level == DENSE
    assert returned(frame, profile) == x.tobytes()
    assert (
        frame.nbytes < {"float32": 0.985, "bfloat16": 0.96, "float16": 0.97}[dtype] * usual.nbytes
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_pattern_of_16_bits_comes_back_dense(dtype: str) -> None:
    patterns = np.arange(2**16, dtype=np.uint16).reshape(-1, DENSE_CHANNELS)
    usual = np.tile(related_states(dtype, 96, seed=6), (100, 1))  # for the frame to be worth coding
    patterns = np.concatenate([usual, patterns, usual])
    profile = dense_profile(dtype)
    frame = encode(patterns, dtype, patterns.shape, DENSE, profile)
    assert frame.level == DENSE
    assert returned(frame, profile) == patterns.tobytes()


def test_float32_that_was_bfloat16_costs_what_bfloat16_costs() -> None:
    narrow = related_states("bfloat16", 96)
    wide = narrow.astype(np.uint32) << 16
    frame = encode(wide, "float32", wide.shape, DENSE, dense_profile("float32"))
    assert frame.level == DENSE
    assert returned(frame, dense_profile("float32")) == wide.tobytes()
    assert (
        frame.nbytes
        < 1.03 * encode(narrow, "bfloat16", narrow.shape, DENSE, dense_profile("bfloat16")).nbytes
    )


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    pool=st.binary(min_size=1, max_size=40),
    rows=st.integers(1, 40),
    spoilt=st.integers(0, 30),
)
def test_any_rows_come_back_from_a_dense_wish(
    dtype: str, pool: bytes, rows: int, spoilt: int
) -> None:
    x = related_states(dtype, rows).reshape(-1)
    x.view(np.uint8)[: 4 * spoilt] = np.resize(np.frombuffer(pool, np.uint8), 4 * spoilt)
    frame = encode(x, dtype, (rows, DENSE_CHANNELS), DENSE, dense_profile(dtype))
    assert returned(frame, dense_profile(dtype)) == x.tobytes()
    assert frame.nbytes <= x.nbytes + 48


def test_a_dense_wish_without_a_fitting_profile_is_a_fast_frame() -> None:
    x = related_states("bfloat16", 96)
    for dtype, shape, profile in (
        ("bfloat16", x.shape, None),
        ("bfloat16", x.shape[::-1], dense_profile("bfloat16")),
        ("float16", x.shape, dense_profile("bfloat16")),
        ("bfloat16", x.shape, Profile.learned(x, "bfloat16", x.shape)),
    ):
        assert encode(x, dtype, shape, DENSE, profile).level == FAST
    noise = np.random.default_rng(1).integers(0, 2**16, x.shape, np.uint16)
    assert encode(noise, "bfloat16", x.shape, DENSE, dense_profile("bfloat16")).level == RAW


def test_a_dense_frame_is_refused_without_its_profile() -> None:
    x = related_states("bfloat16", 32)
    profile = dense_profile("bfloat16")
    frame = encode(x, "bfloat16", x.shape, DENSE, profile).tobytes()
    other = dense_profile("float32")
    plain = Profile.learned(related_states("bfloat16", 64), "bfloat16", (64, DENSE_CHANNELS))
    for known in ({}, {other.id: other}, {profile.id: other}, {profile.id: plain}):
        with pytest.raises(FrameError, match="no fitting dense profile"):
            decode(frame, max_bytes=LIMIT, profiles=known)


def test_too_few_rows_or_channels_teach_nothing() -> None:
    for rows, channels in ((SMALLEST_ROWS - 1, 64), (SMALLEST_ROWS, 15)):
        zeros = np.zeros((rows, channels), np.uint16)
        with pytest.raises(ValueError, match=r"too few|no use"):
            learned(zeros, "bfloat16", zeros.shape)


@pytest.mark.parametrize("fill", [0, 0x7FC0, 0xFFFF])
def test_rows_of_one_number_teach_a_profile_that_codes(fill: int) -> None:
    rows = np.full((SMALLEST_ROWS, 64), fill, np.uint16)
    profile = learned(rows, "bfloat16", rows.shape)
    DenseProfile.parsed(profile.tobytes(), 64)
    assert returned(encode(rows, "bfloat16", rows.shape, DENSE, profile), profile) == rows.tobytes()


def test_a_dense_profile_survives_its_announcement() -> None:
    for dtype in FLOATS:
        profile = dense_profile(dtype)
        again = DenseProfile.parsed(profile.tobytes(), DENSE_CHANNELS)
        assert (again.id, again.dtype) == (profile.id, dtype)
        for field in Model._fields:
            assert np.array_equal(getattr(again.model, field), getattr(profile.model, field))


def test_every_truncated_or_overlong_dense_profile_is_refused() -> None:
    announced = dense_profile("bfloat16").tobytes()
    for length in range(0, len(announced), 7):
        with pytest.raises(FrameError):
            DenseProfile.parsed(announced[:length], DENSE_CHANNELS)
    for wrong in (announced + b"!", announced):
        with pytest.raises(FrameError):
            DenseProfile.parsed(wrong, DENSE_CHANNELS - (wrong == announced))


def spoilt(field: str, at: int, value: int) -> DenseProfile:
    """A dense profile of which one number is not as it should be."""
    array = getattr(dense_profile("bfloat16"), field).copy()
    array.reshape(-1)[at] = value
    changed: dict[str, Any] = {field: array}
    return replace(dense_profile("bfloat16"), **changed)


@pytest.mark.parametrize(
    "wrong",
    [
        spoilt("pivots", -1, DENSE_CHANNELS),
        spoilt("pivots", 1, int(dense_profile("bfloat16").pivots[0])),
        spoilt("pivots", 0, 2**32 - 1),
        spoilt("centres", 5, 512),
        spoilt("biases", 5, MAX_BIAS + 1),
        spoilt("biases", 5, -(2**31)),
        spoilt("weights", 5, -128),
        spoilt("counts", 5, SLOTS),
        spoilt("counts", 2 * ESCAPE, 0),
        spoilt("counts", 0, 2**16 - 1),
    ],
)
def test_a_dense_profile_made_to_harm_is_refused(wrong: DenseProfile) -> None:
    with pytest.raises(FrameError):
        DenseProfile.parsed(wrong.tobytes(), DENSE_CHANNELS)


def test_profiles_mutated_by_a_lying_peer_never_do_worse_than_a_frame_error() -> None:
    """Whatever passes for a profile must serve to code with; compiled code checks no bounds."""
    chance = random.Random(4)
    announced = dense_profile("bfloat16").tobytes()
    x = related_states("bfloat16", 32)
    frame = encode(x, "bfloat16", x.shape, DENSE, dense_profile("bfloat16")).tobytes()
    passed = 0
    for _ in range(3000):
        mutated = bytearray(announced)
        mutated[chance.randrange(len(mutated))] = chance.randrange(256)
        try:
            profile = DenseProfile.parsed(bytes(mutated), DENSE_CHANNELS)
        except FrameError:
            continue
        passed += 1
        with contextlib.suppress(FrameError):
            decode(frame, max_bytes=LIMIT, profiles={dense_profile("bfloat16").id: profile})
        if profile.dtype == "bfloat16":
            assert returned(encode(x, "bfloat16", x.shape, DENSE, profile), profile) == x.tobytes()
    assert passed > 100


def test_extreme_profiles_code_and_decode_alike() -> None:
    """Weights, biases and pivots at their limits, where a sum that rounds would show."""
    rng = np.random.default_rng(7)
    usual = dense_profile("bfloat16")
    x = related_states("bfloat16", 64)
    x[::2, ::3] = 0x7F7F
    for _ in range(20):
        profile = replace(
            usual,
            centres=rng.choice(np.array([0, 1, 255, 511], np.uint16), DENSE_CHANNELS),
            weights=rng.choice(np.array([-127, 0, 127], np.int8), usual.weights.shape),
            biases=rng.choice(np.array([-MAX_BIAS, 0, MAX_BIAS], np.int32), DENSE_CHANNELS),
        )
        again = DenseProfile.parsed(profile.tobytes(), DENSE_CHANNELS)
        assert returned(encode(x, "bfloat16", x.shape, DENSE, profile), again) == x.tobytes()


def test_dense_wire_format_has_not_drifted() -> None:
    """By digests of a profile and a frame that a formula makes."""
    counts = np.full((CONTEXTS, SYMBOLS), 16, np.uint16)
    counts[:, 36:100] += (SLOTS - 16 * SYMBOLS) // 64
    channels, pivots = 96, 32
    profile = DenseProfile(
        "bfloat16",
        np.arange(0, channels, 3, dtype=np.uint32)[::-1].copy(),
        np.full(channels, 254, np.uint16),
        (np.arange(channels, dtype=np.int32) * 977 % 2048) - 1024,
        counts,
        (np.arange(pivots * channels) * 31 % 61 - 30).astype(np.int8).reshape(pivots, -1),
    )
    noise = (np.arange(80 * channels, dtype=np.uint32) * 2654435761 >> 9).astype(np.uint16)
    x = (noise & 0x87FF | 0x3800).reshape(-1, channels)
    frame = encode(x, "bfloat16", x.shape, DENSE, profile)
    assert frame.level == DENSE
    assert returned(frame, profile) == x.tobytes()
    assert (profile.id, xxh3_64_intdigest(frame.tobytes())) == (
        419862323,
        10538381439747939436,
    )
