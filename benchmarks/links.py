"""
What the links make of a slow wire: goodput under loss, overhead, delay beside bulk, processor time.

Two processes on an emulated WAN (`benchmarks/wan.py`, MTU 1500), frames raw as without a codec. They
run as root, whose sockets hold what a long wire has under way; what others get, `wagonway doctor` says.
Where a figure names CUBIC, the data connection was switched to it; the control connection stays as it
is. The emulated wire's packets are cut, joined and summed by the kernel, one by one, which network cards
would do; and after each wait for bytes the process goes on where caches are cold. The same frames over
one host's loopback show what is our own, and the same with the wire's pauses between them, what these
cost.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path as FilePath

from benchmarks.links_end import NAMES, Received, Sent, Transfer, step_packet
from benchmarks.record import Claim, record
from benchmarks.wan import Namespaces, Path, Traffic, Wan, obstacle
from benchmarks.wan_child import line_of
from stages.identity import make_identity
from stages.tcp import BBR_BUNDLE, OTHER_BUNDLE, Bundle

RATE_BIT_PER_S = 100e6
LOSSES = (0.0, 0.001, 0.01)
STREAMS = (
    ("bbr", BBR_BUNDLE), ("bbr", Bundle(1)), ("bbr", Bundle(4)),
    ("cubic", Bundle(1)), ("cubic", OTHER_BUNDLE),
)  # fmt: skip
"""Congestion control and TLS connections: as a host with BBR has it, or without."""
FRAME_BYTES = {"12 KiB": 12 * 2**10, "64 KiB": 64 * 2**10, "1 MiB": 2**20}
ROWS = 32
MESSAGE_EVERY_S = 0.02
TCP_SHARE = 1448 / 1500
"""Of a packet's bytes, what TCP's pace counts."""
LEARNING_S, MEASURED_S = 20.0, 20.0
"""Until a connection has learned the wire's rate, longest where packets are lost; and two turns, during
which BBR alone would twice empty the wire."""


def run(
    folder: FilePath, path: Path, transfer: Transfer, source: str = "a"
) -> tuple[Received, Sent, Traffic]:
    """Both ends' views of one transfer from `source` to "b", and the wire's from "a" to "b"."""
    with Wan(NAMES, path, partial(Namespaces, tcp_buffer_bytes=None)) as wan:
        asked = json.dumps(asdict(transfer))
        receiver = _end(wan, "b", ["receive", str(folder), wan.address("b"), asked])
        port = json.loads(line_of(receiver))
        sender = _end(wan, source, ["send", str(folder), wan.address("b"), str(port), asked])
        received = Received(**json.loads(line_of(receiver)))
        carried = wan.counters()["a", "b"]
        sent = Sent(**json.loads(line_of(sender)))
        return received, sent, carried


def _end(wan: Wan, host: str, words: Sequence[str]) -> "subprocess.Popen[bytes]":
    module = [sys.executable, "-m", "benchmarks.links_end", *words]
    return wan.popen(host, module, stdout=subprocess.PIPE)


def bulk(control: str, bundle: Bundle) -> Transfer:
    """1 MiB frames one after another, over such connections."""
    return Transfer(
        payload_bytes=FRAME_BYTES["1 MiB"], rows=ROWS, congestion_control=control,
        stripes=bundle.stripes, in_turns=bundle.in_turns,
    )  # fmt: skip


def goodput(folder: FilePath) -> list[Claim]:
    """1 MiB frames at a round trip of 200 ms, with losses both ways; and what the wire dropped."""
    claims = []
    for loss in LOSSES:
        for control, bundle in STREAMS:
            path = Path(RATE_BIT_PER_S, 0.100, loss)
            transfer = replace(bulk(control, bundle), warm_up_s=LEARNING_S, measured_s=MEASURED_S)
            received, sent, carried = run(folder, path, transfer)
            assert sent.congestion_control == control
            share = 100 * received.goodput_bytes_per_s * 8 / RATE_BIT_PER_S
            streams = f"{control} x{bundle.stripes}{', in turns' if bundle.in_turns else ''}"
            claim = f"1 MiB frames, RTT 200 ms, {100 * loss:g} % loss, {streams}"
            usual = bundle is BBR_BUNDLE
            claims.append(
                Claim(f"goodput, {claim}", share, "% of 100 Mbit/s", 92 if usual else None)
            )
            dropped = 100 * carried.dropped_packets / carried.sent_packets
            claims.append(Claim(f"packets that found the queue full, {claim}", dropped, "%"))
    return claims


def framing() -> list[Claim]:
    """Bytes beside the payload, before TLS."""
    payload = memoryview(bytes(FRAME_BYTES["64 KiB"]))
    head_bytes = len(step_packet(0, payload, ROWS).head)
    return [
        Claim("framing of 64 KiB, 32 rows", 100 * head_bytes / len(payload), "%", limit=1),
        Claim("framing of 32 rows", head_bytes, "bytes", limit=64 + 24 * ROWS),
    ]


def small_delay(folder: FilePath) -> list[Claim]:
    """How much later control messages arrive while bulk keeps the wire full."""
    claims = []
    for rtt_s in (0.02, 0.2):
        path = Path(RATE_BIT_PER_S, rtt_s / 2)
        silent = Transfer(
            payload_bytes=0, message_every_s=MESSAGE_EVERY_S, warm_up_s=1.0, measured_s=5.0
        )
        alone, _, _ = run(folder, path, silent)
        for control, bundle, held in (
            ("bbr", BBR_BUNDLE, 0.0), ("bbr", BBR_BUNDLE, 0.98), ("bbr", BBR_BUNDLE, 0.95),
            ("cubic", Bundle(1), 0.0),
        ):  # fmt: skip
            transfer = replace(
                bulk(control, bundle),
                held_to_bytes_per_s=held * TCP_SHARE * RATE_BIT_PER_S / 8,
                message_every_s=MESSAGE_EVERY_S, warm_up_s=LEARNING_S, measured_s=MEASURED_S,
            )  # fmt: skip
            beside, _, _ = run(folder, path, transfer)
            added_s = beside.message_delay_s - alone.message_delay_s
            kept = f", held to {100 * held:g} % of the wire" if held else ""
            where = f"RTT {1e3 * rtt_s:g} ms, {control}{kept}"
            usual = bundle is BBR_BUNDLE and not held
            limit = 1e3 * max(0.1 * rtt_s / 2, 0.010) if usual else None
            claim = f"a message's added delay beside bulk, {where}"
            claims.append(Claim(claim, 1e3 * added_s, "ms", limit=limit))
            share = 100 * beside.goodput_bytes_per_s * 8 / RATE_BIT_PER_S
            claims.append(Claim(f"goodput of that bulk, {where}", share, "% of 100 Mbit/s"))
    return claims


def cpu(folder: FilePath) -> list[Claim]:
    """Processor time of each end, TLS and the kernel's TCP included, and bytes at the interface."""
    claims = []
    for size, payload_bytes in FRAME_BYTES.items():
        limit = 0.3 if payload_bytes < FRAME_BYTES["1 MiB"] else None
        wire_pace_s = payload_bytes * 8 / (0.93 * RATE_BIT_PER_S)
        for source, over, every_s in (
            ("a", "the wire", 0.0),
            ("b", "the loopback", 0.0),
            ("b", "the loopback at the wire's pace", wire_pace_s),
        ):
            transfer = Transfer(
                payload_bytes=payload_bytes,
                rows=ROWS,
                frame_every_s=every_s,
                warm_up_s=1,
                measured_s=6,
            )
            received, sent, carried = run(folder, Path(RATE_BIT_PER_S, 0.010), transfer, source)
            ends = ("send", sent.frame_cpu_s), ("receive", received.frame_cpu_s)
            for end, (own_s, kernel_s) in ends:
                claim = f"processor time to {end} a frame of {size} over {over}"
                held_to = None if every_s else limit
                claims.append(Claim(claim, 1e3 * (own_s + kernel_s), "ms", limit=held_to))
                claims.append(Claim(f"{claim}: the kernel's share", 1e3 * kernel_s, "ms"))
            if source == "a":
                beyond = 100 * (carried.delivered_bytes / received.payload_bytes - 1)
                claim = f"bytes at the interface beyond payloads of {size}"
                claims.append(Claim(claim, beyond, "%"))
    return claims


def main() -> None:
    """Measure all of it, or say what is in the way."""
    missing = obstacle()
    if missing:
        sys.exit(f"losses can only be emulated in namespaces: {missing}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = FilePath(scratch)
        for name in NAMES:
            make_identity(name, folder)
        claims = [*goodput(folder), *framing(), *small_delay(folder), *cpu(folder)]
    record("links", claims)


if __name__ == "__main__":
    main()
