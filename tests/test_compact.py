"""Compaction: fewer parts, the same rows, and readers that notice nothing."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage.catalog import query
from storage.compact import compact
from storage.errors import CorruptStoreError
from storage.log import Entry, Snapshot
from storage.parts import read_part
from storage.progress import progress, terminal_rows, unanswered
from storage.prompts import PromptSource
from storage.results import ResultWriter
from storage.store import JobStore
from storage.verify import verify
from tests.stored import answer, begun, prompts_at, run


@pytest.fixture
def source(tmp_path: Path) -> PromptSource:
    return prompts_at(tmp_path / "p.parquet", ["a", "b", "c", "d", "e", ""])


@pytest.fixture
def store(tmp_path: Path, source: PromptSource) -> JobStore:
    """Six parts of one row each."""
    store = begun(str(tmp_path / "store"), source)
    run(store, source, commit_rows=1)
    return store


def results(store: JobStore) -> list[object]:
    root = str(Path(store.files.shown).parent)
    rows: list[object] = query(root, "select * from results order by row_id").to_pylist()
    return rows


def test_small_parts_become_one_and_the_rows_stay(store: JobStore) -> None:
    before = results(store)
    done = compact(store)
    assert (done.merged, done.written, done.superseded_rows, done.deleted) == (6, 1, 0, 0)
    [part] = store.snapshot().parts.values()
    assert (part.rows, part.errors, part.first_row_id, part.last_row_id) == (6, 1, 0, 5)
    assert results(store) == before
    assert verify(store).complete


def test_a_single_part_is_left_alone(store: JobStore) -> None:
    compact(store)
    number = store.snapshot().number
    assert compact(store).merged == 0
    assert store.snapshot().number == number


def test_a_reader_of_an_older_snapshot_reads_on(store: JobStore) -> None:
    older = store.snapshot()
    compact(store)
    assert sum(read_part(store.files, part).num_rows for part in older.parts.values()) == 6
    row_ids, _ = terminal_rows(store, older, store.part_rows(older))
    assert sorted(row_ids) == [0, 1, 2, 3, 4, 5]


def test_replaced_files_go_after_the_grace_period(store: JobStore) -> None:
    compact(store, grace_s=3600.0)
    assert len(store.files.names("data")) == 7
    assert compact(store, grace_s=0.0).deleted == 6
    assert store.files.names("data") == list(store.snapshot().parts)


def test_a_file_that_the_log_never_named_is_not_deleted(store: JobStore) -> None:
    store.files.write("data/part-of-a-slow-writer.parquet", b"not committed yet")
    compact(store, grace_s=0.0)
    assert verify(store).orphans == ("part-of-a-slow-writer.parquet",)


def test_superseded_rows_go(store: JobStore, tmp_path: Path) -> None:
    changed = prompts_at(tmp_path / "p.parquet", ["a", "B?", "c", "d"])
    begun(str(tmp_path / "store"), changed)
    run(store, changed)
    assert verify(store).superseded_rows == 3
    assert compact(store).superseded_rows == 3
    report = verify(store)
    assert (report.complete, report.ok, report.superseded_rows) == (True, 4, 0)


def test_parts_without_a_current_row_leave_nothing(store: JobStore, tmp_path: Path) -> None:
    begun(str(tmp_path / "store"), prompts_at(tmp_path / "p.parquet", ["x", "y"]))
    assert compact(store).written == 0
    assert not store.snapshot().parts


def test_a_writer_goes_on_beside_compaction(store: JobStore, tmp_path: Path) -> None:
    grown = prompts_at(tmp_path / "p.parquet", ["a", "b", "c", "d", "e", "", "g", "h"])
    begun(str(tmp_path / "store"), grown)
    done = progress(store)
    writer = ResultWriter(store, done)
    new = list(unanswered(store, grown, done))
    writer.append(answer(new[0]))
    compact(store, grace_s=0.0)
    assert writer.commit() == 1
    writer.append(answer(new[1]))
    assert writer.commit() == 1
    assert verify(store).complete


class Overtaken(JobStore):
    """A store where something happens just before our entry is created."""

    def __init__(self, store: JobStore, happens: list[object]) -> None:
        super().__init__(store.files, store.job)
        self.happens = happens

    def append(self, known: Snapshot, entry: Entry) -> Snapshot | None:
        while self.happens:
            event = self.happens.pop()
            assert callable(event)
            event()
        return super().append(known, entry)


def test_an_append_in_between_does_not_stop_compaction(store: JobStore, tmp_path: Path) -> None:
    grown = prompts_at(tmp_path / "p.parquet", ["a", "b", "c", "d", "e", "", "g"])
    begun(str(tmp_path / "store"), grown)
    assert compact(Overtaken(store, [lambda: run(store, grown)])).merged == 6
    assert len(store.snapshot().parts) == 2
    assert verify(store).complete


def test_two_compactions_at_once_leave_one_result(store: JobStore) -> None:
    assert compact(Overtaken(store, [lambda: compact(store)])).merged == 0
    assert len(store.snapshot().parts) == 1
    report = verify(store)
    assert report.complete
    assert len(report.orphans) == 6  # replaced, in their grace period; none is the loser's


def test_a_row_that_becomes_current_meanwhile_is_not_dropped(
    store: JobStore, source: PromptSource, tmp_path: Path
) -> None:
    shorter = prompts_at(tmp_path / "q.parquet", ["a", "b"])
    begun(str(tmp_path / "store"), shorter)
    back = Overtaken(store, [lambda: begun(str(tmp_path / "store"), source)])
    assert compact(back).superseded_rows == 0
    assert verify(store).complete


def test_a_damaged_part_is_not_merged(store: JobStore) -> None:
    name = next(iter(store.snapshot().parts))
    store.files.write(f"data/{name}", store.files.read(f"data/{name}")[:-1])
    with pytest.raises(CorruptStoreError, match=name):
        compact(store)
    assert len(store.snapshot().parts) == 6


def test_large_parts_are_made_of_small_ones_up_to_a_size(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = max(part.bytes for part in store.snapshot().parts.values())
    monkeypatch.setattr("storage.compact.SMALL_BYTES", largest + 1)
    monkeypatch.setattr("storage.compact.MERGED_BYTES", 2 * largest)
    done = compact(store)
    assert (done.merged, done.written) == (6, 3)
    assert verify(store).complete


def test_the_log_says_when_parts_were_replaced(store: JobStore) -> None:
    compact(store)
    removed = store.snapshot().removed
    assert len(removed) == 6
    assert all((datetime.now(UTC) - at).total_seconds() < 60 for at in removed.values())
