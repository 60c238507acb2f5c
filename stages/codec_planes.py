"""Elements to byte planes and back; knows bits, but no frames, no coders and no floats.

An element's bits are rearranged so that plane 0 holds the part that compresses (an exponent carries
about 2.7 of its 8 bits) and the others hold near noise:

    JOINED   bfloat16  eeeeeeem | mmmmmms, seven bits packed      float32  the same | its low 16 bits
    APART    bfloat16  eeeeeeee | mmmmmmms                        float32  the same | its low 16 bits
             float16   eeeeemmm | mmmmmmms                        opaque   one plane, as it is

JOINED is for tensors whose exponents all lie within 128 of each other, which is all but those with
zeros in them: seven bits of the exponent, less the lowest one, then go with the mantissa's first,
which is not quite noise. Symbols of plane 0 are smaller steps there, and a Huffman code fits better.

Float32 that was bfloat16 keeps its zero tail whole, and it costs one byte a frame.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stages.codec_coder import Bytes

CHUNK = 2**17  # elements at a time: scratch stays in a core's cache, numpy's own cost is small

JOINABLE = ("bfloat16", "float32")

Words = NDArray[np.uint16]
Elements = NDArray[np.unsignedinteger[Any]]


@dataclass(slots=True)
class Planes:
    """A tensor's planes; `lowest` is JOINED's lowest exponent, None where the planes are APART."""

    planes: list[Bytes]
    lowest: int | None = None


class _Scratch(threading.local):
    """What a thread reuses from frame to frame."""

    def __init__(self) -> None:
        self.exponents = np.empty(CHUNK, np.uint16)
        self.mantissas = np.empty(CHUNK, np.uint16)
        self.tops = np.empty(CHUNK, np.uint16)
        self.negative = np.empty(CHUNK, np.bool_)


_scratch = _Scratch()
_BLOCK_BITS = (1 << np.arange(7, dtype=np.uint8))[:, None]


def sizes(dtype: str, elements: int, *, joined: bool) -> tuple[int, ...]:
    """Bytes of each plane of that many elements."""
    second = 7 * _eighth(elements) if joined else elements
    if dtype == "opaque":
        return (elements,)
    return (elements, second, 2 * elements) if dtype == "float32" else (elements, second)


def split(elements: Bytes, dtype: str) -> Planes:
    """The planes of the elements, given as raw bytes; all but opaque's are new arrays."""
    if dtype == "opaque":
        return Planes([elements])
    x: Elements = elements.view("u4" if dtype == "float32" else "u2")
    tail = [np.empty(x.size, np.uint16)] if dtype == "float32" else []
    joined = _split_joined(x, *tail) if dtype in JOINABLE else None
    split_up = joined or _split_apart(x, *tail)
    split_up.planes += [words.view(np.uint8) for words in tail]
    return split_up


def merge(split_up: Planes, dtype: str) -> Bytes:
    """The inverse of `split`: the elements' raw bytes, in an array of their own."""
    if dtype == "opaque":
        return split_up.planes[0].copy()
    first, second, *tail = split_up.planes
    if split_up.lowest is not None:
        second = _unpacked(second, first.size)
    x: Elements = np.empty(first.size, "u4" if tail else "u2")
    for start in range(0, x.size, CHUNK):
        out = x[start : start + CHUNK]
        here = slice(start, start + out.size)
        top: Words = _scratch.tops[: out.size] if tail else out.view(np.uint16)
        _merge_top(first[here], second[here], split_up.lowest, top)
        if tail:
            np.copyto(out, top)
            np.left_shift(out, 16, out=out)
            np.bitwise_or(out, tail[0].view(np.uint16)[here], out=out)
    return x.view(np.uint8)


def _top(x: Elements, here: slice, *tail: Words) -> Words:
    """The elements' upper 16 bits; the rest, if there is any, goes to `tail`."""
    if not tail:
        return x[here].view(np.uint16)
    top = _scratch.tops[: x[here].size]
    np.right_shift(x[here], 16, out=top, casting="unsafe")
    np.copyto(tail[0][here], x[here], casting="unsafe")
    return top


def _split_apart(x: Elements, *tail: Words) -> Planes:
    first, second = np.empty(x.size, np.uint8), np.empty(x.size, np.uint8)
    for start in range(0, x.size, CHUNK):
        here = slice(start, min(x.size, start + CHUNK))
        top = _top(x, here, *tail)
        exponents = _scratch.exponents[: top.size]
        np.right_shift(top, 7, out=exponents)
        np.copyto(first[here], exponents, casting="unsafe")
        _split_rest(top, second[here])
    return Planes([first, second])


def _split_joined(x: Elements, *tail: Words) -> Planes | None:
    """None where the exponents lie too far apart."""
    first, second = np.empty(x.size, np.uint8), np.zeros(8 * _eighth(x.size), np.uint8)
    lowest, highest = 255, 0
    for start in range(0, x.size, CHUNK):
        here = slice(start, min(x.size, start + CHUNK))
        top = _top(x, here, *tail)
        exponents = _scratch.exponents[: top.size]
        np.add(top, top, out=exponents)  # off goes the sign
        lowest = min(lowest, int(exponents.min()) >> 8)
        highest = max(highest, int(exponents.max()) >> 8)
        if highest - lowest > 127:
            return None
        np.right_shift(exponents, 7, out=exponents)
        np.copyto(first[here], exponents, casting="unsafe")
        _split_rest(top, second[here])
    np.subtract(first, np.uint8(2 * lowest & 255), out=first)
    return Planes([first, _packed(second)], lowest)


def _split_rest(top: Words, second: Bytes) -> None:
    """The mantissa's seven bits, then the sign."""
    negative = _scratch.negative[: top.size]
    np.less(top.view(np.int16), 0, out=negative)
    np.copyto(second, top, casting="unsafe")
    np.add(second, second, out=second)  # the exponent's last bit falls off the top
    np.bitwise_or(second, negative.view(np.uint8), out=second)


def _merge_top(first: Bytes, second: Bytes, lowest: int | None, out: Words) -> None:
    exponents = _scratch.exponents[: out.size]
    mantissas = _scratch.mantissas[: out.size]
    np.copyto(exponents, first)
    if lowest is None:
        np.multiply(exponents, 128, out=exponents)  # a product is numpy's fastest left shift
    else:
        np.add(exponents, 2 * lowest, out=exponents)
        np.multiply(exponents, 64, out=exponents)
    np.copyto(mantissas, second)
    np.multiply(mantissas, 32768, out=out)  # the sign
    np.add(out, exponents, out=out)
    np.right_shift(mantissas, 1, out=mantissas)
    np.add(out, mantissas, out=out)


def _eighth(elements: int) -> int:
    return -(-elements // 8)


def _packed(second: Bytes) -> Bytes:
    """The low seven bits of each byte: seven eighths as they are, the last one in their top bits."""
    blocks = second.reshape(8, -1)
    packed: Bytes = np.multiply(blocks[7], 128 // _BLOCK_BITS)
    np.bitwise_and(packed, 0x80, out=packed)
    np.bitwise_and(blocks, 0x7F, out=blocks)
    np.bitwise_or(packed, blocks[:7], out=packed)
    return packed.reshape(-1)


def _unpacked(packed: Bytes, elements: int) -> Bytes:
    """The inverse of `_packed`, for that many bytes of seven bits."""
    stored = packed.reshape(7, -1)
    blocks = np.empty((8, stored.shape[1]), np.uint8)
    np.right_shift(stored, 7, out=blocks[:7])
    np.multiply(blocks[:7], _BLOCK_BITS, out=blocks[:7])
    np.bitwise_or.reduce(blocks[:7], axis=0, out=blocks[7])
    np.bitwise_and(stored, 0x7F, out=blocks[:7])
    return blocks.reshape(-1)[:elements]
