"""The command as its users have it: what they type, what they read, what a script reads."""

import csv
import io
import json
import os
import pty
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.cli import exit_status
from flows.embedded import control_plane
from flows.errors import ServerError
from tests.finished import FinishedJob
from tests.jobs import WAGONWAY, environment, results, write_job

Run = Callable[..., tuple[int, bytes, str]]
"""Arguments to (exit status, standard output, standard error)."""


@pytest.fixture
def run(capfdbinary: pytest.CaptureFixture[bytes]) -> Run:
    """The command, called in this process."""

    def run(*arguments: object) -> tuple[int, bytes, str]:
        status = exit_status([str(argument) for argument in arguments])
        out, err = capfdbinary.readouterr()
        return status, out, err.decode()

    return run


@pytest.mark.parametrize("command", ["run", "plan", "status", "query", "verify", "doctor"])
def test_every_command_explains_itself(command: str, run: Run) -> None:
    status, out, _ = run(command, "--help")
    assert status == 0
    assert b"Usage" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("run",),
        ("run", "nowhere.yaml"),
        ("run", "nowhere.yaml", "--stages", "0"),
        ("run", "nowhere.yaml", "--stages", "two"),
        ("run", "nowhere.yaml", "--fast"),
        ("run", "nowhere.yaml", "--pipelines", "2", "--processes", "3"),
        ("run", "nowhere.yaml", "--stages", "9", "--pipelines", "9"),
        ("query",),
        ("query", "select 1", "--format", "xml"),
        ("verify",),
        ("verify", "a/b"),
        ("verify", "okk.json"),
        ("verify", "x" * 300),
        ("status", "x" * 300),
        ("status", "--store", ""),
        ("query", "select 1", "--job", "a/b"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_a_reason(arguments: tuple[str, ...], run: Run) -> None:
    status, out, err = run(*arguments)
    assert status == 2
    assert err
    assert not out


@pytest.mark.parametrize(
    "arguments", [("status",), ("query", "select 1"), ("verify", "demo"), ("status", "demo")]
)
def test_a_store_without_the_job_is_named(
    arguments: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    status, _, err = run(*arguments, "--store", tmp_path)
    assert status == 2
    assert str(tmp_path) in err


QUERY = "select custom_id, output_tokens from results where status = 'ok' order by row_id limit 2"


def test_a_query_prints_a_table_json_csv_or_parquet(finished_job: FinishedJob, run: Run) -> None:
    def ask(form: str) -> bytes:
        status, out, _ = run("query", QUERY, "--store", finished_job.store, "--format", form)
        assert status == 0
        return out

    rows = json.loads(ask("json"))
    assert [row["custom_id"] for row in rows] == ["ordinary-0-0", "ordinary-0-1"]
    table = csv.DictReader(io.StringIO(ask("csv").decode()))
    assert [{**row, "output_tokens": int(row["output_tokens"])} for row in table] == rows
    assert pq.read_table(pa.BufferReader(ask("parquet"))).to_pylist() == rows
    assert b"ordinary-0-0" in ask("table")


def test_json_has_null_for_what_it_cannot_say(finished_job: FinishedJob, run: Run) -> None:
    sql = "select 'nan'::double as a, [1, 'inf'::double] as b"
    _, out, _ = run("query", sql, "--store", finished_job.store, "--format", "json")
    assert json.loads(out, parse_constant=pytest.fail) == [{"a": None, "b": [1.0, None]}]


@pytest.mark.parametrize(
    "sql",
    [
        "copy results to 'out.csv'",
        "attach 'other.db'",
        "select 1; select 2",
        "insert into results select * from results",
        "select * from read_csv('/etc/passwd')",
        "select * from '/etc/passwd'",
        "set enable_external_access = true",
        "create table t as select 1",
        "selec 1",
        "select nothing from results",
        "",
    ],
)
def test_a_query_that_would_do_more_than_read_is_refused(
    sql: str, finished_job: FinishedJob, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("query", sql, "--store", finished_job.store)
    assert (status, out) == (2, b"")
    assert err.startswith("wagonway: ")
    assert not list(tmp_path.iterdir())


def test_every_view_answers(finished_job: FinishedJob, run: Run) -> None:
    views = ("prompts", "results", "errors", "pending", "jobs", "runs", "stages", "links", "nodes")
    for view in views:
        sql = f"select count(*) as n from {view}"
        status, out, _ = run("query", sql, "--store", finished_job.store, "--format", "json")
        assert status == 0
        assert (json.loads(out)[0]["n"] == 0) == (view == "pending")


def test_status_and_verify_speak_json_and_know_a_job_by_file_or_name(
    finished_job: FinishedJob, run: Run
) -> None:
    for job in (finished_job.job_file, "demo"):
        status, out, _ = run("status", job, "--store", finished_job.store, "--json")
        [known] = json.loads(out)
        assert (status, known["job"], known["rows_pending"]) == (0, "demo", 0)
        status, out, _ = run("verify", job, "--store", finished_job.store, "--json")
        assert (status, json.loads(out)["complete"]) == (0, True)


def test_a_damaged_part_fails_verification(
    finished_job: FinishedJob, run: Run, tmp_path: Path
) -> None:
    subprocess.run(["cp", "-r", finished_job.store, tmp_path / "store"], check=True)
    part = next((tmp_path / "store" / "demo" / "data").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    status, out, _ = run("verify", "demo", "--store", tmp_path / "store")
    assert status == 1
    assert part.name in out.decode()


def test_a_plan_is_told_in_words_or_json_and_starts_nothing(
    finished_job: FinishedJob, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("plan", finished_job.job_file, "--stages", 2, "--json")
    assert status == 0, err
    planned = json.loads(out)
    [pipeline] = planned["pipelines"]
    assert [stage["node"] for stage in pipeline["stages"]] == ["local-0", "local-1"]
    assert 0 < planned["tokens_per_s"] <= planned["bound_tokens_per_s"]
    assert planned["finish_s"] > 0
    assert not list(tmp_path.iterdir())


def test_of_no_rows_the_plan_is_that_there_is_nothing_to_do(
    tiny_model: Path, run: Run, tmp_path: Path
) -> None:
    job_file = write_job(tmp_path, tiny_model, [], "p.jsonl", prompts={"prompt_column": "prompt"})
    status, out, err = run("plan", job_file)
    assert (status, err) == (0, "")
    assert b"Nothing to do" in out
    status, out, _ = run("plan", job_file, "--json")
    assert (status, json.loads(out)["pipelines"]) == (0, [])


def test_a_server_that_is_not_there_is_named_with_the_way_out() -> None:
    url = "http://127.0.0.1:9/api"
    with (
        pytest.raises(ServerError, match=f"{url} does not answer.*unset PREFECT_API_URL"),
        temporary_settings({PREFECT_API_URL: url}),
        control_plane(),
    ):
        httpx.get(url)


def test_a_home_that_cannot_be_written_is_no_matter(tmp_path: Path) -> None:
    environs = {**environment(""), "HOME": "/proc/nobody"}
    environs.pop("PREFECT_HOME", None)
    command = (*WAGONWAY, "verify", "demo", "--store", str(tmp_path))
    done = subprocess.run(command, env=environs, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("wagonway: ")
    assert done.stderr.count("\n") == 1


def test_a_terminal_sees_a_bar_and_a_folder_may_have_a_space_in_its_name(
    tiny_model: Path, prefect_api: str, tmp_path: Path
) -> None:
    rows = [{"id": "r", "prompt": "prompt"}]
    folder = tmp_path / "my jobs"
    write_job(folder, tiny_model, rows, "p.jsonl", prompts={"prompt_column": "prompt"})
    command = (*WAGONWAY, "run", "my jobs/job.yaml", "--store", "my store", "--stages", "2")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs,
        env={**environment(prefect_api), "TERM": "xterm", "COLUMNS": "120"},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = _all_of(ours)
    assert process.returncode == 0, shown
    assert "━" in shown
    assert "1 of 1 rows" in shown
    assert "Traceback" not in shown
    assert len(results(tmp_path / "my store")) == 1


def _all_of(terminal: int) -> str:
    """What is written to a terminal until nobody holds its other end."""
    pieces = []
    try:
        while piece := os.read(terminal, 4096):
            pieces.append(piece)
    except OSError:  # Linux's way to say so
        pass
    os.close(terminal)
    return b"".join(pieces).decode()
