"""How many micro-batches keep a ring's slowest stage or link busy, as it was measured at work.

Pure: counters that stages and links report go in, a number comes out; whose counters they are, and
what is done about the number, is the driver's business.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

MOST = 4
"""A ring may come to have this many times the micro-batches that its plan gave it."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What a stage and the link behind it have taken so far, over all frames."""

    frames: int
    busy_s: float
    """Of the stage."""
    sent_bytes: int
    """To the next stage."""
    bytes_per_s: float
    """What that link carries; 0 while that is unknown."""
    rtt_s: float
    """Its round trip; 0 where the system does not say."""


def micro_batches(before: Sequence[Passage], after: Sequence[Passage]) -> int | None:
    """Micro-batches in flight that a ring needs: ring time over bottleneck time, and one that waits.

    Stages in ring order, at two moments. Ring time is that of a micro-batch that waits for no other:
    every stage's and link's seconds a frame, and every link's delay. By Little's law as many are
    under way at the bottleneck's rate. None where some stage has had no frame in between.
    """
    spent_s: list[float] = []
    delays_s = 0.0
    for was, now in zip(before, after, strict=True):
        frames = now.frames - was.frames
        if frames < 1:
            return None
        spent_s.append((now.busy_s - was.busy_s) / frames)
        if now.bytes_per_s:
            spent_s.append((now.sent_bytes - was.sent_bytes) / frames / now.bytes_per_s)
        delays_s += now.rtt_s / 2
    if max(spent_s) <= 0:
        return None
    return math.ceil((sum(spent_s) + delays_s) / max(spent_s)) + 1
