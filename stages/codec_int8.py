"""Eight bits an element, in groups of 64 that share a scale: lossy, for jobs that ask for it.

An element x becomes round(x / scale), with the scale the least bfloat16 at or above max |x| / 127
of its group, or the least normal number. So no element moves by more than half a hundredth of its
group's largest one.
"""

import numpy as np
from numpy.typing import NDArray

from stages.codec_coder import Bytes

GROUP = 64
SMALLEST_SCALE = np.finfo(np.float32).smallest_normal  # a subnormal one may be read as zero

_LARGEST = {"float32": 3.4028235e38, "bfloat16": 3.3895314e38, "float16": 65504.0}


def sizes(elements: int) -> tuple[int, int]:
    """Bytes of the two planes of that many elements."""
    return elements, 2 * _groups(elements)


def quantized(elements: Bytes, dtype: str) -> list[Bytes] | None:
    """The planes [one int8 an element, one bfloat16 scale a group], or None beside a NaN or inf."""
    x = _widened(elements, dtype)
    padded = np.zeros(_groups(x.size) * GROUP, np.float32)
    padded[: x.size] = x
    grouped = padded.reshape(-1, GROUP)
    largest = np.maximum(grouped.max(axis=1), -grouped.min(axis=1))
    if not np.isfinite(largest).all():
        return None
    shares = np.maximum(largest / 127, SMALLEST_SCALE)
    scales = ((shares.view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)
    grouped /= _float32(scales)[:, None]
    np.rint(grouped, out=grouped)
    return [padded[: x.size].astype(np.int8).view(np.uint8), scales.view(np.uint8)]


def restored(planes: list[Bytes], dtype: str) -> Bytes:
    """Elements of the planes that `quantized` made, rounded to the dtype; always finite."""
    count = planes[0].size
    padded = np.zeros(_groups(count) * GROUP, np.float32)
    padded[:count] = planes[0].view(np.int8)
    with np.errstate(over="ignore", invalid="ignore"):  # clipped below, whatever a peer has sent
        padded.reshape(-1, GROUP)[:] *= _float32(planes[1].view(np.uint16))[:, None]
    np.nan_to_num(padded, copy=False)
    np.clip(padded, -_LARGEST[dtype], _LARGEST[dtype], out=padded)
    return _narrowed(padded[:count], dtype)


def _groups(elements: int) -> int:
    """How many scales they have; groups run on over rows, and the last may be short."""
    return -(-elements // GROUP)


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
