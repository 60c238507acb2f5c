"""A job file is right as a whole, or refused with the setting's name."""

from pathlib import Path

import pytest

from flows.errors import JobError
from flows.job import load_job

MINIMAL = """
name: complete
model: model
prompts: {uri: prompts.parquet, prompt_column: prompt}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_relative_paths_count_from_the_job_files_folder(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL + "results: out\n"))
    assert job.model == str(tmp_path / "model")
    assert job.prompts.uri == str(tmp_path / "prompts.parquet")
    assert job.results == str(tmp_path / "out")


def test_a_uri_stays_as_it_was_given(tmp_path: Path) -> None:
    text = MINIMAL.replace("prompts.parquet", "memory://bucket/prompts.parquet")
    assert load_job(write(tmp_path, text)).prompts.uri == "memory://bucket/prompts.parquet"


def test_json_is_a_job_file_too(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text('{"name": "a", "model": "m", "prompts": {"uri": "p.jsonl"}}')
    assert load_job(path).name == "a"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("name: complete", "name: complete\nmodle: x"), "modle"),
        (("name: complete", "name: Has Spaces"), "name"),
        (("name: complete", "name: ../up"), "name"),
        (("name: complete", "name: a\nname: b"), "given twice"),
        (("prompt_column: prompt", "prompt_column: a, messages_column: b"), "not both"),
        (("prompt_column: prompt", "sampling_columns: {max_tokens: n}"), "max_tokens"),
        (("name: complete", "name: a\nsampling: {temperature: .nan}"), "temperature"),
        (("name: complete", "name: a\nsampling: {temperature: -1}"), "temperature"),
        (("name: complete", "name: a\nsampling: {top_p: 0}"), "top_p"),
        (("name: complete", "name: a\nsampling: {max_new_tokens: -1}"), "max_new_tokens"),
        (("name: complete", "name: a\nsampling: {max_new_tokens: 1.5}"), "max_new_tokens"),
        (("name: complete", "name: a\nsampling: {stop: ['']}"), "stop"),
        (("name: complete", "name: a\nsampling: {seed: 9223372036854775808}"), "seed"),
        (("name: complete", "name: a\ndtype: int8"), "dtype"),
        (("name: complete", "name: a\nweights: int2"), "weights"),
        (("name: complete", "- a"), "YAML"),
        (("name: complete", "name: 2024-99-99"), "line 2, column 7.*2024-99-99"),
        (("name: complete", "name: 7"), "name: must be text"),
        (("name: complete", f"name: {'9' * 5000}"), "line 2"),
        (("name: complete", "name: !!float abc"), "no float"),
        (("name: complete", "name: !!timestamp abc"), "no timestamp"),
        (("name: complete", "name: a\nresults: *b"), "line 3.*alias 'b'"),
        (("name: complete", 'name: a\nresults: "a\\0b"'), "line 3.*NUL"),
        (("name: complete", 'name: a\nresults: "\\ud800"'), "line 3.*surrogate"),
        (("name: complete", "name: a\nsampling: {max_new_tokens: true}"), "max_new_tokens"),
        (("name: complete", "name: a\nsampling: {max_new_tokens: '7'}"), "must be a number"),
        (("name: complete", "name: a\nsampling: {temperature: true}"), "temperature"),
        (("name: complete", "name: a\nsampling: {stop: END}"), "a list of texts"),
        (("model: model", "model: hf://a/b"), "download it"),
        (("{uri: prompts.parquet, prompt_column: prompt}", "p"), "a mapping"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(
    tmp_path: Path, change: tuple[str, str], named: str
) -> None:
    path = write(tmp_path, MINIMAL.replace(*change))
    with pytest.raises(JobError, match=named) as refusal:
        load_job(path)
    assert str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_numbers_and_merges_are_read_as_yaml_means_them(tmp_path: Path) -> None:
    text = (
        "prompts: &from {uri: prompts.parquet, prompt_column: other}\n"
        "prompts: {<<: *from, prompt_column: prompt}\n"
    )
    with pytest.raises(JobError, match="'prompts' is given twice"):
        load_job(write(tmp_path, "name: a\nmodel: m\n" + text))
    text = "sampling: {<<: {temperature: 1e-1, top_p: 0.5}, top_p: 1, max_new_tokens: 8.0}\n"
    sampling = load_job(write(tmp_path, MINIMAL + text)).sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (0.1, 1.0, 8)


def test_a_home_folder_may_be_abbreviated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    text = MINIMAL.replace("prompts.parquet", "~/p.parquet").replace("model: m", "model: ~/m")
    job = load_job(write(tmp_path, text + "results: ~/out\n"))
    assert (job.model, job.prompts.uri, job.results) == (
        "/home/me/model", "/home/me/p.parquet", "/home/me/out"
    )  # fmt: skip


@pytest.mark.parametrize(
    "content", [b"[" * 3000, b"", b"- a\n- b\n", b"\xff\xfe\x00", b"{", b"just words"]
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(content)
    with pytest.raises(JobError, match=str(path)):
        load_job(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="nowhere"):
        load_job(tmp_path / "nowhere.yaml")


def test_a_job_as_json_is_without_passwords_and_signatures(tmp_path: Path) -> None:
    uris = ("ftp://me:hidden@host/p.jsonl", "https://host/out?signature=hidden")
    text = MINIMAL.replace("name: complete", f"name: a\nresults: {uris[1]}")
    job = load_job(write(tmp_path, text))
    job = job.model_copy(update={"prompts": job.prompts.model_copy(update={"uri": uris[0]})})
    assert (job.prompts.uri, job.results) == uris
    assert "hidden" not in job.model_dump_json()
    assert "ftp://host/p.jsonl" in job.model_dump_json()
