"""Activations to frames and back, exact to the bit; no sockets, no torch, no state but the profile.

A frame describes itself: level, dtype, shape, how each byte plane is stored, and a checksum over
all of it. So frames may be retried, reordered, dropped or sent twice. The one thing that the two
ends share is a `Profile`, which the sender uses only after the receiver has acknowledged it.

Little-endian, and written so that, but for int8, it is never longer than raw plus its header:

    "WA" | version u8 | level u8 | dtype u8 | dimensions u8
    modes u8: 2 bits a plane, 0x80 if its planes are joined | 0
    xxh3-64 u64, over every other byte of the frame
    dimension u32, each
    level fast, int8, dense: profile u32 (0: none) | stored length u32, each plane
    payload: the planes one after the other; level raw: the elements' bytes

The dense level needs a `DenseProfile` and compiled code (extra `dense`); whoever has no such code is
never asked to decode it, since it acknowledges no such profile.
"""

import math
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from stages import codec_coder, codec_int8, codec_planes
from stages.codec_coder import Buffer, Bytes, Part
from stages.codec_dense_profile import DenseProfile, dense_sizes
from stages.codec_planes import Planes
from stages.codec_profile import Profile
from stages.errors import FrameError

if sys.byteorder != "little":
    raise ImportError("activations travel as their little-endian bits; this host is big-endian")

RAW: Final = "raw"
FAST: Final = "fast"
INT8: Final = "int8"
DENSE: Final = "dense"
LEVELS: Final = (RAW, FAST, INT8, DENSE)
"""By their number on the wire; only int8 loses anything."""

DTYPES: Final = ("opaque", "float32", "bfloat16", "float16")
"""By their number on the wire; what is no float travels as opaque bytes, one an element."""
ITEM_BYTES: Final = {"opaque": 1, "float32": 4, "bfloat16": 2, "float16": 2}
_CODERS: Final = {
    "opaque": (codec_coder.REPEATS,),
    "float32": (codec_coder.HUFFMAN, codec_coder.IF_SKEWED, codec_coder.IF_SKEWED),
    "bfloat16": (codec_coder.HUFFMAN, codec_coder.NONE),
    "float16": (codec_coder.HUFFMAN, codec_coder.NONE),
}
"""What to try on each plane of the fast level; a 16-bit float's sign and mantissa are noise."""
_INT8_CODERS: Final = (codec_coder.IF_SKEWED, codec_coder.NONE)
_DENSE_CODERS: Final = {
    "float32": (codec_coder.DONE, codec_coder.NONE, codec_coder.IF_SKEWED),
    "bfloat16": (codec_coder.DONE, codec_coder.NONE),
    "float16": (codec_coder.DONE, codec_coder.NONE),
}

AnyProfile = Profile | DenseProfile

SMALLEST_CODED_BYTES: Final = 2048  # below, a frame is a packet or two however it is coded
MAX_DIMENSIONS: Final = 8
MAX_RAW_BYTES: Final = 2**31  # of one frame; stored lengths and dimensions are 32 bits wide

_VERSION: Final = 2
_JOINED: Final = 0x80
_START: Final = struct.Struct("<2sBBBBBB")
_CHECKSUM: Final = struct.Struct("<Q")
_DIMENSIONS_AT: Final = _START.size + _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class Encoded:
    """One frame, in parts to be sent in order; they may alias the buffer that was encoded."""

    parts: tuple[Part, ...]
    level: str
    """The level in use, which is raw where the one asked for would not have been smaller."""
    nbytes: int

    def tobytes(self) -> bytes:
        """The frame in one piece."""
        return b"".join(self.parts)


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a frame held; `buffer` is the elements' bytes, writable and its own."""

    dtype: str
    shape: tuple[int, ...]
    buffer: Bytes
    level: str


@dataclass(frozen=True, slots=True)
class _Header:
    """A frame's own description, checked against the frame's length."""

    level: str
    dtype: str
    shape: tuple[int, ...]
    profile_id: int
    joined: bool
    modes: tuple[int, ...]
    lengths: tuple[int, ...]
    payload: memoryview


def encode(
    buffer: Buffer,
    dtype: str,
    shape: Sequence[int],
    level: str,
    profile: AnyProfile | None = None,
) -> Encoded:
    """One frame of the elements in `buffer` (C order; copied first if it is not contiguous).

    `level` is a wish: the frame is raw where that is no longer, or below 2 KiB, and dense gives way to
    fast without a dense profile. But int8 is kept to wherever there is a float, so that what a row
    becomes hangs on nothing else. `profile` must have been
    acknowledged by the receiver; one learned from another dtype or width is left unused. ValueError
    where buffer, dtype and shape disagree.
    """
    elements = _contiguous_bytes(buffer)
    _check_input(elements.size, dtype, shape, level)
    coded = None
    if level == INT8 and dtype != "opaque" and elements.size:
        split = Planes(codec_int8.quantized(elements, dtype, _channels(shape)))
        coded = _coded(INT8, dtype, shape, 0, split)
    elif elements.size >= SMALLEST_CODED_BYTES:
        if level == DENSE and isinstance(profile, DenseProfile) and profile.fits(dtype, shape):
            coded = _encode_dense(elements, dtype, shape, profile)
        if level != RAW and coded is None:
            coded = _encode_fast(elements, dtype, shape, profile)
    return coded or _sealed(RAW, dtype, shape, 0, b"", (elements.data,))


def decode(
    frame: bytes | bytearray | memoryview,
    *,
    max_bytes: int,
    profiles: Mapping[int, AnyProfile] | None = None,
) -> Decoded:
    """What one whole frame holds; nothing above `max_bytes` of elements is ever allocated.

    FrameError for anything else: torn, longer than it says, flipped, a level or dtype of a later
    version, a profile that was never announced, a claim above `max_bytes`.
    """
    header = _opened(memoryview(frame).cast("B"), max_bytes)
    if header.level == RAW:
        elements = np.frombuffer(header.payload, np.uint8).copy()
    elif header.level == INT8:
        elements = codec_int8.restored(_unpacked(header), header.dtype, _channels(header.shape))
    elif header.level == DENSE:
        elements = _restored_dense(header, profiles or {})
    else:
        split = Planes(_unpacked(header), header.joined)
        elements = codec_planes.merge(split, header.dtype, _bases_of(header, profiles or {}))
    return Decoded(header.dtype, header.shape, elements, header.level)


def _contiguous_bytes(buffer: Buffer) -> Bytes:
    array = buffer if isinstance(buffer, np.ndarray) else np.asarray(memoryview(buffer))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _check_input(size: int, dtype: str, shape: Sequence[int], level: str) -> None:
    if dtype not in ITEM_BYTES or level not in LEVELS:
        raise ValueError(f"no such dtype or level: {dtype}, {level}")
    if len(shape) > MAX_DIMENSIONS or size > MAX_RAW_BYTES:
        raise ValueError(f"{size} bytes of shape {tuple(shape)} are too much for one frame")
    if min(shape, default=0) < 0 or math.prod(shape) * ITEM_BYTES[dtype] != size:
        raise ValueError(f"{size} bytes are not {dtype} of shape {tuple(shape)}")


def _channels(shape: Sequence[int]) -> int:
    """Elements of one row; a lone number is a row."""
    return shape[-1] if shape else 1


def _encode_dense(
    elements: Bytes, dtype: str, shape: Sequence[int], profile: DenseProfile
) -> Encoded | None:
    """The frame of densely coded planes, or None where raw is no longer."""
    from stages import codec_dense  # noqa: PLC0415  only where compiled code is at hand

    split = Planes(codec_dense.split(elements, profile))
    return _smaller(DENSE, elements, dtype, shape, profile.id, split)


def _restored_dense(header: _Header, profiles: Mapping[int, AnyProfile]) -> Bytes:
    """The elements of a frame whose dense profile this end has acknowledged."""
    profile = profiles.get(header.profile_id)
    if not isinstance(profile, DenseProfile) or not profile.fits(header.dtype, header.shape):
        raise FrameError(f"no fitting dense profile {header.profile_id:#010x} was announced")
    from stages import codec_dense  # noqa: PLC0415  only where compiled code is at hand

    rows = math.prod(header.shape[:-1])
    return codec_dense.merge(_unpacked(header), profile, rows)


def _encode_fast(
    elements: Bytes, dtype: str, shape: Sequence[int], profile: AnyProfile | None
) -> Encoded | None:
    """The frame of coded planes, or None where raw is no longer."""
    if not isinstance(profile, Profile) or not profile.fits(dtype, shape):
        split = codec_planes.split(elements, dtype, None)
        return _smaller(FAST, elements, dtype, shape, 0, split)
    split = codec_planes.split(elements, dtype, profile.repeated)
    used = split.joined or dtype not in codec_planes.JOINABLE
    return _smaller(FAST, elements, dtype, shape, profile.id if used else 0, split)


def _smaller(
    level: str, elements: Bytes, dtype: str, shape: Sequence[int], profile_id: int, split: Planes
) -> Encoded | None:
    """The frame of these planes if it is smaller than the raw one."""
    coded = _coded(level, dtype, shape, profile_id, split)
    raw_bytes = _DIMENSIONS_AT + 4 * len(shape) + elements.size
    return coded if coded.nbytes < raw_bytes else None


def _coded(level: str, dtype: str, shape: Sequence[int], profile_id: int, split: Planes) -> Encoded:
    """The frame of these planes."""
    coders = _coders(level, dtype)
    packed = [codec_coder.pack(*each) for each in zip(split.planes, coders, strict=True)]
    payload = [stored for _, stored in packed]
    table = struct.pack(f"<{1 + len(packed)}I", profile_id, *map(len, payload))
    modes = sum(mode << 2 * i for i, (mode, _) in enumerate(packed))
    if split.joined:
        modes |= _JOINED
    return _sealed(level, dtype, shape, modes, table, payload)


def _coders(level: str, dtype: str) -> tuple[str, ...]:
    """What to try on each plane; nothing where the level is not for the dtype."""
    if level == FAST:
        return _CODERS[dtype]
    if dtype == "opaque":
        return ()
    return _INT8_CODERS if level == INT8 else _DENSE_CODERS[dtype]


def _sealed(
    level: str,
    dtype: str,
    shape: Sequence[int],
    modes: int,
    table: bytes,
    payload: Sequence[Part],
) -> Encoded:
    """The frame of these parts, its checksum in place."""
    start = _START.pack(
        b"WA", _VERSION, LEVELS.index(level), DTYPES.index(dtype), len(shape), modes, 0
    )
    rest = struct.pack(f"<{len(shape)}I", *shape) + table
    checksum = xxh3_64(start)
    checksum.update(rest)
    for part in payload:
        checksum.update(part)
    header = start + _CHECKSUM.pack(checksum.intdigest()) + rest
    return Encoded((header, *payload), level, len(header) + sum(map(len, payload)))


def _opened(frame: memoryview, max_bytes: int) -> _Header:
    """The frame's header, once its checksum, names, bounds and lengths have been found right."""
    if len(frame) < _DIMENSIONS_AT:
        raise FrameError(f"{len(frame)} bytes are too few for a frame")
    magic, version, level, dtype, ndim, _, zero = _START.unpack_from(frame)
    if magic != b"WA" or version != _VERSION:
        raise FrameError(f"not a frame of version {_VERSION}: starts with {bytes(frame[:3])!r}")
    if level >= len(LEVELS) or dtype >= len(DTYPES) or ndim > MAX_DIMENSIONS or zero:
        raise FrameError(f"no such frame: level {level}, dtype {dtype}, {ndim} dimensions")
    checksum = xxh3_64(frame[: _START.size])
    checksum.update(frame[_DIMENSIONS_AT:])
    if checksum.intdigest() != _CHECKSUM.unpack_from(frame, _START.size)[0]:
        raise FrameError(f"the checksum of a frame of {len(frame)} bytes does not match")
    return _described(frame, LEVELS[level], DTYPES[dtype], max_bytes)


def _described(frame: memoryview, level: str, dtype: str, max_bytes: int) -> _Header:
    """The header's variable part; the checksum stands, so a lie here is a lie of the sender."""
    ndim, modes = frame[5], frame[6]
    joined = bool(modes & _JOINED)
    if joined and (level != FAST or dtype not in codec_planes.JOINABLE):
        raise FrameError(f"{dtype} at level {level} has no joined planes")
    count = 0 if level == RAW else len(_coders(level, dtype))
    table_at = _DIMENSIONS_AT + 4 * ndim
    payload_at = table_at + (4 * (1 + count) if count else 0)
    if len(frame) < payload_at:
        raise FrameError(f"a frame of {len(frame)} bytes ends inside its header")
    shape = struct.unpack_from(f"<{ndim}I", frame, _DIMENSIONS_AT)
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if size > max_bytes:
        raise FrameError(f"a frame claims {size} bytes, above the limit of {max_bytes}")
    if level != RAW and (size == 0 or not count):
        raise FrameError(f"{size} bytes of {dtype} cannot be coded at level {level}")
    profile_id, *lengths = struct.unpack_from(f"<{1 + count}I", frame, table_at) if count else (0,)
    stored = sum(lengths) if count else size
    if (modes & ~_JOINED) >> 2 * count:
        raise FrameError(f"{dtype} at level {level} has {count} planes; modes are {modes:#x}")
    if stored != len(frame) - payload_at:
        raise FrameError(f"{len(frame) - payload_at} bytes of payload where {stored} are named")
    return _Header(
        level,
        dtype,
        shape,
        profile_id,
        joined,
        tuple(modes >> 2 * i & 3 for i in range(count)),
        tuple(lengths),
        frame[payload_at:],
    )


def _unpacked(header: _Header) -> list[Bytes]:
    """The frame's planes, each checked for its size."""
    elements = math.prod(header.shape)
    sizes: tuple[int, ...]
    if header.level == INT8:
        channels = _channels(header.shape)
        sizes = codec_int8.sizes(elements // channels, channels)
    elif header.level == DENSE:
        sizes = dense_sizes(elements, header.dtype, header.lengths[0])
    else:
        sizes = codec_planes.sizes(header.dtype, elements, joined=header.joined)
    unpacked = []
    at = 0
    for mode, length, size in zip(header.modes, header.lengths, sizes, strict=True):
        unpacked.append(codec_coder.unpack(mode, header.payload[at : at + length], size))
        at += length
    return unpacked


def _bases_of(header: _Header, profiles: Mapping[int, AnyProfile]) -> NDArray[np.uint16] | None:
    if not header.profile_id:
        return None
    profile = profiles.get(header.profile_id)
    misused = header.joined != (header.dtype in codec_planes.JOINABLE)
    if not isinstance(profile, Profile) or misused or not profile.fits(header.dtype, header.shape):
        raise FrameError(f"no fitting profile {header.profile_id:#010x} was announced")
    return profile.repeated
