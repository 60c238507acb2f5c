"""Runs rows through real stage processes on hosts of an emulated WAN, and counts what that took."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path as FilePath
from subprocess import Popen

import psutil

from benchmarks.wan import Namespaces, Path, Traffic, Wan
from flows.launch import DRIVER, Fleet, StageSettings
from flows.links import link_rows
from planner.plan import LinkPlan, Pipeline, Plan, StagePlan
from stages.codec import FAST
from stages.config import DType, Ring
from stages.control import Answer, Heartbeat, LeasedRow

BLOCK_TOKENS = 16
CHUNK_ROOM = 256
"""Positions of prompts that travel with a step's decodes."""


@dataclass(frozen=True, slots=True)
class FarJob:
    """A model, how it is split, the wires between its stages, and the rows to answer."""

    folder: FilePath
    dtype: DType
    split: tuple[int, ...]
    """Layers of each stage; a stage has one thread."""
    path: Path
    slots: int
    slot_rows: int
    rows: Sequence[LeasedRow]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages' hosts, in the order of the ring."""
        return tuple("abcdefgh"[: len(self.split)])

    @property
    def ring(self) -> Ring:
        """Room for every row in flight to grow to its limit."""
        longest = max(len(row.token_ids) + row.max_new_tokens for row in self.rows)
        blocks = -(-longest // BLOCK_TOKENS) * self.slots * self.slot_rows
        return Ring(slots=self.slots, slot_rows=self.slot_rows, blocks=blocks,
                    block_tokens=BLOCK_TOKENS, step_tokens=self.slot_rows + CHUNK_ROOM)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Carried:
    """What came of a job."""

    answers: Mapping[int, Answer]
    seconds: float
    """From the first lease to the last answer."""
    cpu_s: float
    """Processor time of all stages and of the driver in the meantime."""
    vitals: Mapping[str, Heartbeat]
    """Of the stages, at the end."""
    links: Mapping[tuple[str, str], Mapping[str, object]]
    """As the `links` view shows them."""
    wire: Mapping[tuple[str, str], Traffic]

    @property
    def output_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(answer.output_tokens for answer in self.answers.values())

    def number(self, pair: tuple[str, str], column: str) -> float:
        """One figure of a link."""
        figure = self.links[pair][column]
        assert isinstance(figure, float | int)
        return float(figure)


def run(job: FarJob) -> Carried:
    """Answer the rows; starting the stages is not counted."""
    placed = tuple(
        StagePlan(name, *ends)
        for name, ends in zip(job.stages, pairwise(accumulate(job.split, initial=0)), strict=True)
    )
    links = tuple(LinkPlan(here, there, FAST) for here, there in pairwise(job.stages))
    plan = Plan((Pipeline(placed, links, job.slot_rows, job.slots),), 0.0, 0.0, 0.0, 0.0, "")
    workers: list[Popen[bytes]] = []
    with Wan((*job.stages, DRIVER), job.path, Namespaces) as wan:

        def start(member: str, spec_path: str) -> None:
            worker = wan.popen(member, [sys.executable, "-m", "stages.worker", spec_path])
            workers.append(worker)
            worker.wait()

        hosts = {name: wan.address(name) for name in job.stages}
        settings = StageSettings(
            "benchmark",
            job.folder,
            job.dtype,
            1,
            driver_host=wan.address(DRIVER),
            hosts=hosts,
        )
        answers: dict[int, Answer] = {}
        with wan.inside(DRIVER, lambda: Fleet(plan, [job.ring], settings, start)) as fleet:
            fleet.start()
            started_s, cpu_s = time.perf_counter(), _cpu_s(workers)
            fleet.lease(0, job.rows)
            while len(answers) < len(job.rows):
                answers |= {answer.row: answer for answer in fleet.news(timeout_s=60.0).answers}
            seconds, cpu_s = time.perf_counter() - started_s, _cpu_s(workers) - cpu_s
        vitals = fleet.vitals()
        by_pair = {
            (str(row["source"]), str(row["target"])): row
            for row in link_rows(vitals, DRIVER, fleet.control())
        }
        return Carried(answers, seconds, cpu_s, vitals, by_pair, wan.counters())


def _cpu_s(workers: Sequence["Popen[bytes]"]) -> float:
    """Processor time of the workers so far, and of this process."""
    each = [psutil.Process(worker.pid).cpu_times() for worker in workers]
    return time.process_time() + sum(float(times.user + times.system) for times in each)
