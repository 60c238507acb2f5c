"""What a run still has to do, whatever happened to the job or to its input before."""

from pathlib import Path
from uuid import uuid4

import pytest

from storage.errors import InputError, StoreError
from storage.progress import progress, unanswered
from storage.prompts import PromptSource
from storage.store import JobStore
from tests.stored import FINGERPRINT, begun, prompts_at, run


def left(store: JobStore, source: PromptSource) -> list[str]:
    return [row.custom_id for row in unanswered(store, source, progress(store))]


def test_a_new_job_has_every_row_to_do(tmp_path: Path) -> None:
    source = prompts_at(tmp_path / "p.parquet", ["a", "b"])
    store = begun(str(tmp_path / "store"), source)
    done = progress(store)
    assert (done.rows, done.answered, done.failed, done.pending) == (2, 0, 0, 2)
    [first, second] = unanswered(store, source, done)
    assert (first.prompt, first.custom_id, second.prompt) == ("a", "row-0", "b")


def test_answers_and_errors_are_not_done_again(tmp_path: Path) -> None:
    source = prompts_at(tmp_path / "p.parquet", ["a", "", "c"])
    store = begun(str(tmp_path / "store"), source)
    run(store, source, commit_rows=1)
    done = progress(store)
    assert (done.answered, done.failed, done.pending) == (3, 1, 0)
    assert left(store, source) == []


def test_a_grown_input_computes_only_what_is_new_or_changed(tmp_path: Path) -> None:
    root, path = str(tmp_path / "store"), tmp_path / "p.parquet"
    source = prompts_at(path, ["a", "b", "c"])
    store = begun(root, source)
    run(store, source)
    source = prompts_at(path, ["a", "B!", "c", "d"])
    begun(root, source)
    assert left(store, source) == ["row-1", "row-3"]
    assert progress(store).answered == 2


def test_an_input_that_returns_to_what_it_was_needs_nothing(tmp_path: Path) -> None:
    root, path = str(tmp_path / "store"), tmp_path / "p.parquet"
    store = begun(root, prompts_at(path, ["a", "b"]))
    run(store, prompts_at(path, ["a", "b"]))
    begun(root, prompts_at(path, ["x"]))
    source = prompts_at(path, ["a", "b"])
    begun(root, source)
    assert left(store, source) == []


def test_reordered_rows_keep_their_answers(tmp_path: Path) -> None:
    root, path = str(tmp_path / "store"), tmp_path / "p.csv"
    source = PromptSource(str(path), id_column="id", prompt_column="prompt")
    path.write_text("id,prompt\nx,a\ny,b\n")
    store = begun(root, source)
    run(store, source)
    path.write_text("id,prompt\ny,b\nz,c\nx,a\n")
    begun(root, source)
    assert left(store, source) == ["z"]


def test_rows_without_ids_are_told_apart_by_occurrence(tmp_path: Path) -> None:
    root, path = f"memory://store-{uuid4().hex}", tmp_path / "p.csv"
    source = PromptSource(str(path), prompt_column="prompt")
    path.write_text("prompt\nsame\nsame\n")
    store = begun(root, source)
    assert run(store, source).committed == 2
    path.write_text("prompt\nsame\nsame\nsame\n")
    begun(root, source)
    assert [custom_id[-2:] for custom_id in left(store, source)] == ["-2"]


@pytest.mark.parametrize("texts", [["a", "B"], ["a"], ["a", "b", "c"]])
def test_an_input_that_changes_under_a_run_stops_it(tmp_path: Path, texts: list[str]) -> None:
    source = prompts_at(tmp_path / "p.parquet", ["a", "b"])
    store = begun(str(tmp_path / "store"), source)
    prompts_at(tmp_path / "p.parquet", texts)
    with pytest.raises(InputError, match="has changed"):
        left(store, source)


def test_a_job_without_input_has_no_progress(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no input yet"):
        progress(JobStore.create(str(tmp_path), "demo", FINGERPRINT, {}))
