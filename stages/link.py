"""
A TLS connection between two members of a plan; knows frames, but not what they mean.

Each end proves the key of the certificate that the plan lists under its name; `greeting` makes
connections, this module uses them.

OpenSSL forbids two threads on one TLS object: a connection notices and raises. Other threads may
only call `close`, which touches the TCP socket alone; the using thread frees the rest.
"""

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from stages.control import Hello, LinkReport
from stages.errors import (
    LinkError,
    LinkTimeoutError,
    PeerClosedError,
    PeerRefusedError,
)
from stages.frame import (
    ACK_KINDS,
    PAYLOAD_KINDS,
    Frame,
    FrameReader,
    Kind,
    Packet,
    check_place,
    run_number,
)
from stages.identity import Identity, Member, pin
from stages.link_meter import TcpState
from stages.send_queue import Bell
from stages.stripes import Stripes

Purpose: TypeAlias = Literal["data", "control"]

RECORD_BYTES = 16 * 2**10  # the most that TLS seals at once
BULKY_BYTES = 2 * RECORD_BYTES  # what a receiver awaits as a whole rather than as it comes
BULK_BYTES, BULK_MS = 2**17, 20.0  # the most that it awaits at once, and for how long
SILENCE_MS = 60_000  # unacknowledged bytes end a connection after this; heartbeats judge sooner
_TCP_OPTIONS = (
    ("TCP_NODELAY", 1),
    ("TCP_KEEPIDLE", 10),
    ("TCP_KEEPINTVL", 10),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", SILENCE_MS),
)

BBR_STRIPES = 1  # more carry a little more under loss, but keep the queue before the wire full
OTHER_STRIPES = 16
BUFFER_BYTES = 16 * 2**20  # twice what is under way at 500 Mbit/s and a round trip of 130 ms
_BUFFERS = (
    (socket.SO_SNDBUF, "core/wmem_max", "ipv4/tcp_wmem"),
    (socket.SO_RCVBUF, "core/rmem_max", "ipv4/tcp_rmem"),
)
"""Option, the most that a program may ask for, and the most that the kernel gives unasked."""


class Trust:
    """The plan's members, and TLS contexts that believe nobody else."""

    def __init__(self, identity: Identity, members: Iterable[Member]) -> None:
        self._members = tuple(members)
        self._names = {member.pin: member.name for member in self._members}
        if len(self._names) < len(self._members):
            raise PeerRefusedError("the plan lists one certificate under two names")
        self.server = self._context(ssl.PROTOCOL_TLS_SERVER, identity)
        self.server.num_tickets = 0  # no resumption: every connection proves its key
        self.client = self._context(ssl.PROTOCOL_TLS_CLIENT, identity)

    def name_of(self, tls: ssl.SSLSocket) -> str:
        """The member whose certificate the peer proved; PeerRefusedError if it is nobody's."""
        certificate = tls.getpeercert(binary_form=True)
        name = self._names.get(pin(certificate)) if certificate else None
        if name is None:
            raise PeerRefusedError("the peer's certificate is in no place of the plan")
        return name

    def _context(self, protocol: int, identity: Identity) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
        context.check_hostname = False  # names are the plan's, and pins say who bears them
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(identity.certificate_path, identity.key_path)
        if self._members:
            context.load_verify_locations(
                cadata="\n".join(m.certificate_pem for m in self._members)
            )
        return context


@dataclass(slots=True)
class Counters:
    """What a connection has carried; written by the thread that uses it."""

    frames_sent: int = 0
    frames_received: int = 0
    payload_bytes_sent: int = 0
    payload_bytes_received: int = 0
    framing_bytes_sent: int = 0
    ack_bytes_sent: int = 0
    control_bytes_sent: int = 0
    tls_bytes_received: int = 0
    blocked_s: float = 0.0
    reconnects: int = 0
    frames_sent_again: int = 0
    duplicates_dropped: int = 0

    @property
    def tls_bytes_sent(self) -> int:
        """Plain bytes handed to TLS, of every kind."""
        coded = self.payload_bytes_sent + self.framing_bytes_sent
        return coded + self.ack_bytes_sent + self.control_bytes_sent


class Connection:
    """
    A TLS connection to a peer whose name, run and epoch were checked; used by one thread.

    Of several TLS sockets it makes one stream of bytes; it breaks when any of them does.
    """

    def __init__(
        self,
        sockets: Sequence[ssl.SSLSocket],
        hello: Hello,
        purpose: Purpose,
        incoming: frozenset[Kind],
    ) -> None:
        self.peer = hello.name
        self.hello = hello
        """The peer's greeting."""
        self.purpose: Purpose = purpose
        self.counters = Counters()
        self.share = object()
        """Whose share of a mailbox its frames take: its own, or that of the first it replaces."""
        self.congestion_control = _congestion_control(sockets[0])
        self.sockets = tuple(sockets)
        self._tls = sockets[0]
        self._stream = Stripes(sockets) if len(sockets) > 1 else sockets[0]
        self.run = run_number(hello.run)
        """The number under which frames of this run travel."""
        self._epoch = hello.epoch if purpose == "data" else None
        self._reader = FrameReader(incoming)
        self._incoming = select.poll()
        self._incoming.register(self._tls, select.POLLIN)
        self._use = threading.Lock()
        self._closing = False

    @property
    def closed(self) -> bool:
        """Whether this end closed the connection."""
        return self._closing

    def fileno(self) -> int:
        """The socket's descriptor, for select."""
        return self._tls.fileno()

    def report(self) -> LinkReport:
        """The counters so far, as a value."""
        c = self.counters
        return LinkReport(
            peer=self.peer,
            purpose=self.purpose,
            congestion_control=self.congestion_control,
            frames_sent=c.frames_sent,
            frames_received=c.frames_received,
            payload_bytes_sent=c.payload_bytes_sent,
            payload_bytes_received=c.payload_bytes_received,
            framing_bytes_sent=c.framing_bytes_sent,
            ack_bytes_sent=c.ack_bytes_sent,
            control_bytes_sent=c.control_bytes_sent,
            tls_bytes_sent=c.tls_bytes_sent,
            tls_bytes_received=c.tls_bytes_received,
            blocked_s=c.blocked_s,
            reconnects=c.reconnects,
            frames_sent_again=c.frames_sent_again,
            duplicates_dropped=c.duplicates_dropped,
        )

    def tcp_state(self) -> TcpState:
        """What the system says of the connection; for the using thread."""
        return TcpState.together([TcpState.of(tls) for tls in self.sockets])

    def succeed(self, broken: "Connection") -> None:
        """Take over the counters and the share of room of the connection that this one replaces."""
        self.counters, self.share = broken.counters, broken.share
        self.counters.reconnects += 1

    def send(self, packet: Packet) -> None:
        """Send one frame whole; blocks while the peer takes nothing, raises LinkError."""
        with self._sole_use():
            started_s, worked_s = time.perf_counter(), time.thread_time()
            for piece in pieces(packet):
                self._stream.sendall(piece)
            waited_s = (time.perf_counter() - started_s) - (time.thread_time() - worked_s)
            self.counters.blocked_s += max(0.0, waited_s)
            self.note_sent(packet)

    def receive(self) -> Frame:
        """The next frame; raises PeerClosedError at the end, ProtocolError for what is no frame."""
        with self._sole_use():
            frame = None
            while frame is None:
                self._await_bulk()
                frame = self._advance(self._stream.recv_into(self._reader.buffer()))
            return frame

    def _await_bulk(self) -> None:
        """
        Sleep until much of a large frame lies ready: waking for every packet costs more than TLS.

        On a slower wire the time limit ends it, and what has come is read.
        """
        missing = min(len(self._reader.buffer()), BULK_BYTES)
        if missing < BULKY_BYTES or self._stream is not self._tls or self._tls.pending():
            return
        self._tls.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, missing)
        self._incoming.poll(BULK_MS)
        self._tls.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    @contextlib.contextmanager
    def unblocked(self) -> Iterator[None]:
        """Hold the connection for one thread's select loop, with reads and writes that return."""
        with self._sole_use():
            self._tls.setblocking(False)
            yield

    def read_ready(self, limit_bytes: int = 2**20) -> Frame | None:
        """The frame that bytes at hand complete, if they do; only inside `unblocked`."""
        stop_at = self.counters.tls_bytes_received + limit_bytes
        frame = None
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            while frame is None and self.counters.tls_bytes_received < stop_at:
                frame = self._advance(self._tls.recv_into(self._reader.buffer()))
        return frame

    def write_ready(self, piece: memoryview) -> int:
        """Bytes taken of a piece, 0 if none can be now; only inside `unblocked`."""
        try:
            return self._tls.send(piece)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    def wait(self, bell: Bell, timeout_s: float | None) -> bool:
        """Wait for bytes or for the bell; whether bytes lie ready, so that `receive` hardly waits."""
        with self._sole_use():
            if self.undelivered():
                return True
            if isinstance(self._stream, Stripes):
                return self._stream.wait(bell, timeout_s)
            waiting = select.poll()  # unlike select, for descriptors of any number
            waiting.register(self._tls, select.POLLIN)
            waiting.register(bell, select.POLLIN)
            ready = waiting.poll(None if timeout_s is None else timeout_s * 1000)
            return any(descriptor == self._tls.fileno() for descriptor, _ in ready)

    def undelivered(self) -> bool:
        """Whether TLS holds decrypted bytes that select does not see."""
        return self._stream.pending() > 0

    def note_sent(self, packet: Packet) -> None:
        """Count a frame that went out whole."""
        counters = self.counters
        counters.frames_sent += 1
        if packet.kind in PAYLOAD_KINDS:
            counters.payload_bytes_sent += len(packet.payload)
            counters.framing_bytes_sent += len(packet.head)
        elif packet.kind in ACK_KINDS:
            counters.ack_bytes_sent += packet.size
        else:
            counters.control_bytes_sent += packet.size

    def refuse(self, packet: Packet) -> None:
        """Say a last frame, take no more, and end the connection once the peer could hear it."""
        with self._sole_use():
            self._stream.sendall(bytes(packet))
            self._closing = True
            for tls in self.sockets:
                part(tls)

    def finish(self) -> None:
        """Tell the peer that nothing more will be sent; it may still send."""
        socket.socket.shutdown(self._tls, socket.SHUT_WR)

    def close(self) -> None:
        """End the connection at once, from any thread; what was sent still goes out."""
        self._closing = True
        for tls in self.sockets:
            with contextlib.suppress(OSError):  # not connected any more: that was the aim
                # The base class's shutdown: SSLSocket's own would touch the TLS object.
                socket.socket.shutdown(tls, socket.SHUT_RDWR)
        self._free()

    def _free(self) -> None:
        """Give the descriptor back, unless another thread is inside: then it does so itself."""
        if self._use.acquire(blocking=False):
            for tls in self.sockets:
                tls.close()
            self._use.release()

    @contextlib.contextmanager
    def _sole_use(self) -> Iterator[None]:
        if not self._use.acquire(blocking=False):
            raise RuntimeError(f"two threads use the TLS connection to {self.peer}")
        try:
            if self._closing:
                raise LinkError(f"the connection to {self.peer} was closed here")
            yield
        except OSError as error:
            raise link_error(f"the connection to {self.peer}", error) from error
        finally:
            self._use.release()
            if self._closing:
                self._free()

    def _advance(self, count: int) -> Frame | None:
        if count == 0:
            where = "between frames" if self._reader.between_frames else "in mid-frame"
            raise PeerClosedError(f"{self.peer} closed its connection {where}")
        self.counters.tls_bytes_received += count
        frame = self._reader.advance(count)
        if frame is not None:
            check_place(frame.label, self.run, self._epoch)
            self.counters.frames_received += 1
            if frame.label.kind in PAYLOAD_KINDS:
                self.counters.payload_bytes_received += len(frame.payload)
        return frame


def pieces(packet: Packet) -> Iterator[bytes | memoryview]:
    """
    A frame's bytes in as few TLS records as can be, without copying more than one of them.

    A large frame's head is a record by itself, so that the receiver soon knows how much will come.
    """
    first = max(0, RECORD_BYTES - len(packet.head)) if len(packet.payload) < BULKY_BYTES else 0
    yield b"".join((packet.head, packet.payload[:first]))
    if len(packet.payload) > first:
        yield packet.payload[first:]


def part(connection: socket.socket) -> None:
    """Close after the other end could read why: closing over unread bytes would reset it."""
    deadline_s = time.monotonic() + 1.0
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_WR)
        connection.settimeout(1.0)
        while time.monotonic() < deadline_s and socket.socket.recv(connection, RECORD_BYTES):
            pass
    connection.close()


def tune(raw: socket.socket) -> None:
    """Send small frames at once, notice dead peers, use BBR where allowed, hold a long wire's bytes.

    Room to receive counts from the first packet on, so a listening socket is tuned before it listens.
    """
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, explicit_limit, tuned_limit in _BUFFERS:
        allowed = 2 * min(BUFFER_BYTES, kernel_limit(explicit_limit))  # the kernel doubles it
        if allowed > kernel_limit(tuned_limit):
            raw.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    for name, value in _TCP_OPTIONS:
        if hasattr(socket, name):  # not every system has every option
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_CONGESTION"):
        with contextlib.suppress(OSError):  # not allowed here: the report says what runs instead
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


@dataclass(frozen=True, slots=True)
class LinkHabits:
    """What data connections get on this host."""

    congestion_control: str
    stripes: int
    send_bytes: int
    """The most that one TLS connection can hold."""
    receive_bytes: int


def link_habits() -> LinkHabits:
    """What a socket here is given, and how many make a data connection."""
    with socket.socket() as raw:
        tune(raw)
        control = _congestion_control(raw)
        room = [
            max(raw.getsockopt(socket.SOL_SOCKET, option), kernel_limit(tuned_limit))
            for option, _, tuned_limit in _BUFFERS
        ]
    return LinkHabits(control, BBR_STRIPES if control == "bbr" else OTHER_STRIPES, *room)


def kernel_limit(name: str) -> int:
    """A limit under /proc/sys/net in bytes, of three numbers the last; 0 where there is none."""
    path = Path("/proc/sys/net") / name
    return int(path.read_text(encoding="ascii").split()[-1]) if path.is_file() else 0


def _congestion_control(connection: socket.socket) -> str:
    if not hasattr(socket, "TCP_CONGESTION"):
        return "unknown"
    name = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
    return name.rstrip(b"\0").decode("ascii")


def link_error(place: str, error: OSError) -> LinkError:
    """Our error for the system's, with the place that it concerns."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ConnectionError):
        return PeerClosedError(f"{place} broke: {error}")
    if isinstance(error, TimeoutError):
        return LinkTimeoutError(f"{place} does not answer: {error}")
    return LinkError(f"{place} failed: {error}")
