"""
What a stage waits on: frames of all its connections in the order they came, and news of their end.

Each connection has its own share of room, so a full one holds up its own sender, through TCP, and
nobody else's.
"""

import math
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import TypeAlias

from stages.errors import StageError
from stages.frame import ROOM_BYTES, Frame
from stages.link import Connection


@dataclass(frozen=True, slots=True)
class Arrival:
    """A frame, and the connection that brought it."""

    source: Connection
    frame: Frame


@dataclass(frozen=True, slots=True)
class LinkDown:
    """A connection that ended without this end closing it, and why."""

    source: Connection
    error: StageError


Mail: TypeAlias = Arrival | LinkDown


class Mailbox:
    """
    Arrivals of several connections in one order.

    Of each wait at most `capacity` frames, and none is added once they have `capacity_bytes`.
    """

    def __init__(self, capacity: int = 64, capacity_bytes: int = ROOM_BYTES) -> None:
        self._capacity = capacity
        self._capacity_bytes = capacity_bytes
        self._mail: deque[Mail] = deque()
        self._waiting: Counter[object] = Counter()
        self._waiting_bytes: Counter[object] = Counter()
        self._changed = threading.Condition()

    def get(self, timeout_s: float | None = None) -> Mail | None:
        """The oldest item, taken out; None if nothing comes in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._mail, timeout_s):
                return None
            mail = self._mail.popleft()
            if isinstance(mail, Arrival):
                self._count(mail, -1)
                self._changed.notify_all()
            return mail

    def put(self, arrival: Arrival, timeout_s: float = math.inf) -> bool:
        """
        Add a frame; waits while its connection's share is full, unless that is closed here.

        Whether there was room before the time was over.
        """
        until_s = time.monotonic() + timeout_s
        with self._changed:
            while not self._has_room(arrival.source) and not arrival.source.closed:
                left_s = until_s - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(min(left_s, 0.2))  # a close from elsewhere notifies nobody
            self._add(arrival)
            return True

    def has_room(self, source: Connection) -> bool:
        """Whether a connection's share has room for another frame."""
        with self._changed:
            return self._has_room(source)

    def report_down(self, down: LinkDown) -> None:
        """Add the end of a connection; there is always room for that."""
        with self._changed:
            self._mail.append(down)
            self._changed.notify_all()

    def _has_room(self, source: Connection) -> bool:
        return (
            self._waiting[source.share] < self._capacity
            and self._waiting_bytes[source.share] < self._capacity_bytes
        )

    def _add(self, arrival: Arrival) -> None:
        self._mail.append(arrival)
        self._count(arrival, 1)
        self._changed.notify_all()

    def _count(self, arrival: Arrival, change: int) -> None:
        self._waiting[arrival.source.share] += change
        self._waiting_bytes[arrival.source.share] += change * arrival.frame.size
