"""Who gets in: a connection stands between members of one plan, run and epoch, and nobody else."""

import socket
import ssl
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import chain, repeat
from pathlib import Path

import pytest

from stages.dialing import dial
from stages.errors import (
    LinkTimeoutError,
    PeerRefusedError,
)
from stages.frame import EpochMismatchError, RunMismatchError
from stages.identity import Member, make_identity
from stages.listener import MAX_HANDSHAKES, Listener
from stages.tcp import Bundle
from stages.trust import Trust
from tests.linked import (
    Net,
    data_hello,
    hello_of,
    step_packet,
    wait_for,
)


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
    reason = refused(
        net,
        lambda listener: dial(impostor, "b", listener.address, data_hello(), 2),
        PeerRefusedError,
    )
    assert "certificate" in reason.lower()


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
    reason = refused(
        net,
        lambda listener: dial(net.trust("a"), "b", listener.address, data_hello(0), 2),
        EpochMismatchError,
    )
    assert reason.count("this is epoch 1, not 0") == 2, "one end was not told"


def test_a_dialer_waits_for_a_listener_that_has_not_heard_of_its_epoch(net: Net) -> None:
    epochs = chain((1, 1), repeat(2))
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

    assert "version" in refused(net, knock, ssl.SSLError).lower()


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
            dial(net.trust("a"), "b", listening.getsockname(), data_hello(), 0.5, Bundle())
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


def test_strangers_who_take_all_places_keep_no_member_out(net: Net) -> None:
    listener = net.listener(handshake_s=30)
    dawdler = net.trust("c").client.wrap_socket(socket.create_connection(listener.address))
    time.sleep(0.2)  # its certificate is read
    idlers = [socket.create_connection(listener.address) for _ in range(2 * MAX_HANDSHAKES)]
    started_s = time.monotonic()
    net.closing.append(dial(net.trust("a"), "b", listener.address, data_hello(), 5).close)
    assert time.monotonic() - started_s < 4
    dawdler.sendall(bytes(hello_of("c").greeting()))
    assert dawdler.recv(1), "who had proved a member's key lost its place"
    for end in (*idlers, dawdler):
        end.close()


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::"])
def test_a_listener_wants_one_address(net: Net, host: str) -> None:
    with pytest.raises(ValueError, match="address that peers can dial"):
        Listener(net.trust("b"), lambda: hello_of("b"), host)


def test_one_certificate_cannot_stand_under_two_names(net: Net) -> None:
    twins = [*net.members, Member("d", net.members[0].certificate_pem)]
    with pytest.raises(PeerRefusedError):
        Trust(net.identities["a"], twins)
