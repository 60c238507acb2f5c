"""Several TLS connections that carry one stream of bytes."""

import random
import socket
import ssl
import struct

import pytest

from stages.control import MAX_STRIPES, Hello
from stages.dialing import dial
from stages.errors import PeerClosedError, ProtocolError
from stages.inbox import Inbox
from stages.mailbox import LinkDown, Mailbox
from stages.send_queue import Bell
from stages.stripes import CHUNK_BYTES, Stripes
from stages.tcp import Bundle
from tests.linked import Net, arrive, data_hello, step_packet, wait_for


def test_frames_of_any_size_arrive_whole_and_in_order(net: Net) -> None:
    near, far = net.pair(bundle=Bundle(4))
    chance = random.Random(1)
    sizes = [chance.choice((4, 3000, CHUNK_BYTES - 200, CHUNK_BYTES, 2_000_000)) for _ in range(40)]
    packets = [
        step_packet(number, chance.randbytes(size // 4 * 4)) for number, size in enumerate(sizes)
    ]
    arrive(near, far, packets)
    assert len(near.sockets) == len(far.sockets) == 4


def test_one_stripe_that_breaks_ends_the_connection(net: Net) -> None:
    near, far = net.pair(bundle=Bundle(4))
    mailbox = Mailbox()
    net.closing.append(Inbox(far, mailbox).close)
    socket.socket.shutdown(near.sockets[2], socket.SHUT_RDWR)
    mail = mailbox.get(5)
    assert isinstance(mail, LinkDown)


def test_whoever_waits_hears_of_the_end_of_one_stripe(net: Net) -> None:
    near, far = net.pair(bundle=Bundle(4))
    bell = Bell()
    net.closing.append(bell.close)
    socket.socket.shutdown(far.sockets[2], socket.SHUT_WR)  # an end, and no reset
    # The first look may find that the stripe has ended; whoever waits after it must hear so too.
    assert all(near.wait(bell, timeout_s=2.0) for _ in range(3))
    with pytest.raises(PeerClosedError):
        near.receive()


def test_a_peer_that_dials_anew_leaves_no_half_stream_behind(net: Net) -> None:
    listener = net.listener()
    half = dial_stripe(net, listener.address, stream=5, stripe=0)
    wait_for(lambda: listener._begun)
    near = dial(net.trust("a"), "b", listener.address, data_hello(), 5, Bundle(2))
    far = listener.accept(5)
    assert not listener._begun
    assert half.recv(1) == b""
    for end in (near, far, half):
        end.close()


def dial_stripe(net: Net, address: tuple[str, int], stream: int, stripe: int) -> ssl.SSLSocket:
    """A single TLS connection that says it is one of two."""
    hello = data_hello().model_copy(update={"stream": stream, "stripe": stripe, "stripes": 2})
    tls = net.trust("a").client.wrap_socket(socket.create_connection(address))
    tls.sendall(bytes(hello.greeting()))
    tls.recv(2**14)
    return tls


@pytest.mark.parametrize(
    ("number", "length"), [(0, 0), (0, CHUNK_BYTES + 1), (0, 2**32 - 1)], ids=repr
)
def test_a_chunk_that_cannot_be_is_refused_before_it_is_read(
    net: Net, number: int, length: int
) -> None:
    listener = net.listener()
    liars = [dial_stripe(net, listener.address, 5, stripe) for stripe in range(2)]
    far = listener.accept(5)
    liars[0].sendall(struct.pack("<QI", number, length))
    with pytest.raises(ProtocolError, match="chunk"):
        far.receive()
    far.close()
    for liar in liars:
        liar.close()


def test_a_chunk_that_comes_twice_is_refused(net: Net) -> None:
    listener = net.listener()
    liars = [dial_stripe(net, listener.address, 5, stripe) for stripe in range(2)]
    far = listener.accept(5)
    liars[0].sendall((struct.pack("<QI", 3, 4) + b"abcd") * 2)
    with pytest.raises(ProtocolError, match="chunk 3"):
        far.receive()
    far.close()
    for liar in liars:
        liar.close()


@pytest.mark.parametrize("number", [0, 2], ids=["delivered", "waiting"])
def test_a_chunk_that_another_stripe_has_brought_is_refused(net: Net, number: int) -> None:
    listener = net.listener()
    liars = [dial_stripe(net, listener.address, 5, stripe) for stripe in range(2)]
    far = listener.accept(5)
    stream = Stripes(far.sockets)
    for early in (0, 2):
        liars[0].sendall(struct.pack("<QI", early, 4) + b"abcd")
    assert stream.recv_into(memoryview(bytearray(4))) == 4
    liars[1].sendall(struct.pack("<QI", number, 4) + b"abcd")
    with pytest.raises(ProtocolError, match=f"chunk {number} came again"):
        stream.recv_into(memoryview(bytearray(4)))
    far.close()
    for liar in liars:
        liar.close()


def test_a_hello_of_a_stripe_that_cannot_be_is_none() -> None:
    for changes in ({"stripe": 2, "stripes": 2}, {"stripes": MAX_STRIPES + 1}, {"stripes": 0}):
        with pytest.raises(ValueError, match="stripe"):
            Hello.model_validate(data_hello().model_dump() | changes)
