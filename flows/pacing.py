"""Watches a pipeline at work and says how many micro-batches it should have in flight.

The plan's number comes from what was measured before the run; a network that turns out slower, or
becomes so, needs more of them. Fewer than planned would gain nothing.
"""

from collections.abc import Mapping, Sequence

from planner.tempo import Passage, micro_batches
from stages.config import Ring
from stages.control import Heartbeat

ROUNDS = 3
"""Times that every micro-batch goes round between two looks."""


class Pacer:
    """Mutable; one thread calls it."""

    def __init__(self, stages: Sequence[str], ring: Ring) -> None:
        """`stages` in ring order, the head first."""
        self._stages = tuple(stages)
        self._least, self._most = ring.slots, ring.shape().capacity
        self.slots = ring.slots
        """Micro-batches in flight."""
        self._before: list[Passage] | None = None

    def heard(self, vitals: Mapping[str, Heartbeat]) -> bool:
        """Take the stages' latest heartbeats, by name; whether `slots` has changed by them."""
        if self._least == self._most or not all(name in vitals for name in self._stages):
            return False
        now = [
            _passage(vitals[name], self._stages[(at + 1) % len(self._stages)])
            for at, name in enumerate(self._stages)
        ]
        before = self._before or now
        rounds = min(n.frames - b.frames for n, b in zip(now, before, strict=True)) / self.slots
        if self._before is not None and rounds < ROUNDS:
            return False
        self._before = now
        wanted = micro_batches(before, now)
        if wanted is None:
            return False
        slots = min(max(wanted, self._least), self._most)
        if slots <= self.slots and slots >= self.slots - 1:  # one too many is no reason to close it
            return False
        self.slots = slots
        return True


def _passage(beat: Heartbeat, next_stage: str) -> Passage:
    outgoing = (r for r in beat.links if r.peer == next_stage and r.payload_bytes_sent)
    link = next(outgoing, None)
    if link is None:
        return Passage(beat.frames, beat.busy_s, 0, 0.0, 0.0)
    return Passage(beat.frames, beat.busy_s, link.tls_bytes_sent, link.bytes_per_s, link.rtt_s)
