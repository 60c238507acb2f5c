"""What the dense level knows of a boundary: how its channels depend on a few of them, and how far.

A hidden state has fewer degrees of freedom than channels. Of each row some channels, the pivots, come
first, sixteen at a time; from those that came before, a linear forecast says about what a channel will
be, and so in which table of counts its sign and magnitude are coded short. Magnitudes are in steps of
half an octave: an element's exponent and its mantissa's first bit.

All of it is learned by the sender, once, off its data path, and sent as any profile is:

    "WD" | version u8 | dtype u8 | channels u32 | pivots u32 | mode u8 | body, as a plane is stored

    body: pivots' channels u32, each | channels' centres u16, each | biases i32, each
          counts u16, of each context and symbol | weights i8 (pivots, channels)
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from stages import codec_coder
from stages.errors import FrameError

SYMBOLS: Final = 128  # of a table: 64 steps of magnitude times two signs
CONTEXTS: Final = 14  # classes of a forecast's size, in steps of half an octave
ESCAPE: Final = 63  # the step that says: the magnitude stands elsewhere
BELOW: Final = 48  # steps that a magnitude may lie below its channel's centre
SCALE_BITS: Final = 12
SLOTS: Final = 1 << SCALE_BITS
FIXED_LIMIT: Final = 511  # of an element as a fixed-point number, 16 to 32 at its channel's centre
MAX_WEIGHT: Final = 127
WEIGHT_ONE: Final = 64  # a weight of 1; a forecast is in as many parts of a fixed-point number

BLOCK: Final = 16  # pivots that come at a time
MAX_PIVOTS: Final = 256
MAX_WEIGHTS: Final = 2**18  # of one profile: what it may cost to send
MAX_BIAS: Final = 2**17  # with all weights and pivots at their limits, sums stay below 2**24

MANTISSA_BITS: Final = {"float32": 7, "bfloat16": 7, "float16": 10}
"""Of an element's upper 16 bits."""
_DTYPES: Final = tuple(MANTISSA_BITS)
_START: Final = struct.Struct("<2sBBIIB")
_MAGIC: Final = b"WD"

Elements = NDArray[np.uint16]
Counts = NDArray[np.uint16]


class Model(NamedTuple):
    """A dense profile as compiled code takes it."""

    mantissa_bits: int
    """Of an element's upper 16 bits."""
    pivots: int
    centres: NDArray[np.int32]
    """Of each channel."""
    order: NDArray[np.int32]
    """The channels as they are coded: the pivots, then the others."""
    weights: NDArray[np.float32]
    """(pivots, channels in that order)."""
    biases: NDArray[np.float32]
    """Of each channel in that order."""
    counts: Counts
    """Of each context's symbols; a context's sum is SLOTS."""
    starts: Counts
    """The first slot of each context's symbols."""
    slots: NDArray[np.uint8]
    """The symbol of each context's slots."""


@dataclass(frozen=True)
class DenseProfile:
    """How a boundary's channels hang together."""

    dtype: str
    pivots: NDArray[np.uint32]
    """Channels that each row begins with, in that order."""
    centres: NDArray[np.uint16]
    """Of each channel, the usual magnitude."""
    biases: NDArray[np.int32]
    """Of each channel, pivots first, what a forecast begins with."""
    counts: Counts
    """(contexts, symbols): how many of the SLOTS each symbol has."""
    weights: NDArray[np.int8]
    """(pivots, channels in coding order): what a pivot adds to the forecasts after its block."""

    @cached_property
    def id(self) -> int:
        """32 bits that name this profile, never 0."""
        return xxh3_64_intdigest(self.dtype.encode() + self._body) & 0xFFFFFFFF or 1

    @property
    def channels(self) -> int:
        """How many numbers a row has."""
        return len(self.centres)

    def fits(self, dtype: str, shape: Sequence[int]) -> bool:
        """Whether a tensor of that dtype and shape has these channels."""
        return dtype == self.dtype and len(shape) > 0 and shape[-1] == self.channels

    @cached_property
    def model(self) -> Model:
        """All of it as compiled code takes it."""
        others = np.setdiff1d(np.arange(self.channels), self.pivots)
        starts = np.cumsum(self.counts, axis=1) - self.counts
        symbols = np.tile(np.arange(SYMBOLS, dtype=np.uint8), CONTEXTS)
        counts = self.counts.reshape(-1).copy()
        return Model(
            MANTISSA_BITS[self.dtype],
            len(self.pivots),
            self.centres.astype(np.int32),
            np.concatenate([self.pivots, others]).astype(np.int32),
            self.weights.astype(np.float32),
            self.biases.astype(np.float32),
            counts,
            starts.astype(np.uint16).reshape(-1),
            np.repeat(symbols, counts),
        )

    def tobytes(self) -> bytes:
        """What to send, once."""
        mode, stored = codec_coder.pack(np.frombuffer(self._body, np.uint8), codec_coder.HUFFMAN)
        sizes = (self.channels, len(self.pivots))
        return _START.pack(_MAGIC, 1, _DTYPES.index(self.dtype), *sizes, mode) + stored

    @cached_property
    def _body(self) -> bytes:
        arrays = (self.pivots, self.centres, self.biases, self.counts, self.weights)
        return b"".join(array.tobytes() for array in arrays)

    @classmethod
    def announced_in(cls, announced: bytes) -> bool:
        """Whether these bytes mean to be such a profile."""
        return announced[:2] == _MAGIC

    @classmethod
    def parsed(cls, announced: bytes, max_channels: int) -> "DenseProfile":
        """The inverse of `tobytes`; FrameError for anything else."""
        if len(announced) <= _START.size:
            raise FrameError(f"{len(announced)} bytes are no dense profile")
        magic, version, dtype, channels, pivots, mode = _START.unpack_from(announced)
        if magic != _MAGIC or version != 1 or dtype >= len(_DTYPES):
            raise FrameError(f"not a dense profile of version 1: starts with {announced[:4]!r}")
        fits = 0 < pivots <= min(MAX_PIVOTS, channels) and pivots % BLOCK == 0
        if not fits or channels > max_channels:
            raise FrameError(f"no dense profile has {pivots} pivots of {channels} channels")
        if pivots * channels > MAX_WEIGHTS:
            raise FrameError(f"{pivots} pivots of {channels} channels have too many weights")
        sizes = (4 * pivots, 2 * channels, 4 * channels, 2 * CONTEXTS * SYMBOLS)
        size = sum(sizes) + pivots * channels
        body = codec_coder.unpack(mode, memoryview(announced)[_START.size :], size)
        parts = np.split(body, np.cumsum(sizes))
        profile = cls(
            _DTYPES[dtype],
            *(parts[0].view("<u4"), parts[1].view("<u2"), parts[2].view("<i4")),
            parts[3].view("<u2").reshape(CONTEXTS, SYMBOLS),
            parts[4].view("i1").reshape(pivots, channels),
        )
        profile._check()
        return profile

    def _check(self) -> None:
        """Raise FrameError where coding with these arrays would make no sense."""
        if self.pivots.max() >= self.channels or len(set(self.pivots.tolist())) < len(self.pivots):
            raise FrameError("the pivots of a dense profile are no channels, or one is twice")
        largest = 0x7FFF >> MANTISSA_BITS[self.dtype] - 1
        if self.centres.max() > largest or abs(self.biases.astype(np.int64)).max() > MAX_BIAS:
            raise FrameError("a centre or a bias of a dense profile is out of bounds")
        if (self.weights < -MAX_WEIGHT).any():
            raise FrameError("a weight of a dense profile is out of bounds")
        if (self.counts.sum(axis=1, dtype=np.int64) != SLOTS).any():
            raise FrameError("the counts of a dense profile do not fill their slots")
        if (self.counts[:, 2 * ESCAPE :] == 0).any():
            raise FrameError("a dense profile has no way to escape")


def low_bytes(elements: int, dtype: str) -> int:
    """Bytes of the bits that the dense level does not code."""
    return -(-elements * (MANTISSA_BITS[dtype] - 1) // 8)


def dense_sizes(elements: int, dtype: str, coded_bytes: int) -> tuple[int, ...]:
    """Bytes of each plane of that many elements, the first of which has so many."""
    others = (low_bytes(elements, dtype), 2 * elements)
    return (coded_bytes, *others) if dtype == "float32" else (coded_bytes, others[0])
