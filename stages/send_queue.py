"""
What a sending thread waits on and keeps: a bounded queue, a bell that select can hear, and the frames
that it has sent and that the peer may not hold.
"""

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

from stages.errors import LinkError, LinkTimeoutError, StageError
from stages.frame import Packet

T = TypeVar("T")


class Bell:
    """Wakes a thread that waits in select; any thread may ring."""

    def __init__(self) -> None:
        self._rope, self._clapper = socket.socketpair()
        self._rope.setblocking(False)
        self._clapper.setblocking(False)

    def fileno(self) -> int:
        """The descriptor that is readable once the bell was rung."""
        return self._clapper.fileno()

    def ring(self) -> None:
        """Wake the thread, or have it not fall asleep."""
        with contextlib.suppress(OSError):  # full: it is awake already; closed: it has ended
            self._rope.send(b"\0")

    def quiet(self) -> None:
        """Forget the rings so far."""
        with contextlib.suppress(BlockingIOError):
            self._clapper.recv(4096)

    def close(self) -> None:
        """Give the descriptors back."""
        self._rope.close()
        self._clapper.close()


class SendQueue(Generic[T]):
    """Frames that wait for the one thread that sends; its error reaches whoever adds more."""

    def __init__(self, peer: str, capacity: int) -> None:
        self._peer = peer
        self._capacity = capacity
        self._packets: deque[T] = deque()
        self._changed = threading.Condition()
        self._in_hand = 0
        self.most_waiting = 0
        """Frames that waited at once, at the worst time so far."""
        self._error: StageError | None = None
        self._lost = False
        self._ended = False

    def put(self, packet: T, timeout_s: float | None) -> None:
        """Add a frame; waits while the queue is full, LinkTimeoutError after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error or self._ended or len(self._packets) < self._capacity, timeout_s
            )
            if self._error is not None:
                raise self._error
            if self._ended:
                raise LinkError(f"no more frames may go to {self._peer}: closed here")
            if len(self._packets) >= self._capacity:
                raise LinkTimeoutError(f"{self._peer} took no frame for {timeout_s} s")
            self._packets.append(packet)
            self.most_waiting = max(self.most_waiting, len(self._packets) + self._in_hand)
            self._changed.notify_all()

    def take(self) -> T | None:
        """The next frame, to be confirmed by `sent`; None where none waits."""
        with self._changed:
            if not self._packets:
                return None
            self._in_hand += 1
            self._changed.notify_all()
            return self._packets.popleft()

    def sent(self, count: int = 1) -> None:
        """Frames that were taken need no further care."""
        with self._changed:
            self._in_hand -= count

    @property
    def waiting(self) -> int:
        """Frames that were put and are not confirmed."""
        with self._changed:
            return len(self._packets) + self._in_hand

    @property
    def finished(self) -> bool:
        """Whether it has ended and needs no further care."""
        with self._changed:
            return self._ended and not self._packets and not self._in_hand

    def end(self) -> None:
        """Take no more frames."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def fail(self, error: StageError) -> None:
        """Drop what waits, and raise the error for every frame put from now on."""
        with self._changed:
            self._error = error
            self._lost = self._in_hand > 0 or bool(self._packets)
            self._in_hand = 0
            self._packets.clear()
            self._changed.notify_all()

    def check_delivery(self) -> None:
        """Raise the error that the sending thread met, if a frame was lost by it."""
        if self._error is not None and self._lost:
            raise self._error


class Kept:
    """Frames that were sent and not acknowledged, in the order of their numbers; for one thread."""

    def __init__(self) -> None:
        self._packets: deque[Packet] = deque()
        self.nbytes = 0
        """Of all of them."""

    def __len__(self) -> int:
        return len(self._packets)

    def __iter__(self) -> Iterator[Packet]:
        return iter(tuple(self._packets))

    def add(self, packet: Packet) -> None:
        """Keep a frame that is about to be sent."""
        self._packets.append(packet)
        self.nbytes += packet.size

    def forget(self, last_frame: int) -> int:
        """Drop the frames up to that number, which the peer holds; how many they were."""
        before = len(self._packets)
        while self._packets and self._packets[0].frame <= last_frame:
            self.nbytes -= self._packets.popleft().size
        return before - len(self._packets)
