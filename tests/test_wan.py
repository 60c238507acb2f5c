"""The emulated network does to packets what it is told, and leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path as FilePath

import psutil
import pytest

from benchmarks.wan import Carrier, Namespaces, Path, Relays, Traffic, Wan, obstacle
from benchmarks.wan_check import Flood, connected, round_trip_s
from tests.linked import wait_for

MISSING = obstacle()
SWIFT = Path(rate_bit_per_s=50e6, delay_s=0.002, queue_s=0.1)
FORWARDERS = {"compiled": Namespaces, "python": partial(Namespaces, compiler=None)}
STAY = "import time; stay = lambda: time.sleep(60)"
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]

needs_namespaces = pytest.mark.skipif(MISSING is not None, reason=f"needs namespaces: {MISSING}")

MakeWan = Callable[..., Wan]


@pytest.fixture
def make() -> Iterator[MakeWan]:
    """Builds networks that end with the test."""
    made: list[Wan] = []
    sinks: list[socket.socket] = []

    def build(path: Path = SWIFT, hosts: tuple[str, ...] = ("a", "b"),
              carrier: Callable[..., Carrier] = Namespaces) -> Wan:  # fmt: skip
        wan = Wan(hosts, path, carrier)
        made.append(wan)
        if carrier is not Relays:
            sinks.extend(wan.inside(host, partial(sink, wan.address(host))) for host in hosts)
        return wan

    yield build
    for receiver in sinks:
        receiver.close()
    for wan in made:
        wan.close()


def sink(address: str) -> socket.socket:
    """Takes datagrams, so that no host answers that nobody wants them."""
    receiver = socket.socket(type=socket.SOCK_DGRAM)
    receiver.bind((address, 9))
    return receiver


def datagrams(wan: Wan, source: str, target: str, count: int, size: int = 1000) -> None:
    """Send so many IP packets of `size` bytes at once."""
    with wan.inside(source, lambda: socket.socket(type=socket.SOCK_DGRAM)) as sender:
        for _ in range(count):
            sender.sendto(bytes(size - 28), (wan.address(target), 9))


def settle(wan: Wan, source: str, target: str, count: int) -> Traffic:
    """What a wire has done, once the fate of so many packets is known."""
    carried = wan.counters()[source, target]

    def fates() -> int:
        nonlocal carried
        carried = wan.counters()[source, target]
        lost = carried.lost_packets + carried.dropped_packets + carried.cut_packets
        return carried.delivered_packets + lost

    wait_for(lambda: fates() == count)
    return carried


@needs_namespaces
@pytest.mark.parametrize("carrier", FORWARDERS.values(), ids=FORWARDERS)
def test_a_round_trip_is_the_sum_of_both_delays(
    make: MakeWan, carrier: Callable[..., Carrier]
) -> None:
    wan = make(carrier=carrier)
    wan.set("a", "b", Path(delay_s=0.010))
    wan.set("b", "a", Path(delay_s=0.030))
    with connected(wan, "a", "b", "") as ends:
        assert 0.040 <= round_trip_s(*ends, times=9) < 0.050


@needs_namespaces
def test_tcp_gets_the_rate_of_the_wire(make: MakeWan) -> None:
    wan = make()
    with connected(wan, "a", "b", "") as ends:
        flood = Flood(*ends)
        flood.start()
        time.sleep(1.0)
        rate = flood.rate_bit_per_s(1.5)
        flood.stop()
    assert 0.85 * 50e6 < rate < 1.07 * 50e6


@needs_namespaces
@pytest.mark.parametrize("carrier", FORWARDERS.values(), ids=FORWARDERS)
def test_lost_packets_are_as_many_as_set_and_every_packet_is_accounted_for(
    make: MakeWan, carrier: Callable[..., Carrier]
) -> None:
    wan = make(Path(rate_bit_per_s=200e6, delay_s=0.001, loss=0.25, queue_s=1.0), carrier=carrier)
    for sent in range(100, 1001, 100):
        datagrams(wan, "a", "b", 100, size=200)
        carried = settle(wan, "a", "b", sent)
    assert 190 < carried.lost_packets < 310
    assert carried.sent_bytes == 1000 * 200
    assert carried.delivered_bytes == carried.delivered_packets * 200


@needs_namespaces
@pytest.mark.parametrize("carrier", FORWARDERS.values(), ids=FORWARDERS)
def test_what_does_not_fit_the_queue_is_dropped(
    make: MakeWan, carrier: Callable[..., Carrier]
) -> None:
    wan = make(Path(rate_bit_per_s=1e6, delay_s=0.0, queue_s=0.2), carrier=carrier)
    datagrams(wan, "a", "b", 100)  # 0.8 s of this wire
    carried = settle(wan, "a", "b", 100)
    assert 60 <= carried.dropped_packets <= 74  # 26 fit, and some more while those are being sent
    assert carried.dropped_packets + carried.delivered_packets == 100


@needs_namespaces
def test_a_wire_can_be_cut_one_way_and_mended(make: MakeWan) -> None:
    wan = make(hosts=("a", "b", "c"))
    wan.partition("a", "b", both=False)
    for source, target in wan.pairs():
        datagrams(wan, source, target, 5)
    cut = {pair: settle(wan, *pair, 5).cut_packets for pair in wan.pairs()}
    assert cut == {pair: 5 if pair == ("a", "b") else 0 for pair in wan.pairs()}
    wan.heal("a", "b", both=False)
    datagrams(wan, "a", "b", 5)
    assert settle(wan, "a", "b", 10).delivered_packets == 5


@needs_namespaces
def test_a_partition_stops_tcp_and_its_end_lets_it_go_on(make: MakeWan) -> None:
    wan = make()
    with connected(wan, "a", "b", "") as (near, far):
        wan.partition("a", "b")
        near.sendall(b"x")
        far.settimeout(0.3)
        with pytest.raises(TimeoutError):
            far.recv(1)
        wan.heal("a", "b")
        far.settimeout(5.0)
        assert far.recv(1) == b"x"


@needs_namespaces
def test_a_path_changes_while_packets_are_under_way(make: MakeWan) -> None:
    wan = make()
    with connected(wan, "a", "b", "") as (near, far):
        flood = Flood(near, far)
        flood.start()
        time.sleep(0.5)
        wan.set("a", "b", Path(rate_bit_per_s=5e6, delay_s=0.002, queue_s=0.1))
        time.sleep(0.5)
        rate = flood.rate_bit_per_s(1.0)
        flood.stop()
    assert 3e6 < rate < 6e6


@needs_namespaces
def test_a_program_runs_in_its_host(make: MakeWan) -> None:
    wan = make()
    program = "import psutil; print(psutil.net_if_addrs()['wan0'][0].address)"
    child = wan.popen("b", [sys.executable, "-c", program], stdout=subprocess.PIPE)
    said, _ = child.communicate(timeout=20)
    assert said.decode().strip() == wan.address("b")
    assert "wan0" not in psutil.net_if_addrs()


@needs_namespaces
def test_closing_ends_a_hosts_processes_and_their_children() -> None:
    program = f"import subprocess; {STAY}; subprocess.Popen({SLEEP!r}); print(flush=True); stay()"
    with Wan(("a", "b"), SWIFT) as wan:
        child = wan.popen("a", [sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        grandchildren = psutil.Process(child.pid).children()
        assert grandchildren
        child.stdout.close()
    gone, alive = psutil.wait_procs(grandchildren, timeout=5)
    assert gone and not alive
    assert child.returncode == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds children to their parent")
def test_nothing_outlives_a_killed_parent() -> None:
    program = (
        "from benchmarks.wan import Wan\n"
        f"wan = Wan(('a', 'b')); wan.popen('a', {SLEEP!r}); print(flush=True); {STAY}; stay()"
    )
    root = FilePath(__file__).parent.parent
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=root, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE)  # fmt: skip
    assert parent.stdout is not None and parent.stdin is not None
    parent.stdout.readline()
    children = psutil.Process(parent.pid).children(recursive=True)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    gone, alive = psutil.wait_procs(children, timeout=5)
    assert gone and not alive


def test_a_program_that_does_not_exist_is_named(make: MakeWan) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        make(carrier=Relays).popen("a", ["no-such-program"])


def test_a_relay_delays_both_ways(make: MakeWan) -> None:
    wan = make(carrier=Relays)
    wan.set("a", "b", Path(delay_s=0.010))
    wan.set("b", "a", Path(delay_s=0.030))
    with connected(wan, "a", "b", "") as ends:
        assert 0.040 <= round_trip_s(*ends, times=9) < 0.050


def test_a_relay_keeps_to_the_rate(make: MakeWan) -> None:
    wan = make(carrier=Relays)
    with connected(wan, "a", "b", "") as ends:
        flood = Flood(*ends)
        flood.start()
        time.sleep(0.3)
        rate = flood.rate_bit_per_s(1.0)
        flood.stop()
    assert 0.9 * 50e6 < rate < 1.07 * 50e6
    carried = wan.counters()["a", "b"]
    assert carried.sent_bytes >= carried.delivered_bytes > 0


def test_a_relay_holds_bytes_while_the_wire_is_cut(make: MakeWan) -> None:
    wan = make(carrier=Relays)
    with connected(wan, "a", "b", "") as (near, far):
        wan.partition("a", "b", both=False)
        near.sendall(b"there")
        far.sendall(b"back")
        assert near.recv(4) == b"back"
        far.settimeout(0.2)
        with pytest.raises(TimeoutError):
            far.recv(5)
        wan.heal("a", "b", both=False)
        assert far.recv(5) == b"there"


def test_a_relay_passes_the_end_of_a_connection_on(make: MakeWan) -> None:
    with connected(make(carrier=Relays), "a", "b", "") as (near, far):
        near.sendall(b"last")
        near.shutdown(socket.SHUT_WR)
        assert far.recv(9) == b"last"
        assert far.recv(9) == b""


def test_a_relay_says_that_it_cannot_lose_bytes(make: MakeWan) -> None:
    with pytest.raises(ValueError, match="root on Linux"):
        make(Path(loss=0.01), carrier=Relays)


@pytest.mark.parametrize(
    "wrong",
    [{"rate_bit_per_s": 0}, {"delay_s": -1}, {"queue_s": -1}, {"loss": 1.5}, {"delay_s": 1e9}],
)
def test_an_impossible_path_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Path"):
        Path(**wrong)


def test_hosts_have_different_names() -> None:
    with pytest.raises(ValueError, match="one name"):
        Wan(("a", "a"), SWIFT, Relays)
