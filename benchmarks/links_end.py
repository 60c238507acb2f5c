"""One end of a link under measurement, as a process of its own: frames flow from "a" to "b".

    python -m benchmarks.links_end receive FOLDER ADDRESS TRANSFER
    python -m benchmarks.links_end send FOLDER ADDRESS PORT TRANSFER

FOLDER holds both ends' keys, TRANSFER is a `Transfer` as JSON. The receiver says its port, then what
it measured, each as a line of JSON, and leaves; that ends the sender, which says its own.
"""

import json
import os
import resource
import socket
import statistics
import struct
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from planner.schedule import Span, Step
from stages.control import Hello, Stop, decode
from stages.dialing import dial
from stages.duplex import Duplex
from stages.errors import LinkError
from stages.frame import Dtype, Packet, run_number
from stages.identity import Member, load_identity
from stages.inbox import Inbox
from stages.link import Connection
from stages.listener import Listener
from stages.mailbox import Arrival, LinkDown, Mailbox
from stages.outbox import Outbox
from stages.tcp import Bundle
from stages.trust import Trust
from stages.wire import StepFrame

RUN = "links"
NAMES = ("a", "b")
DIAL_S = 20.0
SO_MAX_PACING_RATE = 47  # of Linux; Python has no name for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What goes over the link: STEP frames one after another, control messages now and then."""

    payload_bytes: int
    """Of each STEP frame; 0 for none."""
    rows: int = 32
    congestion_control: str = "bbr"
    stripes: int | None = None
    """TLS connections that carry the frames; None for as many as the link takes by itself."""
    in_turns: bool = False
    """Whether these do so one at a time."""
    held_to_bytes_per_s: float = 0.0
    """A limit to BBR's own pace, from after the warm-up's first half; 0 for none."""
    message_every_s: float = 0.0
    """0 for no control connection."""
    frame_every_s: float = 0.0
    """0 for as many as the link takes."""
    warm_up_s: float = 5.0
    measured_s: float = 20.0


@dataclass(frozen=True, slots=True)
class Received:
    """The receiver's view, of the measured seconds."""

    goodput_bytes_per_s: float
    """Payloads, without prefix and header."""
    payload_bytes: int
    """Of all frames, the warm-up's too."""
    message_delay_s: float
    """Median one-way delay of control messages; 0 without."""
    frame_cpu_s: tuple[float, float]
    """Of the processor for each frame: in the program and its libraries, and in the kernel."""


@dataclass(frozen=True, slots=True)
class Sent:
    """The sender's view, from the first frame to the end of the link."""

    congestion_control: str
    frame_cpu_s: tuple[float, float]


def step_packet(number: int, payload: memoryview, rows: int) -> Packet:
    """A frame of one decode step: each row one token, its bfloat16 activation raw."""
    step = Step(number, 0, tuple(Span(row, 1000, 1, True) for row in range(rows)))
    hidden = len(payload) // (2 * rows)
    return StepFrame(1, step, hidden, Dtype.BFLOAT16, payload).encode(run_number(RUN))


def receive(folder: Path, address: str, transfer: Transfer) -> Received:
    """Take what the sender has for the transfer's time; the end of the process ends the link."""
    listener = Listener(_trust("b", folder), lambda: _hello("b", "data"), address)
    print(json.dumps(listener.address[1]), flush=True)
    steps, messages = Mailbox(), Mailbox()
    inbox = None
    for _ in range((transfer.payload_bytes > 0) + (transfer.message_every_s > 0)):
        connection = listener.accept(DIAL_S)
        if connection.purpose == "data":
            inbox = Inbox(connection, steps)
            threading.Thread(target=_drain, args=(steps,), daemon=True).start()
        else:
            Duplex(connection, messages)
    time.sleep(transfer.warm_up_s)
    delays_s: list[float] = []
    threading.Thread(target=_hear, args=(messages, delays_s), daemon=True).start()
    if inbox is None:
        time.sleep(transfer.measured_s)
        return Received(0.0, 0, statistics.median(delays_s), (0.0, 0.0))
    goodput, frame_cpu_s = _measure(inbox, transfer)
    delay_s = statistics.median(delays_s) if delays_s else 0.0
    return Received(goodput, inbox.report().payload_bytes_received, delay_s, frame_cpu_s)


def _measure(inbox: Inbox, transfer: Transfer) -> tuple[float, tuple[float, float]]:
    """Payload bytes per second, and processor seconds per frame."""
    before, used_s, started_s = inbox.report(), _used_s(), time.perf_counter()
    time.sleep(transfer.measured_s)
    after, seconds = inbox.report(), time.perf_counter() - started_s
    # Bytes, not frames, so that a slow link's rate is not rounded to whole ones.
    packet = step_packet(0, memoryview(bytes(transfer.payload_bytes)), transfer.rows)
    share = transfer.payload_bytes / packet.size
    received = after.tls_bytes_received - before.tls_bytes_received
    frames = after.frames_received - before.frames_received
    return share * received / seconds, _by_the_frame(used_s, frames)


def _used_s() -> tuple[float, float]:
    """Processor seconds of this process so far: its own, and the kernel's for it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime, used.ru_stime


def _by_the_frame(before_s: tuple[float, float], frames: int) -> tuple[float, float]:
    """Processor seconds since then, for each of so many frames."""
    own_s, kernel_s = (now - then for now, then in zip(_used_s(), before_s, strict=True))
    return own_s / max(1, frames), kernel_s / max(1, frames)


def _drain(steps: Mailbox) -> None:
    while isinstance(mail := steps.get(), Arrival):
        StepFrame.decode(mail.frame)


def _hear(messages: Mailbox, delays_s: list[float]) -> None:
    """Note how long each message was under way: both ends read one machine's clock.

    Of those that were sent from now on, that is: earlier ones have waited for this thread.
    """
    from_ns = time.monotonic_ns()
    while isinstance(mail := messages.get(), Arrival):
        message = decode(mail.frame)
        assert isinstance(message, Stop)
        sent_ns = int(message.reason)
        if sent_ns >= from_ns:
            delays_s.append((time.monotonic_ns() - sent_ns) / 1e9)


def send(folder: Path, address: tuple[str, int], transfer: Transfer) -> Sent:
    """Send as fast as the link takes it, until the receiver leaves."""
    trust = _trust("a", folder)
    if transfer.message_every_s:
        control = dial(trust, "b", address, _hello("a", "control"), DIAL_S)
        duplex = Duplex(control, Mailbox())
        if not transfer.payload_bytes:
            _tell(duplex, transfer.message_every_s)
            return Sent(control.congestion_control, (0.0, 0.0))
        telling = (duplex, transfer.message_every_s)
        threading.Thread(target=_tell, args=telling, daemon=True).start()
    bundle = None if transfer.stripes is None else Bundle(transfer.stripes, transfer.in_turns)
    connection = dial(trust, "b", address, _hello("a", "data"), DIAL_S, bundle)
    chosen = choose_congestion_control(connection, transfer.congestion_control)
    if transfer.held_to_bytes_per_s:
        # Not before BBR knows the wire: it would take the limit for a policer's, and stay below it.
        threading.Timer(transfer.warm_up_s / 2, _hold, (connection, transfer)).start()
    used_s = _used_s()
    outbox = Outbox(connection, _note_end)
    payload = memoryview(os.urandom(transfer.payload_bytes))
    number = 0
    started_s = time.monotonic()
    try:
        while True:
            early_s = started_s + number * transfer.frame_every_s - time.monotonic()
            if transfer.frame_every_s and early_s > 0:
                time.sleep(early_s)
            outbox.put(step_packet(number, payload, transfer.rows))
            number += 1
    except LinkError:  # the receiver has measured enough
        frame_cpu_s = _by_the_frame(used_s, outbox.report().frames_sent)
    outbox.abort()
    return Sent(chosen, frame_cpu_s)


def choose_congestion_control(connection: Connection, name: str) -> str:
    """Replace what the link chose for itself; what holds now."""
    for tls in connection.sockets:
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode("ascii"))
    held = {
        tls.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16) for tls in connection.sockets
    }
    assert len(held) == 1
    return held.pop().rstrip(b"\0").decode("ascii")


def _hold(connection: Connection, transfer: Transfer) -> None:
    limit = struct.pack("=Q", int(transfer.held_to_bytes_per_s))
    for tls in connection.sockets:
        tls.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, limit)


def _tell(duplex: Duplex, every_s: float) -> None:
    try:
        while True:
            duplex.send(Stop(reason=str(time.monotonic_ns())))
            time.sleep(every_s)
    except LinkError:
        return


def _note_end(down: LinkDown) -> None:
    """Every later `put` raises the same error, so nothing is to be done here."""


def _trust(name: str, folder: Path) -> Trust:
    keys = {each: load_identity(each, folder) for each in NAMES}
    return Trust(keys[name], [Member(each, keys[each].certificate_pem) for each in NAMES])


def _hello(name: str, purpose: Literal["data", "control"]) -> Hello:
    return Hello(name=name, run=RUN, epoch=1, incarnation=7, purpose=purpose)


def main() -> None:
    """Be the end that the command line names."""
    role, folder, address, *rest = sys.argv[1:]
    transfer = Transfer(**json.loads(rest[-1]))
    result: Received | Sent
    if role == "receive":
        result = receive(Path(folder), address, transfer)
    else:
        result = send(Path(folder), (address, int(rest[0])), transfer)
    print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
