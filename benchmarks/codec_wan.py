"""What the codec makes of a slow link: goodput of activations sent raw, coded, and as the link chooses.

    python -m benchmarks.codec_wan

Two processes on an emulated WAN, or on one host's loopback; real activations of the example model in
bfloat16, never repeated inside a frame; they come round again, and a dense profile, where numba is
installed, is learned from a fifth of them. Coding, sending, receiving and decoding are to overlap: then
coded frames carry as many times more as they are smaller. Levels take turns, and medians count.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path as FilePath

import numpy as np

from benchmarks.record import Claim, record
from benchmarks.wan import Path, Wan, obstacle
from benchmarks.wan_child import line_of
from planner.schedule import Span, Step
from stages import codec_compiled
from stages.codec import DENSE, FAST, RAW
from stages.control import Hello
from stages.dialing import dial
from stages.errors import LinkError
from stages.frame import Dtype, run_number
from stages.identity import Member, load_identity, make_identity
from stages.inbox import Inbox
from stages.link_codec import LOSSLESS, LinkEncoder
from stages.link_dense import LEARNING_ROWS
from stages.listener import Listener
from stages.mailbox import Arrival, LinkDown, Mailbox
from stages.outbox import Outbox
from stages.trust import Trust
from stages.wire import StepFrame

RUN = "codec"
NAMES = ("a", "b")
CHANNELS = 256
ROWS_AT_HAND = 5 * LEARNING_ROWS
UNDER_WAY_BYTES = 2**21
ROWS = {"12 KiB": 24, "192 KiB": 384}
WIRES = {
    "10 Mbit/s": Path(10e6, 0.020),
    "100 Mbit/s": Path(100e6, 0.020),
    "loopback": None,
}
LEVELS = {"raw": (RAW,), "fast": (FAST,), "chosen": LOSSLESS}
TURNS = 3
ACTIVATIONS = "activations.npy"


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one turn sends, and for how long."""

    rows: int
    levels: tuple[str, ...]
    measured_s: float = 3.0

    @property
    def warm_up_s(self) -> float:
        """Until the link has learned what it may; over before BBR first empties the wire, after 10 s."""
        return 6.5 if DENSE in self.levels else 2.0


@dataclass(frozen=True, slots=True)
class Received:
    """What came of it."""

    bytes_per_s: float
    """Of activations, as decoded."""
    ratio: float
    """Of the measured seconds."""


def receive(folder: FilePath, address: str, transfer: Transfer) -> Received:
    """Take frames for the transfer's time, and say how many; the process's end ends the link."""
    listener = Listener(_trust("b", folder), lambda: _hello("b"), address)
    print(json.dumps(listener.address[1]), flush=True)
    mailbox = Mailbox()
    inbox = Inbox(listener.accept(30.0), mailbox)
    _taken(mailbox, transfer.warm_up_s)
    before = inbox.report()
    raw_bytes, seconds = _taken(mailbox, transfer.measured_s)
    after = inbox.report()
    return Received(
        raw_bytes / seconds,
        raw_bytes / (after.payload_bytes_received - before.payload_bytes_received),
    )


def _taken(mailbox: Mailbox, for_s: float) -> tuple[int, float]:
    """Bytes of activations that came between the first and the last frame of so many seconds."""
    started_s = first_s = last_s = time.perf_counter()
    total = -1
    while last_s - started_s < for_s:
        mail = mailbox.get(5.0)
        assert isinstance(mail, Arrival), f"the link ended early: {mail}"
        last_s = time.perf_counter()
        if total < 0:
            first_s, total = last_s, 0
        else:
            total += len(mail.frame.payload)
    return total, last_s - first_s


def send(folder: FilePath, address: tuple[str, int], transfer: Transfer) -> None:
    """Send activations as fast as the link takes them, until the receiver leaves."""
    bits = np.load(folder / ACTIVATIONS)
    connection = dial(_trust("a", folder), "b", address, _hello("a"), 30.0)
    # Where the link may choose it begins with fast, as a plan for a slow wire would have it.
    start = FAST if FAST in transfer.levels else RAW
    encoder = LinkEncoder(run_number(RUN), transfer.levels, start)
    payload_bytes = transfer.rows * CHANNELS * bits.itemsize
    window = max(2, UNDER_WAY_BYTES // payload_bytes)  # a ring has no more than its slots under way
    outbox = Outbox(connection, _note_end, window=window, encoder=encoder)
    places = len(bits) // transfer.rows
    spans = tuple(Span(row, 0, 1, True) for row in range(transfer.rows))
    number = 0
    try:
        while True:
            at = number % places * transfer.rows
            payload = memoryview(bits[at : at + transfer.rows].tobytes())
            step = Step(number, 0, spans)
            outbox.put(StepFrame(1, step, CHANNELS, Dtype.BFLOAT16, payload))
            number += 1
    except LinkError:  # the receiver has measured enough
        outbox.abort()


def measure(folder: FilePath, wire: Path | None, transfer: Transfer) -> Received:
    """One turn: over the wire from host a to b, or where there is none, inside b."""
    source = "a" if wire else "b"
    with Wan(NAMES, wire or Path()) as wan:
        asked = json.dumps(asdict(transfer))
        module = [sys.executable, "-m", "benchmarks.codec_wan"]
        words = ["receive", str(folder), wan.address("b"), asked]
        receiver = wan.popen("b", [*module, *words], stdout=subprocess.PIPE)
        port = json.loads(line_of(receiver))
        wan.popen(source, [*module, "send", str(folder), wan.address("b"), str(port), asked])
        return Received(**json.loads(line_of(receiver)))


def claims(folder: FilePath) -> list[Claim]:
    """Every wire and size; on each, the levels by turns."""
    found = []
    for (place, wire), (size, rows) in product(WIRES.items(), ROWS.items()):
        turns: dict[str, list[Received]] = {name: [] for name in LEVELS}
        for _ in range(TURNS):
            for name, levels in LEVELS.items():
                turns[name].append(measure(folder, wire, Transfer(rows, levels)))
        goodput = {
            name: statistics.median(each.bytes_per_s for each in seen)
            for name, seen in turns.items()
        }
        ratio = statistics.median(each.ratio for each in turns["fast"])
        where = f"{size} over {place}"
        for name, speed in goodput.items():
            found.append(Claim(f"{where}: goodput of {name}", speed * 8 / 1e6, "Mbit/s"))
        chosen_ratio = statistics.median(each.ratio for each in turns["chosen"])
        found.append(Claim(f"{where}: ratio of chosen", chosen_ratio, "ratio"))
        over_raw = goodput["chosen"] / goodput["raw"]
        found.append(Claim(f"{where}: chosen over raw", over_raw, "ratio", target=0.98))
        if wire is not None:
            overlap = goodput["fast"] / goodput["raw"] / ratio
            claim = f"{where}: gain of fast over its ratio of {ratio:.3f}"
            found.append(Claim(claim, overlap, "ratio", target=0.97))
    return found


def _note_end(down: LinkDown) -> None:
    """Every later `put` raises the same error, so nothing is to be done here."""


def _trust(name: str, folder: FilePath) -> Trust:
    keys = {each: load_identity(each, folder) for each in NAMES}
    return Trust(keys[name], [Member(each, keys[each].certificate_pem) for each in NAMES])


def _hello(name: str) -> Hello:
    dense = codec_compiled.installed()
    return Hello(name=name, run=RUN, epoch=1, incarnation=7, purpose="data", dense=dense)


def _write_activations(folder: FilePath) -> None:
    from benchmarks.activations import sources  # noqa: PLC0415  the ends need no torch

    np.save(folder / ACTIVATIONS, sources(ROWS_AT_HAND, [])[0].bits(2, "bfloat16"))


def main() -> None:
    """Be the end that the command line names; without words, measure."""
    if sys.argv[1:]:
        role, folder, address, *rest = sys.argv[1:]
        transfer = Transfer(**json.loads(rest[-1]))
        if role == "receive":
            print(json.dumps(asdict(receive(FilePath(folder), address, transfer))), flush=True)
        else:
            send(FilePath(folder), (address, int(rest[0])), transfer)
        return
    missing = obstacle()
    if missing:
        sys.exit(f"slow wires are emulated in namespaces: {missing}")
    with tempfile.TemporaryDirectory() as scratch:
        for name in NAMES:
            make_identity(name, FilePath(scratch))
        _write_activations(FilePath(scratch))
        record("codec_wan", claims(FilePath(scratch)))


if __name__ == "__main__":
    main()
