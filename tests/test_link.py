"""Data connections over the loopback: what is sent arrives, and every queue is bounded."""

import contextlib
import signal
import socket
import ssl
import sys
import threading
import time
from pathlib import Path

import pytest

from planner.schedule import Span, Step
from stages.control import (
    Stop,
    decode,
)
from stages.errors import (
    FrameError,
    LinkError,
    LinkTimeoutError,
    PeerClosedError,
)
from stages.frame import Dtype, EpochMismatchError, RunMismatchError, run_number
from stages.inbox import Inbox
from stages.mailbox import Arrival, LinkDown, Mailbox
from stages.outbox import Outbox
from stages.tcp import BBR_BUNDLE, Bundle, link_habits, open_window
from stages.wire import Ack, StepFrame
from tests.linked import (
    RUN,
    Net,
    plan_in,
    run_child,
    step_frame,
    step_packet,
    unexpected,
    wait_for,
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other ways")


def test_a_frame_arrives_as_it_was_sent(net: Net) -> None:
    near, far = net.pair()
    payload = bytes(range(256)) * 400
    near.send(step_packet(5, payload))
    message = decode(far.receive())
    step = Step(5, 0, (Span(1, 0, 1, True),))
    assert message == StepFrame(1, step, 25600, Dtype.FLOAT32, memoryview(payload))
    assert (near.peer, far.peer) == ("b", "a")


def test_both_ends_count_the_same_bytes(net: Net) -> None:
    near, far = net.pair(bundle=Bundle())
    packets = [step_packet(number, bytes(4 * number)) for number in range(1, 9999, 1000)]
    for packet in packets:
        near.send(packet)
    for _ in packets:
        far.receive()
    sent, received = near.report(), far.report()
    assert sent.frames_sent == received.frames_received == len(packets)
    assert sent.payload_bytes_sent == received.payload_bytes_received
    assert sent.tls_bytes_sent == received.tls_bytes_received == sum(p.size for p in packets)
    assert (sent.peer, sent.purpose) == ("b", "data")
    assert sent.congestion_control in ("bbr", "cubic", "reno")


def test_frames_that_have_no_place_end_the_connection(net: Net) -> None:
    wrong = {
        EpochMismatchError: step_packet(1, epoch=2),
        RunMismatchError: step_frame(1).encode(run_number("run-2")),
        FrameError: Stop().encode(run_number(RUN)),
    }
    for error, packet in wrong.items():
        near, far = net.pair()
        mailbox = Mailbox()
        net.closing.append(Inbox(far, mailbox).close)
        near.send(packet)
        mail = mailbox.get(5)
        assert isinstance(mail, LinkDown) and isinstance(mail.error, error)


@pytest.mark.parametrize("epoch", [0, 2])
def test_the_sender_of_a_frame_of_another_epoch_is_told(net: Net, epoch: int) -> None:
    near, far = net.pair()
    mailbox, downs = Mailbox(), list[LinkDown]()
    net.closing.append(Inbox(far, mailbox).close)
    outbox = Outbox(near, downs.append)
    outbox.put(step_packet(1))
    outbox.put(step_packet(2, epoch=epoch))
    wait_for(lambda: downs)
    assert isinstance(downs[0].error, EpochMismatchError)
    assert f"of epoch {epoch}, not 1" in str(downs[0].error)
    with pytest.raises(EpochMismatchError):
        outbox.put(step_packet(3))
    mail = [mailbox.get(5), mailbox.get(5)]
    assert isinstance(mail[0], Arrival) and mail[0].frame.label.frame == 1
    assert isinstance(mail[1], LinkDown) and isinstance(mail[1].error, EpochMismatchError)


def test_an_outbox_sends_all_before_it_closes(net: Net) -> None:
    near, far = net.pair()
    mailbox = Mailbox(capacity=2)
    net.closing.append(Inbox(far, mailbox).close)
    outbox = Outbox(near, unexpected, capacity=64)
    for number in range(64):
        outbox.put(step_packet(number, bytes(2**16)))
    closing = threading.Thread(target=outbox.close)
    closing.start()
    arrived = [mailbox.get(5) for _ in range(64)]
    closing.join()
    assert [m.frame.label.frame for m in arrived if isinstance(m, Arrival)] == list(range(64))
    last = mailbox.get(5)
    assert isinstance(last, LinkDown) and isinstance(last.error, PeerClosedError)


def test_a_peer_that_takes_nothing_fills_a_bounded_queue(net: Net) -> None:
    near, _far = net.pair()
    outbox = Outbox(near, unexpected, capacity=2)
    net.closing.append(outbox.abort)
    packet = step_packet(1, bytes(2**23))
    accepted = 0
    with pytest.raises(LinkTimeoutError):
        while accepted < 20:
            outbox.put(packet, timeout_s=0.3)
            accepted += 1
    habits = link_habits()
    held = (habits.send_bytes + habits.receive_bytes) / packet.size  # by the kernel
    assert accepted <= 2 + 1 + held  # the queue, and the frame being sent


@linux
def test_an_open_window_takes_in_much_before_anybody_reads() -> None:
    with socket.socket() as listening, socket.socket() as sending:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**17)
        sending.connect(listening.getsockname())
        receiving, _ = listening.accept()
        with receiving:
            open_window(receiving)
            sending.settimeout(5)
            taken = 0
            while taken < 2**21:  # a window that stays narrow raises TimeoutError
                taken += sending.send(bytes(2**14))


@linux
def test_both_ends_of_a_data_connection_open_their_windows(net: Net) -> None:
    for end in net.pair(bundle=BBR_BUNDLE):
        for tls in end.sockets:
            room_bytes = tls.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            assert room_bytes >= link_habits().receive_bytes / 4


def test_an_outbox_tells_of_the_worst_time_of_its_queue(net: Net) -> None:
    near, far = net.pair()
    outbox = Outbox(near, unexpected, capacity=16)
    for number in range(10):
        outbox.put(step_packet(number))
    net.closing.append(Inbox(far, Mailbox()).close)
    wait_for(lambda: outbox.report().frames_waiting == 0)
    outbox.put(step_packet(10))
    wait_for(lambda: outbox.report().frames_waiting == 0)
    assert outbox.report().most_frames_waiting == 10
    outbox.close()


def test_an_outbox_that_cannot_be_emptied_says_so(net: Net) -> None:
    near, _far = net.pair()
    outbox = Outbox(near, unexpected)
    outbox.put(step_packet(1, bytes(2**26)))
    with pytest.raises(LinkTimeoutError, match="last frames"):
        outbox.close(timeout_s=0.2)


def test_time_in_which_the_peer_takes_nothing_is_counted(net: Net) -> None:
    near, far = net.pair()
    sending = threading.Thread(target=near.send, args=(step_packet(1, bytes(2**26)),))
    sending.start()
    time.sleep(0.4)
    far.receive()
    sending.join()
    assert 0.2 < near.report().blocked_s < 5


def test_a_full_share_of_the_mailbox_holds_up_one_sender_alone(net: Net) -> None:
    mailbox = Mailbox(capacity=3)
    (near, far), (other_near, other_far) = net.pair(), net.pair()
    for connection in (far, other_far):
        net.closing.append(Inbox(connection, mailbox).close)
    for number in range(10):
        near.send(step_packet(number))
    wait_for(lambda: not mailbox.has_room(far))
    other_near.send(step_packet(100))
    wait_for(lambda: other_far.report().frames_received == 1)
    time.sleep(0.05)
    assert far.report().frames_received <= 4
    mail = [mailbox.get(5) for _ in range(11)]
    assert sum(isinstance(m, Arrival) and m.source is far for m in mail) == 10


def test_an_outbox_reports_the_end_once_and_takes_no_more(net: Net) -> None:
    near, far = net.pair()
    downs: list[LinkDown] = []
    outbox = Outbox(near, downs.append)
    far.close()
    wait_for(lambda: downs)
    for number in range(2):
        with pytest.raises(PeerClosedError):
            outbox.put(step_packet(number))
    outbox.close()  # it had nothing to lose
    assert len(downs) == 1 and downs[0].source is near


def test_an_outbox_that_lost_a_frame_says_so(net: Net) -> None:
    near, far = net.pair()
    downs: list[LinkDown] = []
    outbox = Outbox(near, downs.append)
    outbox.put(step_packet(1))
    wait_for(lambda: near.report().frames_sent == 1)
    far.close()
    with pytest.raises(LinkError):
        outbox.close()


def test_a_closed_outbox_takes_no_frame(net: Net) -> None:
    near, _far = net.pair()
    outbox = Outbox(near, unexpected)
    outbox.close()
    with pytest.raises(LinkError, match="closed here"):
        outbox.put(step_packet(1))


def test_closing_here_is_no_news(net: Net) -> None:
    _near, far = net.pair()
    mailbox = Mailbox()
    inbox = Inbox(far, mailbox)
    inbox.close()
    assert mailbox.get(0.05) is None


def test_a_connection_that_was_closed_while_a_word_was_read_has_no_state(net: Net) -> None:
    near, far = net.pair()
    far.send(Ack(1, 1).encode(far.run))
    near.receive()
    near.close()  # by another thread, in life: between the word and what it is weighed with
    with pytest.raises(LinkError, match="closed here"):
        near.tcp_state()


def test_two_threads_on_one_tls_object_are_noticed(net: Net) -> None:
    near, far = net.pair()
    reading = threading.Thread(target=far.receive)
    reading.start()
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match="two threads"):
        far.send(step_packet(1))
    near.send(step_packet(1))
    reading.join()


def test_a_connection_that_another_thread_is_closing_was_closed_here(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    near, _far = net.pair()
    free = ssl.SSLSocket.close
    refused: list[LinkError] = []

    def send_while_freeing(tls: ssl.SSLSocket) -> None:
        if tls in near.sockets and not refused:
            with pytest.raises(LinkError, match="closed here") as caught:
                near.send(step_packet(1))
            refused.append(caught.value)
        free(tls)

    monkeypatch.setattr(ssl.SSLSocket, "close", send_while_freeing)
    near.close()
    assert refused


DYING = """
import os, signal, sys
from pathlib import Path
from stages.dialing import dial
from tests import linked

net = linked.plan_in(Path(sys.argv[1]))
near = dial(net.trust("a"), "b", ("127.0.0.1", int(sys.argv[2])), linked.data_hello(), 5)
raw = bytes(linked.step_packet(1, bytes(1000)))
near._tls.sendall(raw[:600])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_peer_killed_in_mid_frame_is_closed(tmp_path: Path) -> None:
    net = plan_in(tmp_path)
    with contextlib.closing(net.listener()) as listener:
        child = run_child(DYING, str(tmp_path), str(listener.address[1]))
        far = listener.accept(20)
        with pytest.raises(PeerClosedError, match="mid-frame"):
            far.receive()
        far.close()
        assert child.wait() == -signal.SIGKILL


def test_a_small_frame_costs_at_most_a_third_of_a_millisecond(net: Net) -> None:
    near, far = net.pair(bundle=Bundle())  # as when both of two have learned the wire
    count, costs = 500, [0.0, 0.0]
    spans = tuple(Span(row, 100, 1, True) for row in range(32))
    payload = memoryview(bytes(32 * 256))

    def read() -> None:
        started_s = time.thread_time()
        for _ in range(count):
            decode(far.receive())
        costs[1] = time.thread_time() - started_s

    reading = threading.Thread(target=read)
    reading.start()
    started_s = time.thread_time()
    for number in range(count):
        frame = StepFrame(1, Step(number, 0, spans), 64, Dtype.FLOAT32, payload)
        near.send(frame.encode(near.run))
    costs[0] = time.thread_time() - started_s
    reading.join()
    assert max(costs) / count < 0.0003, f"seconds to send and to receive: {costs}"
