"""The main path: prompt rows in, result rows out. Read this first.

Prefect sees a flow of a few coarse tasks. Between the start of the stages and the end of the last
row the data path calls no Prefect API: threads of their own show the progress, and rows go on
without them.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.errors import RunError
from flows.job import Job
from flows.launch import EPOCH, Fleet, StageSettings
from flows.lease import Clerk, Lease, RunNames, in_order
from flows.measure import Measured, measure
from flows.model import ModelFolder
from flows.planning import make_plan, ring_of, workload
from flows.ready import require_ready
from flows.report import announce, shown
from flows.run import Run, Summary, fingerprint, is_begun, prompt_source
from flows.twins import Twins
from planner.facts import Workload
from planner.plan import Plan
from stages.config import Ring
from storage.compact import MAX_LIVE_PARTS, compact
from storage.export import export
from storage.index import BuiltIndex, built_index
from storage.progress import progress
from storage.results import ResultRow, ResultWriter
from storage.store import JobStore
from storage.verify import verify

AHEAD = 2
"""Rows leased to a head, as a multiple of what its ring holds: it never waits for the driver."""
REFILL_BELOW = 0.75
"""Fraction of those rows at which more are leased, so that a lease is worth its message."""
POLL_S = 0.5


@flow(name="batch", flow_run_name="{job.name}", validate_parameters=False)
def run_batch(job: Job, store_uri: str, stages: int, stage_bytes: float | None = None) -> Summary:
    """Prompt rows in, result rows out; safe to run again after any crash.

    Each of the stages may take `stage_bytes` of memory; by default its share of what is free.
    """
    model = require_ready(job, store_uri)
    with ExitStack() as scratch:
        index = validate(job, scratch)
        # A new job is begun only when a node has computed its model rightly, and a plan fits.
        is_new = index.rows > 0 and not is_begun(store_uri, job)
        start = prepare(job, model, index, index.rows, stages, stage_bytes) if is_new else None
        document = job.model_dump(mode="json")
        store = JobStore.create(store_uri, job.name, fingerprint(job, model), document)
        store.set_input(index)
    done = progress(store)
    if done.pending and start is None:
        start = prepare(job, model, index, done.pending, stages, stage_bytes)
    run = Run(job, model, store, done)
    try:
        if start is not None:
            answer(run, start)
        return finish(run)
    except BaseException:
        run.ended("failed")
        raise


@dataclass(frozen=True, slots=True)
class Start:
    """What is known and decided before stages start."""

    work: Workload
    measured: Measured
    plan: Plan


def prepare(
    job: Job, model: ModelFolder, index: BuiltIndex, rows: int, stages: int,
    stage_bytes: float | None,
) -> Start:  # fmt: skip
    """Measure the nodes and plan for so many of the index's rows; nothing is started or stored."""
    work = workload(rows, index.sample, job, model)
    measured = measure_nodes(job, stages, stage_bytes)
    return Start(work, measured, plan_run(measured, work))


def answer(run: Run, start: Start) -> None:
    """Start the stages of the plan and have the rows answered that have no result yet."""
    plan, measured = start.plan, start.measured
    run.planned(plan, measured)
    announce(plan)
    [pipeline] = plan.pipelines
    ring = ring_of(pipeline, measured, run.model.context_tokens, start.work)
    settings = StageSettings(
        run.id,
        run.model.folder,
        run.job.dtype,
        measured.threads,
        weights=run.job.weights,
        device=measured.device,
    )
    fleet = Fleet(plan, [ring], settings)
    try:
        with fleet:
            start_stages(fleet)
            process(run, fleet, fleet.rings[0])
    finally:
        run.worked(fleet)


@task(cache_policy=NO_CACHE)
def validate(job: Job, scratch: ExitStack) -> BuiltIndex:
    """Check every prompt row before anything starts; InputError names the file, row and column."""
    return scratch.enter_context(built_index(prompt_source(job)))


@task(name="measure", cache_policy=NO_CACHE)
def measure_nodes(job: Job, stages: int, stage_bytes: float | None) -> Measured:
    """Check on a node that the model is computed rightly there, and how fast."""
    return measure(job, stages, stage_bytes)


@task(name="plan", cache_policy=NO_CACHE)
def plan_run(measured: Measured, work: Workload) -> Plan:
    """Decide who computes which layers; JobError if no split fits."""
    return make_plan(measured, work)


@task(cache_policy=NO_CACHE)
def start_stages(fleet: Fleet) -> None:
    """Start one long-lived flow per stage; they are loaded and connected when this returns."""
    fleet.start()


@task(cache_policy=NO_CACHE)
def process(run: Run, fleet: Fleet, ring: Ring) -> None:
    """Lease rows to the head, take answers back, commit them; the one long task."""
    names = RunNames(run.id, run.plan_id, EPOCH, run.activations)
    clerk = Clerk(run.job, run.model, names, ring.blocks * ring.block_tokens)
    writer = ResultWriter(run.store, run.done)
    with shown(run.tally), run.tally.timed():
        try:
            for row in ended_rows(
                run, fleet, clerk, AHEAD * ring.shape().capacity * ring.slot_rows
            ):
                if row is not None:
                    writer.append(row)
                    run.tally.count(row)
                if writer.due():
                    _commit(writer, run.store)
                if run.due():
                    run.worked(fleet)
        finally:
            writer.commit()  # what is answered is kept, whatever became of the rest


def ended_rows(run: Run, fleet: Fleet, clerk: Clerk, ahead: int) -> Iterator[ResultRow | None]:
    """Every row's end as it comes, with `ahead` rows leased; None after each look for answers."""
    leases: dict[int, Lease] = {}
    twins = Twins()
    prompts = in_order(run.prompts())
    more = True
    while more or leases:
        if more and len(leases) <= ahead * REFILL_BELOW:
            wanted = ahead - len(leases)
            fresh = [clerk.lease(prompt) for prompt in islice(prompts, wanted)]
            more = len(fresh) == wanted
            run.unfit += fresh.count(None)
            yield from (row for row in fresh if isinstance(row, ResultRow))
            leased: list[Lease] = []
            for lease in (each for each in fresh if isinstance(each, Lease)):
                known = twins.answer_to(lease)
                if known is not None:
                    yield clerk.ended(lease, known)
                elif not twins.waits(lease):
                    leased.append(lease)
            leases |= {lease.row.row: lease for lease in leased}
            if leased:
                fleet.lease(0, [lease.row for lease in leased])
        if leases:
            for answer in fleet.news(POLL_S).answers:
                first = leases.pop(answer.row)
                for lease in (first, *twins.answered(first, answer)):
                    yield clerk.ended(lease, answer)
        yield None


def _commit(writer: ResultWriter, store: JobStore) -> None:
    writer.commit()
    if writer.live_parts > MAX_LIVE_PARTS:
        compact(store)


@task(name="verify", cache_policy=NO_CACHE)
def finish(run: Run) -> Summary:
    """Prove that every row has exactly one result; RunError naming what is missing otherwise."""
    found = verify(run.store)
    if not found.complete:
        problems = found.problems()
        if run.unfit:
            problems.append(
                f"{run.unfit} rows are longer than the plan's KV cache: "
                "run again with more memory, or with fewer stages on this machine"
            )
        raise RunError(f"{run.job.name}: {'; '.join(problems)}")
    if run.job.results is not None:
        export(run.store, run.job.results)
    run.ended("completed")
    return run.summary
