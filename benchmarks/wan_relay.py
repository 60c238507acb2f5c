"""Hosts as loopback processes, joined by TCP relays that delay and pace bytes; needs no rights.

What a relay cannot do: TCP ends at it, so packets are not lost, congestion control meets no wire,
connecting takes no time, and the sender's socket buffers come on top of the queue. A partition
holds bytes back instead of dropping packets, which TCP's own retransmission comes to as well. Only
connections to an `endpoint` pass a relay, and processes that a host's process starts are not ended.
"""

import contextlib
import queue
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

from benchmarks.wan_board import Path, Traffic
from benchmarks.wan_child import as_child

T = TypeVar("T")
Chunks: TypeAlias = "queue.Queue[tuple[float, bytes] | None]"

LOOPBACK = "127.0.0.1"
CHUNK_S = 0.001  # of a wire's time; bytes are paced so finely
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1448, 2**16
MAX_CHUNKS = 1024


class Relays:
    """N hosts that share the loopback; every ordered pair is a wire of bytes."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._wires = {(a, b): _Wire() for a in hosts for b in hosts if a != b}
        self._relays: dict[tuple[str, str, int], _Relay] = {}
        self._children: list[subprocess.Popen[bytes]] = []

    def address(self, host: str) -> str:
        """Where a host listens: the loopback, like every other."""
        return LOOPBACK

    def endpoint(self, source: str, target: str, port: int) -> tuple[str, int]:
        """Where `source` dials to reach a port of `target` over the emulated wire."""
        known = (source, target, port)
        if known not in self._relays:
            there, back = self._wires[source, target], self._wires[target, source]
            self._relays[known] = _Relay(port, there, back)
        return LOOPBACK, self._relays[known].port

    def set_path(self, source: str, target: str, path: Path) -> None:
        """Give a wire its rate, delay and queue; ValueError for a loss."""
        if path.loss:
            raise ValueError(f"{path}: a relay loses no bytes; emulating loss needs root on Linux")
        self._wires[source, target].path = path

    def set_up(self, source: str, target: str, up: bool) -> None:
        """Let bytes pass, or hold them."""
        wire = self._wires[source, target]
        (wire.up.set if up else wire.up.clear)()

    def traffic(self, source: str, target: str) -> Traffic:
        """What a wire has carried: bytes, without headers; it knows no packets."""
        wire = self._wires[source, target]
        return Traffic(0, wire.sent_bytes, 0, wire.delivered_bytes, 0, 0, 0, 0)

    def inside(self, host: str, function: Callable[[], T]) -> T:
        """The function's value: all hosts are here."""
        return function()

    def popen(
        self, host: str, words: Sequence[str], env: Mapping[str, str] | None, stdout: int | None
    ) -> "subprocess.Popen[bytes]":
        """A process, which on Linux ends no later than this one."""
        child = subprocess.Popen(as_child(words), env=env, stdout=stdout)
        self._children.append(child)
        return child

    def close(self) -> None:
        """End the processes and the relays."""
        for child in self._children:
            child.kill()
            child.wait()
        for wire in self._wires.values():
            wire.up.set()
        for relay in self._relays.values():
            relay.close()


class _Wire:
    """One ordered pair: all its connections share the rate."""

    def __init__(self) -> None:
        self.path = Path()
        self.up = threading.Event()
        self.up.set()
        self.sent_bytes = 0
        self.delivered_bytes = 0
        self._free_s = 0.0
        self._lock = threading.Lock()

    @property
    def chunk_bytes(self) -> int:
        """How many bytes to read at once."""
        fitting = int(self.path.rate_bit_per_s / 8 * CHUNK_S)
        return min(max(fitting, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)

    def take(self, size: int) -> float:
        """When bytes read now will arrive; sleeps while the queue is full."""
        path = self.path
        with self._lock:
            start_s = max(self._free_s, time.monotonic())
            self._free_s = start_s + 8 * size / path.rate_bit_per_s
            self.sent_bytes += size
            due_s = self._free_s + path.delay_s
        time.sleep(max(0.0, start_s - time.monotonic() - path.queue_s))
        return due_s

    def arrived(self, size: int) -> None:
        """Count bytes that the target's socket has taken."""
        with self._lock:
            self.delivered_bytes += size


class _Relay:
    """A port that stands for a port of another host, and the connections through it."""

    def __init__(self, target_port: int, there: _Wire, back: _Wire) -> None:
        self._target_port = target_port
        self._wires = there, back
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listening.getsockname()[1])
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._accepting = self._start(self._serve)

    def close(self) -> None:
        """Break every connection and end every thread."""
        self._listening.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listening.close()
        for end in self._ends:
            _hang_up(end)
        for thread in self._threads:
            thread.join()
        for end in self._ends:
            end.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=work, args=arguments, name="wan-relay", daemon=True)
        thread.start()
        return thread

    def _serve(self) -> None:
        there, back = self._wires
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:  # closed
                return
            there.up.wait()
            try:
                far = socket.create_connection((LOOPBACK, self._target_port))
            except ConnectionRefusedError:
                near.close()
                continue
            self._ends += [near, far]
            for source, target, wire in ((near, far, there), (far, near, back)):
                for end in (source, target):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                chunks: Chunks = queue.Queue(MAX_CHUNKS)
                self._threads.append(self._start(_read, source, wire, chunks))
                self._threads.append(self._start(_write, chunks, wire, target, source))


def _read(source: socket.socket, wire: _Wire, chunks: Chunks) -> None:
    with contextlib.suppress(OSError):  # reset: for the other end it is over as well
        while chunk := source.recv(wire.chunk_bytes):
            chunks.put((wire.take(len(chunk)), chunk))
            wire.up.wait()
    chunks.put(None)


def _write(chunks: Chunks, wire: _Wire, target: socket.socket, source: socket.socket) -> None:
    broken = False
    while item := chunks.get():
        due_s, chunk = item
        if broken:
            continue  # the reader may be waiting for room
        time.sleep(max(0.0, due_s - time.monotonic()))
        wire.up.wait()
        try:
            target.sendall(chunk)
            wire.arrived(len(chunk))
        except OSError:
            broken = True
            _hang_up(source)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _hang_up(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side was faster
        end.shutdown(socket.SHUT_RDWR)
