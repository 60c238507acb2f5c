"""What verify proves, what it finds, and when _SUCCESS may stand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from storage.errors import CorruptStoreError, StoreError
from storage.parts import read_part, write_part
from storage.progress import progress, unanswered
from storage.prompts import PromptSource
from storage.results import ResultWriter
from storage.store import SUCCESS, JobStore, new_entry
from storage.verify import verify
from tests.stored import FINGERPRINT, answer, begun, prompts_at, run


@pytest.fixture
def source(tmp_path: Path) -> PromptSource:
    return prompts_at(tmp_path / "p.parquet", ["a", "b", "", "d"])


@pytest.fixture
def store(tmp_path: Path, source: PromptSource) -> JobStore:
    """Complete, in two parts."""
    store = begun(str(tmp_path / "store"), source)
    run(store, source, commit_rows=2)
    return store


def first_part(store: JobStore) -> str:
    return next(iter(store.snapshot().parts))


def test_a_complete_job_gets_its_success(store: JobStore) -> None:
    assert not store.is_verified()
    report = verify(store)
    assert report.complete
    assert (report.rows, report.ok, report.failed, report.parts) == (4, 3, 1, 2)
    assert report.problems() == []
    written = json.loads(store.files.read(SUCCESS))
    assert (written["rows"], written["rows_ok"], written["rows_failed"]) == (4, 3, 1)


def test_a_job_without_rows_is_complete(tmp_path: Path) -> None:
    store = begun(str(tmp_path / "store"), prompts_at(tmp_path / "p.parquet", []))
    assert verify(store).complete
    assert progress(store).pending == 0


def test_missing_rows_are_named(tmp_path: Path, source: PromptSource) -> None:
    store = begun(str(tmp_path / "store"), source)
    done = progress(store)
    writer = ResultWriter(store, done)
    writer.append(answer(next(unanswered(store, source, done))))
    writer.commit()
    report = verify(store)
    assert (report.missing, report.missing_ids) == (3, ("row-1", "row-2", "row-3"))
    assert "3 rows have no result: 'row-1'" in report.problems()[0]
    assert not store.is_verified()


def test_rows_that_are_there_twice_are_named(store: JobStore) -> None:
    known = store.snapshot()
    part = next(iter(known.parts.values()))
    rows = read_part(store.files, part).slice(1, 1)
    store.append(known, new_entry("append", added=(write_part(store.files, rows),)))
    report = verify(store)
    assert (report.duplicated, report.duplicated_ids) == (1, ("row-1",))
    assert part.rows == 2
    assert not store.is_verified()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:-10], "sha256"),
        (lambda content: b"", "sha256"),
        (lambda content: content[:50] + b"x" + content[51:], "sha256"),
    ],
)
def test_a_torn_part_is_named_and_its_rows_are_missing(
    store: JobStore, damage: Callable[[bytes], bytes], reason: str
) -> None:
    verify(store)
    path = f"data/{first_part(store)}"
    store.files.write(path, damage(store.files.read(path)))
    report = verify(store)
    [line] = report.corrupt
    assert path in line
    assert reason in line
    assert report.missing == 2
    assert not store.is_verified()  # what an earlier verify wrote no longer holds


def test_a_part_that_is_gone_is_named(store: JobStore) -> None:
    store.files.remove(f"data/{first_part(store)}")
    assert "is missing" in verify(store).corrupt[0]


def test_a_part_whose_footer_contradicts_the_log_is_named(
    tmp_path: Path, source: PromptSource
) -> None:
    store = begun(str(tmp_path / "store"), source)
    other = begun(str(tmp_path / "other"), source)
    run(other, source)
    [written] = other.snapshot().parts.values()
    part = write_part(store.files, read_part(other.files, written))
    wrong = part.model_copy(update={"rows": 3})
    store.append(store.snapshot(), new_entry("append", added=(wrong,)))
    assert "has 4 rows, the log says 3" in verify(store).corrupt[0]


def test_files_that_the_log_does_not_name_are_told_and_no_fault(store: JobStore) -> None:
    store.files.write("data/part-of-a-killed-writer.parquet", b"torn")
    report = verify(store)
    assert report.orphans == ("part-of-a-killed-writer.parquet",)
    assert report.complete


def test_a_changed_input_takes_the_success_away(
    store: JobStore, source: PromptSource, tmp_path: Path
) -> None:
    verify(store)
    begun(str(tmp_path / "store"), source)
    assert store.is_verified()
    begun(str(tmp_path / "store"), prompts_at(tmp_path / "p.parquet", ["a", "b", "", "d", "e"]))
    assert not store.is_verified()
    assert verify(store).missing_ids == ("row-4",)


def test_a_damaged_index_is_named(store: JobStore) -> None:
    version = store.snapshot().input
    assert version is not None
    path = f"index/{version.sha}.parquet"
    whole = store.files.read(path)
    store.files.write(path, whole[:-10])
    with pytest.raises(CorruptStoreError, match=f"{version.sha}.parquet is torn"):
        verify(store)
    store.files.remove(path)
    with pytest.raises(CorruptStoreError, match="is missing"):
        verify(store)


def test_a_job_without_input_has_nothing_to_verify(tmp_path: Path) -> None:
    store = JobStore.create(str(tmp_path), "demo", FINGERPRINT, {})
    with pytest.raises(StoreError, match="no input yet"):
        verify(store)
