"""
A TLS connection between two members of a plan; knows frames, but not what they mean.

Each end proves the key of the certificate that the plan lists under its name; `dialing` and `listener`
make connections, this module uses them.

One thread uses a connection; other threads may only call `close`, which touches the TCP sockets alone
(`sole_use`).
"""

import contextlib
import select
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from stages.control import Hello, LinkReport
from stages.errors import PeerClosedError
from stages.frame import (
    ACK_KINDS,
    PAYLOAD_KINDS,
    TURN_KINDS,
    Frame,
    Kind,
    Label,
    Packet,
    check_place,
    run_number,
    seal,
)
from stages.frame_reader import FrameReader
from stages.link_meter import TcpState, bytes_moved
from stages.send_queue import Bell
from stages.sole_use import SoleUse
from stages.stripes import Stripes
from stages.tcp import congestion_control, limit_unsent, open_window
from stages.turns import MOST_UNSENT_BYTES, Turns, unsent_bytes

Purpose: TypeAlias = Literal["data", "control"]

RECORD_BYTES = 16 * 2**10  # the most that TLS seals at once
BULKY_BYTES = 2 * RECORD_BYTES  # what a receiver awaits as a whole rather than as it comes
BULK_BYTES, BULK_MS = 2**17, 20.0  # the most that it awaits at once, and for how long


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

    Of several TLS sockets it makes one stream of bytes, or has them carry frames in turns; it breaks
    when one that it uses does.
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
        self.congestion_control = congestion_control(sockets[0])
        self.sockets = tuple(sockets)
        self._tls = sockets[0]
        at_once = len(sockets) > 1 and not hello.in_turns
        for tls in sockets:
            if purpose == "data":
                open_window(tls)
            if hello.in_turns:
                limit_unsent(tls, MOST_UNSENT_BYTES)
        self._lanes = (Stripes(sockets),) if at_once else self.sockets
        """What carries a frame by itself."""
        self._sending, self._receiving = Turns(len(self._lanes)), 0
        """Whose turn it is, either way."""
        self.run = run_number(hello.run)
        """The number under which frames of this run travel."""
        self._epoch = hello.epoch if purpose == "data" else None
        self._reader = FrameReader(incoming | TURN_KINDS if hello.in_turns else incoming)
        self._watched: tuple[tuple[ssl.SSLSocket | Bell, ...], select.poll] = (), select.poll()
        self._sole_use = SoleUse(hello.name, self.sockets)

    @property
    def closed(self) -> bool:
        """Whether this end closed the connection."""
        return self._sole_use.closing

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
        """What the system says of the connection; for the using thread, raises LinkError."""
        with self._sole_use:
            states = [TcpState.of(tls) for tls in self.sockets]
            turn = self._sending.current if self.hello.in_turns else None
            return TcpState.together(states, turn)

    def bytes_moved(self) -> int | None:
        """Bytes that have gone there or come here, TLS's own too; for any thread.

        None where nobody can say, or no more.
        """
        with contextlib.suppress(OSError):
            moved = [bytes_moved(tls) for tls in self.sockets]
            told = [count for count in moved if count is not None]
            return sum(told) if len(told) == len(moved) else None
        return None

    def succeed(self, broken: "Connection") -> None:
        """Take over the counters and the share of room of the connection that this one replaces."""
        self.counters, self.share = broken.counters, broken.share
        self.counters.reconnects += 1

    def send(self, packet: Packet) -> None:
        """Send one frame whole; blocks while the peer takes nothing, raises LinkError."""
        with self._sole_use:
            started_s, worked_s = time.perf_counter(), time.thread_time()
            if packet.kind in PAYLOAD_KINDS and self._sending.over(now_s := time.monotonic()):
                self._write(seal(Label(Kind.TURN, self.run, self.hello.epoch), b"", b""))
                self._sending.pass_on(now_s)
                self._keep_little_unsent()
                self._write(packet, opening=True)
            else:
                self._write(packet)
            waited_s = (time.perf_counter() - started_s) - (time.thread_time() - worked_s)
            self.counters.blocked_s += max(0.0, waited_s)

    def _keep_little_unsent(self) -> None:
        """Let as much wait in the kernel as suits what the wire was seen to carry."""
        bytes_per_s = max(TcpState.of(tls).bytes_per_s for tls in self.sockets)
        for tls in self.sockets:
            limit_unsent(tls, unsent_bytes(bytes_per_s))

    def _write(self, packet: Packet, opening: bool = False) -> None:
        lane = self._lanes[self._sending.current]
        for piece in pieces(packet, opening):
            lane.sendall(piece)
        self.note_sent(packet)

    def receive(self) -> Frame:
        """The next frame; raises PeerClosedError at the end, ProtocolError for what is no frame."""
        with self._sole_use:
            frame = None
            while frame is None:
                lane = self._lanes[self._receiving]
                if isinstance(lane, ssl.SSLSocket):
                    self._await_bulk(lane)
                frame = self._advance(lane.recv_into(self._reader.buffer()))
            return frame

    def _await_bulk(self, tls: ssl.SSLSocket) -> None:
        """
        Sleep until much of a large frame lies ready: waking for every packet costs more than TLS.

        On a slower wire the time limit ends it, and what has come is read.
        """
        missing = min(len(self._reader.buffer()), BULK_BYTES)
        if missing < BULKY_BYTES or tls.pending():
            return
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, missing)
        self._watching(tls).poll(BULK_MS)
        tls.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)

    @contextlib.contextmanager
    def unblocked(self) -> Iterator[None]:
        """Hold the connection for one thread's select loop, with reads and writes that return."""
        with self._sole_use:
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
        with self._sole_use:
            if self.undelivered():
                return True
            lane = self._lanes[self._receiving]
            if isinstance(lane, Stripes):
                return lane.wait(bell, timeout_s)
            watching = self._watching(lane, bell)
            ready = watching.poll(None if timeout_s is None else timeout_s * 1000)
            return any(descriptor == lane.fileno() for descriptor, _ in ready)

    def _watching(self, *sources: ssl.SSLSocket | Bell) -> select.poll:
        """What tells of bytes there; kept, for they are mostly the same."""
        if self._watched[0] != sources:
            incoming = select.poll()  # unlike select, for descriptors of any number
            for each in sources:
                incoming.register(each, select.POLLIN)
            self._watched = sources, incoming
        return self._watched[1]

    def undelivered(self) -> bool:
        """Whether TLS holds decrypted bytes that select does not see."""
        return self._lanes[self._receiving].pending() > 0

    def note_sent(self, packet: Packet) -> None:
        """Count a frame that went out whole; what passes a turn on is bytes alone."""
        counters = self.counters
        counters.frames_sent += packet.kind not in TURN_KINDS
        if packet.kind in PAYLOAD_KINDS:
            counters.payload_bytes_sent += len(packet.payload)
            counters.framing_bytes_sent += len(packet.head)
        elif packet.kind in TURN_KINDS:
            counters.framing_bytes_sent += packet.size
        elif packet.kind in ACK_KINDS:
            counters.ack_bytes_sent += packet.size
        else:
            counters.control_bytes_sent += packet.size

    def refuse(self, packet: Packet) -> None:
        """Say a last frame, take no more, and end the connection once the peer could hear it."""
        with self._sole_use:
            self._lanes[self._sending.current].sendall(bytes(packet))
            self._sole_use.part()

    def finish(self) -> None:
        """Tell the peer that nothing more will be sent; it may still send."""
        for tls in self.sockets:
            socket.socket.shutdown(tls, socket.SHUT_WR)

    def close(self) -> None:
        """End the connection at once, from any thread; what was sent still goes out."""
        self._sole_use.close()

    def _advance(self, count: int) -> Frame | None:
        if count == 0:
            where = "between frames" if self._reader.between_frames else "in mid-frame"
            raise PeerClosedError(f"{self.peer} closed its connection {where}")
        self.counters.tls_bytes_received += count
        frame = self._reader.advance(count)
        if frame is None:
            return None
        check_place(frame.label, self.run, self._epoch)
        if frame.label.kind in TURN_KINDS:
            self._receiving = (self._receiving + 1) % len(self._lanes)
            return None
        self.counters.frames_received += 1
        if frame.label.kind in PAYLOAD_KINDS:
            self.counters.payload_bytes_received += len(frame.payload)
        return frame


def pieces(packet: Packet, opening: bool = False) -> Iterator[bytes | memoryview]:
    """
    A frame's bytes in as few TLS records as can be, without copying more than one of them.

    A large frame's head is a record by itself, so that the receiver soon knows how much will come. Not
    so where it is `opening` a turn: one small packet's acknowledgement may be late on purpose, and BBR
    would not measure by it.
    """
    beside = max(0, RECORD_BYTES - len(packet.head))
    if len(packet.payload) >= BULKY_BYTES and not opening:
        beside = 0
    yield b"".join((packet.head, packet.payload[:beside]))
    if len(packet.payload) > beside:
        yield packet.payload[beside:]
