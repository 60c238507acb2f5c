"""Plans and simulations of clusters that somebody imagines: a YAML file in, a plan out; no node."""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from flows.errors import JobError
from flows.job import Job, read_mapping
from flows.measure import measure
from flows.model import open_model
from flows.planning import SAMPLED_ROWS, workload
from flows.run import prompt_source
from planner.baselines import METHODS, baseline
from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.plan import Plan
from planner.solve import solve
from planner.what_if import WhatIfError, what_if
from storage.formats import read_rows
from storage.index import built_index

OURS = "exact"


@dataclass(frozen=True, slots=True)
class Imagined:
    """A whole problem for the planner."""

    cluster: Cluster
    model: ModelShape
    work: Workload

    def plan(self, method: str = OURS) -> Plan:
        """The plan of ours, or of a published method; JobError where none fits."""
        if method != OURS and method not in METHODS:
            raise JobError(f"no method {method!r}; there are {', '.join((OURS, *METHODS))}")
        try:
            if method == OURS:
                return solve(self.cluster, self.model, self.work)
            return baseline(method, self.cluster, self.model, self.work)
        except InfeasibleError as error:
            raise JobError(f"no plan fits: {error}") from error


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
        model = model or measure(job, stages=1).model
        work = work or job_workload(job)
    assert model is not None
    assert work is not None
    return Imagined(given.cluster, model, work)


def job_workload(job: Job) -> Workload:
    """All rows of a job, with lengths from a sample of them."""
    source = prompt_source(job)
    with built_index(source) as index:
        rows = index.rows
    return workload(rows, islice(read_rows(source), SAMPLED_ROWS), job, open_model(job))
