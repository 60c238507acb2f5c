"""Hosts as network namespaces, joined by TUN devices and one forwarder; needs root on Linux.

A namespace has no name: it lives as long as a thread or a process is in it, so nothing can be left
behind. Inside, addresses are 10.77.0.x and the only way leads over the emulated wires.
"""

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path as FilePath
from typing import TypeVar

import psutil

from benchmarks.wan_board import Board, Path, Traffic
from benchmarks.wan_child import as_child

T = TypeVar("T")

HERE = FilePath(__file__).parent
MAX_HOSTS = 64
TCP_BUFFER_BYTES = 64 * 2**20  # the wire shall be the limit, not the host: 500 Mbit/s over 0.5 s
SETTLE_S = 5.0

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8916, 0x891C, 0x8922, 0x8943
_DEVICE = b"wan0"
_QUEUED_PACKETS = 4096  # between a host and the forwarder; the wire's queue is the forwarder's


class Namespaces:
    """N hosts, each a namespace and a thread in it; every ordered pair is a wire."""

    def __init__(
        self,
        hosts: Sequence[str],
        mtu: int = 1500,
        seed: int = 0,
        compiler: str | None = shutil.which("cc"),
        tcp_buffer_bytes: int | None = TCP_BUFFER_BYTES,
    ) -> None:
        """
        `seed` draws the losses. Without a `compiler` the forwarder is Python, and slow. TCP may
        buffer `tcp_buffer_bytes` a socket; None leaves what the system allows.
        """
        if not 2 <= len(hosts) <= MAX_HOSTS:
            raise ValueError(f"{len(hosts)} hosts: a network has 2 to {MAX_HOSTS}")
        self._hosts = {name: number for number, name in enumerate(hosts)}
        self._inside = {name: ThreadPoolExecutor(1, f"wan-{name}") for name in hosts}
        self._children: list[subprocess.Popen[bytes]] = []
        self._board = Board(len(hosts))
        tuns: list[int] = []
        try:
            for name in hosts:
                enter = partial(_enter, self.address(name), mtu, tcp_buffer_bytes)
                tuns.append(self.inside(name, enter))
            self._forwarder = _start_forwarder(compiler, seed, self._board.descriptor, tuns)
        except BaseException:
            self._end_hosts()
            raise
        finally:
            for tun in tuns:
                os.close(tun)  # the forwarder has its own

    def address(self, host: str) -> str:
        """The host's IPv4 address, the same seen from every other."""
        return f"10.77.0.{self._hosts[host] + 1}"

    def endpoint(self, source: str, target: str, port: int) -> tuple[str, int]:
        """Where `source` dials to reach a port of `target`."""
        return self.address(target), port

    def set_path(self, source: str, target: str, path: Path) -> None:
        """Give a wire its rate, delay, loss and queue."""
        self._board.set_path(self._pair(source, target), path)

    def set_up(self, source: str, target: str, up: bool) -> None:
        """Mend or cut a wire."""
        self._board.set_up(self._pair(source, target), up)

    def traffic(self, source: str, target: str) -> Traffic:
        """What a wire has carried."""
        return self._board.traffic(self._pair(source, target))

    def inside(self, host: str, function: Callable[[], T]) -> T:
        """The value of a short function called in the host; sockets that it makes stay there."""
        return self._inside[host].submit(function).result()

    def popen(
        self, host: str, words: Sequence[str], env: Mapping[str, str] | None, stdout: int | None
    ) -> "subprocess.Popen[bytes]":
        """A process in the host, which ends no later than this one."""
        child = self.inside(host, lambda: subprocess.Popen(as_child(words), env=env, stdout=stdout))
        self._children.append(child)
        return child

    def close(self) -> None:
        """End every process of every host, and the hosts; RuntimeError if the wires had failed."""
        namespaces = [self.inside(name, _namespace) for name in self._hosts]
        _kill_residents(set(namespaces))
        for child in self._children:
            child.wait()
        assert self._forwarder.stdin is not None
        self._forwarder.stdin.close()
        ended = self._forwarder.wait()
        self._end_hosts()
        if ended not in (0, -signal.SIGINT):
            raise RuntimeError(f"the forwarder ended with {ended}: what was measured is void")

    def _end_hosts(self) -> None:
        for thread in self._inside.values():
            thread.shutdown()
        self._board.close()

    def _pair(self, source: str, target: str) -> int:
        return self._hosts[source] * len(self._hosts) + self._hosts[target]


def obstacle() -> str | None:
    """Why this process cannot have such hosts; None if it can."""
    if sys.platform != "linux":
        return f"{sys.platform} has no network namespaces"
    with ThreadPoolExecutor(1) as thread:
        try:
            os.close(thread.submit(_enter, "10.77.0.1", 1500, None).result())
        except OSError as error:
            return str(error)
    return None


def _start_forwarder(
    compiler: str | None, seed: int, board: int, tuns: Sequence[int]
) -> "subprocess.Popen[bytes]":
    descriptors = (board, *tuns)
    arguments = [str(seed), *map(str, descriptors)]
    with tempfile.TemporaryDirectory() as scratch:
        program = [sys.executable, "-m", "benchmarks.wan_forwarder"]
        if compiler is not None:
            program = [str(FilePath(scratch, "wan_forwarder"))]
            source = HERE / "wan_forwarder.c"
            subprocess.run([compiler, "-O2", "-o", program[0], source], check=True)
        return subprocess.Popen(
            [*program, *arguments], stdin=subprocess.PIPE, pass_fds=descriptors, cwd=HERE.parent
        )


def _enter(address: str, mtu: int, tcp_buffer_bytes: int | None) -> int:
    """Move this thread into a new namespace with a loopback and one TUN device; the device."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no new network namespace without root: {os.strerror(number)}")
    for limit in ("tcp_rmem", "tcp_wmem"):
        if tcp_buffer_bytes is not None:
            _raise_limit(FilePath("/proc/sys/net/ipv4", limit), tcp_buffer_bytes)
    ipv6 = FilePath("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    if ipv6.exists():
        ipv6.write_text("1", encoding="ascii")  # its router solicitations are nobody's traffic
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", _DEVICE, _IFF_TUN | _IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        _set(control, _SIOCSIFADDR, struct.pack("HH4s8x", socket.AF_INET, 0, _packed(address)))
        netmask = struct.pack("HH4s8x", socket.AF_INET, 0, _packed("255.255.255.0"))
        _set(control, _SIOCSIFNETMASK, netmask)
        _set(control, _SIOCSIFMTU, struct.pack("i12x", mtu))
        _set(control, _SIOCSIFTXQLEN, struct.pack("i12x", _QUEUED_PACKETS))
        for device in (b"lo", _DEVICE):
            asked = struct.pack("16s16x", device)
            (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, asked), 16)
            _set(control, _SIOCSIFFLAGS, struct.pack("H14x", flags | _IFF_UP), device)
    return tun


def _set(control: socket.socket, request: int, value: bytes, device: bytes = _DEVICE) -> None:
    fcntl.ioctl(control, request, struct.pack("16s16s8x", device, value))


def _packed(address: str) -> bytes:
    return socket.inet_aton(address)


def _raise_limit(limit: FilePath, most_bytes: int) -> None:
    least, default, _ = limit.read_text(encoding="ascii").split()
    limit.write_text(f"{least} {default} {most_bytes}", encoding="ascii")


def _namespace() -> str:
    return str(FilePath("/proc/thread-self/ns/net").readlink())


def _kill_residents(namespaces: set[str]) -> None:
    """End every process in the namespaces, also those that our children have started."""
    assert _lives_in(os.getpid()) not in namespaces, "a host's namespace is this process's own"
    deadline_s = time.monotonic() + SETTLE_S
    while residents := [pid for pid in psutil.pids() if _lives_in(pid) in namespaces]:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"processes {residents} outlive SIGKILL")
        for pid in residents:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue  # ended by itself
        time.sleep(0.01)


def _lives_in(pid: int) -> str | None:
    try:
        return str(FilePath(f"/proc/{pid}/ns/net").readlink())
    except OSError:  # ended meanwhile, or not ours to look into
        return None
