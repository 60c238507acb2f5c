"""What a boundary's first rows teach about its channels: one exponent base each.

A channel's exponents lie close together, but about another value in each channel; less its base,
they all lie about zero and one Huffman table serves them better. A profile is sent once for a
connection and used only after it was acknowledged.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from xxhash import xxh3_64_intdigest

from stages.codec_planes import Buffer, Bytes, split
from stages.errors import FrameError

SMALLEST_ROWS = 64  # fewer teach a channel's noise

_DTYPES = ("float32", "bfloat16", "float16")
_START = struct.Struct("<2sBB")


@dataclass(frozen=True)
class Profile:
    """Exponent bases of a boundary's channels: `bases` holds one byte a channel."""

    dtype: str
    bases: bytes

    @classmethod
    def learned(cls, buffer: Buffer, dtype: str, shape: Sequence[int]) -> "Profile":
        """The profile of rows of a boundary: shape (..., channels), 64 rows or more.

        ValueError where there are fewer rows, or the dtype has no exponent.
        """
        channels = shape[-1]
        rows = np.ascontiguousarray(buffer).reshape(-1).view(np.uint8)
        if dtype not in _DTYPES or rows.size < SMALLEST_ROWS * channels:
            raise ValueError(f"{dtype} of shape {tuple(shape)} is too little to learn from")
        exponents = split(rows, 4 if dtype == "float32" else 2)[0].reshape(-1, channels)
        bases = np.median(exponents, axis=0).astype(np.uint8)
        return cls(dtype, bases.tobytes())

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
        if not _START.size < len(announced) <= _START.size + max_channels:
            raise FrameError(f"{len(announced)} bytes are no profile of 1-{max_channels} channels")
        magic, version, dtype = _START.unpack_from(announced)
        if magic != b"WP" or version != 1 or dtype >= len(_DTYPES):
            raise FrameError(f"not a profile of version 1: starts with {announced[:4]!r}")
        return cls(_DTYPES[dtype], announced[_START.size :])

    def fits(self, dtype: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of that dtype and shape has these channels."""
        return dtype == self.dtype and len(shape) > 0 and shape[-1] == len(self.bases)

    def centred(self, exponents: Bytes) -> Bytes:
        """Plane 0 less the bases, modulo 256; in place, as the plane was made for this frame."""
        rows = exponents.reshape(-1, len(self.bases))
        np.subtract(rows, self._row, out=rows)
        return exponents

    def restored(self, centred: Bytes) -> Bytes:
        """Plane 0 again."""
        return np.add(centred.reshape(-1, len(self.bases)), self._row).reshape(-1)

    @cached_property
    def _row(self) -> Bytes:
        return np.frombuffer(self.bases, np.uint8)
