"""
The control connection of a stage and its driver: both ways at once, in one select loop.

One thread owns the TLS object, reads and writes without blocking, sends a heartbeat each second,
and calls the peer lost after a silence. A process that was itself stopped for a while first hears
what lies ready before it judges. Other threads only fill a bounded queue and wake the loop.
"""

import selectors
import threading
import time
from collections.abc import Callable, Iterator

from stages.control import ControlMessage, Heartbeat
from stages.errors import LinkError, LinkTimeoutError, StageError
from stages.frame import Kind, Packet
from stages.link import Connection, pieces
from stages.mailbox import Arrival, LinkDown, Mailbox
from stages.send_queue import Bell, SendQueue

HEARTBEAT_S = 1.0
LOST_AFTER_S = 20.0
PIECES_A_TURN = 16  # written before the loop reads again
MAILBOX_FULL_S = 0.05  # how often the loop looks whether the mailbox has room again


class Duplex:
    """
    Control messages both ways, and the judge of whether the peer is alive.

    Frames other than heartbeats go to the mailbox; so does the news that the connection is down:
    PeerClosedError, LinkTimeoutError after `lost_after_s` seconds without a byte, or ProtocolError.
    `vitals` is called by the loop's thread for each heartbeat to send.
    """

    def __init__(
        self,
        connection: Connection,
        mailbox: Mailbox,
        vitals: Callable[[], Heartbeat] = Heartbeat,
        heartbeat_s: float = HEARTBEAT_S,
        lost_after_s: float = LOST_AFTER_S,
        capacity: int = 64,
    ) -> None:
        self.connection = connection
        self.heard: Heartbeat | None = None
        """The peer's last heartbeat."""
        self._mailbox = mailbox
        self._vitals = vitals
        self._heartbeat_s = heartbeat_s
        self._lost_after_s = lost_after_s
        self._queue: SendQueue[Packet] = SendQueue(connection.peer, capacity)
        self._pieces: Iterator[bytes | memoryview] = iter(())
        self._piece = memoryview(b"")
        self._sending: Packet | None = None
        self._beat: Packet | None = None
        self._blocked_since_s: float | None = None
        self._finishing = False
        self._watched = 0
        self._received = 0
        self._heard_s = self._beat_s = time.monotonic()
        self._bell = Bell()
        self._thread = threading.Thread(
            target=self._run, name=f"duplex-{connection.peer}", daemon=True
        )
        self._thread.start()

    def send(self, message: ControlMessage, timeout_s: float | None = None) -> None:
        """Queue a message; waits while the queue is full. Raises the error that ended the link."""
        self._queue.put(message.encode(self.connection.run), timeout_s)
        self._bell.ring()

    def close(self, timeout_s: float = 5.0) -> None:
        """
        Send what is queued, say that no more comes, and leave when the peer does the same.

        Raises the connection's error where it lost a queued message, LinkTimeoutError where the
        peer did not take them in time. That the peer left first is no error.
        """
        self._queue.end()
        self._bell.ring()
        self._thread.join(timeout_s)
        flushed = self._queue.finished
        self.connection.close()
        self._bell.ring()
        self._thread.join()
        if not flushed:
            raise LinkTimeoutError(f"{self.connection.peer} did not take the last messages")
        self._queue.check_delivery()

    def _run(self) -> None:
        try:
            with self.connection.unblocked(), selectors.DefaultSelector() as ready:
                ready.register(self._bell, selectors.EVENT_READ)
                self._converse(ready)
        except StageError as error:
            self._end(error)
        finally:
            self._bell.close()

    def _end(self, error: StageError) -> None:
        left_in_order = self._queue.finished and isinstance(error, LinkError)
        if not left_in_order:
            self._queue.fail(error)
            if not self.connection.closed:
                self._mailbox.report_down(LinkDown(self.connection, error))
        self.connection.close()

    def _converse(self, ready: selectors.BaseSelector) -> None:
        while not self.connection.closed:
            self._watch(ready)
            ready.select(self._wait_s())
            self._bell.quiet()
            self._read()
            self._write()
            self._judge()

    def _watch(self, ready: selectors.BaseSelector) -> None:
        """Wait for bytes while the mailbox has room, and for the socket while there is a frame."""
        events = selectors.EVENT_READ if self._mailbox.has_room(self.connection) else 0
        events |= selectors.EVENT_WRITE if self._sending is not None else 0
        if events == self._watched:
            return
        if self._watched:
            ready.unregister(self.connection)
        if events:
            ready.register(self.connection, events)
        self._watched = events

    def _wait_s(self) -> float:
        if not self._watched & selectors.EVENT_READ:
            return MAILBOX_FULL_S
        if self.connection.undelivered():
            return 0.0
        return max(0.0, self._beat_s - time.monotonic())

    def _read(self) -> None:
        while self._mailbox.has_room(self.connection):
            frame = self.connection.read_ready()
            if frame is None:
                return
            if frame.label.kind is Kind.HEARTBEAT:
                self.heard = Heartbeat.decode(frame)
            else:
                self._mailbox.put(Arrival(self.connection, frame))

    def _write(self) -> None:
        for _ in range(PIECES_A_TURN):
            if not self._load():
                return
            taken = self.connection.write_ready(self._piece)
            self._count_blocked(taken)
            if taken == 0:
                return
            self._piece = self._piece[taken:]

    def _load(self) -> bool:
        """Make `_piece` the next bytes to write; False where there is nothing to say."""
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is not None:
                self._piece = memoryview(piece)
                continue
            if self._sending is not None:
                self._note_sent(self._sending)
            self._sending = self._next_packet()
            if self._sending is None:
                return False
            self._pieces = pieces(self._sending)
        return True

    def _note_sent(self, packet: Packet) -> None:
        self.connection.note_sent(packet)
        if packet is not self._beat:
            self._queue.sent()

    def _next_packet(self) -> Packet | None:
        """A heartbeat when it is due, else what the queue holds; once it ended, the goodbye."""
        if self._finishing:
            return None
        if self._queue.finished:
            self.connection.finish()
            self._finishing = True
            return None
        now_s = time.monotonic()
        if now_s >= self._beat_s:
            self._beat_s = now_s + self._heartbeat_s
            self._beat = self._vitals().encode(self.connection.run)
            return self._beat
        return self._queue.take()

    def _count_blocked(self, taken: int) -> None:
        now_s = time.monotonic()
        if self._blocked_since_s is not None:
            self.connection.counters.blocked_s += now_s - self._blocked_since_s
        self._blocked_since_s = now_s if taken == 0 else None

    def _judge(self) -> None:
        """Raise LinkTimeoutError after a silence that this end listened to."""
        now_s = time.monotonic()
        received = self.connection.counters.tls_bytes_received
        if received != self._received or not self._mailbox.has_room(self.connection):
            self._received, self._heard_s = received, now_s
        elif now_s - self._heard_s > self._lost_after_s:
            silence = f"{now_s - self._heard_s:.1f} s"
            raise LinkTimeoutError(f"{self.connection.peer} has been silent for {silence}")
