"""Connections that take turns: every frame arrives in order, and a turn ends before BBR would pause."""

import random
import socket

import pytest

from stages.errors import FrameError, LinkError
from stages.frame import PREFIX_BYTES, Kind, Label, run_number, seal
from stages.link_meter import TcpState
from stages.tcp import BBR_BUNDLE, Bundle
from stages.turns import (
    LEARNING_S,
    LEAST_UNSENT_BYTES,
    MOST_UNSENT_BYTES,
    TURN_S,
    Turns,
    unsent_bytes,
)
from tests.linked import RUN, Net, always_another, arrive, step_packet

BBR_PATIENCE_S = 10.0
"""For so long BBR trusts a least round trip."""


def carriers(taking: Turns, *times_s: float) -> list[int]:
    """Who carries frames that are sent then."""
    places = []
    for now_s in times_s:
        if taking.over(now_s):
            taking.pass_on(now_s)
        places.append(taking.current)
    return places


def test_a_turn_begins_with_its_first_frame_and_ends_after_its_time() -> None:
    taking = Turns(2)
    first = 7.0 + LEARNING_S
    assert carriers(taking, 7.0, 7.1, first - 0.1, first) == [0, 0, 0, 1]
    assert carriers(taking, first + TURN_S - 0.1, first + TURN_S) == [1, 0]
    assert carriers(taking, 500.0, 499.9 + TURN_S, 500.0 + TURN_S) == [1, 1, 0]


def test_as_a_turn_ends_the_less_waits_in_the_kernel_the_slower_the_wire() -> None:
    assert unsent_bytes(0) == LEAST_UNSENT_BYTES
    assert unsent_bytes(2.5e6) == 100_000
    assert unsent_bytes(1e9) == MOST_UNSENT_BYTES


def test_a_turn_is_over_before_bbr_would_empty_the_wire_and_a_rest_is_not() -> None:
    assert LEARNING_S < TURN_S < BBR_PATIENCE_S < 2 * TURN_S


def test_a_connection_alone_carries_for_ever() -> None:
    assert carriers(Turns(1), 0.0, 0.0, 1e9) == [0, 0, 0]


def test_frames_arrive_whole_and_in_order_whoever_carries_them(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_another(monkeypatch)
    near, far = net.pair(bundle=BBR_BUNDLE)
    chance = random.Random(1)
    sizes = [chance.choice((4, 3000, 70_000, 2_000_000)) for _ in range(40)]
    packets = [step_packet(number, chance.randbytes(size)) for number, size in enumerate(sizes)]
    sent, received = arrive(near, far, packets)
    assert sent.frames_sent == received.frames_received == len(packets)
    framing_bytes = sum(len(packet.head) for packet in packets)
    assert sent.framing_bytes_sent == framing_bytes + PREFIX_BYTES * (len(packets) - 1)


def test_a_broken_connection_is_noticed_when_its_turn_comes(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    always_another(monkeypatch)
    near, _far = net.pair(bundle=BBR_BUNDLE)
    socket.socket.shutdown(near.sockets[1], socket.SHUT_RDWR)
    with pytest.raises(LinkError):
        for number in range(3):
            near.send(step_packet(number))


def test_whoever_has_one_connection_may_not_pass_it_on(net: Net) -> None:
    near, far = net.pair(bundle=Bundle())
    near.send(seal(Label(Kind.TURN, run_number(RUN), 1), b"", b""))
    with pytest.raises(FrameError, match="TURN frame has no place"):
        far.receive()


def test_a_turn_says_nothing_else() -> None:
    with pytest.raises(FrameError):
        seal(Label(Kind.TURN, run_number(RUN), 1), b"", bytes(4))


def test_a_wire_is_seen_by_the_one_that_carries_and_counted_by_all() -> None:
    states = TcpState(0.3, 0.2, 100, 1, 9e6), TcpState(0.25, 0.21, 50, 2, 1e7)
    assert TcpState.together(states, turn=1) == TcpState(0.25, 0.2, 150, 3, 1e7)
