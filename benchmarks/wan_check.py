"""Whether the emulated network does what it is set to: TCP's own rate and round trip over it.

Rates are payload over time at the receiver, so headers count against them: 3.5 % at an MTU of 1500.
"""

import socket
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from benchmarks.record import Claim, record
from benchmarks.wan import MakeCarrier, Namespaces, Path, Relays, Wan, obstacle

ROUND_TRIPS = 25
WARM_UP_S = 3.0  # and 20 round trips: TCP must have found the rate
SLICES, SLICE_S = 5, 0.6
DELAYS_S = (0.0025, 0.025, 0.1)
CELLS = ((20e6, 1500), (100e6, 1500), (500e6, 9000))  # bit/s and MTU

Pair = tuple[socket.socket, socket.socket]


@contextmanager
def connected(wan: Wan, source: str, target: str, congestion_control: str) -> Iterator[Pair]:
    """A TCP connection over the network, the source's end first."""
    listening = wan.inside(target, lambda: socket.create_server((wan.address(target), 0)))
    place = wan.endpoint(source, target, listening.getsockname()[1])
    with listening, wan.inside(source, lambda: socket.create_connection(place)) as near:
        far, _ = listening.accept()
        with far:
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if congestion_control:
                    name = congestion_control.encode("ascii")
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name)
            yield near, far


def round_trip_s(near: socket.socket, far: socket.socket, times: int = ROUND_TRIPS) -> float:
    """The median time for one byte and one byte back, over an idle connection."""

    def echo() -> None:
        while byte := far.recv(1):
            far.sendall(byte)

    echoing = threading.Thread(target=echo)
    echoing.start()
    taken_s = []
    for _ in range(times):
        started_s = time.perf_counter()
        near.sendall(b"?")
        near.recv(1)
        taken_s.append(time.perf_counter() - started_s)
    near.shutdown(socket.SHUT_WR)
    echoing.join()
    return statistics.median(taken_s)


@dataclass
class Flood:
    """As many bytes as TCP carries, from one end to the other, until `stop`."""

    near: socket.socket
    far: socket.socket
    received_bytes: int = 0
    threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Begin to send and to receive."""
        for work in (self._send, self._receive):
            self.threads.append(threading.Thread(target=work))
            self.threads[-1].start()

    def stop(self) -> None:
        """Send no more; what is on its way is dropped."""
        for end in (self.near, self.far):
            end.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()

    def rate_bit_per_s(self, seconds: float) -> float:
        """Payload that arrives during so many seconds."""
        started_s, before = time.perf_counter(), self.received_bytes
        time.sleep(seconds)
        return 8 * (self.received_bytes - before) / (time.perf_counter() - started_s)

    def _send(self) -> None:
        zeros = bytes(2**18)
        with suppress(OSError):  # stopped
            while True:
                self.near.sendall(zeros)

    def _receive(self) -> None:
        room = bytearray(2**20)
        with suppress(ConnectionResetError):  # what was still unread when the other end stopped
            while count := self.far.recv_into(room):
                self.received_bytes += count


def flood_bit_per_s(near: socket.socket, far: socket.socket, rtt_s: float) -> float:
    """The median rate over a few slices of time, once TCP has found it."""
    flood = Flood(near, far)
    flood.start()
    time.sleep(WARM_UP_S + 20 * rtt_s)
    rates = [flood.rate_bit_per_s(SLICE_S) for _ in range(SLICES)]
    flood.stop()
    return statistics.median(rates)


def check(rate_bit_per_s: float, mtu: int, delay_s: float, carrier: MakeCarrier,
          congestion_controls: tuple[str, ...]) -> list[Claim]:  # fmt: skip
    """Set a network of two hosts and measure it; the first congestion control is judged."""
    path = Path(rate_bit_per_s, delay_s)
    place = f"{rate_bit_per_s / 1e6:.0f} Mbit/s, MTU {mtu}, RTT {2e3 * delay_s:.0f} ms"
    claims = []
    with Wan(("a", "b"), path, carrier) as wan:
        for name in congestion_controls:
            with connected(wan, "a", "b", name) as (near, far):
                measured = flood_bit_per_s(near, far, 2 * delay_s)
            label = f"{place}: TCP {name}".rstrip()
            claims.append(Claim(label, measured / 1e6, "Mbit/s"))
            if name == congestion_controls[0]:
                off = 100 * abs(measured / rate_bit_per_s - 1)
                claims.append(Claim(f"{label} off by", off, "%", limit=7))
            time.sleep(path.queue_s + 4 * delay_s)
        with connected(wan, "a", "b", "") as (near, far):
            rtt_s = round_trip_s(near, far)
        claims.append(Claim(f"{place}: round trip", 1e3 * rtt_s, "ms"))
        claims.append(
            Claim(f"{place}: round trip off by", 50 * abs(rtt_s / delay_s - 2), "%", limit=10)
        )
        carried = wan.counters()["a", "b"]
        if carried.delivered_packets:
            late = 100 * carried.late_packets / carried.delivered_packets
            claims.append(Claim(f"{place}: packets over 1 ms late", late, "%"))
    return claims


def congestion_controls() -> tuple[str, ...]:
    """BBR and CUBIC where this process may choose them, else whatever the system takes."""
    allowed = []
    with socket.socket() as trial:
        for name in ("bbr", "cubic"):
            try:
                trial.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode("ascii"))
            except OSError:  # not in this kernel, or not for us
                continue
            allowed.append(name)
    return tuple(allowed) or ("",)


def main() -> None:
    """Measure every cell as well as this user can; leave wan.json where it was namespaces."""
    missing = obstacle()
    namespaces = missing is None
    if missing:
        print(f"relays in place of namespaces: {missing}")
    controls = congestion_controls() if namespaces else ("",)
    claims = []
    for rate_bit_per_s, mtu in CELLS:
        for delay_s in DELAYS_S:
            carrier = partial(Namespaces, mtu=mtu) if namespaces else Relays
            claims += check(rate_bit_per_s, mtu, delay_s, carrier, controls)
    record("wan" if namespaces else "wan_relay", claims)


if __name__ == "__main__":
    main()
