"""Elements to byte planes and back, and each plane's small coder; knows no frames and no floats.

An element's bits are rearranged to exponent | sign and mantissa, so that plane 0 holds the part
that compresses (an exponent carries about 2.7 of its 8 bits) and the others hold near noise:

    bfloat16  eeeeeeee | mmmmmmms          float16  eeeeemmm | mmmmmmms
    float32   eeeeeeee | smmmmmmm | mmmmmmmm | mmmmmmmm       opaque    one plane, as it is

So the zero tail of upcast bfloat16 stays whole, in planes that are constant.

A plane is stored as one repeated byte, as it is, or as a zstd frame. zstd serves as a Huffman coder
here: with a tiny hash table and long matches it finds none of the spurious matches that make its
defaults slower and larger on exponents.
"""

import threading
from collections.abc import Sequence
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

CHUNK_BYTES = 2**17  # scratch of this size stays in a core's second-level cache
SAMPLE_BYTES = 4096
WORTH_CODING_BITS = 7.6  # of 8 a byte; above, coding a plane costs more time than it saves
MAX_WINDOW_BYTES = 2**17


class _Scratch(threading.local):
    """What a thread reuses from frame to frame; zstd's contexts must not be shared by two."""

    def __init__(self) -> None:
        huffman = ZstdCompressionParameters.from_level(
            1, window_log=17, hash_log=6, chain_log=6, min_match=7, write_content_size=False
        )
        general = ZstdCompressionParameters.from_level(1, window_log=17, write_content_size=False)
        self.huffman = ZstdCompressor(compression_params=huffman)
        self.general = ZstdCompressor(compression_params=general)
        self.decompressor = ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self.first = np.empty(CHUNK_BYTES, np.uint8)
        self.second = np.empty(CHUNK_BYTES, np.uint8)


_scratch = _Scratch()


def split(elements: Bytes, itemsize: int) -> list[Bytes]:
    """The byte planes of the elements, given as raw bytes; each plane its own array."""
    if itemsize == 1:
        return [elements]
    count = elements.size // itemsize
    planes = [np.empty(count, np.uint8) for _ in range(itemsize)]
    if itemsize == 2:
        _split_16(elements.view(np.uint16), planes[0], planes[1])
    else:
        _split_32(elements.view(np.uint32), planes)
    return planes


def merge(planes: Sequence[Bytes], itemsize: int) -> Bytes:
    """The inverse of `split`: the elements' raw bytes, in an array of their own."""
    if itemsize == 1:
        return planes[0].copy()
    elements = np.empty(planes[0].size * itemsize, np.uint8)
    if itemsize == 2:
        _merge_16(planes[0], planes[1], elements.view(np.uint16))
    else:
        _merge_32(planes, elements.view(np.uint32))
    return elements


def pack(plane: Bytes, *, leading: bool, general: bool) -> tuple[int, Part]:
    """How to store a plane, and the bytes to store.

    The leading plane is always tried; another one only if a sample of it looks worth the time.
    `general` lets zstd look for repeats, for bytes that are no exponents.
    """
    if _is_constant(plane):
        return CONSTANT, plane[:1].tobytes()
    if not leading and _sampled_bits(plane) > WORTH_CODING_BITS:
        return PLAIN, plane.data
    coded = (_scratch.general if general else _scratch.huffman).compress(plane.data)
    return (CODED, coded) if len(coded) < plane.size else (PLAIN, plane.data)


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
        # A frame that names its size would be believed before max_output_size; ours never does.
        if frame_content_size(stored) != -1:
            raise FrameError("a coded plane names its own size, which none of ours does")
        plane = _scratch.decompressor.decompress(
            stored, max_output_size=count, allow_extra_data=False
        )
    except ZstdError as error:
        raise FrameError(f"a coded plane of {count} bytes does not decode: {error}") from error
    if len(plane) != count:
        raise FrameError(f"a coded plane holds {len(plane)} bytes where {count} belong")
    return np.frombuffer(plane, np.uint8)


def _is_constant(plane: Bytes) -> bool:
    first = plane[0]
    looks_so = bool(first == plane[-1] == plane[plane.size // 2] == plane[plane.size // 3])
    return looks_so and bool((plane == first).all())


def _sampled_bits(plane: Bytes) -> float:
    """Entropy in bits a byte of evenly spaced bytes of the plane."""
    counts = np.bincount(plane[:: max(1, plane.size // SAMPLE_BYTES)], minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _split_16(x: NDArray[np.uint16], high: Bytes, low: Bytes) -> None:
    np.right_shift(x, 7, out=high, casting="unsafe")
    for start in range(0, x.size, CHUNK_BYTES // 2):
        chunk = x[start : start + CHUNK_BYTES // 2]
        mantissa = _scratch.first[: chunk.nbytes].view(np.uint16)
        sign = _scratch.second[: chunk.nbytes].view(np.uint16)
        np.left_shift(chunk, 1, out=mantissa)
        np.right_shift(chunk, 15, out=sign)
        np.bitwise_or(mantissa, sign, out=low[start : start + chunk.size], casting="unsafe")


def _merge_16(high: Bytes, low: Bytes, x: NDArray[np.uint16]) -> None:
    for start in range(0, x.size, CHUNK_BYTES // 2):
        out = x[start : start + CHUNK_BYTES // 2]
        here = slice(start, start + out.size)
        exponent = _scratch.first[: out.nbytes].view(np.uint16)
        mantissa = _scratch.second[: out.nbytes].view(np.uint16)
        np.copyto(exponent, high[here])
        np.copyto(mantissa, low[here])
        np.left_shift(exponent, 7, out=exponent)
        np.left_shift(mantissa, 15, out=out)
        np.right_shift(mantissa, 1, out=mantissa)
        np.bitwise_or(out, exponent, out=out)
        np.bitwise_or(out, mantissa, out=out)


def _split_32(x: NDArray[np.uint32], planes: Sequence[Bytes]) -> None:
    low: NDArray[Any] = x.view(np.uint8)
    np.right_shift(x, 23, out=planes[0], casting="unsafe")
    np.copyto(planes[2], low[1::4])
    np.copyto(planes[3], low[0::4])
    for start in range(0, x.size, CHUNK_BYTES // 4):
        chunk = x[start : start + CHUNK_BYTES // 4]
        mantissa = _scratch.first[: chunk.nbytes].view(np.uint32)
        sign = _scratch.second[: chunk.nbytes].view(np.uint32)
        np.right_shift(chunk, 16, out=mantissa)
        np.bitwise_and(mantissa, 0x7F, out=mantissa)
        np.right_shift(chunk, 31, out=sign)
        np.left_shift(sign, 7, out=sign)
        np.bitwise_or(mantissa, sign, out=planes[1][start : start + chunk.size], casting="unsafe")


def _merge_32(planes: Sequence[Bytes], x: NDArray[np.uint32]) -> None:
    for start in range(0, x.size, CHUNK_BYTES // 4):
        out = x[start : start + CHUNK_BYTES // 4]
        here = slice(start, start + out.size)
        widened = _scratch.first[: out.nbytes].view(np.uint32)
        np.copyto(out, planes[0][here])
        np.left_shift(out, 23, out=out)
        np.copyto(widened, planes[1][here])
        for left in (24, 16):  # the sign goes to the top, then the mantissa's first seven bits down
            moved = _scratch.second[: out.nbytes].view(np.uint32)
            np.left_shift(widened, left, out=moved)
            np.bitwise_and(moved, 0x80000000 if left == 24 else 0x007F0000, out=moved)
            np.bitwise_or(out, moved, out=out)
        np.copyto(widened, planes[2][here])
        np.left_shift(widened, 8, out=widened)
        np.bitwise_or(out, widened, out=out)
        np.bitwise_or(out, planes[3][here], out=out)
