"""From a job and measured nodes to a plan, and from a plan to the settings of its ring."""

import statistics
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from flows.errors import JobError
from flows.job import Job
from flows.layout import Layout
from flows.measure import Measured
from flows.model import ModelFolder
from planner.beside import solve_beside
from planner.facts import Cluster, InfeasibleError, Lengths, ModelShape, Workload
from planner.kv_blocks import BLOCK_TOKENS, Wanted, kv_blocks, kv_room
from planner.leases import Pace, pace_of
from planner.plan import Pipeline, Plan
from planner.prefixes import SHARE_TOKENS, marks
from planner.problem import problem
from planner.rounds import CHUNKS_PER_STEP
from planner.schedule import CHUNK_TOKENS
from planner.solve import solve
from planner.tempo import MOST
from stages.codec import INT8
from stages.config import Ring
from stages.errors import PromptError
from storage.prompts import PromptRow

NOTHING = Plan((), 0.0, 0.0, 0.0, 0.0, "the input has no rows")
"""The plan for no rows at all."""


def workload(rows: int, sample: Iterable[PromptRow], job: Job, model: ModelFolder) -> Workload:
    """What is to do, from a sample of the rows; outputs are assumed to run to their limits,
    which the context may set. Of beginnings that rows share, a sample sees the frequent ones."""
    prompts: list[int] = []
    outputs: list[int] = []
    units: Counter[int] = Counter()
    for row in sample:
        try:
            ids = model.encode(row)
        except PromptError:
            continue  # it will be its row's error; a length it has none
        room = model.context_tokens - len(ids)
        prompts.append(len(ids))
        units.update(marks(ids))
        outputs.append(min(job.sampling.quota(row.sampling), room))
    repeated = SHARE_TOKENS * (units.total() - len(units))
    shared = repeated / sum(prompts) if prompts else 0.0
    return Workload(rows, _lengths(prompts), _lengths(outputs), shared_prefix_fraction=shared)


def _lengths(counts: list[int]) -> Lengths:
    if not counts:
        return Lengths(1.0, 1.0)
    ordered = sorted(counts)
    p95 = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return Lengths(max(1.0, statistics.fmean(ordered)), max(1.0, float(p95)))


def make_plan(measured: Measured, work: Workload, layout: Layout) -> Plan:
    """The fastest plan of that layout over the nodes; JobError if none fits."""
    coded = replace(work, codec={measured.level: measured.codec})
    facts = measured.cluster, measured.model, coded
    try:
        plan = solve_beside(*facts, layout.orders) if layout.orders else _soonest(*facts)
    except InfeasibleError as error:
        raise JobError(f"no plan fits: {error}") from error
    if measured.level == INT8:
        plan = replace(plan, pipelines=tuple(_rounding(each) for each in plan.pipelines))
    return replace(plan, basis=(*measured.basis, *plan.basis))


def _soonest(cluster: Cluster, model: ModelShape, work: Workload) -> Plan:
    """The plan of any pipelines over the nodes that is done first, equal ones among them."""
    plans, nodes = [solve(cluster, model, work)], len(cluster.nodes)
    for stages in (count for count in range(1, nodes + 1) if nodes % count == 0):
        orders = Layout(stages, nodes // stages).orders
        assert orders is not None, "so many pipelines were asked for"
        with suppress(InfeasibleError):  # a pipeline of so few stages has no room for the model
            plans.append(solve_beside(cluster, model, work, orders))
    return min(plans, key=lambda plan: plan.finish_s)


def _rounding(pipeline: Pipeline) -> Pipeline:
    """With int8 on every link but the one that returns tokens: the job asked, not a link's speed."""
    head = pipeline.stages[0].node
    links = (replace(each, codec=INT8) for each in pipeline.links if each.target != head)
    back = (each for each in pipeline.links if each.target == head)
    return replace(pipeline, links=(*links, *back))


def paces_of(plan: Plan, measured: Measured, work: Workload) -> list[Pace]:
    """How fast each pipeline of the plan answers rows."""
    coded = replace(work, codec={measured.level: measured.codec})
    given = problem(measured.cluster, measured.model, coded)
    return [pace_of(given, pipeline) for pipeline in plan.pipelines]


def ring_of(pipeline: Pipeline, measured: Measured, context_tokens: int, work: Workload) -> Ring:
    """The ring's settings: as many KV blocks as the rows in flight may want, or as memory allows.

    A ring of several stages may come to have more micro-batches than planned, and room for them.
    """
    slots = pipeline.in_flight if len(pipeline.stages) == 1 else MOST * pipeline.in_flight
    rows = pipeline.micro_batch_rows * slots
    step_tokens = pipeline.micro_batch_rows + CHUNKS_PER_STEP * CHUNK_TOKENS
    blocks = kv_blocks(
        [
            kv_room(stage, measured.model, measured.cluster, pipeline.in_flight)
            for stage in pipeline.stages
        ],
        measured.model.window,
        Wanted(rows, work.prompt_tokens.p95, work.output_tokens.p95, context_tokens, step_tokens),
    )
    return Ring(
        slots=pipeline.in_flight,
        slot_rows=pipeline.micro_batch_rows,
        blocks=blocks.whole,
        block_tokens=BLOCK_TOKENS,
        step_tokens=step_tokens,
        most_slots=slots,
        window_tokens=measured.model.window if blocks.windowed else 0,
        window_blocks=blocks.windowed,
    )
