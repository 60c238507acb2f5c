"""Links that break and come back: each frame arrives once, in order."""

import dataclasses
import random
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from stages import turns
from stages.control import Hello
from stages.dialing import dial_once
from stages.errors import LinkError, LinkTimeoutError, PeerClosedError
from stages.inbox import Inbox
from stages.link import Connection
from stages.listener import Listener
from stages.mailbox import Arrival, LinkDown, Mailbox
from stages.outbox import Outbox
from stages.tcp import Bundle
from tests.linked import (
    Net,
    Relay,
    always_another,
    hello_of,
    plan_in,
    step_packet,
    unexpected,
    wait_for,
)

ALONE = Bundle()
BUNDLES = [ALONE, Bundle(4), Bundle(2, in_turns=True)]


@dataclasses.dataclass
class Wire:
    """A sender, a receiver, and the stretch between them."""

    net: Net
    relay: Relay
    listener: Listener
    outbox: Outbox
    inbox: Inbox
    mailbox: Mailbox
    downs: list[LinkDown]

    def arrived(self, count: int) -> list[int]:
        """The numbers of the next frames; fails where the link went down."""
        numbers = []
        for _ in range(count):
            mail = self.mailbox.get(10)
            assert isinstance(mail, Arrival), (mail, self.downs)
            numbers.append(mail.frame.label.frame)
        return numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture
def join(folder: Path) -> Iterator[Callable[..., Wire]]:
    """Builds the wire; `patience_s` is both ends' and `capacity` the mailbox's."""
    closing: list[Callable[[], None]] = []

    def build(
        patience_s: float = 5.0,
        capacity: int = 64,
        incarnations: tuple[int, ...] = (7, 7),
        bundle: Bundle = ALONE,
    ) -> Wire:
        net = plan_in(folder)
        listening = iter([incarnations[0], *incarnations[1:], *([incarnations[-1]] * 999)])
        greeting = lambda: incarnate(hello_of("b"), next(listening))  # noqa: E731
        listener = Listener(net.trust("b"), greeting, "127.0.0.1")
        relay = Relay(listener.address)
        downs: list[LinkDown] = []
        redial = partial(dial_once, net.trust("a"), "b", relay.address, hello_of("a"), 5.0, bundle)
        first: Connection = redial()
        outbox = Outbox(first, downs.append, 8, redial, patience_s)
        mailbox = Mailbox(capacity)
        inbox = Inbox(listener.accept(5), mailbox, listener, patience_s)
        closing.extend((relay.close, listener.close, inbox.close, outbox.abort))
        return Wire(net, relay, listener, outbox, inbox, mailbox, downs)

    yield build
    for close in reversed(closing):
        close()


def incarnate(hello: Hello, incarnation: int) -> Hello:
    return hello.model_copy(update={"incarnation": incarnation})


def send(outbox: Outbox, numbers: range, size: int = 20_000) -> None:
    for number in numbers:
        outbox.put(step_packet(number, bytes(size)), timeout_s=10)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_every_frame_arrives_once_and_in_order_over_a_link_that_is_reset_again_and_again(
    join: Callable[..., Wire], bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LEARNING_S", 0.1)
    monkeypatch.setattr(turns, "TURN_S", 0.02)
    wire = join(bundle=bundle)
    wire.relay.reset_after_bytes = 300_000  # in mid-frame, every fifteen frames or so
    wire.relay.reset()
    sending = threading.Thread(target=send, args=(wire.outbox, range(200)))
    sending.start()
    assert wire.arrived(200) == list(range(200))
    sending.join()
    wire.outbox.close()
    assert wire.inbox.last_frame == 199
    assert wire.outbox.report().reconnects > 5
    assert not wire.downs


def test_frames_that_were_lost_in_mid_air_are_sent_again(join: Callable[..., Wire]) -> None:
    wire = join()
    wire.relay.open.clear()
    sending = threading.Thread(target=send, args=(wire.outbox, range(30)))
    sending.start()
    wait_for(lambda: wire.outbox.report().frames_sent >= 5)
    wire.relay.reset()
    wire.relay.open.set()
    assert wire.arrived(30) == list(range(30))
    sending.join()
    wire.outbox.close()
    assert wire.outbox.report().frames_sent_again >= 4


@pytest.mark.parametrize("sent_before", [1, 2])  # by turns, where the sender awaits words or not
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_frame_that_was_altered_is_sent_again_at_once(
    join: Callable[..., Wire], bundle: Bundle, sent_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_another(monkeypatch)
    wire = join(patience_s=60.0, bundle=bundle)
    send(wire.outbox, range(sent_before))
    wire.arrived(sent_before)
    wait_for(lambda: wire.outbox.report().frames_waiting == 0)
    wire.relay.bits_to_flip = 1
    send(wire.outbox, range(sent_before, 4))
    assert wire.arrived(4 - sent_before) == list(range(sent_before, 4))
    wire.outbox.close()
    assert wire.outbox.report().reconnects == 1
    assert not wire.downs


def test_a_cut_of_a_second_is_a_pause(join: Callable[..., Wire]) -> None:
    wire = join()
    wire.relay.open.clear()
    threading.Timer(1.0, wire.relay.open.set).start()
    started_s = time.monotonic()
    send(wire.outbox, range(20))
    assert wire.arrived(20) == list(range(20))
    assert time.monotonic() - started_s > 0.8
    wire.outbox.close()
    assert wire.outbox.report().reconnects == 0


@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_connection_that_its_route_forgot_is_dialled_again(
    join: Callable[..., Wire], bundle: Bundle
) -> None:
    wire = join(patience_s=1.6, bundle=bundle)
    wire.relay.hold()
    send(wire.outbox, range(1))
    assert wire.arrived(1) == [0]
    wire.outbox.close()
    assert wire.outbox.report().reconnects == 1
    assert not wire.downs


def test_a_sender_that_its_route_forgot_in_mid_frame_dials_again(join: Callable[..., Wire]) -> None:
    wire = join(patience_s=1.6)
    wire.relay.hold()
    send(wire.outbox, range(3), size=40_000_000)  # more than the wire takes: the thread is stuck
    assert wire.arrived(3) == [0, 1, 2]
    wire.outbox.close()
    assert wire.outbox.report().reconnects == 1


def test_a_receiver_that_is_held_up_is_not_lost(join: Callable[..., Wire]) -> None:
    wire = join(patience_s=1.6, capacity=1)
    send(wire.outbox, range(4))
    time.sleep(2.5)
    send(wire.outbox, range(4, 6), size=40_000_000)
    time.sleep(2.5)
    assert wire.arrived(6) == list(range(6))
    wire.outbox.close()
    assert wire.outbox.report().reconnects == 0


def test_a_slow_wire_is_not_lost(join: Callable[..., Wire]) -> None:
    wire = join(patience_s=1.6)
    opening = threading.Event()

    def crawl() -> None:
        while not opening.wait(0.2):
            wire.relay.there.set()
            time.sleep(0.002)
            wire.relay.there.clear()
        wire.relay.there.set()

    crawling = threading.Thread(target=crawl)
    crawling.start()
    send(wire.outbox, range(1), size=40_000_000)
    time.sleep(3)
    opening.set()
    crawling.join()
    assert wire.arrived(1) == [0]
    wire.outbox.close()
    assert wire.outbox.report().reconnects == 0


def test_a_frame_that_comes_twice_is_dropped(join: Callable[..., Wire]) -> None:
    wire = join()
    connection = wire.net.pair()
    mailbox = Mailbox()
    inbox = Inbox(connection[1], mailbox)
    for number in (1, 2, 2, 1, 3):
        connection[0].send(step_packet(number))
    numbers = [m.frame.label.frame for _ in range(3) if isinstance(m := mailbox.get(5), Arrival)]
    assert numbers == [1, 2, 3]
    assert connection[1].report().duplicates_dropped == 2
    inbox.close()
    for close in reversed(wire.net.closing):
        close()


def test_closing_waits_until_the_peer_holds_every_frame(join: Callable[..., Wire]) -> None:
    wire = join(capacity=1)
    send(wire.outbox, range(5))
    with pytest.raises(LinkTimeoutError, match="last frames"):
        wire.outbox.close(timeout_s=0.3)
    assert wire.inbox.last_frame < 4


def test_a_sender_keeps_no_more_than_its_window(folder: Path) -> None:
    net = plan_in(folder)
    near, far = net.pair()
    outbox = Outbox(near, unexpected, capacity=1, window=3)
    with pytest.raises(LinkTimeoutError):
        for number in range(10):
            outbox.put(step_packet(number), timeout_s=0.2)
    assert number == 4  # three in the air, one in the queue
    mailbox = Mailbox()
    inbox = Inbox(far, mailbox)
    outbox.put(step_packet(4), timeout_s=5)
    outbox.close()
    inbox.close()
    for close in reversed(net.closing):
        close()


def test_a_sender_keeps_no_more_bytes_than_it_has_credit_for(folder: Path) -> None:
    net = plan_in(folder)
    listener = net.listener("b", hello_of("b").model_copy(update={"room_bytes": 100_000}))
    near = dial_once(net.trust("a"), "b", listener.address, hello_of("a"), 5.0)
    outbox, number = Outbox(near, unexpected, capacity=1), 0
    with pytest.raises(LinkTimeoutError):
        while number < 20:
            outbox.put(step_packet(number, bytes(40_000)), timeout_s=0.2)
            number += 1
    assert number == 4  # the third exceeds the credit, the fourth is queued
    inbox = Inbox(listener.accept(5), Mailbox())
    outbox.put(step_packet(4), timeout_s=5)
    outbox.close()
    inbox.close()
    for close in reversed(net.closing):
        close()


def test_a_peer_that_started_anew_is_down(join: Callable[..., Wire]) -> None:
    wire = join(incarnations=(7, 8))
    wire.relay.reset()
    wait_for(lambda: wire.downs)
    assert isinstance(wire.downs[0].error, PeerClosedError)
    assert "started anew" in str(wire.downs[0].error)
    with pytest.raises(PeerClosedError):
        wire.outbox.put(step_packet(1))


def test_a_sender_that_started_anew_is_down(join: Callable[..., Wire]) -> None:
    wire = join()
    hello = incarnate(hello_of("a"), 99)
    other = dial_once(wire.net.trust("a"), "b", wire.listener.address, hello, 5)
    mail = wire.mailbox.get(5)
    assert isinstance(mail, LinkDown) and "started anew" in str(mail.error)
    other.close()


def test_a_peer_that_stays_away_is_down_at_both_ends(join: Callable[..., Wire]) -> None:
    wire = join(patience_s=0.3)
    wire.relay.target = ("127.0.0.1", 1)
    wire.relay.reset()
    wait_for(lambda: wire.downs)
    mail = wire.mailbox.get(5)
    assert isinstance(mail, LinkDown) and isinstance(mail.error, LinkError)


def test_an_abort_ends_the_dialing(join: Callable[..., Wire]) -> None:
    wire = join(patience_s=60)
    wire.relay.target = ("127.0.0.1", 1)
    wire.relay.reset()
    time.sleep(0.2)
    started_s = time.monotonic()
    wire.outbox.abort()
    wire.inbox.close()
    assert time.monotonic() - started_s < 1
    assert not wire.downs


def test_resets_at_any_moment_lose_nothing(join: Callable[..., Wire]) -> None:
    wire = join(capacity=4)
    chance = random.Random(3)
    done = threading.Event()

    def disturb() -> None:
        while not done.wait(chance.uniform(0.0, 0.15)):
            wire.relay.reset()

    disturbing = threading.Thread(target=disturb)
    sending = threading.Thread(target=send, args=(wire.outbox, range(400), 4000))
    disturbing.start()
    sending.start()
    assert wire.arrived(400) == list(range(400))
    done.set()
    disturbing.join()
    sending.join()
    wire.outbox.close()
