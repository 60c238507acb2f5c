"""
Threads between connections and the work: one sends, one receives, and every queue is bounded.

A `Mailbox` is what a stage waits on: frames of all its connections in the order they came, and the
news that a connection is down. Each connection has its own share of room, so a full one holds up
its own sender, through TCP, and nobody else's.
"""

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from stages.errors import LinkError, LinkTimeoutError, StageError
from stages.frame import Frame, Packet
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
    """Arrivals of several connections in one order; at most `capacity` frames wait of each."""

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._mail: deque[Mail] = deque()
        self._waiting: Counter[Connection] = Counter()
        self._changed = threading.Condition()

    def get(self, timeout_s: float | None = None) -> Mail | None:
        """The oldest item, taken out; None if nothing comes in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._mail, timeout_s):
                return None
            mail = self._mail.popleft()
            if isinstance(mail, Arrival):
                self._waiting[mail.source] -= 1
                self._changed.notify_all()
            return mail

    def put(self, arrival: Arrival) -> None:
        """Add a frame; waits while its connection's share is full, unless that is closed here."""
        with self._changed:
            while not self._has_room(arrival.source) and not arrival.source.closed:
                self._changed.wait(0.2)  # a close from elsewhere notifies nobody
            self._add(arrival)

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
        return self._waiting[source] < self._capacity

    def _add(self, arrival: Arrival) -> None:
        self._mail.append(arrival)
        self._waiting[arrival.source] += 1
        self._changed.notify_all()


class Inbox:
    """The one thread that reads a data connection, into a mailbox."""

    def __init__(self, connection: Connection, mailbox: Mailbox) -> None:
        self._connection = connection
        self._mailbox = mailbox
        self._thread = threading.Thread(
            target=self._receive, name=f"inbox-{connection.peer}", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the connection and its thread; what the mailbox holds stays there."""
        self._connection.close()
        self._thread.join()

    def _receive(self) -> None:
        source = self._connection
        try:
            while not source.closed:
                self._mailbox.put(Arrival(source, source.receive()))
        except StageError as error:
            if not source.closed:
                self._mailbox.report_down(LinkDown(source, error))
                source.close()


class SendQueue:
    """Frames that wait for the one thread that sends; its error reaches whoever adds more."""

    def __init__(self, peer: str, capacity: int) -> None:
        self._peer = peer
        self._capacity = capacity
        self._packets: deque[Packet] = deque()
        self._changed = threading.Condition()
        self._in_hand = False
        self._error: StageError | None = None
        self._lost = False
        self._ended = False

    def put(self, packet: Packet, timeout_s: float | None) -> None:
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
            self._changed.notify_all()

    def wait(self) -> Packet | None:
        """The next frame, when there is one; None when the queue has ended and is empty."""
        with self._changed:
            self._changed.wait_for(lambda: self._packets or self._ended)
        return self.take()

    def take(self) -> Packet | None:
        """The next frame, to be confirmed by `sent`; None where none waits."""
        with self._changed:
            if not self._packets:
                return None
            self._in_hand = True
            self._changed.notify_all()
            return self._packets.popleft()

    def sent(self) -> None:
        """The frame that was taken went out whole."""
        self._in_hand = False

    @property
    def finished(self) -> bool:
        """Whether it has ended and every frame went out."""
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
            self._lost = self._in_hand or bool(self._packets)
            self._in_hand = False
            self._packets.clear()
            self._changed.notify_all()

    def check_delivery(self) -> None:
        """Raise the error that the sending thread met, if a frame was lost by it."""
        if self._error is not None and self._lost:
            raise self._error


class Outbox:
    """
    The one thread that writes a data connection, behind a bounded queue.

    When the connection fails, `on_down` is called once from that thread, and every later `put`
    raises the same error.
    """

    def __init__(
        self, connection: Connection, on_down: Callable[[LinkDown], None], capacity: int = 8
    ) -> None:
        self._connection = connection
        self._on_down = on_down
        self._queue = SendQueue(connection.peer, capacity)
        self._thread = threading.Thread(
            target=self._send, name=f"outbox-{connection.peer}", daemon=True
        )
        self._thread.start()

    def put(self, packet: Packet, timeout_s: float | None = None) -> None:
        """Queue a frame; waits while the queue is full, LinkTimeoutError after `timeout_s`."""
        self._queue.put(packet, timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """
        Send what is queued, then end the connection.

        Raises the connection's error where it lost a queued frame, LinkTimeoutError where the peer
        did not take them in time.
        """
        self._queue.end()
        self._thread.join(timeout_s)
        flushed = self._queue.finished
        self.abort()
        if not flushed:
            raise LinkTimeoutError(f"{self._connection.peer} did not take the last frames")
        self._queue.check_delivery()

    def abort(self) -> None:
        """End the connection at once; frames still queued are dropped."""
        self._queue.end()
        self._connection.close()
        self._thread.join()

    def _send(self) -> None:
        try:
            while (packet := self._queue.wait()) is not None:
                self._connection.send(packet)
                self._queue.sent()
        except StageError as error:
            self._queue.fail(error)
            if not self._connection.closed:
                self._on_down(LinkDown(self._connection, error))
                self._connection.close()
