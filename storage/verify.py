"""Proves a job complete: every input row has exactly one result row, and every file is whole."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from storage.errors import CorruptStoreError, StoreError
from storage.index import content_sha, index_batches
from storage.log import InputVersion, Part, Snapshot
from storage.parts import check_part
from storage.sql import connection, own_query
from storage.store import SUCCESS, JobStore

EXAMPLES = 10

_COUNTS = f"""
    with found as (
        select i.custom_id, count(p.custom_id) as times,
               count(*) filter (p.status = 'ok') as ok,
               count(*) filter (p.status = 'error') as failed
        from index_rows i left join part_rows p using (custom_id, input_hash) group by i.custom_id
    )
    select count(*), coalesce(sum(ok), 0)::bigint, coalesce(sum(failed), 0)::bigint,
           count(*) filter (times = 0), count(*) filter (times > 1),
           min(custom_id, {EXAMPLES}) filter (times = 0),
           min(custom_id, {EXAMPLES}) filter (times > 1)
    from found
"""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found. Example ids are the first few in alphabetical order."""

    rows: int
    """Rows of the current input."""
    ok: int
    failed: int
    missing: int
    missing_ids: tuple[str, ...]
    duplicated: int
    duplicated_ids: tuple[str, ...]
    superseded_rows: int
    """Result rows of earlier versions of the input; no fault."""
    parts: int
    corrupt: tuple[str, ...]
    """A line for each damaged file; its rows count as missing."""
    orphans: tuple[str, ...]
    """Files in data/ that the log does not name: a killed writer's, or a compaction's; no fault."""

    @property
    def complete(self) -> bool:
        """Whether every row has exactly one result and every file is whole."""
        return not (self.missing or self.duplicated or self.corrupt)

    def problems(self) -> list[str]:
        """A line for each kind of fault; empty if the job is complete."""
        lines = list(self.corrupt)
        if self.missing:
            lines.append(f"{self.missing} rows have no result: {_named(self.missing_ids)}")
        if self.duplicated:
            lines.append(f"{self.duplicated} rows have several: {_named(self.duplicated_ids)}")
        return lines


def verify(store: JobStore) -> Verification:
    """Read every byte that the log names, count every row, and write _SUCCESS if all is there.

    _SUCCESS is replaced if it is there, and removed if the job turns out not to be complete.
    """
    snapshot = store.snapshot()
    if snapshot.input is None:
        raise StoreError(f"{store.files.shown}: the job has no input yet; nothing to verify")
    _require_index(store, snapshot.input)
    whole: dict[str, Part] = {}
    corrupt: list[str] = []
    for name, part in snapshot.parts.items():
        try:
            check_part(store.files, part)
            whole[name] = part
        except CorruptStoreError as error:
            corrupt.append(str(error))
    report = _report(store, snapshot, whole, tuple(corrupt))
    if report.complete:
        store.files.write(SUCCESS, _success(snapshot, report))
    else:
        store.files.remove(SUCCESS)
    return report


def _require_index(store: JobStore, version: InputVersion) -> None:
    """CorruptStoreError unless the index is the one whose hash it bears."""
    advice = "delete it and run the job again: it is rebuilt from the input"
    place = f"{store.files.shown}/index/{version.sha}.parquet"
    try:
        with store.index_file(version) as file:
            sha = content_sha(index_batches(file))
    except (pa.ArrowException, OSError) as error:
        raise CorruptStoreError(f"{place} is torn ({error}); {advice}") from error
    if sha != version.sha:
        raise CorruptStoreError(f"{place} is not what was written; {advice}")


def _report(
    store: JobStore, snapshot: Snapshot, whole: dict[str, Part], corrupt: tuple[str, ...]
) -> Verification:
    parts = store.part_rows(Snapshot(parts=whole))
    tables = {"index_rows": store.index_rows(snapshot), "part_rows": parts}
    with connection(tables) as database, own_query(store.files.shown):
        [counts] = database.sql(_COUNTS).fetchall()
    rows, ok, failed, missing, duplicated, missing_ids, duplicated_ids = counts
    return Verification(
        rows=rows,
        ok=ok,
        failed=failed,
        missing=missing,
        missing_ids=tuple(missing_ids or ()),
        duplicated=duplicated,
        duplicated_ids=tuple(duplicated_ids or ()),
        superseded_rows=sum(part.rows for part in whole.values()) - ok - failed,
        parts=len(snapshot.parts),
        corrupt=corrupt,
        orphans=tuple(sorted(set(store.files.names("data")) - snapshot.parts.keys())),
    )


def _success(snapshot: Snapshot, report: Verification) -> bytes:
    facts = {
        "verified_at": datetime.now(UTC).isoformat(),
        "log_entry": snapshot.number,
        "input": snapshot.input.sha if snapshot.input else None,
        "rows": report.rows,
        "rows_ok": report.ok,
        "rows_failed": report.failed,
    }
    return json.dumps(facts, indent=1).encode()


def _named(ids: tuple[str, ...]) -> str:
    return ", ".join(map(repr, ids)) + (", ..." if len(ids) == EXAMPLES else "")
