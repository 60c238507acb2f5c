"""Merges small parts into few large ones, and lets superseded rows go.

A reader that holds an older snapshot goes on reading the parts it knows for the grace period. A
crash at any step leaves either the old parts or the new ones live, and at worst a file that no
entry names.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa

from storage.log import Part, Snapshot
from storage.parts import read_part, remove_part, write_part
from storage.sql import connection, own_query
from storage.store import MAX_RACES, JobStore, new_entry

log = logging.getLogger(__name__)

MAX_LIVE_PARTS = 500  # every query opens every part; at 2,000 it takes ten times as long
MERGED_BYTES = 64 * 2**20
SMALL_BYTES = MERGED_BYTES // 2
GRACE_S = 3600.0

_CURRENT = """
    select r.position from rows r semi join index_rows i using (custom_id, input_hash)
    order by r.position
"""


@dataclass(frozen=True, slots=True)
class Compaction:
    """What a compaction did."""

    merged: int
    """Parts that were replaced."""
    written: int
    """Parts that replaced them."""
    superseded_rows: int
    """Rows that answered an earlier version of the input, and are gone now."""
    deleted: int
    """Files of earlier compactions whose grace period is over."""


def compact(store: JobStore, grace_s: float = GRACE_S) -> Compaction:
    """Merge all small parts by one commit; delete what was replaced more than `grace_s` ago.

    Safe beside writers, readers and other compactions. Raises CorruptStoreError rather than merge
    a damaged part, CommitConflictError if other commits win every race.
    """
    for _ in range(MAX_RACES):
        before = store.snapshot()
        merged = _merge(store, before)
        if merged is not None:
            done = Compaction(*merged, _delete_replaced(store, store.snapshot(), grace_s))
            log.info(
                "parts compacted job=%s merged=%d written=%d superseded_rows=%d deleted=%d",
                store.job,
                done.merged,
                done.written,
                done.superseded_rows,
                done.deleted,
            )
            return done
    raise store.race_lost()


def _merge(store: JobStore, before: Snapshot) -> tuple[int, int, int] | None:
    """(parts merged, parts written, rows dropped); None if the log has moved on in our way."""
    small = [part for part in before.parts.values() if part.bytes < SMALL_BYTES]
    if len(small) < 2:
        return 0, 0, 0
    written = [part for group in _groups(small) for part in _write_group(store, before, group)]
    if not _commit(store, before, small, written):
        for part in written:
            remove_part(store.files, part.name)
        return None
    dropped = sum(part.rows for part in small) - sum(part.rows for part in written)
    return len(small), len(written), dropped


def _groups(parts: list[Part]) -> Iterator[list[Part]]:
    """Parts in input order, cut where a group would outgrow a merged part."""
    group: list[Part] = []
    for part in sorted(parts, key=lambda part: part.first_row_id):
        if group and sum(member.bytes for member in group) + part.bytes > MERGED_BYTES:
            yield group
            group = []
        group.append(part)
    yield group


def _write_group(store: JobStore, before: Snapshot, group: list[Part]) -> Iterator[Part]:
    rows = pa.concat_tables(read_part(store.files, part) for part in group).combine_chunks()
    keys = rows.select(["custom_id", "input_hash"])
    positions = pa.array(np.arange(rows.num_rows))
    tables = {
        "rows": keys.append_column("position", positions),
        "index_rows": store.index_rows(before),
    }
    with connection(tables) as database, own_query(store.files.shown):
        current = database.sql(_CURRENT).to_arrow_table().column("position")
    if len(current):
        yield write_part(store.files, rows.take(current))


def _commit(store: JobStore, before: Snapshot, small: list[Part], written: list[Part]) -> bool:
    """One entry that removes the old parts and adds the new; appends in between do not matter."""
    entry = new_entry("compact", added=tuple(written), removed=tuple(part.name for part in small))
    for _ in range(MAX_RACES):
        now = store.snapshot()
        if now.input != before.input or not now.parts.keys() >= set(entry.removed):
            return False
        if store.append(now, entry) is not None:
            return True
    return False


def _delete_replaced(store: JobStore, snapshot: Snapshot, grace_s: float) -> int:
    """Delete what the log removed long ago; a part that it never named may yet be committed."""
    horizon = datetime.now(UTC) - timedelta(seconds=grace_s)
    there = set(store.files.names("data"))
    old = [name for name, at in snapshot.removed.items() if at <= horizon and name in there]
    for name in old:
        remove_part(store.files, name)
    return len(old)
