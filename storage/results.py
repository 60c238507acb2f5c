"""Result rows into the store: collected, written as a part, committed by a log entry.

"Finished" means committed. The log decides, so two writers of one job cannot both commit a row:
whoever loses the race for an entry drops what is terminal by now and writes its part anew.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Literal

import numpy as np
import pyarrow as pa

from storage.errors import DuplicateRowError
from storage.log import Part, Snapshot, new_parts, replay
from storage.parts import remove_part, write_part
from storage.progress import Progress, terminal_rows
from storage.schema import RESULT_SCHEMA
from storage.store import MAX_RACES, JobStore, new_entry

log = logging.getLogger(__name__)

COMMIT_ROWS = 1000
COMMIT_S = 10.0

_OPEN, _OURS, _THEIRS = range(3)


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One row's end: an answer, or a typed error with its reason."""

    row_id: int
    custom_id: str
    input_hash: str
    status: Literal["ok", "error"]
    text: str | None
    finish_reason: Literal["stop", "length", "error"]
    sampling: str
    """The sampling in force, as JSON."""
    model: str
    job: str
    run_id: str
    finished_at: datetime
    """With its time zone."""
    prompt_tokens: int = 0
    output_tokens: int = 0
    replayed_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    truncated: bool = False
    activations: str | None = None
    """exact or int8: what travelled between stages; None where nothing was computed."""
    weights: str | None = None
    """stored, int8 or int4: what the layers computed with; None where nothing was."""
    error_type: str | None = None
    error_message: str | None = None
    seed: int | None = None
    model_revision: str | None = None
    plan: str | None = None
    epoch: int | None = None
    pipeline: int | None = None
    queued_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None

    def __post_init__(self) -> None:
        failed = self.status == "error"
        if failed != (self.finish_reason == "error") or failed != (self.error_type is not None):
            raise ValueError(
                f"row {self.row_id} ({self.custom_id}): status, finish_reason and error_type"
                f" disagree: {self.status}, {self.finish_reason}, {self.error_type}"
            )
        if self.finished_at.tzinfo is None:
            raise ValueError(f"row {self.row_id}: finished_at has no time zone")


class ResultWriter:
    """Collects the rows of one run and commits them. One thread may use it at a time."""

    def __init__(
        self, store: JobStore, done: Progress, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        self._known = done.snapshot
        self._base = done
        self._clock = clock
        self._pending: list[ResultRow] = []
        self._oldest_s = 0.0
        self._attempt: Part | None = None
        """The part of a commit that has not been answered yet."""
        self._states = np.where(done.terminal, np.uint8(_THEIRS), np.uint8(_OPEN))
        self.committed = 0
        """Rows that this writer has finished."""
        self.dropped = 0
        """Rows that were terminal already when this writer came to commit them."""

    @property
    def pending(self) -> int:
        """Rows that are appended and not yet committed."""
        return len(self._pending)

    @property
    def live_parts(self) -> int:
        """Parts that the log named when last read; compaction is due above `MAX_LIVE_PARTS`."""
        return len(self._known.parts)

    def append(self, row: ResultRow) -> None:
        """Take a finished row; DuplicateRowError if this writer has had it before."""
        if row.job != self._store.job:
            raise ValueError(f"a row of job {row.job!r} in the store of {self._store.job!r}")
        if not 0 <= row.row_id < len(self._states):
            raise ValueError(f"row {row.row_id} is outside the input of {len(self._states)} rows")
        state = self._states[row.row_id]
        if state == _OURS:
            raise DuplicateRowError(f"row {row.row_id} ({row.custom_id}) was appended twice")
        if state == _THEIRS:
            self.dropped += 1
            return
        self._states[row.row_id] = _OURS
        if not self._pending:
            self._oldest_s = self._clock()
        self._pending.append(row)

    def due(self) -> bool:
        """Whether to commit: 1,000 rows wait, or one has waited for 10 s."""
        if not self._pending:
            return False
        return self.pending >= COMMIT_ROWS or self._clock() - self._oldest_s >= COMMIT_S

    def commit(self) -> int:
        """Finish all waiting rows; how many. After a StoreError they wait on: commit again.

        Raises CommitConflictError if other writers win every race.
        """
        before = self.committed
        for _ in range(MAX_RACES):
            self._catch_up()
            if not self._pending:
                return self.committed - before
            part = self._attempt = write_part(self._store.files, self._table())
            newest = max(self._pending, key=lambda row: row.epoch or 0)
            entry = new_entry("append", added=(part,), plan=newest.plan, epoch=newest.epoch)
            done = self._store.append(self._known, entry)
            if done is not None:
                self._known = done
                self._finish(part)
                log.info(
                    "rows committed job=%s entry=%d rows=%d",
                    self._store.job,
                    done.number,
                    part.rows,
                )
                return self.committed - before
            log.warning("commit overtaken job=%s after=%d", self._store.job, self._known.number)
            self._attempt = None
            remove_part(self._store.files, part.name)
        raise self._store.race_lost()

    def _finish(self, part: Part) -> None:
        """The oldest waiting rows, which the part holds, are committed."""
        del self._pending[: part.rows]
        self._attempt = None
        self.committed += part.rows

    def _catch_up(self) -> None:
        """Read what others committed since, and drop waiting rows that are terminal by now."""
        entries = self._store.entries_after(self._known.number)
        if not entries:
            return
        latest = replay(self._known, entries)
        if self._attempt is not None and self._attempt.name in latest.parts:
            self._finish(self._attempt)  # its commit was answered with an error, and had succeeded
        if unknown := new_parts(self._known, entries):
            parts = self._store.part_rows(Snapshot(parts={part.name: part for part in unknown}))
            theirs, _ = terminal_rows(self._store, self._base.snapshot, parts)
            self._drop(set(theirs.tolist()))
            self._states[theirs[self._states[theirs] == _OPEN]] = _THEIRS
        self._known = latest

    def _drop(self, terminal: set[int]) -> None:
        kept = [row for row in self._pending if row.row_id not in terminal]
        self.dropped += len(self._pending) - len(kept)
        self._pending = kept

    def _table(self) -> pa.Table:
        columns = {
            name: pa.array(
                [getattr(row, name) for row in self._pending], RESULT_SCHEMA.field(name).type
            )
            for name in (field.name for field in fields(ResultRow))
        }
        return pa.table(columns).select(RESULT_SCHEMA.names).cast(RESULT_SCHEMA)
