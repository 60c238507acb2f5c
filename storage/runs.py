"""The runs' JSON files as typed values and as tables; what a file leaves out is null.

A missing file is no rows, so a query works from a run's first second. Fields that are not named
here are left alone: a later release may write more.
"""

from collections.abc import Iterable
from datetime import datetime
from typing import TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from storage.errors import CorruptStoreError
from storage.schema import LINK_SCHEMA, NODE_SCHEMA, RUN_SCHEMA, STAGE_SCHEMA
from storage.store import JobStore, RunFile


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class PlannedStage(_Record):
    node: str
    first_layer: int | None = None
    end_layer: int | None = None
    weights_offloaded: int | None = None
    kv_offloaded: float | None = None


class PlannedLink(_Record):
    source: str
    target: str
    codec: str | None = None


class PlannedPipeline(_Record):
    stages: tuple[PlannedStage, ...] = ()
    links: tuple[PlannedLink, ...] = ()
    micro_batch_rows: int | None = None
    in_flight: int | None = None
    draft_len: int | None = None


class PlanFile(_Record):
    """plan.json: the plan in force, or the last one that was."""

    plan_id: str | None = None
    epoch: int | None = None
    created_at: datetime | None = None
    pipelines: tuple[PlannedPipeline, ...] = ()
    rows_per_s: float | None = None
    tokens_per_s: float | None = None
    finish_s: float | None = None
    bound_tokens_per_s: float | None = None
    binding: str | None = None
    basis: tuple[str, ...] = ()


class ClusterNode(_Record):
    name: str
    region: str | None = None
    kind: str | None = None
    flop_per_s: float | None = None
    memory_bytes: float | None = None
    memory_bytes_per_s: float | None = None
    host_bytes: float | None = None
    host_to_device_bytes_per_s: float | None = None
    disk_bytes_per_s: float | None = None
    parked_kv_bytes_per_s: float | None = None
    up_bytes_per_s: float | None = None
    down_bytes_per_s: float | None = None


class ClusterLink(_Record):
    source: str
    target: str
    latency_s: float | None = None
    bytes_per_s: float | None = None
    loss: float | None = None


class ClusterFile(_Record):
    """cluster.json: what was measured before planning."""

    nodes: tuple[ClusterNode, ...] = ()
    links: tuple[ClusterLink, ...] = ()


class MeasuredStage(_Record):
    node: str
    busy_s: float | None = None
    frames: int | None = None
    tokens: int | None = None


class MeasuredLink(_Record):
    source: str
    target: str
    level: str | None = None
    frames: int | None = None
    tokens: int | None = None
    activation_bytes: int | None = None
    payload_bytes: int | None = None
    framing_bytes: int | None = None
    control_bytes: int | None = None
    ack_bytes: int | None = None
    wire_bytes: int | None = None
    ratio: float | None = None
    seen_bytes_per_s: float | None = None
    seen_rtt_s: float | None = None
    seen_loss: float | None = None
    blocked_s: float | None = None
    frames_waiting: int | None = None
    most_frames_waiting: int | None = None
    frames_sent_again: int | None = None
    reconnects: int | None = None
    congestion_control: str | None = None


class SummaryFile(_Record):
    """summary.json: what a run did; written at its end, or as it goes."""

    status: str | None = None
    started_at: datetime | None = None
    finished_at: datetime | None = None
    rows: int | None = None
    rows_ok: int | None = None
    rows_failed: int | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    rows_per_s: float | None = None
    stages: tuple[MeasuredStage, ...] = ()
    links: tuple[MeasuredLink, ...] = ()


class Run(_Record):
    """All that one run has written."""

    run_id: str
    plan: PlanFile
    cluster: ClusterFile
    summary: SummaryFile


_File = TypeVar("_File", PlanFile, ClusterFile, SummaryFile)
Row = dict[str, object]


def stored_runs(store: JobStore) -> list[Run]:
    """Every run of the job; CorruptStoreError names a file that does not fit."""
    return [
        Run(
            run_id=run_id,
            plan=_read(store, run_id, "plan", PlanFile),
            cluster=_read(store, run_id, "cluster", ClusterFile),
            summary=_read(store, run_id, "summary", SummaryFile),
        )
        for run_id in store.run_ids()
    ]


def run_tables(runs: Iterable[Run]) -> dict[str, pa.Table]:
    """The tables runs, stages, links and nodes."""
    runs = list(runs)
    return {
        "runs": _table(RUN_SCHEMA, (_run_row(run) for run in runs)),
        "stages": _table(STAGE_SCHEMA, (row for run in runs for row in _stage_rows(run))),
        "links": _table(LINK_SCHEMA, (row for run in runs for row in _link_rows(run))),
        "nodes": _table(NODE_SCHEMA, (row for run in runs for row in _node_rows(run))),
    }


def _read(store: JobStore, run_id: str, name: RunFile, kind: type[_File]) -> _File:
    content = store.read_run_file(run_id, name)
    if content is None:
        return kind()
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = f"{store.files.shown}/runs/{run_id}/{name}.json"
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise CorruptStoreError(f"{place} is no {name} file: {reason}") from error


def _table(schema: pa.Schema, rows: Iterable[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema)  # a name that a row lacks is null


def _run_row(run: Run) -> Row:
    plan = run.plan
    planned = {
        "plan_id": plan.plan_id,
        "epoch": plan.epoch,
        "planned_at": plan.created_at,
        "planned_rows_per_s": plan.rows_per_s,
        "planned_tokens_per_s": plan.tokens_per_s,
        "planned_finish_s": plan.finish_s,
        "bound_tokens_per_s": plan.bound_tokens_per_s,
        "binding": plan.binding,
        "basis": list(plan.basis),
    }
    return {"run_id": run.run_id, **run.summary.model_dump(exclude={"stages", "links"}), **planned}


def _stage_rows(run: Run) -> Iterable[Row]:
    measured = {stage.node: stage.model_dump() for stage in run.summary.stages}
    for number, pipeline in enumerate(run.plan.pipelines):
        settings = pipeline.model_dump(exclude={"stages", "links"})
        for position, stage in enumerate(pipeline.stages):
            place = {"run_id": run.run_id, "pipeline": number, "stage": position}
            yield {**place, **settings, **measured.get(stage.node, {}), **stage.model_dump()}


def _link_rows(run: Run) -> Iterable[Row]:
    """A row for each use that the plan makes of a link, and for each measured link without use."""
    known = {(link.source, link.target): link.model_dump() for link in run.cluster.links}
    for link in run.summary.links:
        known.setdefault((link.source, link.target), {}).update(link.model_dump())
    used: set[tuple[str, str]] = set()
    for number, pipeline in enumerate(run.plan.pipelines):
        for planned in pipeline.links:
            pair = (planned.source, planned.target)
            used.add(pair)
            facts = known.get(pair, {})
            yield {"run_id": run.run_id, "pipeline": number, **facts, **planned.model_dump()}
    for pair, facts in known.items():
        if pair not in used:
            yield {"run_id": run.run_id, **facts}


def _node_rows(run: Run) -> Iterable[Row]:
    for node in run.cluster.nodes:
        yield {"run_id": run.run_id, **node.model_dump()}
