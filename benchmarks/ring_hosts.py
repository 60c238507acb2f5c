"""Runs rows round a ring of timed stages, each a process on a host of its own, over emulated wires.

Hosts and processes serve run after run: only the wires change, and the connections are made anew.
"""

import multiprocessing
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path as FilePath
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from benchmarks.activations import EXAMPLE, of_model
from benchmarks.pipelines import greedy_row
from benchmarks.ring_arithmetic import HIDDEN, ROWS
from benchmarks.ring_stage import SERVED, Order, place, serve_all
from benchmarks.wan import Namespaces, Path, Wan
from flows.errors import StageLostError
from flows.launch import DRIVER, Fleet, StageSettings
from flows.links import link_rows
from planner.plan import Pipeline, Plan, StagePlan
from planner.rounds import CHUNKS_PER_STEP
from planner.schedule import CHUNK_TOKENS
from stages.codec import RAW
from stages.config import Ring
from stages.control import Answer

BLOCK_TOKENS = 16
RECORDED_TOKENS = 2**14
WARM_ROUNDS = 3
NEARBY = Path(10e9, 0.0)
ANSWER_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Lap:
    """What to run: a ring, its wires, and rows of so many new tokens."""

    paces: tuple[float, ...]
    """Of each stage, times C(n)."""
    path: Path
    slots: int
    quotas: Sequence[int]
    slot_rows: int = ROWS
    levels: tuple[str, ...] = (RAW,)
    most_slots: int = 0
    """Micro-batches that the driver may come to open, if more than `slots`."""
    client: bool = False
    """Whether the last stage and the head are one machine, a client."""
    warm_rounds: int = WARM_ROUNDS
    """Not counted as steady: in them new connections learn what their wires carry."""
    prompts: Sequence[int] = ()
    """Tokens of each row's prompt, no two of which begin alike; one each if not given."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of it."""

    lap: Lap
    answers: Mapping[int, Answer]
    started_s: float
    seconds: float
    """From the first lease to the last answer."""
    steps: list[NDArray[np.float64]]
    """Of each stage [steps, 3]: start and end on one clock, tokens."""
    ratio: float
    """The codec's, on the link that it helped least."""

    @property
    def steady_rows_per_s(self) -> float:
        """Rows' steps that the last stage ends a second, from when all slots have gone round some
        times until the first rows end."""
        ends, tokens = self.steps[-1][:, 1], self.steps[-1][:, 2]
        first, last = self.lap.warm_rounds * self.lap.slots - 1, self._last_steady
        assert last > first, f"{len(ends)} steps are too few for {self.lap.slots} slots"
        return float(tokens[first + 1 : last + 1].sum() / (ends[last] - ends[first]))

    @property
    def early_rows_per_s(self) -> float:
        """The same from the first lease on."""
        ends, tokens = self.steps[-1][:, 1], self.steps[-1][:, 2]
        last = self._last_steady
        return float(tokens[: last + 1].sum() / (ends[last] - self.started_s))

    @property
    def _last_steady(self) -> int:
        full = self.steps[-1][:, 2] == self.lap.slot_rows
        return int(np.flatnonzero(full)[-1]) - self.lap.slots

    def late_busy(self) -> float:
        """The share of the second and third quarters of the run that the busiest stage computes."""
        since_s, until_s = (self.started_s + part * self.seconds for part in (0.25, 0.75))
        return max(
            float(np.diff(np.clip(steps[:, :2], since_s, until_s)).sum()) / (until_s - since_s)
            for steps in self.steps
        )

    def late_rows_per_s(self) -> float:
        """Rows' steps that the last stage ends a second, in the third quarter of the run."""
        ends, tokens = self.steps[-1][:, 1], self.steps[-1][:, 2]
        since_s, until_s = (self.started_s + part * self.seconds for part in (0.5, 0.75))
        return float(tokens[(ends > since_s) & (ends <= until_s)].sum() / (until_s - since_s))

    @property
    def token_s(self) -> float:
        """Mean seconds that a row takes for each of its tokens, from its first step to its end."""
        rows = self.answers.values()
        return float(np.mean([(a.prefill_s + a.decode_s) / a.output_tokens for a in rows]))

    def busy(self, every_s: float) -> NDArray[np.float64]:
        """[stages, times]: the fraction of each so many seconds that a stage computed."""
        since_s = self.started_s + np.arange(0.0, self.seconds, every_s)
        return np.stack(
            [
                np.diff(
                    np.clip(steps[:, None, :2], since_s[:, None], since_s[:, None] + every_s)
                ).sum(axis=(0, 2))
                / every_s
                for steps in self.steps
            ]
        )


class Hosts:
    """Up to so many stages' hosts and processes, and a driver's; one run at a time."""

    def __init__(self, stages: int, folder: FilePath) -> None:
        self._folder = folder
        self._names = tuple(f"n{number}" for number in range(stages))
        self._activations = folder / "activations.npy"
        self._orders: dict[str, Connection] = {}
        self._leave = ExitStack()
        self._wan = self._leave.enter_context(Wan((*self._names, DRIVER), NEARBY, Namespaces))
        for name in self._names:  # forked before torch has threads; each stays in its host
            self._orders[name] = self._wan.inside(name, _fork_stage)
        np.save(self._activations, recorded())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave.close()

    def run(self, lap: Lap) -> Ran:
        """Rows in, round and out; StageLostError if a stage fails."""
        names = self._names[: len(lap.paces)]
        self._lay(names, lap)
        orders: dict[str, Order] = {}
        for name, pace in zip(names, lap.paces, strict=True):
            log = self._folder / f"{name}.npy"
            orders[name] = Order("", str(self._activations), str(log), lap.levels, pace)

        def start(member: str, spec_path: str) -> None:
            ended = place(self._orders[member], replace(orders[member], spec=spec_path))
            if ended != SERVED:
                raise StageLostError(f"timed stage {member}: {ended}")

        placed = tuple(StagePlan(name, at, at + 1) for at, name in enumerate(names))
        plan = Plan((Pipeline(placed, (), lap.slot_rows, lap.slots),), 0.0, 0.0, 0.0, 0.0, "")
        hosts = {name: self._wan.address(name) for name in names}
        settings = StageSettings(
            "ring",
            EXAMPLE,
            "float16",
            1,
            driver_host=self._wan.address(DRIVER),
            hosts=hosts,
        )
        prompts = lap.prompts or (1,) * len(lap.quotas)
        rows = [
            greedy_row(i, [i % 4000 + 1] * tokens, quota)
            for i, (tokens, quota) in enumerate(zip(prompts, lap.quotas, strict=True))
        ]
        answers: dict[int, Answer] = {}
        with self._wan.inside(DRIVER, lambda: Fleet(plan, [_ring(lap)], settings, start)) as fleet:
            fleet.start()
            started_s = time.monotonic()
            fleet.lease(0, rows)
            while len(answers) < len(rows):
                came = fleet.news(timeout_s=ANSWER_TIMEOUT_S).answers
                assert came, f"no row ended in {ANSWER_TIMEOUT_S:.0f} s"
                answers |= {answer.row: answer for answer in came}
            seconds = time.monotonic() - started_s
        steps = [np.load(orders[name].log) for name in names]
        return Ran(lap, answers, started_s, seconds, steps, _ratio(fleet))

    def _lay(self, names: Sequence[str], lap: Lap) -> None:
        for pair in self._wan.pairs():
            self._wan.set(*pair, NEARBY if DRIVER in pair else lap.path)
        if lap.client:
            self._wan.set(names[-1], names[0], NEARBY)
            self._wan.set(names[0], names[-1], NEARBY)


def recorded() -> NDArray[np.uint16]:
    """float16 [layers, rows, HIDDEN] as bits: a row is several tokens' states side by side, so that
    it is as wide as a large model's, and no state occurs twice."""
    activations = of_model("example model", EXAMPLE, RECORDED_TOKENS)
    layers, tokens, channels = activations.states.shape
    side_by_side = HIDDEN // channels
    whole = tokens // side_by_side * side_by_side
    bits = [activations.bits(layer, "float16")[:whole] for layer in range(layers)]
    return np.stack(bits).astype(np.uint16, copy=False).reshape(layers, -1, HIDDEN)


def _ring(lap: Lap) -> Ring:
    each = -(-(max(lap.prompts, default=1) + max(lap.quotas)) // BLOCK_TOKENS)
    return Ring(
        slots=lap.slots,
        most_slots=lap.most_slots,
        slot_rows=lap.slot_rows,
        blocks=max(lap.slots, lap.most_slots) * lap.slot_rows * each,
        block_tokens=BLOCK_TOKENS,
        step_tokens=lap.slot_rows + CHUNKS_PER_STEP * CHUNK_TOKENS,
    )


def _fork_stage() -> Connection:
    """A process in this thread's host; this end of the pipe that brings it orders."""
    ours, theirs = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")  # it has torch imported already
    fork.Process(target=serve_all, args=(theirs,), daemon=True).start()
    theirs.close()
    return ours


def _ratio(fleet: Fleet) -> float:
    ratios = [
        float(str(row["ratio"]))
        for row in link_rows(fleet.vitals(), DRIVER, fleet.control())
        if row.get("ratio")
    ]
    return min(ratios, default=1.0)
