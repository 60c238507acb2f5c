"""Learns a boundary's dense profile from its first rows: pivots, weights, and tables of counts.

Seconds of arithmetic for wide models, so not for the thread that sends.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from stages import codec_dense_kernel as kernel
from stages.codec_coder import Buffer
from stages.codec_dense_profile import (
    BLOCK,
    CONTEXTS,
    ESCAPE,
    MANTISSA_BITS,
    MAX_BIAS,
    MAX_PIVOTS,
    MAX_WEIGHT,
    MAX_WEIGHTS,
    SLOTS,
    SYMBOLS,
    WEIGHT_ONE,
    DenseProfile,
    Elements,
    low_bytes,
)

SMALLEST_ROWS: Final = 1024

COMPARED_CHANNELS: Final = 1024  # of a wide model, those among which pivots are sought
CENTRE_ROWS: Final = 512
RIDGE: Final = 0.02  # of each weight's variance, held against what a few rows make look related
PRIOR_COUNTS: Final = 16.0

Reals = NDArray[np.float32]


def learned(buffer: Buffer, dtype: str, shape: Sequence[int]) -> DenseProfile:
    """The profile of a boundary's first rows, of shape (..., channels).

    ValueError where there are fewer than 1024 rows, a dtype without exponents, or so few or many
    channels that forecasts would not pay.
    """
    channels = shape[-1] if shape else 0
    pivots = min(MAX_PIVOTS, channels, MAX_WEIGHTS // max(1, channels)) // BLOCK * BLOCK
    if dtype not in MANTISSA_BITS or not pivots:
        raise ValueError(f"{dtype} of {channels} channels has no use for a dense profile")
    x = upper(np.ascontiguousarray(buffer).reshape(-1).view(np.uint8), dtype)
    x = x.reshape(-1, channels)
    if len(x) < SMALLEST_ROWS:
        raise ValueError(f"{len(x)} rows are too few to learn from")
    bits = MANTISSA_BITS[dtype]
    centres = np.median((x[:CENTRE_ROWS] & 0x7FFF) >> bits - 1, axis=0).astype(np.uint16)
    values = np.empty(x.shape, np.int16)
    kernel.fixed(x, centres.astype(np.int32), bits, values)
    return _with_counts(x, _related(dtype, centres, values.astype(np.float32), pivots))


def upper(elements: NDArray[np.uint8], dtype: str) -> Elements:
    """The elements' upper 16 bits; a view where they have no others."""
    if dtype == "float32":
        return (elements.view(np.uint32) >> 16).astype(np.uint16)
    return elements.view(np.uint16)


def _related(dtype: str, centres: NDArray[np.uint16], values: Reals, count: int) -> DenseProfile:
    """Pivots and weights, by least squares with a ridge; the counts are still to be made."""
    means, deviations = values.mean(axis=0), values.std(axis=0) + 1e-3
    normal = values
    normal -= means
    normal /= deviations
    pivots = _pivots(normal, count)
    order = np.concatenate([pivots, np.setdiff1d(np.arange(len(centres)), pivots)])
    related = normal[:, pivots].T @ normal[:, order] / len(normal)
    related[:, :count] += RIDGE * np.eye(count, dtype=np.float32)
    exact = np.zeros((count, len(centres)), np.float32)
    for known in range(BLOCK, count + 1, BLOCK):
        asked = slice(known, known + BLOCK if known < count else None)
        exact[:known, asked] = np.linalg.solve(related[:known, :known], related[:known, asked])
    scaled = WEIGHT_ONE * exact * deviations[order] / deviations[pivots][:, None]
    weights = np.clip(np.rint(scaled), -MAX_WEIGHT, MAX_WEIGHT).astype(np.int8)
    biases = WEIGHT_ONE * means[order] - means[pivots] @ weights
    biases = np.clip(np.rint(biases), -MAX_BIAS, MAX_BIAS).astype(np.int32)
    every = np.full((CONTEXTS, SYMBOLS), SLOTS // SYMBOLS, np.uint16)
    return DenseProfile(dtype, pivots.astype(np.uint32), centres, biases, every, weights)


def _pivots(normal: Reals, count: int) -> NDArray[np.int64]:
    """Channels, each chosen as the one that leaves least of the others unexplained.

    That is a Cholesky decomposition of the correlations that picks its pivots greedily.
    """
    channels = normal.shape[1]
    compared = np.arange(channels)[:: -(-channels // COMPARED_CHANNELS)]
    left = normal[:, compared].T @ normal[:, compared] / len(normal)
    picked: list[int] = []
    for _ in range(count):
        gains = np.einsum("ij,ij->j", left, left) / (np.diagonal(left) + 1e-2)
        gains[picked] = -1.0
        best = int(gains.argmax())
        picked.append(best)
        left -= np.outer(left[:, best], left[best]) / (left[best, best] + 1e-3)
    return compared[picked]


def _with_counts(x: Elements, profile: DenseProfile) -> DenseProfile:
    """The profile with tables in which these rows are short."""
    symbols, contexts, _, _ = described(x, profile)
    entries = contexts.astype(np.int64) * SYMBOLS + symbols
    seen = np.bincount(entries, minlength=CONTEXTS * SYMBOLS).reshape(CONTEXTS, SYMBOLS)
    together = seen.sum(axis=0) + 1e-3
    shares = seen + PRIOR_COUNTS * together / together.sum()
    shares *= SLOTS / shares.sum(axis=1, keepdims=True)
    counts = np.rint(shares).astype(np.int64)
    counts[:, 2 * ESCAPE :] = np.maximum(counts[:, 2 * ESCAPE :], 1)
    for context in counts:  # the largest can bear what rounding left over
        context[context.argmax()] += SLOTS - context.sum()
    return DenseProfile(
        profile.dtype, profile.pivots, profile.centres, profile.biases,
        counts.astype(np.uint16), profile.weights,
    )  # fmt: skip


def described(
    x: Elements, profile: DenseProfile
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint8]]:
    """Symbols and contexts of the elements (rows, channels), escapes, and low bits; as to be coded."""
    symbols, contexts = np.empty(x.size, np.uint8), np.empty(x.size, np.uint8)
    escapes = np.empty(x.size, np.uint16)
    low = np.empty(low_bytes(x.size, profile.dtype), np.uint8)
    escaped = kernel.describe(x, profile.model, symbols, contexts, escapes, low)
    return symbols, contexts, escapes[:escaped], low
