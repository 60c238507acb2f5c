"""TLS links over the loopback."""

import contextlib
import random
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from planner.schedule import Span, Step
from stages.control import (
    Answer,
    Answers,
    Heartbeat,
    Message,
    Rows,
    Stop,
    decode,
)
from stages.duplex import Duplex
from stages.errors import (
    FrameError,
    LinkError,
    LinkTimeoutError,
    PeerClosedError,
    PeerRefusedError,
)
from stages.frame import Dtype, EpochMismatchError, RunMismatchError, run_number
from stages.greeting import Listener, dial
from stages.identity import Identity, Member, make_identity
from stages.link import Trust
from stages.mailbox import Arrival, Inbox, LinkDown, Mail, Mailbox, Outbox
from stages.wire import StepFrame
from tests.linked import (
    RUN,
    Net,
    data_hello,
    hello_of,
    plan_in,
    run_child,
    step_frame,
    step_packet,
    unexpected,
    wait_for,
)


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
    payload = bytes(range(256)) * 400
    near.send(step_packet(5, payload))
    message = decode(far.receive())
    step = Step(5, 0, (Span(1, 0, 1, True),))
    assert message == StepFrame(1, step, 25600, Dtype.FLOAT32, memoryview(payload))
    assert (near.peer, far.peer) == ("b", "a")


def test_both_ends_count_the_same_bytes(net: Net) -> None:
    near, far = net.pair()
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


# Who gets in


def refused(net: Net, dialing: Callable[[Listener], object], error: type[Exception]) -> str:
    """Dial, see the error at the dialing end, and that the listener let nobody in."""
    listener = net.listener()
    with pytest.raises(error) as raised:
        dialing(listener)
    with pytest.raises(LinkTimeoutError):
        listener.accept(0.05)
    wait_for(lambda: listener.refusals)
    return f"{raised.value} | {listener.refusals[-1].reason}"


def test_a_strangers_certificate_is_refused(net: Net) -> None:
    stranger = Trust(net.identities["stranger"], net.members)
    reason = refused(
        net,
        lambda listener: dial(stranger, "b", listener.address, data_hello(), 2),
        PeerRefusedError,
    )
    assert "certificate" in reason.lower()


def test_a_stranger_who_took_a_members_name_is_refused(net: Net, tmp_path: Path) -> None:
    impostor = Trust(make_identity("a", tmp_path), net.members)
    refused(
        net,
        lambda listener: dial(impostor, "b", listener.address, data_hello(), 2),
        PeerRefusedError,
    )


def test_an_expired_certificate_is_refused(net: Net, tmp_path: Path) -> None:
    expired = make_identity("a", tmp_path, validity=timedelta(seconds=-60))
    net.members[0] = Member("a", expired.certificate_pem)
    late = Trust(expired, net.members)
    reason = refused(
        net, lambda listener: dial(late, "b", listener.address, data_hello(), 2), PeerRefusedError
    )
    assert "expired" in reason.lower()


def test_a_listener_with_an_expired_certificate_is_refused(net: Net, tmp_path: Path) -> None:
    net.identities = net.identities | {"b": make_identity("b", tmp_path, timedelta(seconds=-60))}
    net.members[1] = Member("b", net.identities["b"].certificate_pem)
    listener = net.listener()
    with pytest.raises(PeerRefusedError, match="expired"):
        dial(net.trust("a"), "b", listener.address, data_hello(), 2)


def test_a_members_certificate_under_another_members_name_is_refused(net: Net) -> None:
    reason = refused(
        net,
        lambda listener: dial(net.trust("c"), "b", listener.address, data_hello(), 2),
        PeerRefusedError,
    )
    assert "the certificate is c's, the hello says a" in reason


def test_a_member_who_answers_in_place_of_another_is_refused(net: Net) -> None:
    listener = net.listener("c")
    with pytest.raises(PeerRefusedError, match="c answers in place of b"):
        dial(net.trust("a"), "b", listener.address, data_hello(), 2)


def test_a_member_of_another_run_is_refused(net: Net) -> None:
    hello = hello_of("a", run="run-2")
    reason = refused(
        net,
        lambda listener: dial(net.trust("a"), "b", listener.address, hello, 2),
        RunMismatchError,
    )
    assert "run-2" in reason


def test_a_dialer_of_an_old_epoch_is_told(net: Net) -> None:
    refused(
        net,
        lambda listener: dial(net.trust("a"), "b", listener.address, data_hello(0), 2),
        EpochMismatchError,
    )


def test_a_dialer_waits_for_a_listener_that_has_not_heard_of_its_epoch(net: Net) -> None:
    epochs = iter((1, 1, 2))
    greeting = lambda: hello_of("b", epoch=next(epochs))  # noqa: E731
    listener = Listener(net.trust("b"), greeting, "127.0.0.1")
    net.closing.append(listener.close)
    connection = dial(net.trust("a"), "b", listener.address, data_hello(2), 5)
    net.closing.append(connection.close)
    assert connection.hello.epoch == 2


def test_a_control_connection_may_be_of_any_epoch(net: Net) -> None:
    listener = net.listener()
    hello = hello_of("a", "control", epoch=0)
    net.closing.append(dial(net.trust("a"), "b", listener.address, hello, 2).close)
    accepted = listener.accept(2)
    net.closing.append(accepted.close)
    assert accepted.hello.epoch == 0


def client_context(net: Net, name: str = "") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(cadata=net.identities["b"].certificate_pem)
    if name:
        identity = net.identities[name]
        context.load_cert_chain(identity.certificate_path, identity.key_path)
    return context


def test_a_client_without_a_certificate_is_refused(net: Net) -> None:
    def knock(listener: Listener) -> None:
        with client_context(net).wrap_socket(socket.create_connection(listener.address)) as tls:
            tls.recv(1)

    reason = refused(net, knock, ssl.SSLError)
    assert "did not return a certificate" in reason.lower()


def test_a_session_is_tls_1_3_and_cannot_be_resumed(net: Net) -> None:
    raw = socket.create_connection(net.listener().address)
    with client_context(net, "a").wrap_socket(raw) as tls:
        tls.sendall(bytes(data_hello().greeting()))
        assert tls.recv(1)
        assert tls.version() == "TLSv1.3"
        assert tls.session is None or not tls.session.has_ticket


def test_tls_1_2_is_refused(net: Net) -> None:
    context = client_context(net, "a")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2

    def knock(listener: Listener) -> None:
        with context.wrap_socket(socket.create_connection(listener.address)) as tls:
            tls.recv(1)

    refused(net, knock, ssl.SSLError)


def test_a_member_without_a_hello_gets_no_frame_in(net: Net) -> None:
    def knock(listener: Listener) -> None:
        raw = socket.create_connection(listener.address)
        with client_context(net, "a").wrap_socket(raw) as tls:
            tls.sendall(bytes(step_packet(1)) * 3)
            if not tls.recv(1):
                raise ConnectionError("hung up")

    assert "no place" in refused(net, knock, ConnectionError)


def test_nothing_but_the_hello_goes_out_before_the_listener_answers(net: Net) -> None:
    heard = bytearray()
    context = net.trust("b").server

    def listen(listening: socket.socket) -> None:
        raw, _ = listening.accept()
        raw.settimeout(5)
        with context.wrap_socket(raw, server_side=True) as tls:
            while piece := tls.recv(4096):
                heard.extend(piece)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=listen, args=(listening,))
        thread.start()
        with pytest.raises(LinkTimeoutError):
            dial(net.trust("a"), "b", listening.getsockname(), data_hello(), 0.5)
        thread.join()
    assert bytes(heard) == bytes(data_hello().greeting())


def test_dialing_a_process_that_speaks_no_tls_is_refused(net: Net) -> None:
    def listen(listening: socket.socket) -> None:
        with listening.accept()[0] as raw:
            raw.sendall(b"220 mail.example ready\r\n" * 20)
            raw.recv(4096)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=listen, args=(listening,))
        thread.start()
        with pytest.raises(PeerRefusedError):
            dial(net.trust("a"), "b", listening.getsockname(), data_hello(), 2)
        thread.join()


def test_a_dialer_waits_for_a_listener_that_starts_late(net: Net) -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        address = reserved.getsockname()
    late: list[Listener] = []

    def start() -> None:
        late.append(Listener(net.trust("b"), lambda: hello_of("b"), *address))

    timer = threading.Timer(0.3, start)
    timer.start()
    connection = dial(net.trust("a"), "b", address, data_hello(), 5)
    net.closing += [late[0].close, connection.close]
    timer.join()
    assert connection.peer == "b"


def test_peers_that_dribble_hold_nobody_up(net: Net) -> None:
    listener = net.listener(handshake_s=0.6)
    idlers = [socket.create_connection(listener.address) for _ in range(8)]
    idlers[0].sendall(b"\x16\x03\x01")
    started_s = time.monotonic()
    net.closing.append(dial(net.trust("a"), "b", listener.address, data_hello(), 5).close)
    net.closing.append(listener.accept(5).close)
    assert time.monotonic() - started_s < 0.5
    wait_for(lambda: len(listener.refusals) == len(idlers))
    for idler in idlers:
        idler.close()


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_listener_wants_one_address(net: Net, host: str) -> None:
    with pytest.raises(ValueError, match="address that peers can dial"):
        Listener(net.trust("b"), lambda: hello_of("b"), host)


def test_one_certificate_cannot_stand_under_two_names(net: Net) -> None:
    twins = [*net.members, Member("d", net.members[0].certificate_pem)]
    with pytest.raises(PeerRefusedError):
        Trust(net.identities["a"], twins)


# Data connections


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
    assert accepted <= 2 + 3  # the queue, the frame being sent, and what the kernel holds


def test_an_outbox_that_cannot_be_emptied_says_so(net: Net) -> None:
    near, _far = net.pair()
    outbox = Outbox(near, unexpected)
    outbox.put(step_packet(1, bytes(2**25)))
    with pytest.raises(LinkTimeoutError, match="last frames"):
        outbox.close(timeout_s=0.2)


def test_time_in_which_the_peer_takes_nothing_is_counted(net: Net) -> None:
    near, far = net.pair()
    sending = threading.Thread(target=near.send, args=(step_packet(1, bytes(2**25)),))
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


def test_two_threads_on_one_tls_object_are_noticed(net: Net) -> None:
    near, far = net.pair()
    reading = threading.Thread(target=far.receive)
    reading.start()
    time.sleep(0.1)
    with pytest.raises(RuntimeError, match="two threads"):
        far.send(step_packet(1))
    near.send(step_packet(1))
    reading.join()


DYING = """
import os, signal, sys
from pathlib import Path
from stages.greeting import dial
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
    near, far = net.pair()
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


# Control connections


def talk(net: Net, **settings: float) -> tuple[Duplex, Mailbox, Duplex, Mailbox]:
    near, far = net.pair("control")
    here, there = Mailbox(), Mailbox()
    return Duplex(near, here, **settings), here, Duplex(far, there, **settings), there  # type: ignore[arg-type]


def part(*ends: Duplex) -> None:
    closing = [threading.Thread(target=end.close) for end in ends]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join()


def received(mail: Mail | None) -> Message:
    assert isinstance(mail, Arrival), mail
    return decode(mail.frame)


def test_control_messages_cross_both_ways(net: Net) -> None:
    a, here, b, there = talk(net)
    a.send(Stop())
    b.send(Rows(lease="l", rows=()))
    assert received(there.get(5)) == Stop()
    assert received(here.get(5)) == Rows(lease="l", rows=())
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

    def flood(end: Duplex) -> None:
        for message in messages:
            end.send(message)

    floods = [threading.Thread(target=flood, args=(end,)) for end in (a, b)]
    for thread in floods:
        thread.start()
    for mailbox in (there, here):
        assert [received(mailbox.get(10)) for _ in messages] == messages
    for thread in floods:
        thread.join()
    part(a, b)


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
from stages.duplex import Duplex
from stages.greeting import dial
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
