"""What the codec's tests share: rows that look like a model's, and a frame's way there and back."""

import numpy as np
from numpy.typing import NDArray

from stages.codec import Encoded, decode
from stages.codec_profile import Profile

FLOATS = ("float32", "bfloat16", "float16")
LIMIT = 2**24


def hidden_states(
    dtype: str, rows: int, channels: int, seed: int = 0
) -> NDArray[np.unsignedinteger]:
    """Bits of rows whose channels differ in scale and mean, as a model's do."""
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.normal(0, 1.5, channels))
    x = ((rng.standard_normal((rows, channels)) + 0.3) * scale).astype(np.float32)
    if dtype == "float16":
        return x.astype(np.float16).view(np.uint16)
    return x.view(np.uint32) if dtype == "float32" else (x.view(np.uint32) >> 16).astype(np.uint16)


def returned(frame: Encoded, *profiles: Profile) -> bytes:
    by_id = {profile.id: profile for profile in profiles}
    return decode(frame.tobytes(), max_bytes=LIMIT, profiles=by_id).buffer.tobytes()
