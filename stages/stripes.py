"""
One stream of bytes over several TLS connections, for wires on which one alone is slow.

A congestion control that takes every loss for congestion leaves most of a long, lossy wire idle;
several share it better. The stream is cut into numbered chunks; each goes to a connection that can
take it now, and the other end puts them in order. One thread uses all connections of a stream.
"""

import select
import ssl
import struct
from collections.abc import Sequence

from stages.errors import ProtocolError
from stages.send_queue import Bell
from stages.tcp import limit_unsent

CHUNK_BYTES = 64 * 2**10
MAX_AHEAD = 512  # chunks that may arrive before one that is missing: 32 MiB
UNSENT_BYTES = 2 * CHUNK_BYTES  # waiting in one socket to be sent at all; more would only age there
_CHUNK = struct.Struct("<QI")


class _Stripe:
    """One connection of a stream: the chunk it is sending, and the one it is receiving."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        tls.setblocking(False)
        limit_unsent(tls, UNSENT_BYTES)
        self.tls = tls
        self.ended = False
        self.last = -1
        """Number of the chunk that came last."""
        self._unsent = memoryview(b"")
        self._expect(memoryview(bytearray(_CHUNK.size)), None)

    def _expect(self, space: memoryview, number: int | None) -> None:
        self._space, self._filled, self._number = space, 0, number

    def load(self, chunk: bytes) -> None:
        """Begin to send a chunk; the one before has left."""
        self._unsent = memoryview(chunk)

    def flush(self) -> bool:
        """Send what can be sent now; whether nothing is left."""
        try:
            while self._unsent:
                self._unsent = self._unsent[self.tls.send(self._unsent) :]
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return False
        return True

    def read(self) -> tuple[int, memoryview] | None:
        """The chunk that bytes at hand complete, with its number; notes where the bytes end."""
        try:
            while True:
                count = self.tls.recv_into(self._space[self._filled :])
                if count == 0:
                    self.ended = True
                    return None
                self._filled += count
                if self._filled == len(self._space) and (chunk := self._completed()):
                    return chunk
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def _completed(self) -> tuple[int, memoryview] | None:
        head = memoryview(bytearray(_CHUNK.size))
        if self._number is not None:
            chunk = self._number, self._space
            self.last = self._number
            self._expect(head, None)
            return chunk
        number, length = _CHUNK.unpack(self._space)
        if number <= self.last or not 0 < length <= CHUNK_BYTES:
            raise ProtocolError(f"chunk {number} of {length} bytes came after chunk {self.last}")
        self._expect(memoryview(bytearray(length)), number)
        return None


class Stripes:
    """The stream; reads and writes like a blocking socket."""

    def __init__(self, sockets: Sequence[ssl.SSLSocket]) -> None:
        self._stripes = [_Stripe(tls) for tls in sockets]
        self._by_descriptor = {stripe.tls.fileno(): stripe for stripe in self._stripes}
        self._sent = 0
        self._due = 0
        """Number of the chunk that comes next in order."""
        self._early: dict[int, memoryview] = {}
        self._current = memoryview(b"")

    def sendall(self, piece: bytes | memoryview) -> None:
        """Hand every byte to a connection; the last of them may leave in the next call of any kind."""
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), CHUNK_BYTES):
            chunk = view[start : start + CHUNK_BYTES]
            stripe = self._free()
            stripe.load(b"".join((_CHUNK.pack(self._sent, len(chunk)), chunk)))
            stripe.flush()
            self._sent += 1

    def recv_into(self, buffer: memoryview) -> int:
        """Bytes in their order, at least one; 0 at the end of the stream."""
        while not self._current:
            chunk = self._early.pop(self._due, None)
            if chunk is not None:
                self._current = chunk
                self._due += 1
            elif not self._read():
                if self._ended:
                    return 0
                self._poll(None, None)
        count = min(len(buffer), len(self._current))
        buffer[:count] = self._current[:count]
        self._current = self._current[count:]
        return count

    def pending(self) -> int:
        """Bytes that can be had without waiting."""
        self._read()
        return len(self._current) + len(self._early.get(self._due, b""))

    def wait(self, bell: Bell, timeout_s: float | None) -> bool:
        """Wait for bytes, an end or the bell; whether bytes or an end came."""
        return self._ended or self._poll(bell, timeout_s)

    @property
    def _ended(self) -> bool:
        """Whether one connection has ended, and so the stream; no poll tells of that again."""
        return any(stripe.ended for stripe in self._stripes)

    def _free(self) -> _Stripe:
        """A connection that takes a chunk now."""
        while True:
            for stripe in self._stripes:
                if stripe.flush():
                    return stripe
            writing = select.poll()
            for stripe in self._stripes:
                writing.register(stripe.tls, select.POLLOUT)
            writing.poll()

    def _read(self) -> bool:
        """Take what has arrived; whether that was a chunk at least."""
        before = len(self._early)
        for stripe in self._readable():
            chunk = stripe.read()
            while chunk is not None:
                self._keep(*chunk)
                chunk = stripe.read() if stripe.last < self._due + MAX_AHEAD else None
        return len(self._early) > before

    def _keep(self, number: int, chunk: memoryview) -> None:
        """Hold a chunk until its turn; what comes twice would be held for ever."""
        if number < self._due or number in self._early:
            raise ProtocolError(f"chunk {number} came again, when chunk {self._due} was due")
        self._early[number] = chunk

    def _readable(self) -> list[_Stripe]:
        """Those that may read: a connection far ahead waits for the one that holds what is due."""
        return [s for s in self._stripes if not s.ended and s.last < self._due + MAX_AHEAD]

    def _poll(self, bell: Bell | None, timeout_s: float | None) -> bool:
        """Send what waits, until bytes come, the bell rings, or the time is over."""
        while True:
            waiting = select.poll()
            for stripe in self._stripes:
                waiting.register(stripe.tls, 0 if stripe.flush() else select.POLLOUT)
            for stripe in self._readable():
                waiting.modify(
                    stripe.tls, select.POLLIN | (0 if stripe.flush() else select.POLLOUT)
                )
            if bell is not None:
                waiting.register(bell, select.POLLIN)
            ready = waiting.poll(None if timeout_s is None else timeout_s * 1000)
            if not ready or any(happened != select.POLLOUT for _, happened in ready):
                return any(descriptor in self._by_descriptor for descriptor, _ in ready)
