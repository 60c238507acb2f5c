"""Elements to byte planes and back, and each plane's small coder; knows no frames and no floats.

An element's bits are rearranged so that plane 0 holds the part that compresses (an exponent carries
about 2.7 of its 8 bits) and the others hold near noise:

    bfloat16  eeeeeeee | mmmmmmms          float32  eeeeeeee | mmmmmmms | the low 16 bits
    float16   eeeeemmm | mmmmmmms          opaque   one plane, as it is

So float32 that was bfloat16 keeps its zero tail whole, and it costs one byte a frame.
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

HUFFMAN, IF_SKEWED, REPEATS, NONE = "huffman", "if skewed", "repeats", "none"
"""What to try on a plane: the Huffman coder, the same if a sample is worth it, matches, nothing."""

CHUNK = 2**17  # elements at a time: scratch stays in a core's cache, numpy's own cost is small
SAMPLE_BYTES = 4096
WORTH_CODING_BITS = 7.6  # of 8 a byte; above, coding a plane costs more time than it saves
MAX_WINDOW_BYTES = 2**17


class _Scratch(threading.local):
    """What a thread reuses from frame to frame; zstd's contexts must not be shared by two."""

    def __init__(self) -> None:
        huffman = ZstdCompressionParameters.from_level(
            1, window_log=17, hash_log=6, chain_log=6, min_match=7, write_content_size=False
        )
        repeats = ZstdCompressionParameters.from_level(1, window_log=17, write_content_size=False)
        self.huffman = ZstdCompressor(compression_params=huffman)
        self.repeats = ZstdCompressor(compression_params=repeats)
        self.decompressor = ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        self.exponents = np.empty(CHUNK, np.uint16)
        self.mantissas = np.empty(CHUNK, np.uint16)
        self.tops = np.empty(CHUNK, np.uint16)
        self.negative = np.empty(CHUNK, np.bool_)


_scratch = _Scratch()


def widths(itemsize: int) -> tuple[int, ...]:
    """Bytes an element in each plane of a dtype of that size."""
    return {1: (1,), 2: (1, 1), 4: (1, 1, 2)}[itemsize]


def split(elements: Bytes, itemsize: int) -> list[Bytes]:
    """The byte planes of the elements, given as raw bytes; all but opaque's are new arrays."""
    if itemsize == 1:
        return [elements]
    count = elements.size // itemsize
    split_up = [np.empty(count * width, np.uint8) for width in widths(itemsize)]
    for start in range(0, count, CHUNK):
        here = slice(start, min(count, start + CHUNK))
        if itemsize == 2:
            top = elements.view(np.uint16)[here]
        else:
            top = _halved(elements.view(np.uint32)[here], split_up[2].view(np.uint16)[here])
        _split_16(top, split_up[0][here], split_up[1][here])
    return split_up


def merge(split_up: Sequence[Bytes], itemsize: int) -> Bytes:
    """The inverse of `split`: the elements' raw bytes, in an array of their own."""
    if itemsize == 1:
        return split_up[0].copy()
    count = split_up[0].size
    elements = np.empty(count * itemsize, np.uint8)
    for start in range(0, count, CHUNK):
        here = slice(start, min(count, start + CHUNK))
        out = elements.view(f"u{itemsize}")[here]
        top = out if itemsize == 2 else _scratch.tops[: out.size]
        _merge_16(split_up[0][here], split_up[1][here], top)
        if itemsize == 4:
            np.copyto(out, top)
            np.left_shift(out, 16, out=out)
            np.bitwise_or(out, split_up[2].view(np.uint16)[here], out=out)
    return elements


def pack(plane: Bytes, coder: str) -> tuple[int, Part]:
    """How to store a plane, and the bytes to store; `coder` says what to try."""
    data = plane.data
    if _is_constant(plane, data):
        return CONSTANT, bytes(data[:1])
    if coder == NONE or (coder == IF_SKEWED and _sampled_bits(plane) > WORTH_CODING_BITS):
        return PLAIN, data
    coded = (_scratch.repeats if coder == REPEATS else _scratch.huffman).compress(data)
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


def _is_constant(plane: Bytes, data: memoryview) -> bool:
    first, middle = data[0], len(data) // 2
    looks_so = first == data[-1] == data[middle] == data[middle // 2]
    return looks_so and bool((plane == first).all())


def _sampled_bits(plane: Bytes) -> float:
    """Entropy in bits a byte of evenly spaced bytes of the plane."""
    counts = np.bincount(plane[:: plane.size // SAMPLE_BYTES | 1], minlength=256)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _halved(x: NDArray[np.uint32], low: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """The low 16 bits to `low`; returns the high ones, in scratch."""
    top = _scratch.tops[: x.size]
    np.right_shift(x, 16, out=top, casting="unsafe")
    np.copyto(low, x, casting="unsafe")
    return top


def _split_16(x: NDArray[np.uint16], high: Bytes, low: Bytes) -> None:
    exponents = _scratch.exponents[: x.size]
    negative = _scratch.negative[: x.size]
    np.right_shift(x, 7, out=exponents)
    np.copyto(high, exponents, casting="unsafe")
    np.less(x.view(np.int16), 0, out=negative)
    np.copyto(low, x, casting="unsafe")
    np.add(low, low, out=low)  # the exponent's last bit falls off the top, the sign comes in below
    np.add(low, negative.view(np.uint8), out=low)


def _merge_16(high: Bytes, low: Bytes, x: NDArray[np.uint16]) -> None:
    exponents = _scratch.exponents[: x.size]
    mantissas = _scratch.mantissas[: x.size]
    np.copyto(exponents, high)
    np.multiply(exponents, 128, out=exponents)
    np.copyto(mantissas, low)
    np.multiply(mantissas, 32768, out=x)  # the sign; a product is numpy's fastest left shift
    np.add(x, exponents, out=x)
    np.right_shift(mantissas, 1, out=mantissas)
    np.add(x, mantissas, out=x)
