"""What a link does with bytes, seen in passing: its rate, its round trip, what it lost.

The rate comes from acknowledgements. A link is taken for a queue that serves frames one after the
other, and then holds each back for a round trip: a frame's service ends a least round trip before
its acknowledgement arrives, and begins when the frame was sent, or when the one before it ended. So
idle time does not count, and neither does what the receiver did with the frame. Where the system
tells TCP's least round trip and what it has delivered per second, they are used, and the larger rate
holds: both err towards too little. Without them a link that never has two frames at once looks
faster than it is, for then a frame's own time cannot be told from the round trip.
"""

import math
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

from stages.frame import Packet

SAMPLE_S: Final = 0.1  # acknowledgements are read in bursts; over a moment the bursts even out
SMALLEST_SAMPLE_BYTES: Final = 4096  # below, a frame tells of round trips, not of rates
BUSY_OVER_S: Final = 10.0  # some rounds of a ring, which differ

_TCP_INFO = struct.Struct("<68xI28xI44xI4xIQ")  # of Linux's tcp_info, the fields of TcpState


_TCP_MOVED = struct.Struct("<120xQQ")  # acknowledged by the peer's system, and received from it


def bytes_moved(connection: socket.socket) -> int | None:
    """Bytes that a connection has brought there or here; None where the system does not say."""
    if not hasattr(socket, "TCP_INFO"):
        return None
    told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_MOVED.size)
    return sum(_TCP_MOVED.unpack(told)) if len(told) == _TCP_MOVED.size else None


@dataclass(frozen=True, slots=True)
class TcpState:
    """What the system says of a TCP connection; zeros where it says nothing."""

    rtt_s: float = 0.0
    min_rtt_s: float = 0.0
    segments_sent: int = 0
    segments_sent_again: int = 0
    bytes_per_s: float = 0.0
    """Delivered, by its latest sample that was not held back by a lack of bytes, or a larger one."""

    @classmethod
    def of(cls, connection: socket.socket) -> Self:
        """The state now; raises OSError where the connection is closed."""
        if not hasattr(socket, "TCP_INFO"):
            return cls()
        told = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        if len(told) < _TCP_INFO.size:  # a kernel of before 2016
            return cls()
        rtt_us, again, min_rtt_us, sent, rate = _TCP_INFO.unpack(told)
        return cls(rtt_us / 1e6, min_rtt_us / 1e6, sent, again, float(rate))

    @classmethod
    def together(cls, states: Sequence[Self], turn: int | None = None) -> Self:
        """The state of connections that carry one stream: at once, or the one at `turn` alone."""
        active = states if turn is None else states[turn : turn + 1]
        return cls(
            sum(state.rtt_s for state in active) / len(active),
            min(state.min_rtt_s for state in states),
            sum(state.segments_sent for state in states),
            sum(state.segments_sent_again for state in states),
            sum(state.bytes_per_s for state in active),
        )


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the acknowledgements of a moment tell of the link."""

    nbytes: int
    busy_s: float
    """Seconds that the link spent on them."""


@dataclass(frozen=True, slots=True)
class _UnderWay:
    frame: int
    nbytes: int
    sent_s: float


class LinkMeter:
    """One link's figures over all its connections; changed by its sending thread alone."""

    def __init__(self) -> None:
        self.tcp = TcpState()
        self.busy_share = 0.0
        """Of the link's latest BUSY_OVER_S or so, those in which it had work."""
        self._earlier = TcpState()
        """Sums of the connections before this one."""
        self._under_way: deque[_UnderWay] = deque()
        self._least_rtt_s = float("inf")
        self._idle_since_s = 0.0
        self._told_s = 0.0
        """When the last moment was over."""
        self._nbytes = 0
        self._busy_s = 0.0
        """Since then."""

    @property
    def segments_sent(self) -> int:
        """TCP segments with payload, on all connections."""
        return self._earlier.segments_sent + self.tcp.segments_sent

    @property
    def segments_sent_again(self) -> int:
        """Those that TCP had to repeat."""
        return self._earlier.segments_sent_again + self.tcp.segments_sent_again

    def reconnected(self) -> None:
        """Nothing is under way on a new connection, and its path may be another."""
        self._earlier = TcpState(
            segments_sent=self.segments_sent, segments_sent_again=self.segments_sent_again
        )
        self.tcp = TcpState()
        self._under_way.clear()
        self._least_rtt_s = float("inf")

    def sending(self, packet: Packet, now_s: float) -> None:
        """A frame is about to be handed to TLS."""
        self._under_way.append(_UnderWay(packet.frame, packet.size, now_s))

    def acknowledged(
        self, frame: int, held_s: float, now_s: float, tcp: TcpState
    ) -> Delivery | None:
        """The peer holds every frame up to this one, which it held for so long before it said so.

        What it tells, together with those before it; None while that is not enough.
        """
        self.tcp = tcp
        arrived = []
        while self._under_way and self._under_way[0].frame <= frame:
            arrived.append(self._under_way.popleft())
        if not arrived:
            return None
        under_way_s = max(0.0, now_s - held_s - arrived[-1].sent_s)
        self._least_rtt_s = min(self._least_rtt_s, under_way_s)
        served_s = now_s - held_s - (tcp.min_rtt_s or self._least_rtt_s)
        busy_s = max(0.0, served_s - max(arrived[0].sent_s, self._idle_since_s))
        self._idle_since_s = max(served_s, self._idle_since_s)
        nbytes = sum(each.nbytes for each in arrived)
        if nbytes >= SMALLEST_SAMPLE_BYTES:
            self._nbytes += nbytes
            self._busy_s += busy_s
        return self._moment(now_s)

    def _moment(self, now_s: float) -> Delivery | None:
        """What was seen since the last moment, if that is long enough ago."""
        if not self._nbytes or now_s - self._told_s < SAMPLE_S:
            return None
        nbytes, busy_s = self._nbytes, self._busy_s
        if self.tcp.bytes_per_s:
            busy_s = min(busy_s, nbytes / self.tcp.bytes_per_s)
        past_s = now_s - self._told_s
        newest = 1 - math.exp(-past_s / BUSY_OVER_S)
        self.busy_share += newest * (min(1.0, busy_s / past_s) - self.busy_share)
        self._told_s, self._nbytes, self._busy_s = now_s, 0, 0.0
        return Delivery(nbytes, busy_s)
