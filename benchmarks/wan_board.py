"""What each ordered pair of hosts shall do with bytes, and what it did; shared with the forwarder.

The board is anonymous shared memory of one record of 16 eight-byte words per ordered pair, row by
row; each word has one writer. wan_forwarder.c and wan_forwarder.py read it for every packet.
"""

import mmap
import os
from dataclasses import dataclass

RECORD_WORDS = 16
MAX_IN_FLIGHT_BYTES = 128 * 2**20

_UP, _COUNTERS = 4, 5  # words 0 to 3 are the path's numbers


@dataclass(frozen=True, slots=True)
class Path:
    """
    One direction between two hosts.

    A packet waits at most `queue_s` for its turn, takes its bytes' time at the rate (IP headers
    count), is lost with probability `loss`, and arrives `delay_s` later.
    """

    rate_bit_per_s: float = 100e6
    delay_s: float = 0.020
    loss: float = 0.0
    queue_s: float = 0.1

    def __post_init__(self) -> None:
        if not (self.rate_bit_per_s > 0 and self.delay_s >= 0 and self.queue_s >= 0):
            raise ValueError(f"{self}: the rate is positive, delay and queue are not negative")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"{self}: the loss is a probability")
        if self.rate_bit_per_s * (self.delay_s + self.queue_s) / 8 > MAX_IN_FLIGHT_BYTES:
            raise ValueError(f"{self}: more than {MAX_IN_FLIGHT_BYTES} bytes would be on their way")


@dataclass(frozen=True, slots=True)
class Traffic:
    """What an ordered pair has carried since the start; IP headers count as bytes."""

    sent_packets: int
    sent_bytes: int
    """What the source gave to the wire; the rest says what came of it."""
    delivered_packets: int
    delivered_bytes: int
    lost_packets: int
    dropped_packets: int
    """For want of room in the queue."""
    cut_packets: int
    """Met a partition."""
    late_packets: int
    """Delivered over 1 ms after their time: the machine was too busy to emulate this wire."""


class Board:
    """The shared memory; give `descriptor` to the forwarder."""

    def __init__(self, hosts: int) -> None:
        words = hosts * hosts * RECORD_WORDS
        self.descriptor = os.memfd_create("wan-board")
        os.ftruncate(self.descriptor, 8 * words)
        self._floats, self._counts = map_board(self.descriptor)

    def set_path(self, pair: int, path: Path) -> None:
        """From now on packets of that pair fare so; those on their way keep their time."""
        first = pair * RECORD_WORDS
        numbers = (path.rate_bit_per_s, path.delay_s, path.loss, path.queue_s)
        for word, number in enumerate(numbers, first):
            self._floats[word] = number

    def set_up(self, pair: int, up: bool) -> None:
        """Whether packets of that pair get through at all."""
        self._counts[pair * RECORD_WORDS + _UP] = up

    def traffic(self, pair: int) -> Traffic:
        """The pair's counters so far."""
        first = pair * RECORD_WORDS + _COUNTERS
        return Traffic(*self._counts[first : first + len(Traffic.__slots__)])

    def close(self) -> None:
        """Give the memory back; the forwarder's own view lives on."""
        os.close(self.descriptor)


def map_board(descriptor: int) -> tuple["memoryview[float]", "memoryview[int]"]:
    """The board's words as floats and as counts, both over the same memory."""
    memory = memoryview(mmap.mmap(descriptor, os.fstat(descriptor).st_size))
    return memory.cast("d"), memory.cast("Q")
