"""A ring whose links repeat themselves and bring frames of other plans answers as if they did not."""

import random
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flows.launch import EPOCH
from stages.control import Refused, decode
from stages.errors import LinkError
from stages.frame import PAYLOAD_KINDS, Packet, run_number
from stages.frame_writer import FrameWriter
from stages.link import Connection
from stages.worker import Worker
from tests.linked import step_frame, wait_for
from tests.models import write_random_model
from tests.ring import answers, plan_of, ring_settings, row

STAGES = 3
OTHER_PLANS = (EPOCH - 1, EPOCH + 1, EPOCH - 1)
"""Of which each stage is to be told something."""
send_once = Connection.send


class Echo:
    """What a link says beyond its own: each numbered frame again, and one of those before it."""

    def __init__(self) -> None:
        self._said: list[Packet] = []
        self._dice = random.Random(5)

    def of(self, packet: Packet) -> list[Packet]:
        if not packet.frame:  # heartbeats and farewells, which stand for themselves
            return []
        self._said.append(packet)
        return [packet, self._dice.choice(self._said)]


class EchoingWriter(FrameWriter):
    """The writer of a control link that echoes."""

    def __init__(self, connection: Connection, next_packet: Callable[[], Packet | None]) -> None:
        echo, waiting = Echo(), list[Packet]()

        def next_or_again() -> Packet | None:
            if waiting:
                return waiting.pop(0)
            packet = next_packet()
            if packet is not None:
                waiting.extend(echo.of(packet))
            return packet

        super().__init__(connection, next_or_again)


@pytest.fixture
def echoing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every link of this process echoes."""
    echoes: defaultdict[str, Echo] = defaultdict(Echo)

    def send(self: Connection, packet: Packet) -> None:
        send_once(self, packet)
        for again in echoes[self.peer].of(packet) if packet.kind in PAYLOAD_KINDS else []:
            send_once(self, again)

    monkeypatch.setattr(Connection, "send", send)
    monkeypatch.setattr("stages.duplex.FrameWriter", EchoingWriter)


def intrude(worker: Worker, epoch: int) -> Refused:
    """Take a stage's link to the next one over, and say a frame of another plan; what is answered."""
    assert worker._outbox is not None
    assert worker._outbox._redial is not None
    stale = step_frame(2**40, epoch=epoch).encode(run_number(worker._spec.run))
    while True:
        connection = worker._outbox._redial()
        try:
            send_once(connection, stale)
            word = decode(connection.receive())
            assert isinstance(word, Refused)
            return word
        except LinkError:  # the stage itself was quicker to dial again
            continue
        finally:
            connection.close()


@pytest.mark.usefixtures("echoing")
def test_a_job_takes_every_frame_once_and_of_its_own_plan_alone(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_random_model(tmp_path, "llama", seed=2)
    rows = [row(i, [(7 * i + 13 * k) % 256 for k in range(1 + i % 90)], 40) for i in range(24)]
    calm = answers(tmp_path, rows, plan_of(4, 1), ring_settings(1, 24))
    workers: list[Worker] = []
    refused: list[Refused] = []

    def disturb() -> None:
        wait_for(lambda: len(workers) == STAGES and all(w.done.frames > 5 for w in workers), 60)
        refused.extend(map(intrude, workers, OTHER_PLANS))

    disturbing = threading.Thread(target=disturb)
    disturbing.start()
    found = answers(tmp_path, rows, plan_of(4, STAGES), ring_settings(3, 4), workers.append)
    disturbing.join()
    assert {n: a.output_ids for n, a in found.items()} == {n: a.output_ids for n, a in calm.items()}
    assert not any(answer.replayed_tokens for answer in found.values())
    assert [(word.cause, word.epoch) for word in refused] == [("epoch", EPOCH)] * STAGES
    for worker in workers:
        assert worker._inbox is not None
        assert worker._inbox.report().duplicates_dropped > worker.done.frames
        assert worker._driver.connection.counters.duplicates_dropped > 0
