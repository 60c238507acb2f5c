"""Control connections over the loopback: both ways at once, and who is lost."""

import contextlib
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from stages.control import (
    Answers,
    Heartbeat,
    Rows,
    Stop,
)
from stages.duplex import WINDOW_MESSAGES, Duplex
from stages.errors import (
    LinkError,
    LinkTimeoutError,
    PeerClosedError,
)
from stages.mailbox import LinkDown, Mailbox
from tests.linked import (
    Net,
    answer,
    flood,
    part,
    plan_in,
    received,
    run_child,
    wait_for,
)


def talk(net: Net, **settings: float) -> tuple[Duplex, Mailbox, Duplex, Mailbox]:
    near, far = net.pair("control")
    here, there = Mailbox(), Mailbox()
    return Duplex(near, here, **settings), here, Duplex(far, there, **settings), there  # type: ignore[arg-type]


def test_control_messages_cross_both_ways(net: Net) -> None:
    a, here, b, there = talk(net)
    a.send(Stop())
    b.send(Rows(rows=()))
    assert received(there.get(5)) == Stop()
    assert received(here.get(5)) == Rows(rows=())
    part(a, b)


def test_the_last_words_arrive_though_both_ends_talk(net: Net) -> None:
    a, _here, b, there = talk(net, heartbeat_s=0.001)
    time.sleep(0.05)
    a.send(Stop(reason="done"))
    a.close()
    assert received(there.get(5)) == Stop(reason="done")
    mail = there.get(5)
    assert isinstance(mail, LinkDown) and isinstance(mail.error, PeerClosedError)
    with pytest.raises(PeerClosedError):
        b.send(Stop())
    b.close()


def test_heartbeats_carry_the_vitals_and_trouble_no_mailbox(net: Net) -> None:
    near, far = net.pair("control")
    mailbox = Mailbox()
    beating = Duplex(near, Mailbox(), lambda: Heartbeat(tokens=42), heartbeat_s=0.02)
    hearing = Duplex(far, mailbox)
    wait_for(lambda: near.report().frames_sent > 3)
    wait_for(lambda: hearing.heard == Heartbeat(tokens=42))
    assert mailbox.get(0.01) is None
    part(beating, hearing)


def test_a_heartbeat_sent_as_the_last_message_arrives(net: Net) -> None:
    near, far = net.pair("control")
    mailbox = Mailbox()
    a, b = Duplex(near, Mailbox(), lambda: Heartbeat(tokens=1)), Duplex(far, mailbox)
    a.send(Heartbeat(tokens=42))
    a.close()
    mail = mailbox.get(5)
    assert isinstance(mail, LinkDown) and isinstance(mail.error, PeerClosedError)
    assert b.heard == Heartbeat(tokens=42)
    b.close()


def test_a_silent_peer_is_lost(net: Net) -> None:
    near, _silent = net.pair("control")
    mailbox = Mailbox()
    duplex = Duplex(near, mailbox, heartbeat_s=0.1, lost_after_s=0.4)
    started_s = time.monotonic()
    mail = mailbox.get(5)
    assert isinstance(mail, LinkDown) and isinstance(mail.error, LinkTimeoutError)
    assert 0.3 < time.monotonic() - started_s < 2
    with pytest.raises(LinkTimeoutError):
        duplex.send(Stop())


def test_an_owner_who_does_not_listen_calls_nobody_lost(net: Net) -> None:
    near, far = net.pair("control")
    mailbox = Mailbox(capacity=2)
    a = Duplex(near, Mailbox(), heartbeat_s=0.05)
    b = Duplex(far, mailbox, heartbeat_s=0.05, lost_after_s=0.3)
    for number in range(5):
        a.send(Stop(reason=str(number)))
    time.sleep(0.8)
    reasons = [received(mailbox.get(5)) for _ in range(5)]
    assert reasons == [Stop(reason=str(number)) for number in range(5)]
    part(a, b)


def test_a_flood_from_both_ends_arrives_whole_and_in_order(net: Net) -> None:
    a, here, b, there = talk(net, heartbeat_s=0.005)
    chance = random.Random(1)
    sizes = [chance.choice((0, 10, 3000, 30_000, 600_000)) for _ in range(120)]
    messages = [Answers(answers=(answer(number, "x" * size),)) for number, size in enumerate(sizes)]

    floods = [threading.Thread(target=flood, args=(end, messages)) for end in (a, b)]
    for thread in floods:
        thread.start()
    for mailbox in (there, here):
        assert [received(mailbox.get(10)) for _ in messages] == messages
    for thread in floods:
        thread.join()
    part(a, b)


def test_a_peer_that_reads_nothing_fills_a_bounded_control_queue(net: Net) -> None:
    near, far = net.pair("control")
    duplex = Duplex(near, Mailbox(), capacity=2, lost_after_s=30)
    big = Answers(answers=(answer(0, "x" * 2**23),))
    with pytest.raises(LinkTimeoutError):
        for _ in range(20):
            duplex.send(big, timeout_s=0.3)
    far.close()
    with pytest.raises(LinkError):
        duplex.close()


PAUSED = """
import sys
from pathlib import Path
from stages.control import Stop
from stages.duplex import WINDOW_MESSAGES, Duplex
from stages.dialing import dial
from stages.mailbox import LinkDown, Mailbox
from tests import linked

net = linked.plan_in(Path(sys.argv[1]))
hello = linked.hello_of("a", "control")
near = dial(net.trust("a"), "b", ("127.0.0.1", int(sys.argv[2])), hello, 5)
mailbox = Mailbox()
duplex = Duplex(near, mailbox, heartbeat_s=0.1, lost_after_s=0.5)
mail = mailbox.get(30)
duplex.send(Stop(reason=repr(mail.error) if isinstance(mail, LinkDown) else ""))
duplex.close()
"""


def test_a_process_that_was_stopped_for_a_while_is_neither_lost_nor_calls_others_lost(
    tmp_path: Path,
) -> None:
    net = plan_in(tmp_path)
    with contextlib.closing(net.listener()) as listener:
        child = run_child(PAUSED, str(tmp_path), str(listener.address[1]))
        mailbox = Mailbox()
        duplex = Duplex(listener.accept(20), mailbox, heartbeat_s=0.1, lost_after_s=10)
        wait_for(lambda: duplex.heard)
        child.send_signal(signal.SIGSTOP)
        time.sleep(1.5)
        child.send_signal(signal.SIGCONT)
        time.sleep(0.3)
        duplex.send(Stop())
        assert received(mailbox.get(10)) == Stop(reason="")
        assert child.wait() == 0
        duplex.close()


def test_a_mailbox_that_nobody_empties_bounds_what_both_ends_hold(net: Net) -> None:
    near, far = net.pair("control")
    a, b = Duplex(near, Mailbox(), capacity=4), Duplex(far, Mailbox(capacity=2))
    sent = 0
    with pytest.raises(LinkTimeoutError):
        while sent < 200:
            a.send(Stop(reason="x" * 1000), timeout_s=0.2)
            sent += 1
    assert sent == 2 + WINDOW_MESSAGES + 4
    for end in (near, far):
        end.close()
    for duplex in (a, b):
        with contextlib.suppress(LinkError):
            duplex.close()
