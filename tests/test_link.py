"""TLS links over the loopback."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from planner.schedule import Span, Step
from stages.control import Drain, Hello, Rows, decode
from stages.duplex import Duplex
from stages.errors import PeerClosedError
from stages.frame import Dtype, Packet, run_number
from stages.greeting import Listener, dial
from stages.identity import Identity, Member, make_identity
from stages.link import Connection, Trust
from stages.mailbox import Arrival, LinkDown, Mailbox
from stages.wire import StepFrame

RUN = "run-1"


@dataclass
class Net:
    """Members a and b of one plan, and everything to be closed after a test."""

    identities: dict[str, Identity]
    members: list[Member]
    closing: list[Callable[[], None]] = field(default_factory=list)

    def trust(self, name: str) -> Trust:
        return Trust(self.identities[name], self.members)

    def listener(
        self, name: str = "b", hello: Hello | None = None, handshake_s: float = 5.0
    ) -> Listener:
        greeting = hello or hello_of(name)
        listener = Listener(
            self.trust(name), lambda: greeting, "127.0.0.1", handshake_s=handshake_s
        )
        self.closing.append(listener.close)
        return listener

    def pair(self, purpose: str = "data") -> tuple[Connection, Connection]:
        """A connection from a to b: a's end and b's end."""
        listener = self.listener()
        hello = hello_of("a", purpose)
        dialled = dial(self.trust("a"), "b", listener.address, hello, 5.0)
        accepted = listener.accept(5.0)
        self.closing += [dialled.close, accepted.close]
        return dialled, accepted


def hello_of(name: str, purpose: str = "data", run: str = RUN, epoch: int = 1) -> Hello:
    return Hello.model_validate(
        {"name": name, "run": run, "epoch": epoch, "incarnation": 7, "purpose": purpose}
    )


def step_packet(number: int, payload: bytes = bytes(64), epoch: int = 1) -> Packet:
    step = Step(number, 0, (Span(1, 0, 1, True),))
    columns = len(payload) // 4
    frame = StepFrame(epoch, step, columns, Dtype.FLOAT32, memoryview(payload))
    return frame.encode(run_number(RUN))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    folder: Path = tmp_path_factory.mktemp("keys")
    return {name: make_identity(name, folder) for name in ("a", "b", "c", "stranger")}


@pytest.fixture
def net(keys: dict[str, Identity]) -> Iterator[Net]:
    members = [Member(name, keys[name].certificate_pem) for name in ("a", "b", "c")]
    net = Net(keys, members)
    yield net
    for close in reversed(net.closing):
        close()


def test_a_frame_arrives_as_it_was_sent(net: Net) -> None:
    near, far = net.pair()
    near.send(step_packet(5, bytes(range(256)) * 400))
    frame = far.receive()
    assert decode(frame) == StepFrame(
        1,
        Step(5, 0, (Span(1, 0, 1, True),)),
        25600,
        Dtype.FLOAT32,
        memoryview(bytes(range(256)) * 400),
    )
    assert (near.peer, far.peer) == ("b", "a")
    assert near.counters.tls_bytes_sent == far.counters.tls_bytes_received


def test_control_messages_cross_both_ways(net: Net) -> None:
    near, far = net.pair("control")
    here, there = Mailbox(), Mailbox()
    a, b = Duplex(near, here), Duplex(far, there)
    a.send(Drain())
    b.send(Rows(lease="l", rows=()))
    mail = there.get(5)
    assert isinstance(mail, Arrival) and decode(mail.frame) == Drain()
    mail = here.get(5)
    assert isinstance(mail, Arrival) and decode(mail.frame) == Rows(lease="l", rows=())
    a.close()
    mail = there.get(5)
    assert isinstance(mail, LinkDown) and isinstance(mail.error, PeerClosedError)
    with pytest.raises(PeerClosedError):
        b.close()
