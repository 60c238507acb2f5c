"""
TCP connections under links: what this host gives them, how they part, what their errors mean.

BBR paces by itself, and gets no limit of ours. A limit of 95 % of its estimate draws the estimate down:
to 67 of 100 Mbit/s in 25 s, at a round trip of 200 ms. One of 98 or 95 % of the wire itself, set once
BBR knows it (`benchmarks.links`), leaves no queue, so that a message beside bulk is 1 to 3 ms late in
place of 13 to 21; but then each moment in which a sender has nothing ready is lost to the wire: it
carried 94 Mbit/s in place of 95 on a quiet machine, and 92 in place of 96 on a busy one. From estimates
of ours, made while a queue stood, it carried 85 to 95 in ten trials. Rows an hour come first. A limit
set before the wire is full, or while packets are lost, is taken for a policer's for 48 round trips (58
Mbit/s at 1 % loss).

Nor is a long wire emptied every ten seconds, as BBR does to see the least round trip: two connections
take turns (`turns`). At 200 ms that is worth 1 to 4 of 100 Mbit/s, and where it is not full, half a
second of late frames every ten.
"""

import contextlib
import socket
import ssl
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from stages.errors import LinkError, LinkTimeoutError, PeerClosedError

SILENCE_MS = 60_000
"""Bytes that the other end's system has not taken for so long end a connection.

That it answers and has no room counts as well: a peer held up by a full mailbox. Links judge sooner and
better, by what they hear.
"""
_TCP_OPTIONS = (
    ("TCP_NODELAY", 1),
    ("TCP_KEEPIDLE", 10),
    ("TCP_KEEPINTVL", 10),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", SILENCE_MS),
)

PARTING_BYTES = 16 * 2**10  # thrown away at a time, of what a peer said too late


@dataclass(frozen=True, slots=True)
class Bundle:
    """TLS connections that carry one link's frames: all at once, or one at a time in turns."""

    stripes: int = 1
    in_turns: bool = False


BBR_BUNDLE = Bundle(2, in_turns=True)  # at once, they would keep the queue before the wire full
OTHER_BUNDLE = Bundle(16)

BUFFER_BYTES = 16 * 2**20  # twice what is under way at 500 Mbit/s and a round trip of 130 ms


@dataclass(frozen=True, slots=True)
class _Buffer:
    """One way's room in the kernel."""

    option: int
    forced: int
    """The option that root may set beyond the limit, of which Python has no name."""
    explicit_limit: str
    """The most that a program may ask for."""
    tuned_limit: str
    """The most that the kernel gives unasked, as it is needed."""


_BUFFERS = (
    _Buffer(socket.SO_SNDBUF, 32, "core/wmem_max", "ipv4/tcp_wmem"),
    _Buffer(socket.SO_RCVBUF, 33, "core/rmem_max", "ipv4/tcp_rmem"),
)


def tune(raw: socket.socket) -> None:
    """Send small frames at once, notice dead peers, use BBR where allowed, hold a long wire's bytes.

    Room to receive counts from the first packet on, so a listening socket is tuned before it listens.
    """
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for buffer in _BUFFERS:
        _make_room(raw, buffer)
    for name, value in _TCP_OPTIONS:
        if hasattr(socket, name):  # not every system has every option
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_CONGESTION"):
        with contextlib.suppress(OSError):  # not allowed here: the report says what runs instead
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"bbr")


def open_window(connection: socket.socket) -> None:
    """
    Let a connection take in much from its first byte on; what it may take later is the kernel's to say.

    The kernel begins with 64 KiB and widens that as a program reads. A connection that carries a frame
    now and then, or is not read until its turn comes, stays narrow: at a round trip of 50 ms frames of
    320 KiB took 80 ms in place of 40, and 2 s as a job began. Told to wake its program for so much at
    once, the kernel makes the room for it, whoever asks (Linux from 4.18 on).
    """
    if sys.platform == "linux":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, BUFFER_BYTES)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def limit_unsent(connection: socket.socket, nbytes: int) -> None:
    """Let no more wait in the kernel to be sent at all, where it can be told so."""
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, nbytes)


def _make_room(raw: socket.socket, buffer: _Buffer) -> None:
    """
    BUFFER_BYTES, or as much of it as this host allows; the kernel doubles what it is asked for.

    At 200 ms and 100 Mbit/s BBR has up to 15 MB under way as it starts. A socket that cannot hold them
    looks to it like a sender with little to say: with 8 MiB its start went on for 12 s, for which an
    eighth of all packets found the queue before the wire full.
    """
    unasked = kernel_limit(buffer.tuned_limit)
    if unasked >= 2 * BUFFER_BYTES:
        return
    if sys.platform == "linux":
        with contextlib.suppress(PermissionError):  # not root
            raw.setsockopt(socket.SOL_SOCKET, buffer.forced, BUFFER_BYTES)
            return
    if 2 * min(BUFFER_BYTES, kernel_limit(buffer.explicit_limit)) > unasked:
        raw.setsockopt(socket.SOL_SOCKET, buffer.option, BUFFER_BYTES)


@dataclass(frozen=True, slots=True)
class LinkHabits:
    """What data connections get on this host."""

    congestion_control: str
    bundle: Bundle
    send_bytes: int
    """The most that one TLS connection can hold."""
    receive_bytes: int


def link_habits() -> LinkHabits:
    """What a socket here is given, and how many make a data connection."""
    with socket.socket() as raw:
        tune(raw)
        control = congestion_control(raw)
        room = [
            max(raw.getsockopt(socket.SOL_SOCKET, each.option), kernel_limit(each.tuned_limit))
            for each in _BUFFERS
        ]
    return LinkHabits(control, BBR_BUNDLE if control == "bbr" else OTHER_BUNDLE, *room)


def kernel_limit(name: str) -> int:
    """A limit under /proc/sys/net in bytes, of three numbers the last; 0 where there is none."""
    path = Path("/proc/sys/net") / name
    return int(path.read_text(encoding="ascii").split()[-1]) if path.is_file() else 0


def congestion_control(connection: socket.socket) -> str:
    """The name of the one that a TCP connection uses; "unknown" where the system does not say."""
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


def part(connection: socket.socket) -> None:
    """Close after the other end could read why: closing over unread bytes would reset it."""
    deadline_s = time.monotonic() + 1.0
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_WR)
        connection.settimeout(1.0)
        while time.monotonic() < deadline_s and socket.socket.recv(connection, PARTING_BYTES):
            pass
    connection.close()
