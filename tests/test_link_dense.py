"""The dense level on a link: both ends get ready for it, it is chosen where it pays, nothing waits."""

import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from planner.schedule import Span, Step
from stages import codec_compiled, link_codec
from stages.codec import DENSE, FAST, LEVELS
from stages.codec_compiled import installed
from stages.cpu_share import CpuShare
from stages.dialing import dial_once
from stages.frame import Dtype, Frame, Packet, run_number
from stages.frame_reader import FrameReader
from stages.inbox import Inbox
from stages.link_codec import LinkDecoder, LinkEncoder
from stages.link_dense import LEARNING_ROWS
from stages.link_meter import TcpState
from stages.mailbox import Arrival, Mailbox
from stages.outbox import Outbox
from stages.wire import Ack, ProfileHeld, StepFrame
from tests.coded import DENSE_CHANNELS, related_states
from tests.linked import RUN, Relay, hello_of, plan_in, unexpected, wait_for

NUMBER = run_number(RUN)
ROWS = 256
TO_LEARN = LEARNING_ROWS // ROWS
READY_S = 30.0  # where it was never compiled before

dense = pytest.mark.skipif(not installed(), reason="the dense level takes the extra `dense`")


def activation(number: int) -> StepFrame:
    bits = related_states("bfloat16", ROWS, seed=number)
    step = Step(number, 0, tuple(Span(row, number, 1, True) for row in range(ROWS)))
    return StepFrame(1, step, DENSE_CHANNELS, Dtype.BFLOAT16, memoryview(bits.tobytes()))


def arrived(packet: Packet) -> Frame:
    [frame] = FrameReader().feed(bytes(packet))
    return frame


class SlowLink:
    """An encoder and a decoder on either side of 20 Mbit/s that nothing but bytes keeps busy."""

    def __init__(self, peer_is_dense: bool) -> None:
        self.now_s = 0.0
        cpu = CpuShare(now_s=lambda: self.now_s, thread_s=lambda: 0.0)
        self.encoder = LinkEncoder(NUMBER, start=FAST, cpu=cpu, clock=lambda: self.now_s)
        self.encoder.reconnected(peer_is_dense)
        self.decoder = LinkDecoder()
        self.announced = 0
        self.number = 0

    def send(self) -> str:
        """One frame there, and the word back; the level that it took."""
        self.announce()
        step = activation(self.number)
        packet = self.encoder.packet(step)
        self.encoder.sending(packet)
        self.encoder.sent()
        self.now_s += packet.size / 2.5e6
        frame = arrived(packet)
        assert self.decoder.opened(frame).payload == step.payload
        self.encoder.heard(Ack(1, self.number), TcpState(min_rtt_s=1e-9))
        self.hear()
        self.number += 1
        return LEVELS[frame.label.codec]

    def announce(self) -> None:
        while (profile := self.encoder.announcement()) is not None:
            self.announced += 1
            self.decoder.learn(arrived(profile))
            self.hear()

    def hear(self) -> int:
        """Bring the decoder's words about profiles back; how many there were."""
        words = 0
        while (word := self.decoder.word()) is not None:
            self.encoder.heard(word, TcpState())
            words += 1
        return words

    def learn(self) -> None:
        """Send until both ends are ready, which takes neither's time."""
        wait_for(lambda: self.send() == DENSE, READY_S)


@dense
def test_a_slow_link_of_two_dense_ends_settles_on_dense_frames() -> None:
    link = SlowLink(peer_is_dense=True)
    link.learn()
    levels = [link.send() for _ in range(40)]
    assert levels[-20:].count(DENSE) >= 18


@dense
def test_a_peer_that_cannot_decode_dense_frames_hears_nothing_of_them() -> None:
    link = SlowLink(peer_is_dense=False)
    levels = {link.send() for _ in range(TO_LEARN + 40)}
    assert DENSE not in levels
    assert link.announced == 1


@dense
def test_a_slow_link_that_mostly_rests_learns_nothing_dense(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lessons: list[str] = []
    monkeypatch.setattr(codec_compiled, "prepare", lambda: lessons.append("begun"))
    link = SlowLink(peer_is_dense=True)
    while link.now_s < 30 or link.number < 2 * TO_LEARN:
        sent_s = link.now_s
        link.send()
        link.now_s += 4 * (link.now_s - sent_s)
    assert link.encoder.meter.busy_share == pytest.approx(0.2, abs=0.05)
    assert link.encoder.activation_bytes[FAST] > 0
    assert not lessons


@dense
def test_a_new_connection_holds_both_profiles_before_frames_that_need_them() -> None:
    link = SlowLink(peer_is_dense=True)
    link.learn()
    link.encoder.reconnected(True)
    link.decoder.reconnected()
    words = []
    while (profile := link.encoder.announcement()) is not None:
        link.decoder.learn(arrived(profile))
        words.append(link.decoder.word())
    assert len(words) == 2
    for word in words:
        assert isinstance(word, ProfileHeld)
        assert link.encoder.waiting_for_word
        link.encoder.heard(word, TcpState())
    assert not link.encoder.waiting_for_word
    assert DENSE in {link.send() for _ in range(4)}


@dense
def test_dense_frames_survive_resets_on_a_live_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_codec, "DENSE_PAYS_BYTES_PER_S", float("inf"))
    monkeypatch.setattr(link_codec, "DENSE_PAYS_BUSY", 0.0)
    able = {"dense": True}
    net = plan_in(tmp_path)
    listener = net.listener(hello=hello_of("b").model_copy(update=able))
    relay = Relay(listener.address)
    hello = hello_of("a").model_copy(update=able)
    redial = partial(dial_once, net.trust("a"), "b", relay.address, hello, 5.0)
    encoder = LinkEncoder(NUMBER, (FAST, DENSE))
    outbox = Outbox(redial(), unexpected, 8, redial, 5.0, encoder=encoder)
    mailbox = Mailbox()
    inbox = Inbox(listener.accept(5), mailbox, listener, 5.0)
    relay.reset_after_bytes = 2_000_000
    relay.reset()
    over = threading.Event()

    def send() -> None:
        number = 0
        while not over.is_set():
            outbox.put(activation(number), timeout_s=10)
            number += 1
            if number > 2 * TO_LEARN:
                over.wait(0.01)

    sending = threading.Thread(target=send)
    sending.start()
    number = 0

    def take() -> bool:
        nonlocal number
        mail = mailbox.get(10)
        assert isinstance(mail, Arrival), mail
        assert mail.frame.payload == activation(number).payload
        number += 1
        return encoder.activation_bytes[DENSE] > ROWS * DENSE_CHANNELS * 2

    wait_for(take, READY_S)
    reconnects = outbox.report().reconnects
    wait_for(lambda: take() and outbox.report().reconnects > reconnects, READY_S)
    over.set()
    while sending.is_alive():
        mailbox.get(0.05)
    outbox.abort()
    inbox.close()
    relay.close()
    for close in reversed(net.closing):
        close()


def test_a_machine_that_cannot_compile_says_why_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('llvm is broken here')\n")
    program = (
        "import logging, sys; logging.basicConfig()\n"
        "from stages import codec_compiled as c\n"
        "assert c.installed() and not c.ready()\n"
        "c.prepare()\n"
        "print(c.await_ready())\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{root}"},
        check=True,
    )
    assert done.stdout == "False\n"
    assert "llvm is broken here" in done.stderr
