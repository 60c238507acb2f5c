"""The codec on a live link: the profile's way, the level's choice, what a report says."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from planner.schedule import Span, Step
from stages.codec import FAST, INT8, LEVELS, RAW
from stages.codec_profile import LEARNING_ROWS
from stages.cpu_share import CpuShare
from stages.dialing import dial_once
from stages.errors import FrameError
from stages.frame import Dtype, Frame, Kind, Packet, run_number
from stages.frame_reader import FrameReader
from stages.inbox import Inbox
from stages.link_codec import LinkDecoder, LinkEncoder
from stages.link_meter import LinkMeter, TcpState
from stages.mailbox import Arrival, Mailbox
from stages.outbox import Outbox
from stages.wire import Ack, ProfileHeld, StepFrame
from tests.linked import RUN, Relay, hello_of, plan_in, unexpected

ROWS, CHANNELS = 32, 256
TO_LEARN = -(-LEARNING_ROWS // ROWS)
NUMBER = run_number(RUN)


def activation(number: int, rows: int = ROWS) -> StepFrame:
    """A decode step's, of a boundary whose channels keep their scales from frame to frame."""
    scale = np.exp2(np.random.default_rng(1).normal(0, 1.5, CHANNELS))
    x = (np.random.default_rng(number + 2).standard_normal((rows, CHANNELS)) + 0.3) * scale
    bits = (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    step = Step(number, 0, tuple(Span(row, number, 1, True) for row in range(rows)))
    return StepFrame(1, step, CHANNELS, Dtype.BFLOAT16, memoryview(bits.tobytes()))


def arrived(packet: Packet) -> Frame:
    [frame] = FrameReader().feed(bytes(packet))
    return frame


def restored(decoder: LinkDecoder, packet: Packet) -> bytes:
    return bytes(decoder.opened(arrived(packet)).payload)


def told(decoder: LinkDecoder, profile: Packet) -> ProfileHeld:
    """What the decoder says once it holds a profile."""
    decoder.learn(arrived(profile))
    word = decoder.word()
    assert word is not None and decoder.word() is None
    return word


def taught(encoder: LinkEncoder) -> Packet:
    """The profile's frame, once the encoder has coded enough rows."""
    for number in range(TO_LEARN):
        assert encoder.announcement() is None
        encoder.packet(activation(number))
    packet = encoder.announcement()
    assert packet is not None
    return packet


def test_the_profile_is_used_only_while_the_connection_is_known_to_hold_it() -> None:
    encoder = LinkEncoder(NUMBER, (FAST,))
    knowing, ignorant = LinkDecoder(), LinkDecoder()
    step = activation(99)
    original = bytes(step.payload)

    held = told(knowing, taught(encoder))
    assert encoder.announcement() is None, "once is enough"
    before = encoder.packet(step)
    assert restored(ignorant, before) == original
    encoder.heard(held, TcpState())
    after = encoder.packet(step)
    assert after.size < before.size
    assert restored(knowing, after) == original
    with pytest.raises(FrameError, match="profile"):
        ignorant.opened(arrived(after))

    encoder.reconnected()
    knowing.reconnected()
    assert restored(knowing, encoder.packet(step)) == original
    again = encoder.announcement()
    assert again is not None and encoder.waiting_for_word
    encoder.heard(told(knowing, again), TcpState())
    assert not encoder.waiting_for_word
    assert restored(knowing, encoder.packet(step)) == original


def test_a_word_about_another_profile_counts_for_nothing() -> None:
    encoder = LinkEncoder(NUMBER, (FAST,))
    taught(encoder)
    encoder.heard(ProfileHeld(1, 7), TcpState())
    assert encoder.waiting_for_word
    LinkDecoder().opened(arrived(encoder.packet(activation(3))))


def test_rows_of_zeros_teach_nothing_and_harm_nothing() -> None:
    encoder = LinkEncoder(NUMBER, (FAST,))
    for number in range(2 * TO_LEARN):
        step = activation(number)
        zeros = np.frombuffer(step.payload, np.uint16).copy()
        zeros[::7] = 0
        blank = StepFrame(1, step.step, CHANNELS, step.dtype, memoryview(zeros.tobytes()))
        assert restored(LinkDecoder(), encoder.packet(blank)) == zeros.tobytes()
    assert encoder.announcement() is None


def test_what_loses_bits_is_refused_unless_the_job_asked_for_it() -> None:
    packet = LinkEncoder(NUMBER, (INT8,)).packet(activation(1))
    with pytest.raises(FrameError, match="no right to the level int8"):
        LinkDecoder().opened(arrived(packet))
    opened = LinkDecoder(LEVELS).opened(arrived(packet))
    assert len(opened.payload) == len(activation(1).payload)
    assert opened.label.codec == LEVELS.index(RAW)


def test_a_frame_whose_payload_tells_another_shape_is_refused() -> None:
    coded = LinkEncoder(NUMBER, (FAST,)).packet(activation(1))
    other = activation(1, rows=ROWS // 2)
    lie = StepFrame(1, other.step, 2 * CHANNELS, other.dtype, coded.payload, LEVELS.index(FAST))
    with pytest.raises(FrameError, match=r"says bfloat16 \(16, 512\)"):
        LinkDecoder().opened(arrived(lie.encode(NUMBER)))


@dataclass
class Modelled:
    """A link that serves frames one after the other, seen through its acknowledgements."""

    bytes_per_s: float
    rtt_s: float = 0.04
    now_s: float = 0.0
    free_s: float = 0.0
    """When the last frame has left."""
    due: list[tuple[float, int]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now_s

    def send(self, packet: Packet) -> None:
        self.free_s = max(self.free_s, self.now_s) + packet.size / self.bytes_per_s
        self.due.append((self.free_s + self.rtt_s, packet.frame))


@pytest.mark.parametrize(("mbit", "level"), [(20, FAST), (100, FAST), (80_000, RAW)])
@pytest.mark.parametrize("start", [RAW, FAST])
def test_the_link_settles_on_the_level_that_its_speed_asks_for(
    mbit: int, level: str, start: str
) -> None:
    link = Modelled(mbit * 1e6 / 8)
    cpu = CpuShare(now_s=link.clock, thread_s=lambda: 0.0)
    encoder = LinkEncoder(NUMBER, start=start, cpu=cpu, clock=link.clock)
    sent: list[str] = []
    for number in range(60):
        packet = encoder.packet(activation(number))
        sent.append(LEVELS[arrived(packet).label.codec])
        encoder.sending(packet)
        encoder.sent()
        link.send(packet)
        if number % 4 == 3:  # four in flight
            for (due_s, frame), coded in zip(link.due, sent[-4:], strict=True):
                link.now_s = max(link.now_s, due_s + 0.002)
                decode_us = 100 if coded == FAST else 0  # encoding takes no time on this clock
                word = Ack(1, frame, held_us=2000, decode_us=decode_us)
                encoder.heard(word, TcpState(min_rtt_s=link.rtt_s))
            link.due.clear()
    assert sent[-20:].count(level) >= 18


def metered(link: Modelled, frames: int, pause_s: float, held_s: float) -> float:
    """Bytes per second that a meter makes of frames sent at such a pace over a link."""
    meter = LinkMeter()
    packet = activation(0).encode(NUMBER)
    sizes = busy_s = 0.0
    for number in range(frames):
        each = Packet(packet.head, packet.payload, Kind.STEP, number)
        meter.sending(each, link.now_s)
        link.send(each)
        link.now_s += pause_s
    tcp = TcpState(min_rtt_s=link.rtt_s)
    for due_s, number in link.due:
        seen = meter.acknowledged(number, held_s, due_s + held_s, tcp)
        if seen is not None:
            sizes, busy_s = sizes + seen.nbytes, busy_s + seen.busy_s
    return sizes / busy_s


@pytest.mark.parametrize("held_s", [0.0, 0.03])
def test_a_busy_links_rate_is_what_it_carries_whatever_the_peer_does_with_frames(
    held_s: float,
) -> None:
    assert metered(Modelled(2e6), 50, 0.0, held_s) == pytest.approx(2e6)


def test_acknowledgements_that_are_read_in_bursts_tell_the_same_rate() -> None:
    link, meter = Modelled(2e6), LinkMeter()
    tcp = TcpState(min_rtt_s=link.rtt_s)
    packet = activation(0).encode(NUMBER)
    rates = []
    for number in range(300):
        each = Packet(packet.head, packet.payload, Kind.STEP, number)
        meter.sending(each, link.now_s)
        link.send(each)
        if number % 10 == 9:  # the sender was busy sending meanwhile
            link.now_s = link.due[-1][0]
            told = [meter.acknowledged(n, 0.0, link.now_s, tcp) for _, n in link.due]
            rates += [seen.nbytes / seen.busy_s for seen in told if seen is not None]
            link.due.clear()
    assert min(rates[5:]) > 1.2e6
    assert max(rates[5:]) < 3e6


def test_time_in_which_a_link_has_nothing_to_do_does_not_count() -> None:
    assert metered(Modelled(2e6), 50, pause_s=1.0, held_s=0.0) == pytest.approx(2e6)


def test_what_tcp_says_of_the_rate_holds_where_it_is_more() -> None:
    meter = LinkMeter()
    packet = activation(0).encode(NUMBER)
    meter.sending(packet, 0.0)
    meter.acknowledged(packet.frame, 0.0, 0.1, TcpState())
    meter.sending(packet, 1.0)
    seen = meter.acknowledged(packet.frame, 0.0, 1.5, TcpState(bytes_per_s=1e6))
    assert seen is not None
    assert seen.busy_s == pytest.approx(packet.size / 1e6)


@pytest.mark.parametrize(("idle_cores", "work_s"), [(0.1, 0.8), (1.5, 0.0)])
def test_a_codec_counts_as_work_only_where_no_core_is_idle(
    idle_cores: float, work_s: float
) -> None:
    now_s = [0.0]
    share = CpuShare(
        busy_s=lambda: 0.8 * now_s[0],
        idle_s=lambda: idle_cores * now_s[0],
        now_s=lambda: now_s[0],
        thread_s=lambda: 0.3 * now_s[0],
    )
    assert share.s_per_byte(500) == 0.0
    now_s[0] = 2.0
    assert share.s_per_byte(500) == pytest.approx(2 * work_s / 1000)
    started = share.started()
    now_s[0] = 3.0
    assert share.cost_s(started) == pytest.approx(0.3 if work_s else 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@dataclass
class Joined:
    """An encoding sender, a stretch of wire that resets, a decoding receiver."""

    relay: Relay
    outbox: Outbox
    mailbox: Mailbox


@pytest.fixture
def joined(folder: Path) -> Iterator[Joined]:
    net = plan_in(folder)
    listener = net.listener()
    relay = Relay(listener.address)
    redial = partial(dial_once, net.trust("a"), "b", relay.address, hello_of("a"), 5.0)
    encoder = LinkEncoder(NUMBER, (FAST,))
    outbox = Outbox(redial(), unexpected, 8, redial, 5.0, encoder=encoder)
    mailbox = Mailbox()
    inbox = Inbox(listener.accept(5), mailbox, listener, 5.0)
    yield Joined(relay, outbox, mailbox)
    outbox.abort()
    inbox.close()
    relay.close()
    for close in reversed(net.closing):
        close()


def test_a_link_that_is_reset_again_and_again_brings_the_profile_anew_and_every_bit(
    joined: Joined,
) -> None:
    count = 150
    joined.relay.reset_after_bytes = 200_000  # in mid-frame, every fifteen frames or so
    joined.relay.reset()
    steps = [activation(number) for number in range(count)]

    def send() -> None:
        for step in steps:
            joined.outbox.put(step, timeout_s=10)

    sending = threading.Thread(target=send)
    sending.start()
    for step in steps:
        mail = joined.mailbox.get(10)
        assert isinstance(mail, Arrival), mail
        assert mail.frame.label.frame == step.step.frame
        assert mail.frame.payload == step.payload
    sending.join()
    joined.outbox.close()
    report = joined.outbox.report()
    assert report.reconnects >= 5
    assert report.control_bytes_sent >= 4 * CHANNELS, "the profile did not go with each connection"


def test_a_report_says_what_the_link_did_with_bytes(joined: Joined) -> None:
    steps = [activation(number) for number in range(40)]
    for step in steps:
        joined.outbox.put(step, timeout_s=10)
    joined.outbox.close()
    report = joined.outbox.report()
    assert report.activation_bytes == sum(len(step.payload) for step in steps)
    assert report.coded_bytes == report.payload_bytes_sent < 0.9 * report.activation_bytes
    assert report.level == FAST
    assert report.bytes_per_s > 1e6
    turns, rest = divmod(report.framing_bytes_sent - 40 * (56 + 8 + 12 * ROWS), 56)
    assert (0 <= turns <= 40, rest) == (True, 0), "beside the frames' own, what passes turns on"
    assert CHANNELS < report.control_bytes_sent < CHANNELS + 80, "the profile, once"
    assert report.ack_bytes_sent == 0
    parts = report.payload_bytes_sent + report.framing_bytes_sent + report.control_bytes_sent
    assert report.tls_bytes_sent == parts
    if report.rtt_s:  # the system tells of TCP
        assert report.segments_sent >= 40
        assert report.rtt_s < 1.0
