"""How a plane of bytes is stored: as one repeated byte, as it is, or as a zstd frame.

zstd serves as a Huffman coder here: with a tiny hash table and long matches it finds none of the
spurious matches that make its defaults slower and larger on exponents.
"""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zstandard import (
    ZstdCompressionParameters,
    ZstdCompressor,
    ZstdDecompressor,
    ZstdError,
    frame_content_size,
)

from stages.errors import FrameError

Bytes = NDArray[np.uint8]
Buffer = bytes | bytearray | memoryview | NDArray[Any]
"""Elements as a caller may hold them."""
Part = bytes | memoryview
"""A piece of a frame, of single bytes."""

CONSTANT, PLAIN, CODED = 0, 1, 2
"""How a plane is stored: one byte for all, as it is, or a zstd frame."""
HUFFMAN, IF_SKEWED, REPEATS, NONE, DONE = "huffman", "if skewed", "repeats", "none", "done"
"""What to try on a plane: the Huffman coder, the same if a sample is worth it, matches, nothing.

DONE is a plane that comes coded already, and stays so: it is stored as it is, always.
"""

SAMPLE_BYTES = 2048
EVEN_VALUES = 180  # as random as this many equally likely bytes: coding costs more than it saves
MAX_WINDOW_BYTES = 2**17


class _Contexts(threading.local):
    """zstd's contexts, kept from frame to frame; two threads must not share them."""

    def __init__(self) -> None:
        huffman = ZstdCompressionParameters.from_level(
            1, window_log=17, hash_log=6, chain_log=6, min_match=7
        )
        repeats = ZstdCompressionParameters.from_level(1, window_log=17)
        self.huffman = ZstdCompressor(compression_params=huffman)
        self.repeats = ZstdCompressor(compression_params=repeats)
        self.decompressor = ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)


_contexts = _Contexts()


def pack(plane: Bytes, coder: str) -> tuple[int, Part]:
    """How to store a plane, and the bytes to store; `coder` says what to try."""
    data = plane.data
    if coder == DONE:
        return PLAIN, data
    if _is_constant(plane, data):
        return CONSTANT, bytes(data[:1])
    if coder == NONE or (coder == IF_SKEWED and not _is_skewed(plane)):
        return PLAIN, data
    coded = (_contexts.repeats if coder == REPEATS else _contexts.huffman).compress(data)
    return (CODED, coded) if len(coded) < len(data) else (PLAIN, data)


def unpack(mode: int, stored: memoryview, count: int) -> Bytes:
    """A plane of `count` bytes from what `pack` stored; FrameError if it is not exactly that."""
    if mode == CODED:
        return _decompress(stored, count)
    if mode == CONSTANT and len(stored) == 1:
        return np.full(count, stored[0], np.uint8)
    if mode == PLAIN and len(stored) == count:
        return np.frombuffer(stored, np.uint8)
    raise FrameError(f"a plane of {count} bytes cannot be {len(stored)} bytes in mode {mode}")


def _decompress(stored: memoryview, count: int) -> Bytes:
    try:
        # The size that a zstd frame names is allocated, whatever max_output_size says.
        named = frame_content_size(stored)
        if named != count:
            raise FrameError(f"a coded plane names {named} bytes where {count} belong")
        plane = _contexts.decompressor.decompress(
            stored, max_output_size=count, allow_extra_data=False
        )
    except ZstdError as error:
        raise FrameError(f"a coded plane of {count} bytes does not decode: {error}") from error
    if len(plane) != count:
        raise FrameError(f"a coded plane holds {len(plane)} bytes where {count} belong")
    return np.frombuffer(plane, np.uint8)


def _is_constant(plane: Bytes, data: memoryview) -> bool:
    first, middle = data[0], len(data) // 2
    looks_so = first == data[-1] == data[middle] == data[middle // 2]
    return looks_so and bool((plane == first).all())


def _is_skewed(plane: Bytes) -> bool:
    """Whether two bytes of a sample are equal more often than among EVEN_VALUES likely ones."""
    counts = np.bincount(plane[:: plane.size // SAMPLE_BYTES | 1], minlength=256)
    sampled = int(counts.sum())
    equal_pairs = int(counts @ counts) - sampled
    return equal_pairs * EVEN_VALUES > sampled * (sampled - 1)
