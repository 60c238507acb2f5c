"""
The sending end of a data connection: one thread that writes, behind a bounded queue.

A frame is kept until the receiver says that it holds it. A connection that breaks is a pause: the
sender dials again, the same process answers, and the frames that it has not got are sent again.
Numbers rise on every data connection.
"""

import contextlib
import logging
import threading
import time
from collections.abc import Callable

from stages.control import LinkReport, Refused, decode
from stages.errors import LinkError, LinkTimeoutError, PeerClosedError, StageError
from stages.frame import EpochMismatchError, Packet
from stages.link import Connection
from stages.link_codec import LinkEncoder
from stages.link_meter import SAMPLE_S, TcpState
from stages.mailbox import LinkDown
from stages.send_queue import Bell, Kept, SendQueue
from stages.wire import Ack, ProfileHeld, StepFrame

log = logging.getLogger(__name__)

PATIENCE_S = 20.0  # how long a broken connection may stay away before it counts as down
REDIAL_PAUSE_S = 0.1
GLANCES_A_PATIENCE = 8
"""At whether anything moves; half of them in vain mean that the route is gone."""
LOOK_EVERY_S = SAMPLE_S / 2
WINDOW_FRAMES = 256  # their acknowledgements fit any socket's buffer, so neither end waits for both


class Outbox:
    """
    The one thread that writes a data connection, behind a bounded queue.

    At most `window` frames are unacknowledged at a time, and none is sent once they have the bytes for
    which the peer has given credit: what it does not read is not kept here without bound. With
    `redial`, a connection that broke is dialled again for `patience_s` seconds, each call of `redial`
    being one `dial_once`; so is one over which nothing moves for half of them, though frames are under
    way. When it is down for good, `on_down` is called once from that thread, and every later `put`
    raises the same error.
    """

    def __init__(
        self,
        connection: Connection,
        on_down: Callable[[LinkDown], None],
        capacity: int = 8,
        redial: Callable[[], Connection] | None = None,
        patience_s: float = PATIENCE_S,
        window: int = WINDOW_FRAMES,
        encoder: LinkEncoder | None = None,
    ) -> None:
        self._connection = connection
        self._on_down = on_down
        self._redial = redial
        self._patience_s = patience_s
        self._window = window
        self._encoder = encoder or LinkEncoder(connection.run)
        self._queue: SendQueue[Packet | StepFrame] = SendQueue(connection.peer, capacity)
        self._kept = Kept()
        self._look_again_s = 0.0
        self._bell = Bell()
        self._aborted = threading.Event()
        self._swapping = threading.Lock()
        self._thread = threading.Thread(
            target=self._run, name=f"outbox-{connection.peer}", daemon=True
        )
        self._thread.start()
        self._watch = threading.Thread(
            target=self._watch_route, name=f"watch-{connection.peer}", daemon=True
        )
        if redial is not None:
            self._watch.start()

    def put(self, message: Packet | StepFrame, timeout_s: float | None = None) -> None:
        """Queue a frame; waits while the queue is full, LinkTimeoutError after `timeout_s`.

        A StepFrame's activation is coded when its turn to be sent comes, by the sending thread.
        """
        self._queue.put(message, timeout_s)
        self._bell.ring()

    def report(self) -> LinkReport:
        """What all connections of this outbox have carried, and what their link was seen to do."""
        queue = self._queue
        waiting = {"frames_waiting": queue.waiting, "most_frames_waiting": queue.most_waiting}
        return self._encoder.report(self._connection.report().model_copy(update=waiting))

    def close(self, timeout_s: float = 10.0) -> None:
        """
        Wait until the peer holds every frame, then end the connection.

        Raises the connection's error where it lost a frame, LinkTimeoutError where the peer did not
        take them all in time.
        """
        self._queue.end()
        self._bell.ring()
        self._thread.join(timeout_s)
        delivered = self._queue.finished
        self.abort()
        if not delivered:
            raise LinkTimeoutError(f"{self._connection.peer} did not take the last frames")
        self._queue.check_delivery()

    def abort(self) -> None:
        """End the connection at once; frames still queued are dropped."""
        self._queue.end()
        with self._swapping:
            self._aborted.set()
            self._connection.close()
        self._bell.ring()
        self._thread.join()
        if self._watch.ident is not None:
            self._watch.join()
        self._bell.close()

    def _run(self) -> None:
        try:
            while (error := self._broken_by()) is not None:
                self._reconnect(error)
            with contextlib.suppress(LinkError):  # closed here by now: a report knows a little less
                self._encoder.meter.tcp = self._connection.tcp_state()
        except StageError as error:
            self._queue.fail(error)
            if not self._aborted.is_set():
                self._on_down(LinkDown(self._connection, error))
            self._connection.close()

    def _watch_route(self) -> None:
        """
        Break a connection whose route has forgotten it, in whatever its thread waits there.

        Some box may have taken the frames and lost them, so that TCP knows of none that is missing. A
        peer that is held up says so. Glances are counted, not seconds: this process may have slept.
        """
        seen, in_vain = (self._connection, self._connection.bytes_moved()), 0
        while not self._aborted.wait(self._patience_s / GLANCES_A_PATIENCE):
            if not self._thread.is_alive():
                return
            connection, before = self._connection, seen
            seen = connection, connection.bytes_moved()
            stuck = self._queue.waiting > 0 and seen[1] is not None and seen == before
            in_vain = in_vain + 1 if stuck else 0
            if in_vain == GLANCES_A_PATIENCE // 2:
                log.warning("link forgotten by its route peer=%s", connection.peer)
                connection.close()

    def _broken_by(self) -> LinkError | None:
        """Use the connection until it breaks; None when all was sent."""
        try:
            self._introduce()
            self._send_again()
            self._send_all()
        except LinkError as error:
            return error
        return None

    def _send_again(self) -> None:
        """Send what an earlier connection may have lost."""
        for packet in self._kept:
            self._encoder.sending(packet)
            self._connection.send(packet)
            self._connection.counters.frames_sent_again += 1

    def _send_all(self) -> None:
        """Send frames as they come, until the queue has ended and the peer holds them all."""
        while not self._queue.finished:
            self._take_words()
            self._announce()
            message = None
            if self._has_credit():
                message = self._queue.take()
            if message is not None:
                packet = self._encoder.packet(message)
                self._kept.add(packet)
                self._encoder.sending(packet)
                self._connection.send(packet)
                self._encoder.sent()
            elif not self._queue.finished:
                self._connection.wait(self._bell, None)
                self._bell.quiet()

    def _has_credit(self) -> bool:
        room_bytes = self._connection.hello.room_bytes
        return len(self._kept) < self._window and self._kept.nbytes < room_bytes

    def _introduce(self) -> None:
        """Have a new connection's peer hold the profiles before frames come that need them."""
        self._look_again_s = 0.0
        self._encoder.reconnected(self._connection.hello.dense)
        self._announce()
        while self._encoder.waiting_for_word:
            self._take_word()

    def _announce(self) -> None:
        while (profile := self._encoder.announcement()) is not None:
            self._connection.send(profile)

    def _take_words(self) -> None:
        while self._connection.wait(self._bell, 0):
            self._take_word()

    def _take_word(self) -> None:
        word = decode(self._connection.receive())
        if isinstance(word, Refused):
            raise EpochMismatchError(f"{self._connection.peer} refused a frame: {word.reason}")
        assert isinstance(word, Ack | ProfileHeld), "the connection takes no other kinds"
        self._encoder.heard(word, self._tcp_state())
        if isinstance(word, Ack):
            self._forget(word.frame)

    def _tcp_state(self) -> TcpState:
        """What TCP knew a moment ago at most: to ask the system costs as much as to read a word."""
        now_s = time.monotonic()
        if now_s >= self._look_again_s:
            self._look_again_s = now_s + LOOK_EVERY_S
            self._encoder.meter.tcp = self._connection.tcp_state()
        return self._encoder.meter.tcp

    def _forget(self, last_frame: int) -> None:
        """Drop the frames that the peer holds."""
        self._queue.sent(self._kept.forget(last_frame))

    def _reconnect(self, error: LinkError) -> None:
        """Dial until the same process answers, and learn which frames it has."""
        broken = self._connection
        broken.close()
        connection = self._dialled(error)
        connection.succeed(broken)
        with self._swapping:
            self._connection = connection
            if self._aborted.is_set():
                raise error
        if connection.hello.incarnation != broken.hello.incarnation:
            raise PeerClosedError(f"{broken.peer} started anew") from error
        log.info("link resumed peer=%s error=%s", connection.peer, error)
        self._forget(connection.hello.last_frame)

    def _dialled(self, error: LinkError) -> Connection:
        deadline_s = time.monotonic() + self._patience_s
        while self._redial is not None and time.monotonic() < deadline_s:
            if self._aborted.is_set():
                break
            try:
                return self._redial()
            except LinkError as again:
                log.info("link still down peer=%s error=%s", self._connection.peer, again)
            self._aborted.wait(REDIAL_PAUSE_S)
        raise error
