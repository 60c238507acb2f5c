"""One job over links and processes that fail in every way but for good, and answers as if they had not.

Three stage processes; whoever dials another, the driver's stages too, passes a relay that can cut,
hold, reset and record. Each fault has rows of its own under way; none of them is computed twice.
"""

import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from flows.launch import Fleet, StageSettings
from flows.stage import stage
from stages.config import StageSpec
from stages.control import Answer, Hello, LeasedRow, Refused, decode
from stages.dialing import dial_once
from stages.errors import PeerRefusedError
from stages.frame import EpochMismatchError, RunMismatchError
from stages.identity import Identity, Member, make_identity
from stages.trust import Trust
from stages.wire import Ack
from tests.linked import Relay, step_frame, wait_for
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, row

STAGES = 3
BATCH = 24
NEW_TOKENS = 20
RING = ring_settings(slots=3, slot_rows=4)


@dataclass
class Site:
    """The relays before each member, and the specs of its stages."""

    relays: dict[str, Relay] = field(default_factory=dict)
    specs: dict[str, Path] = field(default_factory=dict)
    fleet: Fleet | None = None
    """Of them, once it is at work."""

    def incarnation(self, member: str) -> int:
        """The number that a stage's process drew, as it told the driver."""
        assert self.fleet is not None
        link = self.fleet._stations[member].link
        assert link is not None
        return link.connection.hello.incarnation

    def reached_at(self, member: str, place: tuple[str, int]) -> tuple[str, int]:
        if member not in self.relays:
            self.relays[member] = Relay(place)
        return self.relays[member].address

    def start(self, member: str, spec_path: str) -> None:
        self.specs[member] = Path(spec_path)
        stage.fn(member, spec_path)

    def spec(self, member: str) -> StageSpec:
        return StageSpec.model_validate_json(self.specs[member].read_text())

    def process(self, member: str) -> psutil.Process:
        children = psutil.Process().children()
        return next(c for c in children if str(self.specs[member]) in c.cmdline())


@dataclass
class Job:
    """A fleet at work, and the rows that it is to answer."""

    fleet: Fleet
    site: Site
    rows: Iterator[LeasedRow]
    expected: dict[int, Answer]

    def answered_under(self, fault: Callable[[Site], object]) -> float:
        """Lease rows, let the fault happen beside them, check their answers; seconds to the last."""
        rows = [next(self.rows) for _ in range(BATCH)]
        started_s = time.monotonic()
        self.fleet.lease(0, rows)
        failing = threading.Thread(target=fault, args=(self.site,))
        failing.start()
        found: dict[int, Answer] = {}
        took_s = 0.0
        while len(found) < BATCH or failing.is_alive():
            for answer in self.fleet.news(timeout_s=0.2).answers:
                took_s = time.monotonic() - started_s
                assert answer.row not in found, f"row {answer.row} was answered twice"
                found[answer.row] = answer
            assert time.monotonic() - started_s < 60, f"{len(found)} of {BATCH} rows came"
        failing.join()
        for number, answer in found.items():
            assert answer.output_ids == self.expected[number].output_ids
            assert answer.replayed_tokens == 0, "a pause was taken for a loss"
        return took_s


def calm(_site: Site) -> None:
    pass


def cut_for_5_s(site: Site) -> None:
    """A link carries nothing either way: its receiver seems to have stopped reading."""
    site.relays["n1"].open.clear()
    time.sleep(5)
    site.relays["n1"].open.set()


def one_way_for_10_s(site: Site) -> None:
    """Nothing reaches the third stage, nothing comes back from the first, the driver is not heard."""
    gates = site.relays["n2"].there, site.relays["n0"].back, site.relays["driver"].back
    for gate in gates:
        gate.clear()
    time.sleep(10)
    site.relays["n0"].reset()  # what lay between is lost; the sender cannot know what arrived
    for gate in gates:
        gate.set()


def reset_again_and_again(site: Site) -> None:
    """Every connection breaks each second and, now and then, in the middle of a frame."""
    for relay in site.relays.values():
        relay.reset_after_bytes = 30_000
    for _ in range(4):
        for relay in site.relays.values():
            relay.reset()
        time.sleep(1)
    for relay in site.relays.values():
        relay.reset_after_bytes = 2**62


def stopped_for_10_s(site: Site) -> None:
    process = site.process("n1")
    process.send_signal(signal.SIGSTOP)
    time.sleep(10)
    process.send_signal(signal.SIGCONT)


def attacked(site: Site) -> None:
    """A recorded connection again, a zombie of an old plan, a member of another run, a stranger."""
    relay, victim = site.relays["n1"], site.spec("n1")
    recorded = relay.recorded
    with socket.create_connection(relay.target) as replaying:
        replaying.sendall(recorded)
        replaying.settimeout(10)
        answer = bytearray()
        while piece := replaying.recv(4096):
            answer += piece
    assert len(recorded) > 4000 and b"WW" not in answer

    zombie = site.spec("n0")
    identity = Identity("n0", zombie.certificate, zombie.key)
    members = [Member(name, pem) for name, pem in zombie.members.items()]
    for error, changes in (
        (EpochMismatchError, {"epoch": victim.epoch - 1}),
        (RunMismatchError, {"run": "yesterday"}),
        (PeerRefusedError, {"name": "n2"}),
    ):
        hello = _hello(victim, **changes)
        with pytest.raises(error):
            dial_once(Trust(identity, members), "n1", relay.address, hello, 10)
    stranger = make_identity("n0", zombie.key.parent / "strange")
    with pytest.raises(PeerRefusedError):
        dial_once(Trust(stranger, members), "n1", relay.address, _hello(victim), 10)
    with pytest.raises(ssl.SSLError):
        _without_certificate(relay.target)


def repeated_and_stale(site: Site) -> None:
    """A frame that the second stage has, and one of an old plan, over a connection that is the first's
    by key, name and incarnation; the first has to dial again."""
    relay, victim, first = site.relays["n1"], site.spec("n1"), site.spec("n0")
    identity = Identity("n0", first.certificate, first.key)
    trust = Trust(identity, [Member(name, pem) for name, pem in first.members.items()])
    relay.there.clear()  # until this is over
    hello = _hello(victim, incarnation=site.incarnation("n0"))
    connection = dial_once(trust, "n1", relay.target, hello, 10)
    last_frame = connection.hello.last_frame
    assert last_frame > 0
    connection.send(step_frame(last_frame, epoch=victim.epoch).encode(connection.run))
    held = decode(connection.receive())
    assert isinstance(held, Ack) and held.frame >= last_frame
    connection.send(step_frame(held.frame + 1, epoch=victim.epoch - 1).encode(connection.run))
    told = decode(connection.receive())
    assert isinstance(told, Refused) and told.cause == "epoch"
    connection.close()
    relay.there.set()


def bits_flipped(site: Site) -> None:
    """One on the way to each member, between two frames or in one: TLS notices."""
    for relay in site.relays.values():
        relay.bits_to_flip = 1
    wait_for(lambda: not any(relay.bits_to_flip for relay in site.relays.values()), limit_s=10)


def _hello(victim: StageSpec, **changes: object) -> Hello:
    said = {"name": "n0", "run": victim.run, "epoch": victim.epoch, "incarnation": 7}
    return Hello.model_validate(said | {"purpose": "data"} | changes)


def _without_certificate(place: tuple[str, int]) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with context.wrap_socket(socket.create_connection(place)) as tls:
        tls.recv(1)


def test_a_job_whose_links_and_processes_falter_answers_as_if_they_had_not(tmp_path: Path) -> None:
    write_random_model(tmp_path, "llama", seed=2)
    faults = [
        (calm, 0.0), (cut_for_5_s, 5.0), (one_way_for_10_s, 10.0), (reset_again_and_again, 1.0),
        (attacked, 0.0), (repeated_and_stale, 0.0), (bits_flipped, 0.0), (stopped_for_10_s, 10.0),
        (calm, 0.0),
    ]  # fmt: skip
    rows = [
        row(i, [(7 * i + 13 * k) % 256 for k in range(1 + i % 90)], NEW_TOKENS)
        for i in range(BATCH * len(faults))
    ]
    expected = answers(tmp_path, rows, plan_of(4, 1), ring_settings(1, 32))
    site = Site()
    settings = StageSettings("chaos", tmp_path, "float32", 1)
    with Fleet(plan_of(4, STAGES), [RING], settings, site.start, site.reached_at) as fleet:
        fleet.start()
        site.fleet = fleet
        job = Job(fleet, site, iter(rows), expected)
        for fault, at_least_s in faults:
            took_s = job.answered_under(fault)
            assert took_s > at_least_s, f"{fault.__name__} held nothing up"
    for relay in site.relays.values():
        relay.close()
    links = [link for beat in fleet.vitals().values() for link in beat.links]
    assert sum(link.reconnects for link in links) >= 2 * STAGES
    assert sum(link.frames_sent_again for link in links) > 0
    assert sum(link.duplicates_dropped for link in links) > 0
