"""The dense level's planes: coded signs and magnitudes, the bits below them, float32's lower half.

coded plane: lanes' states u32, each | escapes u32 | escapes' magnitudes u16, each | words u16
second plane: the other bits of each element's upper 16, one after the other
third plane, float32 alone: the lower 16 bits
"""

import struct
from typing import Final

import numpy as np

from stages import codec_dense_kernel as kernel
from stages.codec_coder import Bytes
from stages.codec_dense_learning import described, upper
from stages.codec_dense_profile import DenseProfile
from stages.errors import FrameError

_START: Final = struct.Struct(f"<{kernel.LANES + 1}I")
_FAULTS: Final = {
    kernel.TORN: "end too early",
    kernel.LEFT_OVER: "do not end where they should",
    kernel.NO_NUMBER: "name a magnitude that no element has",
}


def split(elements: Bytes, profile: DenseProfile) -> list[Bytes]:
    """The planes of the elements, given as raw bytes of whole rows."""
    x = upper(elements, profile.dtype).reshape(-1, profile.channels)
    symbols, contexts, escapes, low = described(x, profile)
    words = np.empty(x.size, np.uint16)
    states = np.empty(kernel.LANES, np.uint32)
    begin = kernel.encode(symbols, contexts, profile.model, states, words)
    start = _START.pack(*states.tolist(), len(escapes))
    coded = np.frombuffer(b"".join((start, escapes.tobytes(), words[begin:].tobytes())), np.uint8)
    tail = elements.view(np.uint16)[::2].copy().view(np.uint8)
    return [coded, low, tail] if profile.dtype == "float32" else [coded, low]


def merge(planes: list[Bytes], profile: DenseProfile, rows: int) -> Bytes:
    """The inverse of `split`, in an array of its own; FrameError where the planes make no sense."""
    coded = planes[0].tobytes()
    if len(coded) < _START.size or len(coded) % 2:
        raise FrameError(f"{len(coded)} bytes are no coded plane")
    *states, escaped = _START.unpack_from(coded)
    rest = np.frombuffer(coded, np.uint16, offset=_START.size)
    if escaped > len(rest):
        raise FrameError(f"a coded plane of {len(coded)} bytes cannot hold {escaped} escapes")
    x = np.empty((rows, profile.channels), np.uint16)
    first = np.array(states, np.uint32)
    fault = kernel.decode(rest[escaped:], first, rest[:escaped], planes[1], profile.model, x)
    if fault:
        raise FrameError(f"a coded plane's bytes {_FAULTS[fault]}")
    if profile.dtype != "float32":
        return x.reshape(-1).view(np.uint8)
    whole = np.empty(2 * x.size, np.uint16)
    whole[::2], whole[1::2] = planes[2].view(np.uint16), x.reshape(-1)
    return whole.view(np.uint8)
