"""The codec's promises: exact to the bit, never longer than raw, never a wrong answer."""

import numpy as np
import pytest

from stages.codec import FAST, RAW, decode, encode

FLOATS = ("float32", "bfloat16", "float16")
LIMIT = 2**26


def hidden_states(dtype: str, rows: int, channels: int, seed: int = 0) -> np.ndarray:
    """Bits of rows whose channels differ in scale and mean, as a model's do."""
    random = np.random.default_rng(seed)
    scale = np.exp2(random.normal(0, 1.5, channels))
    x = ((random.standard_normal((rows, channels)) + 0.3) * scale).astype(np.float32)
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    return x.view(np.uint32) if dtype == "float32" else (x.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("level", [RAW, FAST])
def test_frame_returns_every_bit(dtype: str, level: str) -> None:
    x = hidden_states(dtype, 64, 96)
    frame = encode(x, dtype, x.shape, level)
    decoded = decode(frame.tobytes(), max_bytes=x.nbytes)
    assert (decoded.dtype, decoded.shape, frame.level) == (dtype, x.shape, level)
    assert decoded.buffer.tobytes() == x.tobytes()
    assert frame.nbytes == len(frame.tobytes())
    assert level == RAW or frame.nbytes < 0.9 * x.nbytes
