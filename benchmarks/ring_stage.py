"""A stage whose layers take their time and compute nothing, as a process that serves many runs.

Everything but the layers is the product's: worker, head, scheduler, frames, codec, sockets. Orders
come as JSON over a pipe; each is one run's stage, answered by a word when that run is over.
"""

import ctypes
import json
import signal
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from torch import Tensor

from benchmarks.ring_arithmetic import HIDDEN, stage_s
from planner.schedule import RingShape, Step
from stages.config import StageSpec
from stages.errors import StageError
from stages.frame import Dtype
from stages.wire import Admit, SampleFrame, StepFrame
from stages.worker import Worker

TOKEN = 300
"""What every row samples; it ends no answer."""
SERVED = "served"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Order:
    """One run's stage."""

    spec: str
    """The path of a StageSpec."""
    activations: str
    """A .npy of uint16 [layers, rows, HIDDEN]: float16 as bits."""
    log: str
    """Where to write [steps, 3]: a step's start and end (monotonic seconds), and its tokens."""
    levels: tuple[str, ...]
    """Among which the link to the next stage chooses."""
    pace: float = 1.0
    """Times C(n); 0 is a client that only passes on."""


class TimedCompute:
    """Sleeps C(n) for each step and passes on recorded activations, other rows each time."""

    def __init__(self, order: Order, spec: StageSpec) -> None:
        layers = np.load(order.activations, mmap_mode="r")
        self._spec = spec
        self.ring = spec.ring.shape()
        self._pace = order.pace
        self._rows = layers[spec.model.first_layer % len(layers)]
        self.steps: list[tuple[float, float, int]] = []

    def settle(self, ring: RingShape) -> None:
        """Sleep needs no memory."""
        self.ring = ring

    def begin(self, step: Step, ids: Tensor, admits: tuple[Admit, ...]) -> StepFrame | SampleFrame:
        """The head's part, as long as any other's."""
        assert len(ids) == step.tokens
        return self._after_work(step, admits)

    def go_on(self, frame: StepFrame) -> StepFrame | SampleFrame:
        """A later stage's part."""
        return self._after_work(frame.step, frame.admits)

    def _after_work(self, step: Step, admits: tuple[Admit, ...]) -> StepFrame | SampleFrame:
        started_s = time.monotonic()
        time.sleep(self._pace * stage_s(step.tokens))
        self.steps.append((started_s, time.monotonic(), step.tokens))
        epoch = self._spec.epoch
        if self._spec.is_last:
            sampled = sum(span.samples for span in step.spans)
            return SampleFrame(epoch, step.frame, step.slot, (TOKEN,) * sampled)
        payload = self._payload(step)
        return StepFrame(epoch, step, HIDDEN, Dtype.FLOAT16, payload, admits=admits)

    def _payload(self, step: Step) -> memoryview:
        """As many different rows as the step has tokens."""
        assert step.tokens <= len(self._rows), "rows would repeat inside a frame"
        first = 37 * step.frame % (len(self._rows) - step.tokens + 1)
        return memoryview(self._rows[first : first + step.tokens].view(np.uint8).reshape(-1))


def serve(order: Order) -> None:
    """Be that run's stage to its end."""
    spec = StageSpec.model_validate_json(Path(order.spec).read_text(encoding="utf-8"))
    compute = TimedCompute(order, spec)
    worker = Worker(spec, load=lambda _spec: compute)
    worker.levels = order.levels
    worker.live()
    np.save(order.log, np.array(compute.steps))


def place(orders: Connection, order: Order) -> str:
    """Have a process serve the order, to the end of its run; how that went."""
    orders.send_bytes(json.dumps(asdict(order)).encode())
    return orders.recv_bytes().decode()


def serve_all(orders: Connection) -> None:
    """Serve orders until killed, or until the parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    while True:
        given = json.loads(orders.recv_bytes())
        try:
            serve(Order(**given | {"levels": tuple(given["levels"])}))
        except StageError as error:
            orders.send_bytes(f"{type(error).__name__}: {error}".encode())
        else:
            orders.send_bytes(SERVED.encode())
