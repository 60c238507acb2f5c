"""A plan of three members on the loopback, the wire between them, and what travels there."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from planner.schedule import Span, Step
from stages import turns
from stages.control import Answer, Answers, Hello, LinkReport, Message, decode
from stages.dialing import dial
from stages.duplex import Duplex
from stages.frame import Dtype, Packet, run_number
from stages.identity import Identity, Member, load_identity, make_identity
from stages.inbox import Inbox
from stages.link import Connection
from stages.listener import Listener
from stages.mailbox import Arrival, LinkDown, Mail, Mailbox
from stages.outbox import Outbox
from stages.tcp import Bundle
from stages.trust import Trust
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

    def pair(
        self, purpose: str = "data", bundle: Bundle | None = None
    ) -> tuple[Connection, Connection]:
        """A connection from a to b: a's end and b's end."""
        listener = self.listener()
        hello = hello_of("a", purpose)
        dialled = dial(self.trust("a"), "b", listener.address, hello, 5.0, bundle)
        accepted = listener.accept(5.0)
        self.closing += [dialled.close, accepted.close]
        return dialled, accepted


def hello_of(name: str, purpose: str = "data", run: str = RUN, epoch: int = 1) -> Hello:
    return Hello.model_validate(
        {"name": name, "run": run, "epoch": epoch, "incarnation": 7, "purpose": purpose}
    )


def step_frame(number: int, payload: bytes = bytes(64), epoch: int = 1) -> StepFrame:
    step = Step(number, 0, (Span(1, 0, 1, True),))
    return StepFrame(epoch, step, len(payload) // 4, Dtype.FLOAT32, memoryview(payload))


def step_packet(number: int, payload: bytes = bytes(64), epoch: int = 1) -> Packet:
    return step_frame(number, payload, epoch).encode(run_number(RUN))


def arrive(
    near: Connection, far: Connection, packets: Sequence[Packet]
) -> tuple[LinkReport, LinkReport]:
    """Send frames over a data connection, each of which must arrive whole; what both ends counted."""
    mailbox = Mailbox()
    inbox, outbox = Inbox(far, mailbox), Outbox(near, unexpected, capacity=len(packets))
    for packet in packets:
        outbox.put(packet)
    for packet in packets:
        mail = mailbox.get(10)
        assert isinstance(mail, Arrival) and mail.frame.payload == packet.payload
    outbox.close()
    inbox.close()
    return outbox.report(), inbox.report()


def data_hello(epoch: int = 1) -> Hello:
    return hello_of("a", epoch=epoch)


def wait_for(true: Callable[[], object], limit_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline_s, "it did not come to pass"
        time.sleep(0.005)


def always_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of connections that take turns, have each frame be another's."""
    monkeypatch.setattr(turns, "LEARNING_S", 0.0)
    monkeypatch.setattr(turns, "TURN_S", 0.0)


def unexpected(down: LinkDown) -> None:
    raise down.error


def plan_in(folder: Path) -> Net:
    """The plan whose keys lie in a folder, made where there are none yet."""
    names = ("a", "b", "c")
    known = (folder / "a.key").exists()
    keys = {name: (load_identity if known else make_identity)(name, folder) for name in names}
    return Net(keys, [Member(name, keys[name].certificate_pem) for name in names])


def run_child(program: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """A Python process that can import the rooms and `tests.linked`."""
    root = str(Path(__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments], env=os.environ | {"PYTHONPATH": root}
    )


def part(*ends: Duplex) -> None:
    closing = [threading.Thread(target=end.close) for end in ends]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def received(mail: Mail | None) -> Message:
    assert isinstance(mail, Arrival), mail
    return decode(mail.frame)


def flood(end: Duplex, messages: list[Answers]) -> None:
    for message in messages:
        end.send(message)


def answer(row: int, text: str) -> Answer:
    return Answer(
        row=row,
        output_ids=(),
        text=text,
        finish_reason="stop",
        prompt_tokens=0,
        output_tokens=0,
        queued_s=0.0,
        prefill_s=0.0,
        decode_s=0.0,
    )


def opened() -> threading.Event:
    gate = threading.Event()
    gate.set()
    return gate


class Relay:
    """A stretch of wire between a dialer and a listener, that can be cut, held and reset."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target = target
        self.open = opened()
        self.there, self.back = opened(), opened()
        """Each way alone: from the dialer, and to it."""
        self.reset_after_bytes = 2**62
        self.bits_to_flip = 0
        """In as many of the next pieces that a dialer sends."""
        self._carried: list[bytearray] = []
        """What each connection's dialer has sent, or the first of it."""
        self._gates: list[threading.Event] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listening.getsockname()
        return host, port

    @property
    def recorded(self) -> bytes:
        """What the dialer of some busy connection has sent, or the first of it."""
        return bytes(max(self._carried, key=len))

    def reset(self) -> None:
        """Break every connection at once, as a router that lost its table does."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Let today's connections carry nothing more, and tell neither end."""
        self.open.clear()
        self.open = opened()

    def close(self) -> None:
        for gate in (self.open, self.there, self.back, *self._gates):
            gate.set()
        self._listening.shutdown(socket.SHUT_RDWR)
        self.reset()
        for thread in self._threads:
            thread.join()
        self._listening.close()
        for end in self._ends:
            end.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                self._ends.append(near)
                try:
                    far = socket.create_connection(self.target)
                except ConnectionRefusedError:
                    near.close()
                    continue
                self._ends.append(far)
                self._carried.append(bytearray())
                for way in (
                    (near, far, self.there, self._carried[-1]),
                    (far, near, self.back, None),
                ):
                    self._threads.append(
                        threading.Thread(target=self._carry, args=way, daemon=True)
                    )
                    self._threads[-1].start()

    def _carry(
        self,
        source: socket.socket,
        target: socket.socket,
        way: threading.Event,
        carried: bytearray | None,
    ) -> None:
        left, gate = self.reset_after_bytes, self.open
        self._gates.append(gate)
        with contextlib.suppress(OSError):
            while left > 0 and (piece := source.recv(min(left, 4096))):
                gate.wait()
                way.wait()
                if way is self.there and self.bits_to_flip:
                    self.bits_to_flip -= 1
                    piece = piece[:-1] + bytes([piece[-1] ^ 1])
                if carried is not None and len(carried) < 2**17:
                    carried += piece
                target.sendall(piece)
                left -= len(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
