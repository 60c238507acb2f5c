"""What the codec's tests share: rows that look like a model's, and a frame's way there and back."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from stages.codec import AnyProfile, Encoded, decode
from stages.codec_dense_profile import DenseProfile

FLOATS = ("float32", "bfloat16", "float16")
LIMIT = 2**24
DENSE_CHANNELS = 64


def hidden_states(
    dtype: str, rows: int, channels: int, seed: int = 0
) -> NDArray[np.unsignedinteger]:
    """Bits of rows whose channels differ in scale and mean, as a model's do."""
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.normal(0, 1.5, channels))
    return _bits(((rng.standard_normal((rows, channels)) + 0.3) * scale).astype(np.float32), dtype)


def related_states(
    dtype: str, rows: int, channels: int = DENSE_CHANNELS, seed: int = 0
) -> NDArray[np.unsignedinteger]:
    """Bits of rows with a quarter as many degrees of freedom as channels, and some noise."""
    mix = np.random.default_rng(11).standard_normal((channels // 4, channels))
    scale = np.exp2(np.random.default_rng(12).normal(0, 1.5, channels))
    rng = np.random.default_rng(seed)
    free = rng.standard_normal((rows, channels // 4)) @ mix / np.sqrt(channels / 4)
    noise = 0.4 * rng.standard_normal((rows, channels))
    return _bits(((free + noise) * scale).astype(np.float32), dtype)


@cache
def dense_profile(dtype: str) -> DenseProfile:
    """Learned from related states; takes the compiled code."""
    from stages.codec_dense_learning import learned  # noqa: PLC0415

    x = related_states(dtype, 2048, seed=99)
    return learned(x, dtype, x.shape)


def _bits(x: NDArray[np.float32], dtype: str) -> NDArray[np.unsignedinteger]:
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    return x.view(np.uint32) if dtype == "float32" else (x.view(np.uint32) >> 16).astype(np.uint16)


def returned(frame: Encoded, *profiles: AnyProfile) -> bytes:
    by_id = {profile.id: profile for profile in profiles}
    return decode(frame.tobytes(), max_bytes=LIMIT, profiles=by_id).buffer.tobytes()
