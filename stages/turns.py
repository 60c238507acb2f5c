"""
Whose turn it is among a link's connections, of which one at a time carries the frames.

BBR, as Linux has it, must see the least round trip: where no lower one came for ten seconds, it empties
the wire for a round trip and a fifth of a second, and what was to be sent waits. But one that sends
again after a rest takes its first round trip for the least, since nothing of its own was in the queue,
and goes on at the rate that it knew. So two connections take turns that are shorter than ten seconds:
each rests while the other carries, and the wire is never emptied. (tcp_bbr.c of Linux 4.9 to 6.18.)
"""

from typing import Final

TURN_S: Final = 9.0
LEARNING_S: Final = 2.0
"""The first turn: the other connection learns the wire, too, while the job begins."""
UNSENT_S: Final = 0.04
LEAST_UNSENT_BYTES: Final = 64 * 2**10
MOST_UNSENT_BYTES: Final = 512 * 2**10
"""What may wait in the kernel: what is left as a turn ends shares the wire with the next, and what is
more than the queue before the wire holds is lost. 512 KiB are a fifth of a second of 20 Mbit/s, and
were a hundred packets a turn."""


class Turns:
    """A count that goes round; told the time, it keeps none of its own."""

    def __init__(self, count: int) -> None:
        self.current = 0
        """The place of the connection that carries now."""
        self._count = count
        self._ends_s: float | None = None

    def over(self, now_s: float) -> bool:
        """Whether a frame that is sent now is the next one's to carry; the first begins a turn."""
        if self._ends_s is None:
            self._ends_s = now_s + LEARNING_S
            return False
        return self._count > 1 and now_s >= self._ends_s

    def pass_on(self, now_s: float) -> None:
        """Let the next connection carry from now on."""
        self.current = (self.current + 1) % self._count
        self._ends_s = now_s + TURN_S


def unsent_bytes(bytes_per_s: float) -> int:
    """What may wait in the kernel for a wire that carries so much."""
    return min(MOST_UNSENT_BYTES, max(LEAST_UNSENT_BYTES, round(UNSENT_S * bytes_per_s)))
