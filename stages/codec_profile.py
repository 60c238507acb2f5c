"""What a boundary's first rows teach about its channels: one base each, to take from plane 0.

A channel's exponents lie close together, but about another value in each channel; less its base,
they all lie about zero and one Huffman table serves them better. (Plane 0 ends in mantissa bits, so
a base is in halves or eighths of an octave, which fits better still.) A profile is sent once for a
connection and used only after it was acknowledged.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from xxhash import xxh3_64_intdigest

from stages.codec_coder import Buffer, Bytes
from stages.codec_planes import CHUNK, JOINABLE, Words, split
from stages.errors import FrameError

SMALLEST_ROWS = 64  # fewer teach a channel's noise
LEARNING_ROWS = 256  # what to wait for: with 64, a profile gains half as much
LEARNING_ROUNDS = 6
REPEATED_CHANNELS = 8192
REACH = 8  # how far beyond the medians a base may lie

_DTYPES = ("float32", "bfloat16", "float16")
_START = struct.Struct("<2sBB")


@dataclass(frozen=True)
class Profile:
    """The bases of a boundary's channels, one byte each."""

    dtype: str
    bases: bytes

    @classmethod
    def learned(cls, buffer: Buffer, dtype: str, shape: Sequence[int]) -> "Profile":
        """The profile of a boundary's first rows, of shape (..., channels).

        ValueError where there are fewer than 64 rows, more channels than 2**17, a dtype
        without exponents, or (not for float16) a zero among the numbers.
        """
        channels = shape[-1] if shape else 0
        rows = np.ascontiguousarray(buffer).reshape(-1).view(np.uint8)
        least = SMALLEST_ROWS * channels * (4 if dtype == "float32" else 2)
        if dtype not in _DTYPES or not 0 < channels <= CHUNK or rows.size < least:
            raise ValueError(f"{dtype} of shape {tuple(shape)} is too little to learn from")
        split_up = split(rows, dtype, None)
        if split_up.joined != (dtype in JOINABLE):
            raise ValueError("numbers lie too far apart to learn from")
        return cls(dtype, _aligned(split_up.planes[0].reshape(-1, channels)).tobytes())

    @cached_property
    def id(self) -> int:
        """32 bits that name these bases, never 0."""
        return xxh3_64_intdigest(self.tobytes()) & 0xFFFFFFFF or 1

    def tobytes(self) -> bytes:
        """What to send, once."""
        return _START.pack(b"WP", 1, _DTYPES.index(self.dtype)) + self.bases

    @classmethod
    def parsed(cls, announced: bytes, max_channels: int) -> "Profile":
        """The inverse of `tobytes`; FrameError for anything else."""
        most = min(max_channels, CHUNK)
        if not 0 < len(announced) - _START.size <= most:
            raise FrameError(f"{len(announced)} bytes are no profile of 1 to {most} channels")
        magic, version, dtype = _START.unpack_from(announced)
        if magic != b"WP" or version != 1 or dtype >= len(_DTYPES):
            raise FrameError(f"not a profile of version 1: starts with {announced[:4]!r}")
        return cls(_DTYPES[dtype], announced[_START.size :])

    def fits(self, dtype: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of that dtype and shape has these channels."""
        return dtype == self.dtype and len(shape) > 0 and shape[-1] == len(self.bases)

    @cached_property
    def repeated(self) -> Words:
        """The bases over and over, as `codec_planes` takes them: numpy is slow on short rows."""
        times = max(1, REPEATED_CHANNELS // len(self.bases))
        return np.tile(np.frombuffer(self.bases, np.uint8).astype(np.uint16), times)


def _aligned(exponents: Bytes) -> Bytes:
    """The base of each channel (rows, channels) at which one table of all fits them best.

    Expectation and maximization: from the medians, the table of all channels less their bases,
    then for each channel the base near its own at which that table codes it shortest.
    """
    channels = exponents.shape[1]
    symbols = exponents.astype(np.int64) + 256 * np.arange(channels)
    counts = np.bincount(symbols.reshape(-1), minlength=256 * channels).reshape(channels, 256)
    bases = np.median(exponents, axis=0).astype(np.int64)
    for _ in range(LEARNING_ROUNDS):
        centred = (np.arange(256) - bases[:, None]) % 256
        together = np.bincount(centred.reshape(-1), counts.reshape(-1), minlength=256)
        bits = -np.log2((together + 0.5) / (together.sum() + 128))
        candidates = np.arange(bases.min() - REACH, bases.max() + REACH + 1)
        cost = counts @ bits[(np.arange(256)[:, None] - candidates) % 256]
        bases = candidates[np.argmin(cost, axis=1)]
    aligned: Bytes = np.clip(bases, 0, 255).astype(np.uint8)
    return aligned
