"""The main path: prompt rows in, result rows out. Read this first.

Prefect sees a flow of a few coarse tasks. Between the start of the stages and the end of the last
row the data path calls no Prefect API: threads of their own show the progress, and rows go on
without them.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.dealing import Dealer
from flows.errors import RunError
from flows.intake import Intake, Waiting
from flows.job import Job
from flows.launch import EPOCH, Fleet, StageSettings
from flows.layout import Layout
from flows.lease import Clerk, RunNames
from flows.measure import Measured, measure
from flows.model import ModelFolder
from flows.planning import make_plan, paces_of, ring_of, workload
from flows.ready import require_ready
from flows.report import announce, shown
from flows.run import Run, Summary, fingerprint, is_begun, prompt_source
from planner.facts import Workload
from planner.plan import Plan
from storage.compact import MAX_LIVE_PARTS, compact
from storage.export import export
from storage.index import BuiltIndex, built_index
from storage.progress import progress
from storage.results import ResultRow, ResultWriter
from storage.store import JobStore
from storage.verify import verify

POLL_S = 0.5


@flow(name="batch", flow_run_name="{job.name}", validate_parameters=False)
def run_batch(job: Job, store_uri: str, layout: Layout) -> Summary:
    """Prompt rows in, result rows out; safe to run again after any crash."""
    model = require_ready(job, store_uri)
    with ExitStack() as scratch:
        index = validate(job, scratch)
        # A new job is begun only when a node has computed its model rightly, and a plan fits.
        is_new = index.rows > 0 and not is_begun(store_uri, job)
        start = prepare(job, model, index, index.rows, layout) if is_new else None
        document = job.model_dump(mode="json")
        store = JobStore.create(store_uri, job.name, fingerprint(job, model), document)
        store.set_input(index)
    done = progress(store)
    if done.pending and start is None:
        start = prepare(job, model, index, done.pending, layout)
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


def prepare(job: Job, model: ModelFolder, index: BuiltIndex, rows: int, layout: Layout) -> Start:
    """Measure the nodes and plan for so many of the index's rows; nothing is started or stored."""
    work = workload(rows, index.sample, job, model)
    measured = measure_nodes(job, layout)
    return Start(work, measured, plan_run(measured, work, layout))


def answer(run: Run, start: Start) -> None:
    """Start the stages of the plan and have the rows answered that have no result yet."""
    plan, measured = start.plan, start.measured
    run.planned(plan, measured)
    announce(plan)
    context = run.model.context_tokens
    rings = [ring_of(each, measured, context, start.work) for each in plan.pipelines]
    settings = StageSettings(
        run.id,
        run.model.folder,
        run.job.dtype,
        measured.threads,
        weights=run.job.weights,
        device=measured.device,
    )
    fleet = Fleet(plan, rings, settings)
    try:
        with fleet:
            start_stages(fleet)
            process(run, fleet, start)
    finally:
        run.worked(fleet)


@task(cache_policy=NO_CACHE)
def validate(job: Job, scratch: ExitStack) -> BuiltIndex:
    """Check every prompt row before anything starts; InputError names the file, row and column."""
    return scratch.enter_context(built_index(prompt_source(job)))


@task(name="measure", cache_policy=NO_CACHE)
def measure_nodes(job: Job, layout: Layout) -> Measured:
    """Check on a node that the model is computed rightly there, and how fast."""
    return measure(job, layout)


@task(name="plan", cache_policy=NO_CACHE)
def plan_run(measured: Measured, work: Workload, layout: Layout) -> Plan:
    """Decide who computes which layers; JobError if no split fits."""
    return make_plan(measured, work, layout)


@task(cache_policy=NO_CACHE)
def start_stages(fleet: Fleet) -> None:
    """Start one long-lived flow per stage; they are loaded and connected when this returns."""
    fleet.start()


@task(cache_policy=NO_CACHE)
def process(run: Run, fleet: Fleet, start: Start) -> None:
    """Lease rows to the heads, take answers back, commit them; the one long task."""
    names = RunNames(run.id, run.plan_id, EPOCH, run.activations)
    room = max(ring.shape().row_tokens for ring in fleet.rings)
    clerk = Clerk(run.job, run.model, names, room)
    paces = paces_of(start.plan, start.measured, start.work)
    dealer = Dealer(fleet, paces, start.work)
    writer = ResultWriter(run.store, run.done)
    with shown(run.tally), run.tally.timed():
        try:
            for row in ended_rows(run, clerk, dealer):
                if row is not None:
                    writer.append(row)
                    run.tally.count(row)
                if writer.due():
                    _commit(writer, run.store)
                if run.due():
                    run.worked(fleet)
        finally:
            writer.commit()  # what is answered is kept, whatever became of the rest


def ended_rows(run: Run, clerk: Clerk, dealer: Dealer) -> Iterator[ResultRow | None]:
    """Every row's end as it comes; None after each look for answers."""
    intake = Intake(Waiting(run.prompts(), run.done.pending, run.job.sampling), clerk)
    while intake or dealer.rows:
        dealer.fill(intake)
        ended = intake.take_ended()
        yield from ended
        for told in dealer.news(0.0 if ended else POLL_S):
            yield from intake.answered(told)
        yield None
    run.unfit = intake.unfit


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
