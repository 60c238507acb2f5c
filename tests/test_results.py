"""Commits: nothing lost, nothing twice, whoever is killed, overtaken or out of disk."""

import errno
import multiprocessing
import shutil
import signal
from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from storage.catalog import query
from storage.errors import CommitConflictError, DuplicateRowError, StoreError
from storage.files import LocalFiles
from storage.log import Entry, Snapshot
from storage.progress import progress, unanswered
from storage.prompts import PromptRow, PromptSource
from storage.results import COMMIT_ROWS, COMMIT_S, ResultRow, ResultWriter
from storage.schema import RESULT_SCHEMA
from storage.store import JobStore, new_entry
from storage.verify import verify
from tests.doomed import doomed, doomed_beginning, race
from tests.stored import answer, begun, prompts_at, run

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.doomed"])


@pytest.fixture
def source(tmp_path: Path) -> PromptSource:
    return prompts_at(tmp_path / "p.parquet", ["a", "b", "", "d", "e", "f"])


@pytest.fixture
def store(tmp_path: Path, source: PromptSource) -> JobStore:
    return begun(str(tmp_path / "store"), source)


def started(store: JobStore, source: PromptSource) -> tuple[ResultWriter, list[PromptRow]]:
    done = progress(store)
    return ResultWriter(store, done), list(unanswered(store, source, done))


def test_a_result_row_has_the_columns_of_the_schema() -> None:
    assert {field.name for field in fields(ResultRow)} == set(RESULT_SCHEMA.names)


def test_what_is_committed_is_read_back_unchanged(store: JobStore, source: PromptSource) -> None:
    writer, rows = started(store, source)
    sent = replace(
        answer(rows[1]),
        text="naïve\n☕",
        seed=2**40,
        queued_s=0.5,
        truncated=True,
        finished_at=datetime(2030, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    )
    writer.append(sent)
    assert writer.commit() == 1
    [row] = query(str(Path(store.files.shown).parent), "select * from results").to_pylist()
    assert row == {field.name: getattr(sent, field.name) for field in fields(ResultRow)}


def test_nothing_is_visible_before_the_commit(store: JobStore, source: PromptSource) -> None:
    writer, rows = started(store, source)
    writer.append(answer(rows[0]))
    assert progress(store).answered == 0
    writer.commit()
    assert progress(store).answered == 1
    assert (writer.pending, writer.committed) == (0, 1)


def test_an_entry_says_what_it_added(store: JobStore, source: PromptSource) -> None:
    writer, rows = started(store, source)
    for row in (rows[5], rows[2]):
        writer.append(answer(row))
    writer.commit()
    entry = store.entries_after(1)[0]
    [part] = entry.added
    assert (part.rows, part.errors, part.first_row_id, part.last_row_id) == (2, 1, 2, 5)
    assert (entry.kind, entry.plan, entry.epoch) == ("append", "plan-1", 1)


def test_a_row_appended_twice_is_refused(store: JobStore, source: PromptSource) -> None:
    writer, rows = started(store, source)
    writer.append(answer(rows[0]))
    with pytest.raises(DuplicateRowError, match="row-0"):
        writer.append(answer(rows[0]))
    writer.commit()
    with pytest.raises(DuplicateRowError, match="row-0"):
        writer.append(answer(rows[0]))


def test_a_row_that_contradicts_itself_is_refused(store: JobStore, source: PromptSource) -> None:
    _, rows = started(store, source)
    with pytest.raises(ValueError, match="disagree"):
        replace(answer(rows[0]), status="error")
    with pytest.raises(ValueError, match="no time zone"):
        replace(answer(rows[0]), finished_at=datetime(2030, 1, 1))


def test_a_row_of_another_job_or_input_is_refused(store: JobStore, source: PromptSource) -> None:
    writer, rows = started(store, source)
    with pytest.raises(ValueError, match="other"):
        writer.append(answer(rows[0], job="other"))
    for row_id in (-1, 6):
        with pytest.raises(ValueError, match="outside the input of 6 rows"):
            writer.append(replace(answer(rows[0]), row_id=row_id))


def test_a_commit_is_due_after_a_thousand_rows_or_ten_seconds(tmp_path: Path) -> None:
    source = prompts_at(tmp_path / "many.parquet", ["x"] * (COMMIT_ROWS + 1))
    store, now = begun(str(tmp_path / "store"), source), [0.0]
    done = progress(store)
    writer = ResultWriter(store, done, clock=lambda: now[0])
    rows = unanswered(store, source, done)
    assert not writer.due()
    writer.append(answer(next(rows)))
    now[0] = COMMIT_S - 0.1
    assert not writer.due()
    now[0] = COMMIT_S
    assert writer.due()
    writer.commit()
    for row in rows:
        assert not writer.due()
        writer.append(answer(row))
    assert writer.due()


def test_the_loser_of_a_race_commits_only_what_is_left(
    store: JobStore, source: PromptSource
) -> None:
    first, rows = started(store, source)
    second, _ = started(store, source)
    for row in rows[:3]:
        first.append(answer(row, run_id="first"))
    for row in rows[1:4]:
        second.append(answer(row, run_id="second"))
    assert first.commit() == 3
    assert second.commit() == 1
    assert second.dropped == 2
    second.append(answer(rows[0], run_id="second"))  # known to be terminal by now
    second.append(answer(rows[4], run_id="second"))
    assert second.commit() == 1
    assert (second.committed, second.dropped) == (2, 3)
    assert verify(store).duplicated == 0


class Overtaken(JobStore):
    """A store in which another writer commits between our reading the log and our own commit."""

    def __init__(self, store: JobStore, rivals: list[ResultWriter]) -> None:
        super().__init__(store.files, store.job)
        self.rivals = rivals

    def append(self, known: Snapshot, entry: Entry) -> Snapshot | None:
        if self.rivals:
            self.rivals.pop().commit()
        return super().append(known, entry)


def test_a_writer_overtaken_at_the_last_moment_writes_its_part_anew(
    store: JobStore, source: PromptSource
) -> None:
    rival, rows = started(store, source)
    done = progress(store)
    writer = ResultWriter(Overtaken(store, [rival]), done)
    for row in rows[:4]:
        rival.append(answer(row))
    for row in rows[2:]:
        writer.append(answer(row))
    assert writer.commit() == 2
    report = verify(store)
    assert report.complete
    assert report.orphans == ()


def test_a_writer_that_loses_every_race_says_so(store: JobStore, source: PromptSource) -> None:
    class Hopeless(JobStore):
        def append(self, known: Snapshot, entry: Entry) -> Snapshot | None:
            store.append(known, new_entry("append"))
            return super().append(known, entry)

    writer = ResultWriter(Hopeless(store.files, store.job), progress(store))
    writer.append(answer(next(unanswered(store, source, progress(store)))))
    with pytest.raises(CommitConflictError, match="overtaken"):
        writer.commit()
    assert verify(store).orphans == ()


class FailingFiles(LocalFiles):
    """A folder whose disk fails once, before or after a file has got its name."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fails_at = "never"

    def _fail(self, step: str) -> None:
        if step == self.fails_at:
            self.fails_at = "never"
            raise OSError(errno.ENOSPC, "No space left on device")

    def _write(self, path: Path, content: bytes | Path) -> None:
        self._fail("part" if path.parent.name == "data" else "entry")
        super()._write(path, content)

    def _sync_folder(self, path: Path) -> None:
        self._fail(f"after {path.name}")
        super()._sync_folder(path)


@pytest.mark.parametrize("step", ["part", "entry", "after data", "after _log"])
def test_rows_survive_a_full_disk_and_are_committed_once(
    store: JobStore, source: PromptSource, step: str
) -> None:
    files = FailingFiles(Path(store.files.shown))
    writer = ResultWriter(JobStore(files, "demo"), progress(store))
    for row in unanswered(store, source, progress(store)):
        writer.append(answer(row))
    files.fails_at = step
    with pytest.raises(StoreError, match="No space left"):
        writer.commit()
    assert writer.pending == 6
    assert writer.commit() == 6
    assert (writer.committed, writer.dropped) == (6, 0)
    assert verify(store).complete


# Killed processes


def test_killed_at_any_step_of_a_commit_no_row_is_lost_or_repeated(
    tmp_path: Path, source: PromptSource
) -> None:
    template = tmp_path / "template"
    store = begun(str(template), source)
    writer, rows = started(store, source)
    for row in rows[:2]:
        writer.append(answer(row, run_id="before"))
    writer.commit()
    steps = 0
    while not (tmp_path / f"killed-{steps}" / "survived").exists():
        steps += 1
        folder = tmp_path / f"killed-{steps}"
        shutil.copytree(template, folder)
        process = PROCESSES.Process(target=doomed, args=(folder, source, steps))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        finishes_the_same(folder, source)
        assert steps < 100
    assert steps > 20  # the hook has seen the part, the entry, the merged part and its entry


def test_killed_while_it_begins_a_job_begins_again(tmp_path: Path, source: PromptSource) -> None:
    steps = 0
    while not (tmp_path / f"killed-{steps}" / "survived").exists():
        steps += 1
        folder = tmp_path / f"killed-{steps}"
        folder.mkdir()
        process = PROCESSES.Process(target=doomed_beginning, args=(folder, source, steps))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        store = begun(str(folder), source)
        assert progress(store).pending == 6
        assert store.snapshot().number == 1
        assert steps < 100
    assert steps > 15  # the hook has seen the job's file, the index and the first entry


def finishes_the_same(folder: Path, source: PromptSource) -> None:
    """Run again after the kill: all rows once, and what was acknowledged is not computed again."""
    store = JobStore.open(str(folder), "demo")
    before = progress(store)
    if (folder / "acknowledged").exists():
        assert before.pending == 0
    assert before.answered in (2, 6)
    again = run(store, source, run_id="again")
    assert again.committed == before.pending
    assert verify(store).complete
    rows = query(str(folder), "select custom_id, text, run_id from results order by row_id")
    assert rows.column("custom_id").to_pylist() == [f"row-{n}" for n in range(6)]
    assert rows.column("text").to_pylist() == ["A", "B", None, "D", "E", "F"]
    assert rows.column("run_id").to_pylist().count("before") == 2


def test_two_processes_on_one_job_commit_every_row_once(tmp_path: Path) -> None:
    source = prompts_at(tmp_path / "p.parquet", [f"text {n}" for n in range(120)])
    store = begun(str(tmp_path / "store"), source)
    start = PROCESSES.Barrier(2)
    racers = [
        PROCESSES.Process(target=race, args=(str(tmp_path / "store"), source, name, start))
        for name in ("left", "right")
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert [racer.exitcode for racer in racers] == [0, 0]
    report = verify(store)
    assert report.complete
    assert (report.ok, report.superseded_rows, report.orphans) == (120, 0, ())
