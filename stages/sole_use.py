"""Sockets that one thread uses at a time, and that any thread may close."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Sequence
from types import TracebackType

from stages.errors import LinkError
from stages.tcp import link_error, part


class SoleUse:
    """
    Entered around every use of a connection's TLS sockets; an OSError inside becomes a LinkError.

    OpenSSL forbids two threads on one TLS object: the second raises RuntimeError here. A class, since
    a generator's `with` took a fifth of a small frame's processor time.
    """

    def __init__(self, peer: str, sockets: Sequence[ssl.SSLSocket]) -> None:
        self.closing = False
        """Whether this end closed the connection."""
        self._peer = peer
        self._sockets = sockets
        self._inside = threading.Lock()

    def __enter__(self) -> None:
        if not self._inside.acquire(blocking=False):
            self._require_open()  # else it may be `close` that holds it, for a moment
            raise RuntimeError(f"two threads use the TLS connection to {self._peer}")
        if self.closing:
            self._leave()
            self._require_open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave()
        if isinstance(error, OSError):
            raise link_error(f"the connection to {self._peer}", error) from error

    def close(self) -> None:
        """End the connection at once, from any thread; what was sent still goes out."""
        self.closing = True
        for tls in self._sockets:
            with contextlib.suppress(OSError):  # not connected any more: that was the aim
                # The base class's shutdown: SSLSocket's own would touch the TLS object.
                socket.socket.shutdown(tls, socket.SHUT_RDWR)
        self._free()

    def part(self) -> None:
        """End the connection once the peer could hear what was said last; for the thread inside."""
        self.closing = True
        for tls in self._sockets:
            part(tls)

    def _leave(self) -> None:
        self._inside.release()
        if self.closing:
            self._free()

    def _free(self) -> None:
        """Give the descriptors back, unless another thread is inside: then it does so itself."""
        if self._inside.acquire(blocking=False):
            for tls in self._sockets:
                tls.close()
            self._inside.release()

    def _require_open(self) -> None:
        if self.closing:
            raise LinkError(f"the connection to {self._peer} was closed here")
