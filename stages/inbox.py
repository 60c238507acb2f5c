"""
The receiving end of a data connection: one thread that reads, decodes, acknowledges, and outlives a
break.

What comes twice, because its acknowledgement was lost with a connection, is dropped by its number.
"""

import logging
import threading

from stages.control import LinkReport, Refused
from stages.errors import LinkError, PeerClosedError, StageError
from stages.frame import EpochMismatchError, Kind
from stages.link import Connection
from stages.link_codec import LinkDecoder
from stages.listener import Listener
from stages.mailbox import Arrival, LinkDown, Mailbox
from stages.outbox import PATIENCE_S
from stages.wire import Ack

log = logging.getLogger(__name__)

WORDS_A_PATIENCE = 8
"""From an end that is held up; the other takes half a patience in silence for a loss."""


class Inbox:
    """
    The one thread that reads a data connection, into a mailbox, and acknowledges each frame.

    A frame of another epoch is refused, its sender told, and the connection ended. With a `listener`,
    a connection that broke may be replaced by its peer for `patience_s` seconds; only then, or when
    another incarnation of the peer dials, it is reported as down.
    """

    def __init__(
        self,
        connection: Connection,
        mailbox: Mailbox,
        listener: Listener | None = None,
        patience_s: float = PATIENCE_S,
        decoder: LinkDecoder | None = None,
    ) -> None:
        self.last_frame = -1
        """Number of the last frame that the mailbox got."""
        self._connection = connection
        self._epoch = connection.hello.epoch
        self._mailbox = mailbox
        self._listener = listener
        self._patience_s = patience_s if listener else 0.0
        self._word_s = patience_s / WORDS_A_PATIENCE
        self._decoder = decoder or LinkDecoder()
        self._changed = threading.Condition()
        self._next: Connection | None = None
        self._restarted = False
        self._closing = False
        if listener is not None:
            listener.route(connection.peer, self._adopt, lambda: self.last_frame)
        self._thread = threading.Thread(
            target=self._run, name=f"inbox-{connection.peer}", daemon=True
        )
        self._thread.start()

    def report(self) -> LinkReport:
        """What all connections of this inbox have carried."""
        return self._connection.report()

    def close(self) -> None:
        """End the connection and its thread; what the mailbox holds stays there."""
        if self._listener is not None:
            self._listener.unroute(self._connection.peer)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._connection.close()
        self._thread.join()
        if self._next is not None:
            self._next.close()

    def _adopt(self, connection: Connection) -> None:
        """Let a new connection of the peer take the place of the one in use."""
        with self._changed:
            if connection.hello.incarnation != self._connection.hello.incarnation:
                self._restarted = True
                connection.close()
            else:
                if self._next is not None:
                    self._next.close()
                self._next = connection
            self._connection.close()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                try:
                    self._read()
                except LinkError as error:
                    self._replace(error)
                except EpochMismatchError as error:
                    refused = Refused(reason=str(error), cause="epoch", epoch=self._epoch)
                    self._connection.refuse(refused.encode(self._connection.run, self._epoch))
                    self._replace(error)
        except StageError as error:
            if not self._closing:
                self._mailbox.report_down(LinkDown(self._connection, error))
            self._connection.close()

    def _read(self) -> None:
        source = self._connection
        while True:
            frame = source.receive()
            self._decoder.came()
            if frame.label.kind is Kind.PROFILE:
                self._decoder.learn(frame)
                self._answer_profiles()
                continue
            if frame.label.frame > self.last_frame:
                self._hand_over(Arrival(source, self._decoder.opened(frame)))
                self.last_frame = frame.label.frame
            else:
                source.counters.duplicates_dropped += 1
            word = self._decoder.acknowledgement(frame.label.epoch, self.last_frame)
            source.send(word.encode(source.run))
            self._answer_profiles()

    def _hand_over(self, arrival: Arrival) -> None:
        """Put a frame into the mailbox; while that is full, have the sender hear that this end lives."""
        while not self._mailbox.put(arrival, self._word_s):
            word = Ack(arrival.frame.label.epoch, self.last_frame)
            arrival.source.send(word.encode(arrival.source.run))

    def _answer_profiles(self) -> None:
        """Tell the sender which profiles are held; of a dense one, when this end can decode with it."""
        while (word := self._decoder.word()) is not None:
            self._connection.send(word.encode(self._connection.run))

    def _replace(self, error: StageError) -> None:
        """Go on with the connection that replaces a broken one; raises where none comes."""
        self._connection.close()  # the sender may await words on another lane than the one that broke
        with self._changed:
            self._changed.wait_for(
                lambda: self._next or self._restarted or self._closing, self._patience_s
            )
            if self._restarted:
                raise PeerClosedError(f"{self._connection.peer} started anew") from error
            if self._next is None or self._closing:
                raise error
            self._next.succeed(self._connection)
            self._connection, self._next = self._next, None
        self._decoder.reconnected()
        log.info("link resumed peer=%s error=%s", self._connection.peer, error)
