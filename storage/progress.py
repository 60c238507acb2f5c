"""What of the current input is answered, and what is left to do.

A row is terminal if a live part holds a row, answer or error, with its custom_id and input_hash.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage.errors import InputError, StoreError
from storage.files import shown
from storage.formats import read_rows
from storage.index import index_batches
from storage.log import InputVersion, Snapshot
from storage.parts import ScannedTable
from storage.prompts import PromptRow, PromptSource
from storage.sql import connection, own_query
from storage.store import JobStore

_TERMINAL = """
    select i.row_id, p.status = 'ok' as ok
    from index_rows i join part_rows p using (custom_id, input_hash)
"""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the job is, at one moment of the log."""

    snapshot: Snapshot
    version: InputVersion
    terminal: npt.NDArray[np.bool_]
    """For each row of the index, in order, whether it has its result."""
    failed: int
    """Terminal rows that are errors."""

    @property
    def rows(self) -> int:
        return self.version.rows

    @property
    def answered(self) -> int:
        """Terminal rows, error rows included."""
        return int(np.count_nonzero(self.terminal))

    @property
    def pending(self) -> int:
        return self.rows - self.answered


def progress(store: JobStore) -> Progress:
    """The job's progress now; StoreError if it has no input yet.

    The join of keys spills to disk where memory is short; one byte a row remains.
    """
    snapshot = store.snapshot()
    if snapshot.input is None:
        raise StoreError(f"{store.files.shown}: the job has no input yet; set it first")
    row_ids, ok = terminal_rows(store, snapshot, store.part_rows(snapshot))
    terminal = np.zeros(snapshot.input.rows, np.bool_)
    terminal[row_ids] = True
    return Progress(snapshot, snapshot.input, terminal, len(np.unique(row_ids[~ok])))


def terminal_rows(
    store: JobStore, snapshot: Snapshot, parts: ScannedTable
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(row_id, whether it is an answer) for each row in `parts` that the snapshot's index has."""
    tables = {"index_rows": store.index_rows(snapshot), "part_rows": parts}
    with connection(tables) as database, own_query(store.files.shown):
        found = database.sql(_TERMINAL).to_arrow_table()
    return found.column("row_id").to_numpy(), found.column("ok").to_numpy()


def unanswered(store: JobStore, source: PromptSource, done: Progress) -> Iterator[PromptRow]:
    """The rows of the input that are not terminal in `done`, in order, streamed.

    Raises InputError if the input is no longer the one that was indexed.
    """
    rows = read_rows(source)
    with store.index_file(done.version) as file:
        for batch in index_batches(file):
            ids, hashes = batch.column("custom_id"), batch.column("input_hash")
            for custom_id, input_hash in zip(ids.to_pylist(), hashes.to_pylist(), strict=True):
                row = next(rows, None)
                if row is None or row.input_hash != input_hash:
                    raise _changed(source, custom_id)
                if not done.terminal[row.row_id]:
                    yield row if row.custom_id else row.named(custom_id)
    if next(rows, None) is not None:
        raise _changed(source, None)


def _changed(source: PromptSource, custom_id: str | None) -> InputError:
    where = f"at {custom_id!r}" if custom_id else "after its last row"
    reason = f"has changed {where} since it was indexed; start the run again"
    return InputError(shown(source.uri), reason)
