"""
The control link of a stage and its driver: both ways at once, in one select loop.

One thread owns the TLS object, reads and writes without blocking, sends a heartbeat each second,
and calls the peer lost after a silence. A process that was itself stopped for a while first hears
what lies ready before it judges. Other threads only fill a bounded queue and wake the loop.

A connection that breaks is a pause. Messages are numbered, and kept until the peer's mailbox has them;
whoever dialled dials again, and what the other has not got is sent again. An end whose mailbox is full
reads on, lest acknowledgements wait behind messages; the window bounds what it has to hold.
"""

import logging
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable

from stages.control import Bye, ControlMessage, Heartbeat
from stages.errors import (
    LinkError,
    LinkTimeoutError,
    PeerClosedError,
    ProtocolError,
    StageError,
)
from stages.frame import ROOM_BYTES, Frame, Kind, Packet, numbered
from stages.frame_writer import FrameWriter
from stages.link import Connection
from stages.listener import Listener
from stages.mailbox import Arrival, LinkDown, Mailbox
from stages.send_queue import Bell, Kept, SendQueue
from stages.wire import Ack

log = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
LOST_AFTER_S = 20.0
REJOIN_S = 5.0  # for a peer to dial again, though this end had no time to listen for long
REDIAL_PAUSE_S = 0.1
WINDOW_MESSAGES = 64  # sent and not acknowledged
FRAMES_A_TURN = 16  # read before the loop writes again
MAILBOX_FULL_S = 0.05  # how often the loop looks whether the mailbox has room again


class Duplex:
    """
    Control messages both ways, and the judge of whether the peer is alive.

    Frames other than heartbeats go to the mailbox; so does the news that the link is down:
    PeerClosedError, LinkTimeoutError after `lost_after_s` seconds without a byte, or ProtocolError.
    `vitals` is called by the loop's thread for each heartbeat to send.

    A connection that broke is replaced by `redial`, which is given the number of the last message
    that came, or by the peer, through `listener`. With neither, a break is the end.
    """

    def __init__(
        self,
        connection: Connection,
        mailbox: Mailbox,
        vitals: Callable[[], Heartbeat] = Heartbeat,
        heartbeat_s: float = HEARTBEAT_S,
        lost_after_s: float = LOST_AFTER_S,
        capacity: int = 64,
        redial: Callable[[int], Connection] | None = None,
        listener: Listener | None = None,
    ) -> None:
        self.connection = connection
        """The one in use."""
        self.heard: Heartbeat | None = None
        """The peer's last heartbeat."""
        self.last_message = 0
        """Number of the last message that the mailbox got."""
        self._mailbox = mailbox
        self._vitals = vitals
        self._heartbeat_s = heartbeat_s
        self._lost_after_s = lost_after_s
        self._redial = redial
        self._listener = listener
        self._queue: SendQueue[Packet] = SendQueue(connection.peer, capacity)
        self._kept = Kept()
        self._again: deque[Packet] = deque()
        self._arrived: deque[Frame] = deque()
        """Messages that the mailbox has no room for yet."""
        self._numbers = 0
        self._acknowledged = 0
        self._heard_s = self._beat_s = time.monotonic()
        self._received = 0
        self._lost = self._peer_left = False
        self._swapping = threading.Condition()
        self._next: Connection | None = None
        self._closing = False
        self._bell = Bell()
        self._said_bye = False
        self._writer = FrameWriter(connection, self._next_packet)
        if listener is not None:
            listener.route(connection.peer, self._adopt, lambda: self.last_message, "control")
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

        Raises the link's error where it lost a queued message, LinkTimeoutError where the peer did
        not take them in time. That the peer left first is no error.
        """
        self._queue.end()
        with self._swapping:
            self._swapping.notify_all()
        self._bell.ring()
        self._thread.join(timeout_s)
        flushed = self._queue.finished
        with self._swapping:
            self._closing = True
            self.connection.close()
            self._swapping.notify_all()
        self._bell.ring()
        self._thread.join()
        if not flushed:
            raise LinkTimeoutError(f"{self.connection.peer} did not take the last messages")
        self._queue.check_delivery()

    def _adopt(self, connection: Connection) -> None:
        """Let a new connection of the peer take the place of the one in use."""
        with self._swapping:
            if self._next is not None:
                self._next.close()
            self._next = connection
            self.connection.close()
            self._swapping.notify_all()
        self._bell.ring()

    def _run(self) -> None:
        try:
            while (error := self._broken_by()) is not None:
                self._reconnect(error)
        except StageError as error:
            self._end(error)
        finally:
            if self._listener is not None:
                self._listener.unroute(self.connection.peer, "control")
            if self._next is not None:
                self._next.close()
            self._bell.close()

    def _end(self, error: StageError) -> None:
        left_in_order = self._queue.finished and isinstance(error, LinkError)
        if not left_in_order:
            self._queue.fail(error)
            if not self._closing:
                self._mailbox.report_down(LinkDown(self.connection, error))
        self.connection.close()

    def _broken_by(self) -> LinkError | None:
        """Use the connection until it breaks; None when this end closed it. Raises what ends all."""
        try:
            with self.connection.unblocked(), selectors.DefaultSelector() as ready:
                ready.register(self._bell, selectors.EVENT_READ)
                self._converse(ready)
        except LinkError as error:
            over = self._peer_left or self._queue.finished or self._lost
            if over or (self._redial is None and self._listener is None):
                raise
            return error
        if self._closing:
            return None
        return PeerClosedError(f"{self.connection.peer} has dialled again")

    def _reconnect(self, error: LinkError) -> None:
        """Go on with another connection to the same process; raises where none comes in time."""
        broken = self.connection
        broken.close()
        connection = self._replacement(error)
        with self._swapping:
            connection.succeed(broken)
            self.connection = connection
            if self._closing:
                connection.close()
                raise error
        if connection.hello.incarnation != broken.hello.incarnation:
            raise PeerClosedError(f"{broken.peer} started anew") from error
        log.info("link resumed peer=%s error=%s", connection.peer, error)
        self._forget(connection.hello.last_frame)
        self._again = deque(self._kept)
        self._arrived.clear()  # they come again
        self._acknowledged = 0
        self._heard_s = time.monotonic()
        self._said_bye = False
        self._writer = FrameWriter(connection, self._next_packet)

    def _replacement(self, error: LinkError) -> Connection:
        """The connection that takes the place of a broken one."""
        rejoin_s = min(REJOIN_S, self._lost_after_s)
        until_s = max(self._heard_s + self._lost_after_s, time.monotonic() + rejoin_s)
        while not self._is_over():
            connection = self._dialled() if self._redial else self._adopted(until_s)
            if connection is not None:
                return connection
            if time.monotonic() >= until_s:
                silence = f"{time.monotonic() - self._heard_s:.1f} s"
                raise LinkTimeoutError(
                    f"{self.connection.peer} has been away for {silence}: {error}"
                ) from error
        raise error

    def _dialled(self) -> Connection | None:
        """One attempt to dial, and a short pause where it fails."""
        assert self._redial is not None
        try:
            return self._redial(self.last_message)
        except LinkError as error:
            log.info("link still down peer=%s error=%s", self.connection.peer, error)
        with self._swapping:
            self._swapping.wait_for(self._is_over, REDIAL_PAUSE_S)
        return None

    def _adopted(self, until_s: float) -> Connection | None:
        """The connection that the peer has dialled; None where there is none in time."""
        with self._swapping:
            left_s = max(0.0, until_s - time.monotonic())
            self._swapping.wait_for(lambda: self._next or self._is_over(), left_s)
            connection, self._next = self._next, None
        return connection

    def _is_over(self) -> bool:
        """Whether this end has nothing more to do: all was said, or it was closed."""
        return self._closing or self._queue.finished

    def _converse(self, ready: selectors.BaseSelector) -> None:
        ready.register(self.connection, selectors.EVENT_READ)
        while not self.connection.closed:
            sending = selectors.EVENT_WRITE if self._writer.in_mid_frame else 0
            ready.modify(self.connection, selectors.EVENT_READ | sending)
            ready.select(self._wait_s())
            self._bell.quiet()
            self._read()
            self._writer.write()
            self._judge()

    def _wait_s(self) -> float:
        if self.connection.undelivered():
            return 0.0
        to_beat_s = max(0.0, self._beat_s - time.monotonic())
        return min(to_beat_s, MAILBOX_FULL_S) if self._arrived else to_beat_s

    def _read(self) -> None:
        for _ in range(FRAMES_A_TURN):
            frame = self.connection.read_ready()
            if frame is None:
                break
            self._take(frame)
        while self._arrived and self._mailbox.has_room(self.connection):
            frame = self._arrived.popleft()
            if frame.label.kind is Kind.HEARTBEAT:  # one that was sent as a message, to be the last
                self.heard = Heartbeat.decode(frame)
            else:
                self._mailbox.put(Arrival(self.connection, frame))
            self.last_message = frame.label.frame

    def _take(self, frame: Frame) -> None:
        kind, number = frame.label.kind, frame.label.frame
        if kind is Kind.HEARTBEAT and not number:
            self.heard = Heartbeat.decode(frame)
        elif kind is Kind.ACK:
            self._forget(Ack.decode(frame).frame)
        elif kind is Kind.BYE:
            self._peer_left = True
        elif number > (self._arrived[-1].label.frame if self._arrived else self.last_message):
            if len(self._arrived) >= WINDOW_MESSAGES:
                raise ProtocolError(f"{self.connection.peer} sends more than it was allowed to")
            self._arrived.append(frame)
        else:
            self.connection.counters.duplicates_dropped += 1

    def _forget(self, last_message: int) -> None:
        """Drop the messages that the peer holds."""
        self._queue.sent(self._kept.forget(last_message))

    def _next_packet(self) -> Packet | None:
        """What is to be said next: a heartbeat that is due, acknowledgements, messages, goodbye."""
        run = self.connection.run
        if self._said_bye:
            self.connection.finish()
            return None
        now_s = time.monotonic()
        if now_s >= self._beat_s:
            self._beat_s = now_s + self._heartbeat_s
            return self._vitals().encode(run)
        if self._acknowledged < self.last_message:
            self._acknowledged = self.last_message
            return Ack(0, self.last_message).encode(run)
        if self._again:
            self.connection.counters.frames_sent_again += 1
            return self._again.popleft()
        if self._queue.finished:
            self._said_bye = True
            return Bye().encode(run)
        return self._next_message()

    def _next_message(self) -> Packet | None:
        """The oldest message that waits, numbered, unless the peer has too many to acknowledge."""
        if len(self._kept) >= WINDOW_MESSAGES or self._kept.nbytes >= ROOM_BYTES:
            return None
        packet = self._queue.take()
        if packet is None:
            return None
        self._numbers += 1
        packet = numbered(packet, self._numbers)
        self._kept.add(packet)
        return packet

    def _judge(self) -> None:
        """
        Raise LinkTimeoutError after a silence that this end listened to.

        Whoever can dial again does so after half of it: routers forget connections.
        """
        now_s = time.monotonic()
        received = self.connection.counters.tls_bytes_received
        if received != self._received:
            self._received, self._heard_s = received, now_s
            return
        silence_s = now_s - self._heard_s
        self._lost = silence_s > self._lost_after_s
        if self._lost or (self._redial is not None and silence_s > self._lost_after_s / 2):
            raise LinkTimeoutError(f"{self.connection.peer} has been silent for {silence_s:.1f} s")
