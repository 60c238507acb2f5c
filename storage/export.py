"""The finished table, as one Parquet file anywhere: live rows joined to the newest index."""

from pathlib import Path

import fsspec
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from storage.errors import StoreError
from storage.files import files_at
from storage.schema import RESULT_SCHEMA
from storage.scratch import Scratch
from storage.sql import connection, own_query
from storage.store import JobStore

FILE_NAME = "results.parquet"


def current_results(parts: str, index: str) -> str:
    """SELECT of the result rows of the current input, under the positions that they have there."""
    columns = ", ".join(f"p.{name}" for name in RESULT_SCHEMA.names if name != "row_id")
    return f"select i.row_id, {columns} from {parts} p join {index} i using (custom_id, input_hash)"


def export(store: JobStore, target_uri: str) -> int:
    """Write all finished rows, by row_id; how many. A local target is replaced in one step.

    `target_uri` is a folder, which gets results.parquet, or names the .parquet file itself.
    What does not fit into memory is sorted on disk.
    """
    snapshot = store.snapshot()
    folder, name = _target(target_uri)
    tables = {"index_rows": store.index_rows(snapshot), "part_rows": store.part_rows(snapshot)}
    with Scratch("export") as scratch:
        finished = scratch / FILE_NAME
        with connection(tables) as database, own_query(store.files.shown):
            rows_now = current_results("part_rows", "index_rows")
            database.sql(
                f"copy ({rows_now} order by i.row_id) to '{_quoted(finished)}'"
                " (format parquet, compression zstd)"
            )
            [(rows,)] = database.sql(f"select count(*) from '{_quoted(finished)}'").fetchall()
        files_at(folder).write(name, finished)
    return int(rows)


def require_target(target_uri: str) -> None:
    """StoreError unless a table can be written there; of the trial nothing is left."""
    folder, name = _target(target_uri)
    files = files_at(folder)
    files.require_writable()
    if files.root is not None and (files.root / name).is_dir():
        raise StoreError(f"{files.root / name}: is a folder, so no table can take its place")


def require_own(target_uri: str, job: str) -> None:
    """StoreError for a file there that is anything but an earlier table of this job.

    A finished table replaces what bears its name: that must be no prompts, and no other job's rows.
    """
    folder, name = _target(target_uri)
    files = files_at(folder)
    if not files.exists(name):
        return
    where = f"{files.shown}/{name}"
    try:
        with fsspec.open(f"{folder}/{name}") as file:
            table = ParquetFile(file)
            if table.schema_arrow.names != RESULT_SCHEMA.names:
                raise StoreError(f"{where}: is no table of results, which would take its place")
            parts = table.iter_batches(columns=["job"])
            owners = {owner for part in parts for owner in part["job"].unique().to_pylist()}
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(f"{where}: is no table of results, which would take its place") from error
    if owners - {job}:
        raise StoreError(f"{where}: holds results of job {min(owners - {job})}; name another place")


def _target(uri: str) -> tuple[str, str]:
    """(folder, file name)"""
    if not uri.endswith(".parquet"):
        return uri, FILE_NAME
    folder, slash, name = uri.rpartition("/")
    return folder or slash or ".", name


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
