"""The dense level's inner loops, compiled by numba when this module is first imported on a machine.

Compiled code does not check where it reads: whoever calls these functions has checked every array
against every other, and what a stream of bytes alone decides is checked here, before it is used.

Rows are coded 32 at a time: the first block of pivots of each, the second of each, and so on.

Numbers are integers throughout. Where they travel as float32 they stay below 2**24, so that sums are
exact and alike on every machine, in whatever order it adds.
"""

from typing import Any, Final

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

from stages.codec_dense_profile import (
    BELOW,
    BLOCK,
    CONTEXTS,
    ESCAPE,
    FIXED_LIMIT,
    SCALE_BITS,
    SLOTS,
    SYMBOLS,
    Elements,
    Model,
)

LANES: Final = 4  # streams that take turns, so that none waits for another's arithmetic
LEAST_STATE: Final = 1 << 16
TOGETHER: Final = 32  # rows that go through the channels side by side: weights stay in cache
SMALLEST_CLASS: Final = 2 * 127 + 13  # 2 ** 6.5 in the top bits of a float32

TORN, LEFT_OVER, NO_NUMBER = 1, 2, 3
"""What `decode` may find wrong: bytes are missing, bytes are over, a magnitude that no element has."""

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]
States = NDArray[np.uint32]


def _read(kind: Any, dimensions: int = 1) -> Any:
    return types.Array(kind, dimensions, "C", readonly=True)


def _write(kind: Any, dimensions: int = 1) -> Any:
    return types.Array(kind, dimensions, "C")


_MODEL = types.NamedTuple(
    (
        types.intp, types.intp,
        _write(types.int32), _write(types.int32), _write(types.float32, 2), _write(types.float32),
        _write(types.uint16), _write(types.uint16), _write(types.uint8),
    ),
    Model,
)  # fmt: skip
"""Its arrays are read, but in a tuple their types must be those of writable ones."""


@njit(inline="always")
def _fixed(element: Any, centre: Any, mantissa_bits: int) -> Any:
    """An element as a fixed-point number, by its channel's centre; no larger than the limit."""
    magnitude = element & 0x7FFF
    up = (magnitude >> mantissa_bits) - (centre >> 1)
    if up >= 6:
        value = FIXED_LIMIT
    elif up < -7:
        value = 0
    else:
        digits = 128 | (magnitude >> (mantissa_bits - 7)) & 127
        value = (digits << (up + 7)) >> 10
    return -value if element & 0x8000 else value


@njit(inline="always")
def _block_ends(first: int, model: Any, channels: int) -> Any:
    """Where, in coding order, the block ends that begins there: pivots', then all the others."""
    return first + BLOCK if first < model.pivots else channels


@njit(inline="always")
def _forecast(x: Any, row: int, first: int, end: int, model: Any, expected: Any) -> None:
    """Add to what is expected of the channels after a block of pivots what the block makes of them."""
    for i in range(first, end, 4):
        a, b = _value(x, row, i, model), _value(x, row, i + 1, model)
        c, d = _value(x, row, i + 2, model), _value(x, row, i + 3, model)
        of_a, of_b = model.weights[i, end:], model.weights[i + 1, end:]
        of_c, of_d = model.weights[i + 2, end:], model.weights[i + 3, end:]
        for j in range(expected.size):  # from 0 on, which lets the compiler use vectors
            expected[j] += (a * of_a[j] + b * of_b[j]) + (c * of_c[j] + d * of_d[j])


@njit(inline="always")
def _value(x: Any, row: int, i: int, model: Any) -> Any:
    channel = model.order[i]
    element = np.int64(x[row, channel])
    return np.float32(_fixed(element, model.centres[channel], model.mantissa_bits))


@njit(inline="always")
def _context(forecast_bits: Any) -> Any:
    """The class of a forecast, given as the bits of a float32."""
    size = ((forecast_bits & 0x7FFFFFFF) >> 22) - SMALLEST_CLASS
    return min(max(size, 0), CONTEXTS - 1)


@njit(
    types.void(_read(types.uint16, 2), _read(types.int32), types.intp, _write(types.int16, 2)),
    nogil=True,
    cache=True,
)
def fixed(x: Elements, centres: Any, mantissa_bits: int, out: Any) -> None:
    """Every element (rows, channels) as a fixed-point number."""
    for row in range(x.shape[0]):
        for channel in range(x.shape[1]):
            out[row, channel] = _fixed(np.int64(x[row, channel]), centres[channel], mantissa_bits)


@njit(
    types.intp(_read(types.uint16, 2), _MODEL, _write(types.uint8), _write(types.uint8),
               _write(types.uint16), _write(types.uint8)),
    nogil=True,
    cache=True,
)  # fmt: skip
def describe(
    x: Elements, model: Model, symbols: Bytes, contexts: Bytes, escapes: Words, low: Bytes
) -> Any:
    """
    What is to be coded of each element, in the order of coding; how many escapes there are.

    `symbols` and `contexts` get one entry an element, `escapes` the magnitudes that have no count in
    their context, `low` the bits that are not coded, one after the other.
    """
    rows, channels = x.shape
    low_bits = model.mantissa_bits - 1
    expected = np.empty((TOGETHER, channels), np.float32)
    expected_bits = expected.view(np.int32)
    at = escaped = written = held_bits = 0
    held = np.int64(0)
    for top in range(0, rows, TOGETHER):
        bottom = min(top + TOGETHER, rows)
        expected[:] = model.biases
        first = 0
        while first < channels:
            end = _block_ends(first, model, channels)
            for row in range(top, bottom):
                for i in range(first, end):
                    channel = model.order[i]
                    bits = expected_bits[row - top, i]
                    context = _context(bits)
                    element = np.int64(x[row, channel])
                    sign = (element >> 15) ^ (1 if bits < 0 else 0)
                    magnitude = (element & 0x7FFF) >> low_bits
                    step = magnitude - model.centres[channel] + BELOW
                    fits = 0 <= step < ESCAPE
                    if not fits or model.counts[context * SYMBOLS + 2 * step + sign] == 0:
                        step = np.int64(ESCAPE)
                        escapes[escaped] = magnitude
                        escaped += 1
                    symbols[at], contexts[at] = 2 * step + sign, context
                    at += 1
                    held |= (element & ((1 << low_bits) - 1)) << held_bits
                    held_bits += low_bits
                    while held_bits >= 8:
                        low[written] = held & 255
                        written += 1
                        held >>= 8
                        held_bits -= 8
                if end < channels:
                    _forecast(x, row, first, end, model, expected[row - top, end:])
            first = end
    if held_bits:
        low[written] = held
    return escaped


@njit(
    types.intp(_read(types.uint8), _read(types.uint8), _MODEL, _write(types.uint32),
               _write(types.uint16)),
    nogil=True,
    cache=True,
)  # fmt: skip
def encode(symbols: Bytes, contexts: Bytes, model: Model, states: States, words: Words) -> Any:
    """
    Code the symbols by rANS, the last one first; where in `words` the result begins.

    Counts of each context sum to SLOTS, and no symbol comes whose count is 0. `states` gets what the
    decoder begins with. Asymmetric numeral systems: Duda, 2013.
    """
    for lane in range(LANES):
        states[lane] = LEAST_STATE
    at = words.size
    for i in range(symbols.size - 1, -1, -1):
        entry = np.int64(contexts[i]) * SYMBOLS + symbols[i]
        count = np.uint64(model.counts[entry])
        state = np.uint64(states[i % LANES])
        if state >= count << np.uint64(32 - SCALE_BITS):
            at -= 1
            words[at] = state & np.uint64(0xFFFF)
            state >>= np.uint64(16)
        whole = state // count
        rest = state - whole * count + np.uint64(model.starts[entry])
        states[i % LANES] = (whole << np.uint64(SCALE_BITS)) + rest
    return at


@njit(
    types.intp(_read(types.uint16), _write(types.uint32), _read(types.uint16), _read(types.uint8),
               _MODEL, _write(types.uint16, 2)),
    nogil=True,
    cache=True,
)  # fmt: skip
def decode(
    words: Words, states: States, escapes: Words, low: Bytes, model: Model, x: Elements
) -> Any:
    """
    The inverse of `describe` and `encode`, into `x` (rows, channels); 0, or what is wrong.

    `low` has exactly as many bytes as the elements' low bits fill; `states` is used up.
    """
    rows, channels = x.shape
    low_bits = model.mantissa_bits - 1
    expected = np.empty((TOGETHER, channels), np.float32)
    expected_bits = expected.view(np.int32)
    word = escaped = taken = held_bits = lane = 0
    held = np.int64(0)
    for top in range(0, rows, TOGETHER):
        bottom = min(top + TOGETHER, rows)
        expected[:] = model.biases
        first = 0
        while first < channels:
            end = _block_ends(first, model, channels)
            for row in range(top, bottom):
                for i in range(first, end):
                    bits = expected_bits[row - top, i]
                    context = _context(bits)
                    state = np.int64(states[lane])
                    slot = state & (SLOTS - 1)
                    symbol = np.int64(model.slots[context * SLOTS + slot])
                    entry = context * SYMBOLS + symbol
                    rest = slot - model.starts[entry]
                    state = model.counts[entry] * (state >> SCALE_BITS) + rest
                    if state < LEAST_STATE:
                        if word == words.size:
                            return TORN
                        state, word = state << 16 | words[word], word + 1
                    states[lane] = state
                    lane = (lane + 1) % LANES
                    channel = model.order[i]
                    magnitude = np.int64(model.centres[channel]) + (symbol >> 1) - BELOW
                    if symbol >> 1 == ESCAPE:
                        if escaped == escapes.size:
                            return TORN
                        magnitude = np.int64(escapes[escaped])
                        escaped += 1
                    if magnitude < 0 or magnitude > 0x7FFF >> low_bits:
                        return NO_NUMBER
                    while held_bits < low_bits:
                        held |= np.int64(low[taken]) << held_bits
                        taken += 1
                        held_bits += 8
                    sign = (symbol & 1) ^ (1 if bits < 0 else 0)
                    below = held & ((1 << low_bits) - 1)
                    x[row, channel] = sign << 15 | magnitude << low_bits | below
                    held >>= low_bits
                    held_bits -= low_bits
                if end < channels:
                    _forecast(x, row, first, end, model, expected[row - top, end:])
            first = end
    whole = word == words.size and escaped == escapes.size
    return 0 if whole and (states == LEAST_STATE).all() else LEFT_OVER
