"""Writes frames to a connection that may not block its thread, as much at a time as it takes."""

import time
from collections.abc import Callable, Iterator

from stages.frame import Packet
from stages.link import Connection, pieces

PIECES_A_TURN = 16  # written before whoever loops reads again


class FrameWriter:
    """Asks `next_packet` for a frame whenever the one before is out; None is nothing to say now."""

    def __init__(self, connection: Connection, next_packet: Callable[[], Packet | None]) -> None:
        self._connection = connection
        self._next_packet = next_packet
        self._sending: Packet | None = None
        self._pieces: Iterator[bytes | memoryview] = iter(())
        self._piece = memoryview(b"")
        self._blocked_since_s: float | None = None

    @property
    def in_mid_frame(self) -> bool:
        """Whether the connection is to be waited for."""
        return self._sending is not None

    def write(self) -> None:
        """Write until the connection takes no more, nothing is left, or it is another's turn."""
        for _ in range(PIECES_A_TURN):
            if not self._load():
                return
            taken = self._connection.write_ready(self._piece)
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
                self._connection.note_sent(self._sending)
            self._sending = self._next_packet()
            if self._sending is None:
                return False
            self._pieces = pieces(self._sending)
        return True

    def _count_blocked(self, taken: int) -> None:
        now_s = time.monotonic()
        if self._blocked_since_s is not None:
            self._connection.counters.blocked_s += now_s - self._blocked_since_s
        self._blocked_since_s = now_s if taken == 0 else None
