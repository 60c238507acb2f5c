"""Bad input ends a run before anything starts: it says where the fault is and leaves no store."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from flows.cli import exit_status
from tests.jobs import Row, write_job
from tests.models import SMALL

GOOD: list[Row] = [{"id": f"r{n}", "prompt": f"prompt {n}", "quota": n + 1.5} for n in range(4)]


def refused(job_file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says to a bad job; nothing new may be left behind."""
    store, before = job_file.parent / "store", set(job_file.parent.iterdir())
    assert exit_status(["run", str(job_file), "--store", str(store)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("wagonway: ")
    assert "\n" not in said
    assert set(job_file.parent.iterdir()) == before
    return said


@pytest.fixture
def no_server() -> Iterator[None]:
    """The Prefect server that is configured does not answer: who needs it fails otherwise."""
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        yield


def changed(row: int, **values: object) -> list[Row]:
    """Good rows but for one; a value of None leaves the key out."""
    rows = [dict(each) for each in GOOD]
    rows[row] = {k: v for k, v in {**rows[row], **values}.items() if v is not None}
    return rows


def parquet(path: Path, **columns: object) -> None:
    pq.write_table(pa.table({"id": ["a", "b"], "prompt": ["one", "two"], **columns}), path)


def lines(path: Path, *content: bytes) -> None:
    path.write_bytes(b"".join(line + b"\n" for line in content))


BAD_PARQUET: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no bytes": (lambda path: path.write_bytes(b""), ("empty (0 bytes)",)),
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-20]), ("torn",)),
    "text": (lambda path: path.write_text("id,prompt\na,b\n"), ("no Parquet file",)),
    "missing": (lambda path: path.unlink(), ()),
    "no id": (lambda path: parquet(path, id=["a", None]), ("row 1", "'id'")),
    "twice": (lambda path: parquet(path, id=["a", "a"]), ("'a'", "'id'")),
    "numbers": (lambda path: parquet(path, prompt=[1, 2]), ("row 0", "'prompt'", "a number")),
    "null": (lambda path: parquet(path, prompt=["one", None]), ("row 1", "'prompt'", "null")),
    "column": (lambda path: parquet(path, quota=[1, 2]), ("'warmth'", "no such column")),
    "NaN": (lambda path: parquet(path, warmth=[1.0, float("nan")]), ("row 1", "'warmth'", "nan")),
    "words": (lambda path: parquet(path, warmth=["hot", "cold"]), ("row 0", "'warmth'", "text")),
}  # fmt: skip


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("fault", BAD_PARQUET)
def test_a_bad_parquet_file_is_refused_with_its_row_and_column(
    fault: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, named = BAD_PARQUET[fault]
    columns: dict[str, Any] = {"prompt_column": "prompt"}
    if fault in ("column", "NaN", "words"):
        columns["sampling_columns"] = {"temperature": "warmth"}
    job_file = write_job(tmp_path, tiny_model, GOOD, "prompts.parquet", prompts=columns)
    spoil(tmp_path / "prompts.parquet")
    said = refused(job_file, capsys)
    for part in (str(tmp_path / "prompts.parquet"), *named):
        assert part in said


BAD_LINES = {
    "no id": ((b'{"id": "a", "prompt": "x"}', b'{"prompt": "y"}'), ("row 1", "line 2", "'id'")),
    "no UTF-8": ((b'{"id": "a", "prompt": "\xff"}',), ("row 0", "line 1", "UTF-8")),
    "no JSON": ((b'{"id": "a", "prompt": "x"}', b"", b"{"), ("row 1", "line 3", "JSON")),
    "no object": ((b"[1]",), ("line 1", "object")),
    "a list": ((b'{"id": "a", "prompt": ["x"]}',), ("row 0", "'prompt'", "a list")),
    "key twice": ((b'{"id": "a", "id": "b", "prompt": "x"}',), ("line 1", "twice")),
    "id twice": (
        (b'{"id": "a", "prompt": "x"}', b"", b'{"id": "a", "prompt": "y"}'),
        ("'a'", "'id'", "row 1", "line 3", "row 0, line 1,"),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("fault", BAD_LINES)
def test_a_bad_line_is_refused_with_its_number(
    fault: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, named = BAD_LINES[fault]
    job_file = write_job(
        tmp_path, tiny_model, GOOD, "p.jsonl", prompts={"prompt_column": "prompt"}, results="out/in"
    )
    lines(tmp_path / "p.jsonl", *content)
    said = refused(job_file, capsys)
    for part in (str(tmp_path / "p.jsonl"), *named):
        assert part in said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"modle": "x"}, "modle"),
        ({"sampling": {"temperature": float("nan")}}, "sampling.temperature"),
        ({"sampling": {"max_tokens": 3}}, "sampling.max_tokens"),
        ({"name": "../up"}, "name"),
        ({"name": 7}, "name"),
        ({"prompts": ["p.jsonl"]}, "prompts"),
        ({"dtype": "int8"}, "dtype"),
        ({"results": "a\0b"}, "NUL"),
    ],
)
def test_an_unknown_or_senseless_setting_is_refused_by_name(
    change: Row, named: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_file = write_job(tmp_path, tiny_model, GOOD, "p.jsonl")
    job = yaml.safe_load(job_file.read_text(encoding="utf-8"))
    job_file.write_text(yaml.safe_dump(job | change), encoding="utf-8")
    said = refused(job_file, capsys)
    assert str(job_file) in said
    assert named in said


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path) -> None:
    """Name a second file of weights, which is not there."""
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def lacking_a_layer(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.3.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


BAD_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("no such model folder",)),
    "pickle": (pickled, ("safetensors", "pytorch_model.bin", "pickle")),
    "no weights": (lambda model: (model / "model.safetensors").unlink(), ("safetensors",)),
    "torn": (lambda model: cut(model / "model.safetensors"), ("model.safetensors", "header")),
    "no header": (lambda model: (model / "model.safetensors").write_bytes(b"123"), ("safetensors",)),
    "a shard": (sharded, ("model-2.safetensors", "missing")),
    "a layer": (lacking_a_layer, ("missing", "model.layers.3.mlp.up_proj.weight")),
    "tokenizer": (lambda model: (model / "tokenizer.json").unlink(), ("tokenizer.json",)),
    "broken tokenizer": (lambda model: (model / "tokenizer.json").write_text("{"), ("tokenizer",)),
    "no config": (lambda model: (model / "config.json").unlink(), ("config.json",)),
    "broken config": (lambda model: (model / "config.json").write_text("{"), ("config.json",)),
    "empty config": (lambda model: (model / "config.json").write_text("{}"), ("config.json",)),
}  # fmt: skip


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize("fault", BAD_MODELS)
def test_a_model_that_cannot_be_used_is_refused(
    fault: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, named = BAD_MODELS[fault]
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    spoil(model)
    job_file = write_job(tmp_path, model, GOOD, "p.jsonl", prompts={"prompt_column": "prompt"})
    said = refused(job_file, capsys)
    for part in (str(model), *named):
        assert part in said


@pytest.mark.usefixtures("prefect_api")
def test_messages_need_a_chat_template(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    rows = [{"id": "a", "messages": [{"role": "user", "content": "Hello"}]}]
    job_file = write_job(tmp_path, model, rows, "p.jsonl", prompts={"messages_column": "messages"})
    said = refused(job_file, capsys)
    assert str(model) in said
    assert "chat template" in said


@pytest.mark.usefixtures("prefect_api")
@pytest.mark.parametrize(
    ("family", "own", "named"),
    [
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"] * 2}, "linear"),
        ("mamba", {"state_size": 4}, "mamba"),
    ],
)
def test_layers_that_are_not_attention_are_refused_by_name(
    family: str, own: Row, named: str, tiny_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    AutoConfig.for_model(family, **{**SMALL, **own}).save_pretrained(model)
    job_file = write_job(tmp_path, model, GOOD, "p.jsonl", prompts={"prompt_column": "prompt"})
    assert named in refused(job_file, capsys)


AT_ONCE: dict[str, tuple[Row, tuple[str, ...]]] = {
    "model": ({"model": "/no/model"}, ("/no/model: there is no such model folder",)),
    "prompts": ({"prompts": {"uri": "/no.csv", "prompt_column": "p"}}, ("/no.csv", "no such file")),
    "column": ({"prompts": {"uri": "p.jsonl", "prompt_column": "ask"}}, ("p.jsonl", "'ask'")),
    "results": ({"results": "/proc/out"}, ("results: /proc/out", "cannot be written")),
    "unreachable": ({"results": "ftp://127.0.0.1:9/out"}, ("results: ftp://127.0.0.1:9/out",)),
}


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("fault", AT_ONCE)
def test_what_is_seen_at_once_is_said_before_any_server_is_asked(
    fault: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, named = AT_ONCE[fault]
    job_file = write_job(tmp_path, tiny_model, GOOD, "p.jsonl", prompts={"prompt_column": "prompt"})
    job = yaml.safe_load(job_file.read_text(encoding="utf-8"))
    job_file.write_text(yaml.safe_dump(job | change), encoding="utf-8")
    said = refused(job_file, capsys)
    for part in named:
        assert part in said


@pytest.mark.usefixtures("prefect_api")
def test_a_plan_that_cannot_be_is_refused_and_leaves_no_store(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_file = write_job(tmp_path, tiny_model, GOOD, "p.jsonl", prompts={"prompt_column": "prompt"})
    store = tmp_path / "store"
    assert exit_status(["run", str(job_file), "--store", str(store), "--stages", "5"]) == 2
    assert "no plan fits" in capsys.readouterr().err
    assert not store.exists()


@pytest.mark.usefixtures("prefect_api")
def test_results_that_could_not_be_written_are_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("a file")
    job_file = write_job(
        tmp_path, tiny_model, GOOD, "p.jsonl", prompts={"prompt_column": "prompt"}, results="taken"
    )
    assert f"results: {tmp_path / 'taken'}" in refused(job_file, capsys)


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(
    "store", ["memory://store", "nowhere://store", "/proc/store", "dangling", "taken", ""]
)
def test_a_store_that_cannot_be_is_refused(
    store: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "taken").write_text("a file")
    job_file = write_job(tmp_path, tiny_model, GOOD, "p.jsonl", prompts={"prompt_column": "prompt"})
    assert exit_status(["run", str(job_file), "--store", store]) == 2
    said = capsys.readouterr().err
    assert store in said
    assert said.count("\n") == 1
    assert not Path("/demo").exists()
