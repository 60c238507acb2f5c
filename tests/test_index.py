"""The index of an input: ids, hashes, versions."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.errors import InputError
from storage.index import SAMPLED_ROWS, built_index, content_sha, index_batches
from storage.prompts import PREFIX_CHARACTERS, PromptSource
from storage.schema import INDEX_SCHEMA
from tests.stored import prompts_at


def index_of(source: PromptSource) -> pa.Table:
    with built_index(source) as index:
        return pa.Table.from_batches(index_batches(index.path), INDEX_SCHEMA)


def sha_of(source: PromptSource) -> str:
    with built_index(source) as index:
        return index.sha


def csv_at(path: Path, prompts: list[str]) -> PromptSource:
    path.write_text("".join(f"{line}\n" for line in ["prompt", *prompts]))
    return PromptSource(str(path), prompt_column="prompt")


def test_the_index_has_one_line_for_each_row_in_order(tmp_path: Path) -> None:
    table = index_of(prompts_at(tmp_path / "p.parquet", ["A", "BB", ""]))
    assert table.column("row_id").to_pylist() == [0, 1, 2]
    assert table.column("custom_id").to_pylist() == ["row-0", "row-1", "row-2"]
    assert table.column("length").to_pylist() == [1, 2, 0]


def test_rows_with_the_same_beginning_have_the_same_prefix_hash(tmp_path: Path) -> None:
    shared = "x" * PREFIX_CHARACTERS
    texts = [f"{shared} one", f"{shared} two", f"y{shared}"]
    hashes = index_of(prompts_at(tmp_path / "p.parquet", texts)).column("prefix_hash").to_pylist()
    assert hashes[0] == hashes[1] != hashes[2]


def test_without_an_id_column_the_id_is_content_and_occurrence(tmp_path: Path) -> None:
    table = index_of(csv_at(tmp_path / "p.csv", ["A", "B", "A", "A"]))
    hashes = table.column("input_hash").to_pylist()
    assert table.column("custom_id").to_pylist() == [
        f"{hashes[0]}-0",
        f"{hashes[1]}-0",
        f"{hashes[0]}-1",
        f"{hashes[0]}-2",
    ]


def test_a_content_id_outlives_a_new_row_before_it(tmp_path: Path) -> None:
    before = index_of(csv_at(tmp_path / "p.csv", ["A", "B"])).column("custom_id").to_pylist()
    after = index_of(csv_at(tmp_path / "p.csv", ["new", "A", "B"])).column("custom_id").to_pylist()
    assert after[1:] == before


def test_equal_inputs_have_one_version_in_any_format(tmp_path: Path) -> None:
    source = prompts_at(tmp_path / "p.parquet", ["A", "B"])
    (tmp_path / "p.csv").write_text("id,prompt\nrow-0,A\nrow-1,B\n")
    same = PromptSource(str(tmp_path / "p.csv"), id_column="id", prompt_column="prompt")
    assert sha_of(source) == sha_of(same)


@pytest.mark.parametrize("texts", [["A"], ["A", "C"], ["B", "A"], ["A", "B", "C"]])
def test_another_input_is_another_version(tmp_path: Path, texts: list[str]) -> None:
    first = sha_of(prompts_at(tmp_path / "p.parquet", ["A", "B"]))
    assert sha_of(prompts_at(tmp_path / "p.parquet", texts)) != first


def test_the_version_does_not_depend_on_batches(tmp_path: Path) -> None:
    with built_index(prompts_at(tmp_path / "p.parquet", ["A"] * 100)) as index:
        assert content_sha(index_batches(index.path, 7)) == index.sha


def test_a_duplicate_id_is_named_with_the_row_that_had_it_first(tmp_path: Path) -> None:
    ids = [f"id-{n}" for n in range(100_000)]
    ids[90_000] = ids[30_000]
    pq.write_table(pa.table({"id": ids, "prompt": ids}), tmp_path / "p.parquet")
    source = PromptSource(str(tmp_path / "p.parquet"), id_column="id", prompt_column="prompt")
    with pytest.raises(InputError, match="'id-30000' is there twice; row 30000") as raised:
        index_of(source)
    assert (raised.value.row, raised.value.column) == (90_000, "id")


def test_a_duplicate_id_in_an_openai_file_is_found(tmp_path: Path) -> None:
    line = '{"custom_id": "a", "body": {"prompt": "x"}}\n'
    (tmp_path / "p.jsonl").write_text(line * 2)
    with pytest.raises(InputError) as raised:
        index_of(PromptSource(str(tmp_path / "p.jsonl")))
    assert (raised.value.row, raised.value.column) == (1, "custom_id")


def test_a_sample_is_of_all_rows_and_the_same_every_time(tmp_path: Path) -> None:
    lengths = [1] * 2000 + [3] * 2000  # sorted, as a file may be
    source = prompts_at(tmp_path / "p.parquet", ["A" * length for length in lengths])
    with built_index(source) as index, built_index(source) as again:
        long = sum(row.length == 3 for row in index.sample)
        assert len({row.row_id for row in index.sample}) == SAMPLED_ROWS
        assert index.sample == again.sample
    assert 0.35 * SAMPLED_ROWS < long < 0.65 * SAMPLED_ROWS  # five standard deviations


def test_a_small_input_is_its_own_sample(tmp_path: Path) -> None:
    with built_index(prompts_at(tmp_path / "p.parquet", ["A", "B", "C"])) as index:
        assert sorted(row.row_id for row in index.sample) == [0, 1, 2]


def test_a_bad_input_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = prompts_at(tmp_path / "p.parquet", ["A", "B"])
    bad = PromptSource(source.uri, id_column="id", prompt_column="nope")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    with pytest.raises(InputError):
        index_of(bad)
    index_of(source)
    assert not list((tmp_path / "scratch").iterdir())
