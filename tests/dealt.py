"""Rows dealt to several pipelines over real sockets, their stages threads of this process."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from flows.dealing import Dealer, Told
from flows.launch import Fleet, StageSettings
from planner.facts import Lengths, Workload
from planner.leases import Pace
from planner.plan import Pipeline, Plan, StagePlan
from stages.compute import Compute, StageCompute
from stages.config import Ring, StageSpec
from stages.control import LeasedRow
from stages.worker import Worker


@dataclass
class Rows:
    """A source of rows, and how many of them each pipeline took of it."""

    waiting: deque[LeasedRow]
    taken: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.waiting)

    def take(self, pipeline: int) -> LeasedRow | None:
        """The next one."""
        self.taken[pipeline] = self.taken.get(pipeline, 0) + bool(self.waiting)
        return self.waiting.popleft() if self.waiting else None


def plan_beside(layers: int, *stages: int) -> Plan:
    """A pipeline for each number of stages, each with all layers: a0, a1, b0..."""
    pipelines = []
    for letter, count in zip("abcdef", stages, strict=False):
        bounds = [layers * i // count for i in range(count + 1)]
        placed = (StagePlan(f"{letter}{i}", *ends) for i, ends in enumerate(pairwise(bounds)))
        pipelines.append(Pipeline(tuple(placed), (), 0, 0))
    return Plan(tuple(pipelines), 0.0, 0.0, 0.0, 0.0, "a test")


def work_of(rows: Sequence[LeasedRow]) -> Workload:
    """What these rows are, to a planner."""
    prompts = [float(len(row.token_ids)) for row in rows]
    outputs = [float(row.max_new_tokens) for row in rows]
    prompt = Lengths(sum(prompts) / len(rows), max(prompts))
    return Workload(len(rows), prompt, Lengths(sum(outputs) / len(rows), max(outputs)))


def dealt(
    model: Path,
    rows: Sequence[LeasedRow],
    plan: Plan,
    rings: Sequence[Ring],
    paces: Sequence[Pace],
    load: Callable[[StageSpec], Compute] = StageCompute.load,
    meet: Callable[[Told], None] = lambda _told: None,
) -> tuple[dict[int, Told], Rows]:
    """How every row ended, and the source that they came from; `meet` sees each as it comes."""

    def live(_member: str, spec_path: str) -> None:
        Worker(
            StageSpec.model_validate_json(Path(spec_path).read_text(encoding="utf-8")), load
        ).live()

    settings = StageSettings("dealt", model, "float32", torch.get_num_threads())
    source, found = Rows(deque(rows)), dict[int, Told]()
    with Fleet(plan, rings, settings, start=live) as fleet:
        fleet.start()
        dealer = Dealer(fleet, paces, work_of(rows))
        while source or dealer.rows:
            dealer.fill(source)
            for told in dealer.news(timeout_s=1.0):
                assert told.answer.row not in found, f"row {told.answer.row} was answered twice"
                found[told.answer.row] = told
                meet(told)
    return found, source
