"""The finished table, written as one file."""

from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from storage.errors import StoreError
from storage.export import export, require_own, require_target
from storage.prompts import PromptSource
from storage.schema import RESULT_SCHEMA
from storage.store import JobStore
from tests.stored import begun, prompts_at, run


@pytest.fixture
def source(tmp_path: Path) -> PromptSource:
    return prompts_at(tmp_path / "p.parquet", ["a", "b", "", "d"])


@pytest.fixture
def store(tmp_path: Path, source: PromptSource) -> JobStore:
    store = begun(str(tmp_path / "a store's root"), source)
    run(store, source, commit_rows=1)
    return store


def test_a_folder_gets_the_finished_table_in_input_order(store: JobStore, tmp_path: Path) -> None:
    assert export(store, str(tmp_path / "out put")) == 4
    table = pq.read_table(tmp_path / "out put" / "results.parquet")
    assert table.schema.names == RESULT_SCHEMA.names
    assert table.schema.types == RESULT_SCHEMA.types
    assert table.column("row_id").to_pylist() == [0, 1, 2, 3]
    assert table.column("text").to_pylist() == ["A", "B", None, "D"]


def test_a_file_name_is_taken_as_it_is_and_replaced(store: JobStore, tmp_path: Path) -> None:
    (tmp_path / "mine.parquet").write_bytes(b"old")
    export(store, str(tmp_path / "mine.parquet"))
    assert pq.read_metadata(tmp_path / "mine.parquet").num_rows == 4
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".writing")]


def test_any_filesystem_is_a_target(store: JobStore) -> None:
    export(store, "memory://exported/results.parquet")
    with fsspec.open("memory://exported/results.parquet") as file:
        assert pq.read_table(file).num_rows == 4


def test_only_rows_of_the_newest_input_are_exported(store: JobStore, tmp_path: Path) -> None:
    begun(str(tmp_path / "a store's root"), prompts_at(tmp_path / "p.parquet", ["a", "x"]))
    assert export(store, str(tmp_path / "out")) == 1


def test_a_store_with_a_missing_part_is_not_exported(store: JobStore, tmp_path: Path) -> None:
    store.files.remove(f"data/{next(iter(store.snapshot().parts))}")
    with pytest.raises(StoreError, match="verify"):
        export(store, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_target_is_tried_and_nothing_of_the_trial_is_left(tmp_path: Path) -> None:
    for target in (tmp_path / "new" / "folder", tmp_path / "mine.parquet"):
        require_target(str(target))
    require_target("memory://anywhere")
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []


def test_a_table_takes_the_place_of_an_earlier_one_of_its_job_and_of_nothing_else(
    store: JobStore, tmp_path: Path
) -> None:
    for target in (str(tmp_path / "out"), "memory://owned/out.parquet"):
        require_own(target, "demo")
        export(store, target)
        require_own(target, "demo")
        with pytest.raises(StoreError, match="holds results of job demo"):
            require_own(target, "other")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for name in ("p.parquet", "torn.parquet"):
        with pytest.raises(StoreError, match=f"{name}: is no table of results"):
            require_own(str(tmp_path / name), "demo")


@pytest.mark.parametrize("target", ["taken", "taken/below", "folder.parquet"])
def test_a_target_that_cannot_be_written_is_refused_by_name(tmp_path: Path, target: str) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(StoreError, match=target):
        require_target(str(tmp_path / target))
