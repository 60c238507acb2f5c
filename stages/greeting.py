"""
What two members of a plan say to each other before anything else: a hello, and a hello back.

Both ends prove their key, compare the certificate with the plan's for that name, and exchange name,
run and epoch. In TLS 1.3 a refused client learns of it only at its next read, so a dialer has a
connection only after the listener's own hello came back.
"""

import ssl
import time
from typing import TypeAlias

from stages.errors import LinkTimeoutError, PeerClosedError
from stages.frame import GREETING_KINDS, Frame, Packet
from stages.frame_reader import FrameReader

Address: TypeAlias = tuple[str, int]


def send_greeting(tls: ssl.SSLSocket, packet: Packet) -> None:
    """Say one frame whole."""
    tls.sendall(bytes(packet))


def read_greeting(tls: ssl.SSLSocket, deadline_s: float) -> Frame:
    """One greeting frame and not a byte more, before the deadline."""
    reader = FrameReader(GREETING_KINDS)
    frame = None
    while frame is None:
        tls.settimeout(left_s(deadline_s))
        count = tls.recv_into(reader.buffer())
        if count == 0:
            raise PeerClosedError("the peer went away before its hello")
        frame = reader.advance(count)
    return frame


def left_s(deadline_s: float) -> float:
    """Seconds of a handshake's time that are left; LinkTimeoutError where none are."""
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise LinkTimeoutError("the handshake took too long")
    return left
