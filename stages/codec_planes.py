"""Elements to byte planes and back; knows bits, but no frames, no coders and no floats.

An element's bits are rearranged so that plane 0 holds the part that compresses (an exponent carries
about 2.7 of its 8 bits) and the others hold near noise:

    JOINED   bfloat16  eeeeeeem | smmmmmm, seven bits packed      float32  as bfloat16 | low 16 bits
    APART    bfloat16  eeeeeeee | mmmmmmms                        float32  as bfloat16 | low 16 bits
             float16   eeeeemmm | mmmmmmms                        opaque   one plane, as it is

JOINED is for tensors whose numbers all lie within 64 powers of two about a channel's usual size,
which is all but those with zeros in them: the exponent's seven low bits then take the mantissa's
first one along, which is not quite noise, and a Huffman code fits those smaller steps better.

Plane 0 is less the channel's base, which a profile may know. JOINED: the exponent and the mantissa's
first bit, as a number of nine bits, less the base, is at most 255. APART: modulo 256.
Float32 that was bfloat16 keeps its zero tail whole, and it costs one byte a frame.
"""

import threading
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from stages.codec_coder import Bytes

CHUNK: Final = 2**17  # elements at a time: scratch stays in cache, numpy's own cost is small
JOINABLE: Final = ("bfloat16", "float32")

Words = NDArray[np.uint16]
Elements = NDArray[np.unsignedinteger[Any]]

SAME_BASE: Final[Words] = np.array([128], np.uint16)
"""One base for all channels; JOINED, numbers from 2**-63 to 2**65 then have symbols."""
NO_BASE: Final[Words] = np.array([0], np.uint16)

# Operands as arrays: for a short frame, numpy takes longer to convert a number than to use it.
_1, _7, _9, _15 = (np.array(bits, np.uint16) for bits in (1, 7, 9, 15))
_TIMES_64, _TIMES_128, _TWICE = (np.array(n, np.uint16) for n in (64, 128, 0x0201))
_SIGN, _NO_SIGN, _REST = (np.array(mask, np.uint16) for mask in (0x8000, 0x7FFF, 0x803F))
_SEVEN, _TOP = np.array(7, np.uint8), np.array(0x80, np.uint8)
_UP: Final[Bytes] = np.array([[1], [2], [4], [8], [16], [32], [64]], np.uint8)
_TO_TOP: Final[Bytes] = 2 * _UP[::-1]


@dataclass(slots=True)
class Planes:
    """A tensor's planes, and whether the first two are JOINED."""

    planes: list[Bytes]
    joined: bool = False


class _Scratch(threading.local):
    """What a thread reuses from frame to frame."""

    def __init__(self) -> None:
        self.exponents = np.empty(CHUNK, np.uint16)
        self.mantissas = np.empty(CHUNK, np.uint16)
        self.tops = np.empty(CHUNK, np.uint16)


_scratch = _Scratch()


def sizes(dtype: str, elements: int, *, joined: bool) -> tuple[int, ...]:
    """Bytes of each plane of that many elements."""
    second = 7 * _eighth(elements) if joined else elements
    if dtype == "opaque":
        return (elements,)
    return (elements, second, 2 * elements) if dtype == "float32" else (elements, second)


def split(elements: Bytes, dtype: str, bases: Words | None) -> Planes:
    """The planes of the elements, given as raw bytes; all but opaque's are new arrays.

    `bases` holds one for each channel, over and over, at most CHUNK of them; it is not used where
    JOINED would be possible for the dtype, but is not for these numbers.
    """
    if dtype == "opaque":
        return Planes([elements])
    x: Elements = elements.view("u4" if dtype == "float32" else "u2")
    tail = [np.empty(x.size, np.uint16)] if dtype == "float32" else []
    if dtype not in JOINABLE:
        return _split_apart(x, NO_BASE if bases is None else bases)
    joined = _split_joined(x, SAME_BASE if bases is None else bases, *tail)
    split_up = joined or _split_apart(x, NO_BASE, *tail)
    split_up.planes += [words.view(np.uint8) for words in tail]
    return split_up


def merge(split_up: Planes, dtype: str, bases: Words | None) -> Bytes:
    """The inverse of `split` with the same bases: raw bytes, in an array of their own."""
    if dtype == "opaque":
        return split_up.planes[0].copy()
    first, second, *tail = split_up.planes
    seconds = _unpacked(second) if split_up.joined else (second, second[:0])
    if bases is None:
        bases = SAME_BASE if split_up.joined else NO_BASE
    x: Elements = np.empty(first.size, "u4" if tail else "u2")
    for here in _chunks(x, bases):
        out = x[here]
        top: Words = _scratch.tops[: out.size] if tail else out.view(np.uint16)
        _widened(seconds, here, top)
        merge_top = _merge_joined if split_up.joined else _merge_apart
        merge_top(first[here], bases, top)
        if tail:
            np.copyto(out, top)
            np.left_shift(out, 16, out=out)
            np.bitwise_or(out, tail[0].view(np.uint16)[here], out=out)
    return x.view(np.uint8)


def _chunks(x: Elements, bases: Words) -> list[slice]:
    """Consecutive ranges that each begin with the first base."""
    step = CHUNK // bases.size * bases.size
    return [slice(start, min(x.size, start + step)) for start in range(0, x.size, step)]


def _top(x: Elements, here: slice, *tail: Words) -> Words:
    """The elements' upper 16 bits; the rest, if there is any, goes to `tail`."""
    if not tail:
        return x[here].view(np.uint16)
    top = _scratch.tops[: x[here].size]
    np.right_shift(x[here], 16, out=top, casting="unsafe")
    np.copyto(tail[0][here], x[here], casting="unsafe")
    return top


def _split_joined(x: Elements, bases: Words, *tail: Words) -> Planes | None:
    """None where a symbol would not fit in its byte."""
    first, second = np.empty(x.size, np.uint8), np.empty(8 * _eighth(x.size), np.uint8)
    second[x.size :] = 0
    for here in _chunks(x, bases):
        top = _top(x, here, *tail)
        symbols = _scratch.exponents[: top.size]
        np.add(top, top, symbols)  # off goes the sign
        np.right_shift(symbols, _7, symbols)
        _by_channel(np.subtract, symbols, bases)
        if np.maximum.reduce(symbols) > 255:  # a difference below zero is large, too
            return None
        first[here] = symbols
        rest = _scratch.mantissas[: top.size]
        np.bitwise_and(top, _REST, rest)
        np.right_shift(rest, _9, symbols)
        np.bitwise_or(rest, symbols, rest)
        second[here] = rest
    return Planes([first, _packed(second)], joined=True)


def _merge_joined(first: Bytes, bases: Words, out: Words) -> None:
    """From the second plane's bytes in `out`, the elements there."""
    symbols = _scratch.exponents[: out.size]
    symbols[:] = first
    _by_channel(np.add, symbols, bases)
    np.multiply(symbols, _TIMES_64, symbols)  # a product is numpy's fastest left shift
    np.multiply(out, _TWICE, out)  # once for the sign at the top, once for the rest below
    np.bitwise_and(out, _REST, out)
    np.bitwise_or(out, symbols, out)


def _split_apart(x: Elements, bases: Words, *tail: Words) -> Planes:
    first, second = np.empty(x.size, np.uint8), np.empty(x.size, np.uint8)
    for here in _chunks(x, bases):
        top = _top(x, here, *tail)
        words = _scratch.exponents[: top.size]
        np.right_shift(top, _7, words)
        _by_channel(np.subtract, words, bases)
        first[here] = words
        np.right_shift(top, _15, words)
        rest = _scratch.mantissas[: top.size]
        np.add(top, top, rest)
        np.bitwise_or(rest, words, rest)
        second[here] = rest
    return Planes([first, second])


def _merge_apart(first: Bytes, bases: Words, out: Words) -> None:
    """From the second plane's bytes in `out`, the elements there."""
    words = _scratch.exponents[: out.size]
    words[:] = first
    _by_channel(np.add, words, bases)
    np.multiply(words, _TIMES_128, words)
    np.bitwise_and(words, _NO_SIGN, words)
    sign = _scratch.mantissas[: out.size]
    np.multiply(out, _SIGN, sign)
    np.bitwise_or(words, sign, words)
    np.right_shift(out, _1, out)
    np.bitwise_or(out, words, out)


def _widened(parts: tuple[Bytes, Bytes], here: slice, out: Words) -> None:
    """That range of the two parts, as if they were one."""
    border = max(0, min(parts[0].size - here.start, out.size))
    out[:border] = parts[0][here.start : here.start + border]
    start = here.start + border - parts[0].size
    if border < out.size:
        out[border:] = parts[1][start : start + out.size - border]


def _by_channel(operation: np.ufunc, symbols: Words, bases: Words) -> None:
    """The operation in place, with the bases repeated as often as needed."""
    whole = symbols.size // bases.size * bases.size
    rows = symbols[:whole].reshape(-1, bases.size)
    operation(rows, bases, rows)
    if whole < symbols.size:
        rest = symbols[whole:]
        operation(rest, bases[: rest.size], rest)


def _eighth(elements: int) -> int:
    return -(-elements // 8)


def _packed(second: Bytes) -> Bytes:
    """Bytes of seven bits: seven eighths of them, with the last eighth's bits on top of theirs."""
    blocks = second.reshape(8, -1)
    packed: Bytes = np.multiply(blocks[7], _TO_TOP)
    np.bitwise_and(packed, _TOP, packed)
    np.bitwise_or(packed, blocks[:7], packed)
    return packed.reshape(-1)


def _unpacked(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The first seven eighths of what was packed, the foreign bits still on top; the last eighth."""
    bits = packed.reshape(7, -1) >> _SEVEN
    np.multiply(bits, _UP, bits)
    return packed, np.bitwise_or.reduce(bits, axis=0)
