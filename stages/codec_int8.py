"""Eight bits an element, in groups of 64 of a row that share a scale: lossy, for jobs that ask for it.

An element x becomes round(x / scale), with the scale the least bfloat16 at or above max |x| / 127
of its group, or the least normal number. So no element moves by more than half a hundredth of its
group's largest one. No group reaches beyond its row, so what becomes of a row is its own doing, whoever
travels with it. A row with a NaN or an infinity arrives as NaNs: it is no answer, and stays none.
"""

import numpy as np
from numpy.typing import NDArray

from stages.codec_coder import Bytes
from stages.errors import FrameError

GROUP = 64
SMALLEST_SCALE = np.finfo(np.float32).smallest_normal  # a subnormal one may be read as zero
NO_SCALE = 0x7FC0
"""Of every group of a row that is not finite: a NaN in bfloat16."""

_FIRST_SCALE, _LAST_SCALE = 0x0080, 0x7F7F  # bfloat16s, positive, normal and finite
_LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}


def sizes(rows: int, channels: int) -> tuple[int, int]:
    """Bytes of the two planes of that many rows of so many elements."""
    return rows * channels, 2 * rows * -(-channels // GROUP)


def quantized(elements: Bytes, dtype: str, channels: int) -> list[Bytes]:
    """The planes: one int8 an element, one bfloat16 scale a group."""
    x = _widened(elements, dtype).reshape(-1, channels)
    largest = np.maximum.reduceat(np.abs(x), _starts(channels), axis=1)
    shares = np.maximum(largest / 127, SMALLEST_SCALE)
    scales = ((shares.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
    finite = np.isfinite(largest).all(axis=1)
    with np.errstate(invalid="ignore"):
        rounded = np.rint(x / _spread(scales, channels))
    rounded[~finite], scales[~finite] = 0, NO_SCALE
    return [rounded.astype(np.int8).view(np.uint8).reshape(-1), scales.view(np.uint8).reshape(-1)]


def restored(planes: list[Bytes], dtype: str, channels: int) -> Bytes:
    """Elements of the planes that `quantized` made, rounded to the dtype.

    FrameError for scales that it would not have made. What is out of the dtype's reach is its largest.
    """
    x = planes[0].view(np.int8).reshape(-1, channels).astype(np.float32)
    scales = planes[1].view(np.uint16).reshape(len(x), -1)
    broken = _rows_without_scales(scales)
    with np.errstate(over="ignore"):
        x *= _spread(scales, channels)
    np.clip(x, -_LARGEST[dtype], _LARGEST[dtype], out=x)
    x[broken] = np.nan
    return _narrowed(x.reshape(-1), dtype)


def _rows_without_scales(scales: NDArray[np.uint16]) -> NDArray[np.bool_]:
    """Which rows are not finite; raises where a row is so in part, or a scale could be no scale."""
    absent = scales == NO_SCALE
    broken: NDArray[np.bool_] = absent.all(axis=1)
    good = (scales >= _FIRST_SCALE) & (scales <= _LAST_SCALE)
    if not (good | broken[:, None]).all():
        raise FrameError("a scale of an int8 frame is none")
    return broken


def _starts(channels: int) -> NDArray[np.int64]:
    """Where a row's groups begin; the last may be short."""
    return np.arange(0, channels, GROUP)


def _spread(scales: NDArray[np.uint16], channels: int) -> NDArray[np.float32]:
    """Each element's scale, of [rows, groups]."""
    widths = np.diff(_starts(channels), append=channels)
    return np.repeat(_float32(scales), widths, axis=1)


def _float32(bfloat16: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bfloat16.astype(np.uint32) << 16).view(np.float32)


def _widened(elements: Bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "bfloat16":
        return _float32(elements.view(np.uint16))
    return elements.view(dtype).astype(np.float32, copy=False)


def _narrowed(x: NDArray[np.float32], dtype: str) -> Bytes:
    if dtype == "bfloat16":  # to nearest, ties to even
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(np.uint8)
    return x.astype(dtype).view(np.uint8)
