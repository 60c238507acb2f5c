"""wan_forwarder.c again, for machines without a C compiler: python wan_forwarder.py SEED BOARD TUN...

It has carried TCP at 400 Mbit/s and an MTU of 1500 within 4 %, but delivers 1 to 12 % of the packets
over a millisecond late, the compiled one mostly a few in 10,000: `late_packets` counts them.
"""

import contextlib
import os
import random
import select
import sys
import time
from collections import deque

from benchmarks.wan_board import RECORD_WORDS, map_board

BURST = 64
LATE_S = 0.001
MAX_PACKET_BYTES = 65536

RATE, DELAY, LOSS, QUEUE = range(4)
UP, SENT, SENT_BYTES, DELIVERED, DELIVERED_BYTES, LOST, DROPPED, CUT, LATE = range(4, 13)


class Wire:
    """The packets on their way from one host to another."""

    def __init__(
        self, floats: "memoryview[float]", counts: "memoryview[int]", target: int, seed: str
    ) -> None:
        self._floats = floats
        self._counts = counts
        self._target = target
        self._dice = random.Random(seed)
        self._free_s = 0.0
        self._packets: deque[tuple[float, bytes]] = deque()

    def take(self, packet: bytes) -> None:
        """Take a packet onto the wire, or not: cut, no room in the queue, or lost on the way."""
        now_s = time.monotonic()
        start_s = max(now_s, self._free_s)
        self._counts[SENT] += 1
        self._counts[SENT_BYTES] += len(packet)
        if not self._counts[UP]:
            self._counts[CUT] += 1
        elif start_s - now_s > self._floats[QUEUE]:
            self._counts[DROPPED] += 1
        else:
            self._free_s = start_s + 8 * len(packet) / self._floats[RATE]
            if self._dice.random() < self._floats[LOSS]:
                self._counts[LOST] += 1
            else:
                self._push(self._free_s + self._floats[DELAY], packet)

    def _push(self, due_s: float, packet: bytes) -> None:
        if self._packets:
            due_s = max(due_s, self._packets[-1][0])  # a shorter delay was set: nobody overtakes
        self._packets.append((due_s, packet))

    def deliver_due(self) -> float | None:
        """Deliver what is due; the time of the next delivery, None where nothing is on its way."""
        while self._packets:
            due_s, packet = self._packets[0]
            late_s = time.monotonic() - due_s
            if late_s < 0:
                return due_s
            self._packets.popleft()
            self._deliver(packet, late_s)
        return None

    def _deliver(self, packet: bytes, late_s: float) -> None:
        if not self._counts[UP]:
            self._counts[CUT] += 1
            return
        try:
            os.write(self._target, packet)
        except OSError:  # the host takes no packets now; a wire cannot help that
            self._counts[DROPPED] += 1
            return
        self._counts[DELIVERED] += 1
        self._counts[DELIVERED_BYTES] += len(packet)
        self._counts[LATE] += late_s > LATE_S


def wires_of(board: int, tuns: list[int], seed: str) -> list[Wire]:
    """One wire per ordered pair, row by row."""
    floats, counts = map_board(board)
    wires = []
    for number in range(len(tuns) ** 2):
        words = slice(number * RECORD_WORDS, (number + 1) * RECORD_WORDS)
        target = tuns[number % len(tuns)]
        wires.append(Wire(floats[words], counts[words], target, f"{seed} {number}"))
    return wires


def read_host(source: int, tuns: list[int], wires: list[Wire]) -> None:
    """Read what a host sends; only IPv4 to another host goes on."""
    with contextlib.suppress(BlockingIOError):
        for _ in range(BURST):
            packet = os.read(tuns[source], MAX_PACKET_BYTES)
            if len(packet) < 20 or packet[0] >> 4 != 4 or packet[16] != 10:
                continue
            target = packet[19] - 1
            if 0 <= target < len(tuns) and target != source:
                wires[source * len(tuns) + target].take(packet)


def main() -> None:
    """Carry packets until standard input ends."""
    seed, board, *tuns = sys.argv[1:]
    devices = [int(tun) for tun in tuns]
    wires = wires_of(int(board), devices, seed)
    while True:
        dues_s = [due_s for wire in wires if (due_s := wire.deliver_due()) is not None]
        wait_s = max(0.0, min(dues_s) - time.monotonic()) if dues_s else None
        ready, _, _ = select.select([0, *devices], [], [], wait_s)
        if 0 in ready:
            return
        for descriptor in ready:
            read_host(devices.index(descriptor), devices, wires)


if __name__ == "__main__":
    main()
