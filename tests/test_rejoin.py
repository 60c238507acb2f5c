"""Control links whose connection breaks and comes back: each message arrives once, in order."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat

import pytest

from stages.control import Answers, Stop
from stages.dialing import dial_once
from stages.duplex import Duplex
from stages.errors import LinkError, LinkTimeoutError, PeerClosedError
from stages.link import Connection
from stages.listener import Listener
from stages.mailbox import LinkDown, Mailbox
from tests.linked import Net, Relay, answer, flood, hello_of, part, received


@dataclasses.dataclass
class Talk:
    """Both ends of a control link, and the stretch of wire between them."""

    relay: Relay
    a: Duplex
    here: Mailbox
    b: Duplex
    there: Mailbox


@pytest.fixture
def reach(net: Net) -> Iterator[Callable[..., Talk]]:
    """Builds the link; a dials and b listens."""
    talks: list[Talk] = []

    def build(incarnations: Iterable[int] = repeat(7), **settings: float) -> Talk:
        numbers = iter(incarnations)
        greeting = lambda: hello_of("b").model_copy(update={"incarnation": next(numbers)})  # noqa: E731
        listener = Listener(net.trust("b"), greeting, "127.0.0.1")
        relay = Relay(listener.address)

        def dial_again(last_message: int) -> Connection:
            hello = hello_of("a", "control").model_copy(update={"last_frame": last_message})
            return dial_once(net.trust("a"), "b", relay.address, hello, 2)

        here, there = Mailbox(), Mailbox()
        first = dial_again(-1)
        a = Duplex(first, here, redial=dial_again, **settings)  # type: ignore[arg-type]
        b = Duplex(listener.accept(5), there, listener=listener, **settings)  # type: ignore[arg-type]
        net.closing += [listener.close, relay.close]
        talks.append(Talk(relay, a, here, b, there))
        return talks[-1]

    yield build
    for talk in talks:
        with contextlib.suppress(LinkError):
            part(talk.a, talk.b)


def test_messages_cross_once_and_in_order_over_a_connection_that_is_reset_again_and_again(
    reach: Callable[..., Talk],
) -> None:
    talk = reach()
    talk.relay.reset_after_bytes = 60_000  # in mid-message
    talk.relay.reset()
    messages = [Answers(answers=(answer(number, "x" * 5000),)) for number in range(50)]
    floods = [threading.Thread(target=flood, args=(end, messages)) for end in (talk.a, talk.b)]
    for thread in floods:
        thread.start()
    for mailbox in (talk.there, talk.here):
        assert [received(mailbox.get(10)) for _ in messages] == messages
    for thread in floods:
        thread.join()
    assert talk.a.connection.report().reconnects > 3
    assert talk.here.get(0.01) is None and talk.there.get(0.01) is None


def test_a_connection_that_its_route_forgot_is_dialled_again(reach: Callable[..., Talk]) -> None:
    talk = reach(heartbeat_s=0.1, lost_after_s=1.0)
    talk.relay.hold()
    talk.a.send(Stop(reason="first"))
    assert received(talk.there.get(5)) == Stop(reason="first")
    assert talk.a.connection.report().reconnects == 1
    assert talk.here.get(0.01) is None


def test_a_peer_that_stays_away_is_lost_at_both_ends(reach: Callable[..., Talk]) -> None:
    talk = reach(lost_after_s=0.5)
    talk.relay.target = ("127.0.0.1", 1)
    talk.relay.reset()
    started_s = time.monotonic()
    for mailbox in (talk.here, talk.there):
        mail = mailbox.get(5)
        assert isinstance(mail, LinkDown) and isinstance(mail.error, LinkTimeoutError)
    assert 0.4 < time.monotonic() - started_s < 3


def test_a_peer_that_came_back_as_another_process_is_lost(reach: Callable[..., Talk]) -> None:
    talk = reach(incarnations=chain([7], repeat(8)))
    talk.relay.reset()
    mail = talk.here.get(5)
    assert isinstance(mail, LinkDown) and "started anew" in str(mail.error)


def test_a_peer_that_said_goodbye_is_not_waited_for(reach: Callable[..., Talk]) -> None:
    talk = reach(lost_after_s=30)
    talk.a.send(Stop(reason="done"))
    talk.a.close()
    assert received(talk.there.get(5)) == Stop(reason="done")
    mail = talk.there.get(2)
    assert isinstance(mail, LinkDown) and isinstance(mail.error, PeerClosedError)
