"""SQL over a store: in-memory DuckDB that sees the log's files through Arrow, and no file itself.

Views: prompts, results, errors, pending, jobs, runs, stages, links, nodes; each has a `job` column.
They show the state at the moment of the query, while a job runs as well as after. A query can
read; it can write nothing, open nothing and change no setting.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, repeat

import duckdb
import pyarrow as pa

from storage.errors import JobNotFoundError, QueryError, StorageError
from storage.export import current_results
from storage.files import shown
from storage.formats import read_rows, readable
from storage.index import index_batches
from storage.log import Snapshot
from storage.prompts import PromptRow
from storage.runs import run_tables, stored_runs
from storage.schema import JOB_SCHEMA, PROMPT_SCHEMA
from storage.sql import connection
from storage.store import JobStore, stored_jobs

READS = ("SELECT", "EXPLAIN")  # DuckDB's names; FROM, WITH, DESCRIBE, SHOW, SUMMARIZE are SELECTs
TEXT_BATCH_ROWS = 1024


def query(store_root: str, sql: str, job: str | None = None) -> pa.Table:
    """The result of one reading statement over one job, or over all jobs of the store.

    Raises QueryError with DuckDB's own words for bad SQL, and for any that would write or open
    something; JobNotFoundError if there is no such job, or no job at all.
    """
    jobs = [_StoredJob.of(JobStore.open(store_root, name)) for name in _names(store_root, job)]
    tables = {
        name: table for number, held in enumerate(jobs) for name, table in held.tables(number)
    }
    with connection({**tables, **_fact_tables(jobs)}) as database:
        for name, text in _views(jobs):
            database.sql(f"create view {name} as {text}")
        database.sql("set enable_external_access = false")
        database.sql("set lock_configuration = true")
        try:
            _require_reading(database, sql)
            return database.sql(sql).to_arrow_table()
        except duckdb.Error as error:
            fault = next((held.prompts.fault for held in jobs if held.prompts.fault), error)
            raise QueryError(str(fault)) from error


class PromptTable:
    """The prompts of a job, read from the input each time that a query scans them."""

    def __init__(self, store: JobStore, snapshot: Snapshot) -> None:
        self._store = store
        self._version = snapshot.input
        self.fault: StorageError | None = None
        """Why the last scan failed, which Arrow passes on only as text."""

    def __arrow_c_schema__(self) -> object:
        return PROMPT_SCHEMA.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        reader = pa.RecordBatchReader.from_batches(PROMPT_SCHEMA, self._batches())
        return reader.__arrow_c_stream__(requested_schema)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        if self._version is None:
            return
        source = self._version.source
        held = read_rows(source) if readable(source) else iter(())
        rows = chain(held, repeat(None))
        try:
            with self._store.index_file(self._version) as file:
                for batch in index_batches(file, TEXT_BATCH_ROWS):
                    yield _with_texts(batch, rows)
        except StorageError as error:
            self.fault = error
            raise


@dataclass(frozen=True, slots=True)
class _StoredJob:
    store: JobStore
    snapshot: Snapshot
    prompts: PromptTable

    @classmethod
    def of(cls, store: JobStore) -> "_StoredJob":
        snapshot = store.snapshot()
        return cls(store, snapshot, PromptTable(store, snapshot))

    def tables(self, number: int) -> Iterator[tuple[str, object]]:
        """What DuckDB sees of this job, by name."""
        yield f"_index_{number}", self.store.index_rows(self.snapshot)
        yield f"_parts_{number}", self.store.part_rows(self.snapshot)
        yield f"_prompts_{number}", self.prompts

    def facts(self) -> dict[str, object]:
        """The job's row in `jobs`, save what counting its results adds."""
        file, version = self.store.job_file(), self.snapshot.input
        return {
            "job": self.store.job,
            "created_at": file.created_at,
            "rows": version.rows if version else None,
            "verified": self.store.is_verified(),
            "input": version.source.uri if version else None,
            "input_sha": version.sha if version else None,
            "parts": len(self.snapshot.parts),
            "commits": self.snapshot.number,
            "fingerprint": json.dumps(file.fingerprint),
            "document": json.dumps(file.document),
        }


def _names(store_root: str, job: str | None) -> list[str]:
    if job is not None:
        return [job]
    names = stored_jobs(store_root)
    if not names:
        raise JobNotFoundError(f"{shown(store_root)}: no job is stored there")
    return names


def _fact_tables(jobs: Iterable[_StoredJob]) -> dict[str, object]:
    """Small tables that are made here and now: jobs, and what their runs have written."""
    jobs = list(jobs)
    tables: dict[str, object] = {
        "_jobs": pa.Table.from_pylist([held.facts() for held in jobs], schema=JOB_SCHEMA)
    }
    by_job = {held.store.job: run_tables(stored_runs(held.store)) for held in jobs}
    for name in ("runs", "stages", "links", "nodes"):
        tables[name] = pa.concat_tables(
            table[name].add_column(0, "job", pa.array([job] * table[name].num_rows, pa.string()))
            for job, table in by_job.items()
        )
    return tables


def _views(jobs: list[_StoredJob]) -> Iterator[tuple[str, str]]:
    numbered = [(number, f"'{held.store.job}' as job") for number, held in enumerate(jobs)]
    yield "prompts", _union(f"select {job}, * from _prompts_{k}" for k, job in numbered)
    yield "results", _union(current_results(f"_parts_{k}", f"_index_{k}") for k, _ in numbered)
    yield "errors", "select * from results where status = 'error'"
    yield (
        "pending",
        _union(
            f"select {job}, i.* from _index_{k} i anti join _parts_{k} p"
            " using (custom_id, input_hash)"
            for k, job in numbered
        ),
    )
    yield (
        "jobs",
        """
        select j.job, j.created_at, j.rows,
               coalesce(r.ok, 0) as rows_ok, coalesce(r.failed, 0) as rows_failed,
               j.rows - rows_ok - rows_failed as rows_pending, j.* exclude (job, created_at, rows)
        from _jobs j left join (
            select job, count(*) filter (status = 'ok') as ok,
                   count(*) filter (status = 'error') as failed
            from results group by job
        ) r using (job)
        """,
    )


def _union(selects: Iterable[str]) -> str:
    return " union all ".join(selects)


def _require_reading(database: duckdb.DuckDBPyConnection, sql: str) -> None:
    """QueryError unless the text is one statement that reads."""
    statements = database.extract_statements(sql)
    if len(statements) != 1:
        raise QueryError(f"one statement is needed; there are {len(statements)}")
    kind = statements[0].type.name
    if kind not in READS:
        raise QueryError(f"{kind} is refused: a query may only read (SELECT, DESCRIBE, EXPLAIN...)")


def _with_texts(batch: pa.RecordBatch, rows: Iterator[PromptRow | None]) -> pa.RecordBatch:
    """The batch with what each row asks; null where the input no longer holds it."""
    hashes = batch.column("input_hash").to_pylist()
    held = [
        row if row is not None and row.input_hash == input_hash else None
        for input_hash, row in zip(hashes, rows)  # noqa: B905  (rows never end)
    ]
    prompts = [row.prompt if row else None for row in held]
    messages = [
        json.dumps(row.messages, ensure_ascii=False) if row and row.messages is not None else None
        for row in held
    ]
    texts = [pa.array(prompts, pa.string()), pa.array(messages, pa.string())]
    return pa.record_batch([*batch.columns, *texts], schema=PROMPT_SCHEMA)
