"""Plans and simulations of clusters that somebody imagines: a YAML file in, a plan out; no node."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flows.errors import JobError
from flows.job import Job
from flows.layout import Layout
from flows.measure import measure
from flows.model import open_model
from flows.planning import workload
from flows.run import prompt_source
from flows.yaml_file import read_mapping
from planner.baselines import METHODS, baseline
from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.leases import POLICIES, Policy
from planner.milp import MissingSolverError
from planner.plan import Plan
from planner.rehearse import REHEARSED_ROWS, rehearsed
from planner.rows import arriving, sample_rows
from planner.simulate import Event, NodesChange, Simulated, simulate
from planner.solve import solve
from planner.what_if import WhatIfError, what_if
from storage.index import built_index

OURS = "exact"
REPLICATED = "replicated"
"""Ours, with replicated stages where they win: more than a run's ring can do today."""
REHEARSED = "rehearsed"
PLANNERS = (OURS, REPLICATED, REHEARSED, *METHODS)
SAMPLES = 3
"""Draws of rows that a rehearsal runs, and again that the best few run after it."""

PLAYED_ROWS = 10_000_000
"""Rows that a simulation can hold."""


@dataclass(frozen=True, slots=True)
class Course:
    """How an imagined run goes, beside its plan."""

    seed: int = 0
    rows_per_s: float | None = None
    """Of arriving rows; None where all are there at once."""
    policy: Policy = POLICIES[0]
    leaving: Sequence[str] = ()
    """`NODE@SECONDS`, as `joining`: a node is there until then, or from then on."""
    joining: Sequence[str] = ()
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Imagined:
    """A whole problem for the planner."""

    cluster: Cluster
    model: ModelShape
    work: Workload

    def plan(self, method: str = OURS) -> Plan:
        """The plan of ours, or of a published method; JobError where none fits."""
        if method not in PLANNERS:
            raise JobError(f"no method {method!r}; there are {', '.join(PLANNERS)}")
        try:
            if method in {OURS, REPLICATED}:
                replicate = method == REPLICATED
                return solve(self.cluster, self.model, self.work, replicate=replicate)
            if method == REHEARSED:
                return self._rehearsed()
            planned = baseline(method, self.cluster, self.model, self.work)
            ours = solve(self.cluster, self.model, self.work)
            least = min(planned.bound_tokens_per_s, ours.bound_tokens_per_s)
            return replace(planned, bound_tokens_per_s=least)
        except InfeasibleError as error:
            raise JobError(f"no plan fits: {error}") from error
        except MissingSolverError as error:
            raise JobError(str(error)) from error

    def _rehearsed(self) -> Plan:
        few = replace(self.work, rows=min(self.work.rows, REHEARSED_ROWS))
        # Seeds that no simulation uses by itself: a plan is not judged on the rows it was made for.
        drawn = [sample_rows(few, 1_000_000 + i) for i in range(2 * SAMPLES)]
        samples, others = drawn[:SAMPLES], drawn[SAMPLES:]
        return rehearsed(self.cluster, self.model, self.work, samples, others=others)

    def at_first(self, course: Course) -> "Imagined":
        """The problem without the nodes that join later."""
        late = {name for name, _ in self._moments(course.joining)}
        nodes = tuple(node for node in self.cluster.nodes if node.name not in late)
        return replace(self, cluster=replace(self.cluster, nodes=nodes))

    def play(self, plan: Plan, course: Course) -> Simulated:
        """Simulate a plan that was made for the nodes of `at_first`; JobError where it ends stuck."""
        if self.work.rows > PLAYED_ROWS:
            raise JobError(
                f"a simulation plays every row, at most {PLAYED_ROWS:,}; "
                f"the workload has {self.work.rows:,}"
            )
        rows = sample_rows(self.work, course.seed)
        if course.rows_per_s is not None:
            rows = arriving(rows, course.rows_per_s, course.seed)
        try:
            return simulate(
                plan,
                self.at_first(course).cluster,
                self.model,
                self.work,
                rows=rows,
                policy=course.policy,
                changes=self._changes(course),
                trace=course.trace,
            )
        except InfeasibleError as error:
            raise JobError(str(error)) from error

    def _changes(self, course: Course) -> list[NodesChange]:
        """The cluster after each moment at which a node leaves or joins."""
        moves = [(at_s, name, False) for name, at_s in self._moments(course.leaving)]
        moves += [(at_s, name, True) for name, at_s in self._moments(course.joining)]
        there = {node.name for node in self.at_first(course).cluster.nodes}
        changes = []
        for at_s, name, joins in sorted(moves):
            there = there | {name} if joins else there - {name}
            nodes = tuple(node for node in self.cluster.nodes if node.name in there)
            changes.append(NodesChange(at_s, replace(self.cluster, nodes=nodes)))
        return changes

    def _moments(self, texts: Sequence[str]) -> list[tuple[str, float]]:
        """(node, seconds) of every NODE@SECONDS."""
        names = {node.name for node in self.cluster.nodes}
        moments = []
        for text in texts:
            name, _, seconds = text.rpartition("@")
            try:
                at_s = float(seconds)
            except ValueError:
                at_s = -1.0
            if not 0 <= at_s < float("inf") or name not in names:
                known = ", ".join(sorted(names))
                raise JobError(f"{text!r} is not NODE@SECONDS; nodes are {known}")
            moments.append((name, at_s))
        return moments


def write_trace(path: Path, events: Iterable[Event]) -> None:
    """One JSON object a line, in the order of time; JobError where the file cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            for event in sorted(events, key=lambda event: event.at_s):
                file.write(json.dumps(asdict(event)) + "\n")
    except OSError as error:
        raise JobError(f"{path}: cannot write the trace: {error.strerror}") from error


def read_what_if(path: Path, job: Job | None) -> Imagined:
    """The problem in a what-if file; model and workload, where it has none, are the job's."""
    try:
        given = what_if(read_mapping(path))
    except WhatIfError as error:
        raise JobError(f"{path}: {error}") from error
    model, work = given.model, given.workload
    if (model is None or work is None) and job is None:
        missing = "model" if model is None else "workload"
        raise JobError(f"{path}: there is no {missing} in it; add one, or name a job that has it")
    if job is not None:
        model = model or measure(job, Layout()).model
        work = work or job_workload(job)
    assert model is not None
    assert work is not None
    return Imagined(given.cluster, model, work)


def job_workload(job: Job) -> Workload:
    """All rows of a job, with lengths from a sample of them."""
    with built_index(prompt_source(job)) as index:
        return workload(index.rows, index.sample, job, open_model(job))
