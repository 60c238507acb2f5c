"""A whole pipeline over real sockets, its stages as threads: what tests of the ring drive."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from flows.launch import Fleet, StageSettings
from planner.plan import LinkPlan, Pipeline, Plan, StagePlan
from planner.windows import Window
from stages.compute import Compute, StageCompute
from stages.config import Ring, StageSpec
from stages.control import Answer, LeasedRow
from stages.worker import Worker


def plan_of(layers: int, stages: int, codec: str = "raw") -> Plan:
    """One pipeline of equal stages."""
    bounds = [layers * i // stages for i in range(stages + 1)]
    placed = tuple(StagePlan(f"n{i}", *ends) for i, ends in enumerate(pairwise(bounds)))
    links = tuple(LinkPlan(here.node, there.node, codec) for here, there in pairwise(placed))
    return Plan((Pipeline(placed, links, 0, 0),), 0.0, 0.0, 0.0, 0.0, "a test")


def ring_settings(slots: int, slot_rows: int, row_tokens: int = 400) -> Ring:
    """A ring with room for that many rows of that length."""
    return Ring(
        slots=slots,
        slot_rows=slot_rows,
        blocks=slots * slot_rows * row_tokens // 16,
        block_tokens=16,
        step_tokens=slot_rows + 256,
    )


def windowed_settings(slots: int, slot_rows: int, blocks: int, window: int, rows: int) -> Ring:
    """A ring whose windowed layers keep their window, of so many rows that prefill at once."""
    step_tokens = slot_rows + 256
    each = -(-Window(window, 0).most_tokens(step_tokens) // 16)
    return Ring(
        slots=slots, slot_rows=slot_rows, blocks=blocks, block_tokens=16, step_tokens=step_tokens,
        window_tokens=window, window_blocks=rows * each,
    )  # fmt: skip


def row(number: int, ids: Sequence[int], new_tokens: int, **sampling: float) -> LeasedRow:
    """A greedy row, or as `sampling` says."""
    settings = {"seed": 7, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "stop": (), **sampling}
    return LeasedRow.model_validate(
        {"row": number, "key": 7919 * number + 1, "token_ids": tuple(ids),
         "max_new_tokens": new_tokens, **settings}
    )  # fmt: skip


def answers(
    model: Path,
    rows: Sequence[LeasedRow],
    plan: Plan,
    ring: Ring,
    watch: Callable[[Worker], None] = lambda _worker: None,
    load: Callable[[StageSpec], Compute] = StageCompute.load,
) -> dict[int, Answer]:
    """Every row's answer, from stages that are threads of this process; `watch` meets each stage,
    and `load` says what computes in it."""

    def live(_member: str, spec_path: str) -> None:
        spec = StageSpec.model_validate_json(Path(spec_path).read_text(encoding="utf-8"))
        worker = Worker(spec, load)
        watch(worker)
        worker.live()

    settings = StageSettings("test-run", model, "float32", torch.get_num_threads())
    found: dict[int, Answer] = {}
    with Fleet(plan, [ring], settings, start=live) as fleet:
        fleet.start()
        fleet.lease(0, rows)
        while len(found) < len(rows):
            for answer in fleet.news(timeout_s=60.0).answers:
                assert answer.row not in found, f"row {answer.row} was answered twice"
                found[answer.row] = answer
    return found
