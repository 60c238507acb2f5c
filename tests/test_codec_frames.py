"""Frames that are wrong: one typed error each, little memory, and never a silent wrong answer."""

import math
import random
import struct
import tracemalloc
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from stages.codec import DENSE, FAST, INT8, ITEM_BYTES, RAW, decode, encode
from stages.codec_compiled import installed
from stages.codec_dense_profile import DenseProfile
from stages.errors import FrameError
from tests.coded import FLOATS, LIMIT, dense_profile, hidden_states, related_states

MUTATED_FRAMES = 100_000


def sealed(frame: bytes | bytearray) -> bytes:
    """The frame with a checksum that fits it: what a broken or lying sender would make."""
    checksum = xxh3_64_intdigest(bytes(frame[:8]) + bytes(frame[16:]))
    return bytes(frame[:8]) + struct.pack("<Q", checksum) + bytes(frame[16:])


def good_frames() -> list[bytes]:
    frames = []
    for dtype in FLOATS:
        x = hidden_states(dtype, 24, 64)
        frames += [encode(x, dtype, x.shape, level).tobytes() for level in (RAW, FAST, INT8)]
        if installed():
            y = related_states(dtype, 24)
            frames.append(encode(y, dtype, y.shape, DENSE, dense_profile(dtype)).tobytes())
    return [*frames, encode(b"abc " * 600, "opaque", (2400,), FAST).tobytes()]


def dense_profiles() -> dict[int, DenseProfile]:
    """Those that the good frames take."""
    profiles = [dense_profile(dtype) for dtype in FLOATS] if installed() else []
    return {profile.id: profile for profile in profiles}


NUMBERS = range(13 if installed() else 10)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_truncation_is_refused(number: int) -> None:
    frame = memoryview(good_frames()[number])
    known = dense_profiles()
    for length in range(len(frame)):
        with pytest.raises(FrameError):
            decode(frame[:length], max_bytes=LIMIT, profiles=known)


@pytest.mark.parametrize("number", NUMBERS)
def test_every_flipped_byte_is_refused(number: int) -> None:
    frame = bytearray(good_frames()[number])
    known = dense_profiles()
    for at in range(len(frame)):
        frame[at] ^= 1 << at % 8
        with pytest.raises(FrameError):
            decode(frame, max_bytes=LIMIT, profiles=known)
        frame[at] ^= 1 << at % 8


def test_lies_under_a_right_checksum_never_do_worse_than_a_frame_error() -> None:
    """Frames mutated and then sealed again, as no line noise but a broken sender makes them."""
    frames, known = good_frames(), dense_profiles()
    chance = random.Random(3)
    refused = 0
    for number in range(MUTATED_FRAMES):
        mutated = bytearray(frames[number % len(frames)])
        end = 48 if number % 2 else len(mutated)
        for _ in range(1 + number % 3):
            mutated[chance.randrange(end)] = chance.randrange(256)
        if number % 5 == 0:
            del mutated[chance.randrange(len(mutated)) :]
        try:
            decoded = decode(sealed(mutated), max_bytes=LIMIT, profiles=known)
        except FrameError:
            refused += 1
        else:
            assert decoded.buffer.nbytes == math.prod(decoded.shape) * ITEM_BYTES[decoded.dtype]
    assert refused > MUTATED_FRAMES // 3


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused(noise: bytes) -> None:
    for frame in (noise, b"WA\2" + noise, sealed(b"WA\2\1\2\2\2\0" + bytes(8) + noise)):
        with pytest.raises(FrameError):
            decode(frame, max_bytes=LIMIT)


def fast_frame(*, dims: tuple[int, int], planes: tuple[bytes, bytes], modes: int = 0b0110) -> bytes:
    """A bfloat16 frame made by hand; 0b0110: plane 0 coded, plane 1 as it is."""
    start = struct.pack("<2sBBBBBB8x", b"WA", 2, 1, 2, 2, modes, 0)
    table = struct.pack("<5I", *dims, 0, len(planes[0]), len(planes[1]))
    return sealed(start + table + planes[0] + planes[1])


def coded(plane: bytes, names: int | None = None, **parameters: int) -> bytes:
    """A zstd frame of the plane that names `names` bytes, or no size at all."""
    chosen = zstandard.ZstdCompressionParameters.from_level(
        1, write_content_size=names is not None, **parameters
    )
    coder = zstandard.ZstdCompressor(compression_params=chosen)
    if names is None:
        stream = coder.compressobj()
        return stream.compress(plane) + stream.flush()
    frame = coder.compress(plane)
    if names == len(plane):
        return frame
    # The size stands after magic number, flags and perhaps a window: in 2 bytes (less 256) or in 4.
    at = 5 if frame[4] & 0x20 else 6
    size = struct.pack("<I", names) if frame[4] >> 6 == 2 else struct.pack("<H", names - 256)
    return frame[:at] + size + frame[at + len(size) :]


def bfloat16_frame(coded_plane: bytes) -> bytes:
    return fast_frame(dims=(64, 64), planes=(coded_plane, ZEROS))


ZEROS = bytes(4096)
WRONG: dict[str, Callable[[], bytes]] = {
    "bomb": lambda: bfloat16_frame(coded(bytes(2**26))),
    "bomb that names its size": lambda: bfloat16_frame(coded(bytes(2**26), names=2**26)),
    "bomb that names a small size": lambda: bfloat16_frame(coded(bytes(2**26), names=4096)),
    "window of 128 MiB": lambda: bfloat16_frame(coded(ZEROS, window_log=27)),
    "plane without a size": lambda: bfloat16_frame(coded(ZEROS)),
    "plane too short": lambda: bfloat16_frame(coded(ZEROS[1:], names=4095)),
    "plane shorter than it says": lambda: bfloat16_frame(coded(ZEROS[1:], names=4096)),
    "plane longer than it says": lambda: bfloat16_frame(coded(ZEROS + b"!", names=4096)),
    "plane followed by bytes": lambda: bfloat16_frame(coded(ZEROS, names=4096) + b"!"),
    "plane of two zstd frames": lambda: bfloat16_frame(coded(ZEROS, names=4096) * 2),
    "skippable zstd frame": lambda: fast_frame(
        dims=(64, 64), planes=(b"\x50\x2a\x4d\x18" + struct.pack("<I", 4) + b"skip", ZEROS)
    ),
    "no zstd at all": lambda: fast_frame(dims=(64, 64), planes=(b"not zstd", ZEROS)),
    "empty plane": lambda: fast_frame(dims=(64, 64), planes=(b"", ZEROS)),
    "no elements": lambda: fast_frame(dims=(0, 64), planes=(coded(b""), b"")),
    "huge claim": lambda: fast_frame(dims=(2**32 - 1, 2**32 - 1), planes=(b"a", b"b"), modes=0),
    "mode that does not exist": lambda: fast_frame(
        dims=(64, 64), planes=(ZEROS, ZEROS), modes=0b0111
    ),
    "mode of a third plane": lambda: fast_frame(
        dims=(64, 64), planes=(ZEROS, ZEROS), modes=0b010101
    ),
    "joined planes of float16": lambda: sealed(
        b"WA\2\1\3\2\x80\0" + encode(ZEROS, "float16", (2, 1024), FAST).tobytes()[8:]
    ),
    "trailing bytes": lambda: sealed(fast_frame(dims=(1, 1), planes=(b"a", b"b"), modes=0) + b"!"),
}


def test_frame_made_by_hand_is_a_right_one() -> None:
    decoded = decode(bfloat16_frame(coded(ZEROS, names=4096)), max_bytes=LIMIT)
    assert decoded.buffer.tobytes() == bytes(8192)


@pytest.mark.parametrize("lie", WRONG)
def test_frame_made_to_harm_is_refused(lie: str) -> None:
    frame = WRONG[lie]()
    tracemalloc.start()
    with pytest.raises(FrameError):
        decode(frame, max_bytes=LIMIT)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 2**16


def test_frame_above_the_limit_is_refused_before_it_is_allocated() -> None:
    frame = fast_frame(dims=(2**15, 2**15), planes=(b"a", b"b"), modes=0)
    with pytest.raises(FrameError, match="above the limit"):
        decode(frame, max_bytes=2**31 - 1)
    assert decode(encode(bytes(64), "opaque", (64,), RAW).tobytes(), max_bytes=64).shape == (64,)


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4, 5, 7])
def test_frame_of_a_stranger_or_another_version_is_refused(at: int) -> None:
    frame = bytearray(good_frames()[1])
    frame[at] = 200
    with pytest.raises(FrameError):
        decode(sealed(frame), max_bytes=LIMIT)
