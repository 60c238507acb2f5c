"""
A slow, lossy, long network between hosts on one machine; real TCP crosses it.

    with Wan(("a", "b"), Path(rate_bit_per_s=100e6, delay_s=0.020)) as wan:
        server = wan.popen("b", [sys.executable, "-m", "stages.worker", ...])
        wan.partition("a", "b", both=False)

As root on Linux hosts are network namespaces (`Namespaces`); otherwise relays on the loopback, which
emulate less (`Relays` says what). Run as a program, this module measures itself.
"""

import subprocess
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeAlias, TypeVar

from benchmarks.wan_board import Path, Traffic
from benchmarks.wan_namespaces import Namespaces, obstacle
from benchmarks.wan_relay import Relays

__all__ = ["Carrier", "Namespaces", "Path", "Relays", "Traffic", "Wan", "best_carrier", "obstacle"]

T = TypeVar("T")

ORDINARY = Path()  # 100 Mbit/s, 20 ms, no loss


class Carrier(Protocol):
    """What carries bytes between hosts: `Namespaces` or `Relays`."""

    def address(self, host: str) -> str: ...
    def endpoint(self, source: str, target: str, port: int) -> tuple[str, int]: ...
    def set_path(self, source: str, target: str, path: Path) -> None: ...
    def set_up(self, source: str, target: str, up: bool) -> None: ...
    def traffic(self, source: str, target: str) -> Traffic: ...
    def inside(self, host: str, function: Callable[[], T]) -> T: ...
    def popen(
        self, host: str, words: Sequence[str], env: Mapping[str, str] | None, stdout: int | None
    ) -> "subprocess.Popen[bytes]": ...
    def close(self) -> None: ...


MakeCarrier: TypeAlias = Callable[[Sequence[str]], Carrier]


def best_carrier(hosts: Sequence[str]) -> Carrier:
    """Namespaces where nothing is in their way, else relays."""
    return Relays(hosts) if obstacle() else Namespaces(hosts)


class Wan:
    """
    Hosts by name, and a wire for every ordered pair of them; gone when closed.

    All wires start as `default`. A host's processes end with this one, however it ends.
    """

    def __init__(
        self,
        hosts: Sequence[str],
        default: Path = ORDINARY,
        carrier: MakeCarrier = best_carrier,
    ) -> None:
        self.hosts = tuple(hosts)
        if len(set(self.hosts)) < len(self.hosts):
            raise ValueError(f"two hosts of one name among {self.hosts}")
        self.carrier = carrier(self.hosts)
        self._paths: dict[tuple[str, str], Path] = {}
        for source, target in self.pairs():
            self.set(source, target, default)
            self.carrier.set_up(source, target, True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def pairs(self) -> list[tuple[str, str]]:
        """Every ordered pair of hosts."""
        return [(a, b) for a in self.hosts for b in self.hosts if a != b]

    def path(self, source: str, target: str) -> Path:
        """What the wire from one host to another is set to."""
        return self._paths[source, target]

    def set(self, source: str, target: str, path: Path) -> None:
        """Change one direction; holds for what is sent from now on."""
        self.carrier.set_path(source, target, path)
        self._paths[source, target] = path

    def partition(self, source: str, target: str, both: bool = True) -> None:
        """Cut the wire from one host to another, and the way back too unless `both` is False."""
        self._set_up(source, target, both, up=False)

    def heal(self, source: str, target: str, both: bool = True) -> None:
        """Mend what `partition` cut."""
        self._set_up(source, target, both, up=True)

    def address(self, host: str) -> str:
        """Where the host's own servers listen."""
        return self.carrier.address(host)

    def endpoint(self, source: str, target: str, port: int) -> tuple[str, int]:
        """Where `source` dials to reach a port of `target`; among namespaces simply its address."""
        return self.carrier.endpoint(source, target, port)

    def inside(self, host: str, function: Callable[[], T]) -> T:
        """
        The value of a short function called in the host, one at a time.

        Sockets and threads that it makes belong to the host for good, whoever uses them.
        """
        return self.carrier.inside(host, function)

    def popen(
        self,
        host: str,
        words: Sequence[str],
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
    ) -> "subprocess.Popen[bytes]":
        """Start a program in the host; FileNotFoundError where there is none of that name."""
        return self.carrier.popen(host, words, env, stdout)

    def counters(self) -> dict[tuple[str, str], Traffic]:
        """What every ordered pair has carried since the start."""
        return {pair: self.carrier.traffic(*pair) for pair in self.pairs()}

    def close(self) -> None:
        """End every process of every host, and the network."""
        self.carrier.close()

    def _set_up(self, source: str, target: str, both: bool, up: bool) -> None:
        self.carrier.set_up(source, target, up)
        if both:
            self.carrier.set_up(target, source, up)


if __name__ == "__main__":
    from benchmarks.wan_check import main

    main()
