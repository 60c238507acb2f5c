"""The whole path: rows in, stages as processes, rows out; what comes out is right and accounted for."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from flows.batch import run_batch
from flows.cli import exit_status
from flows.job import load_job
from flows.layout import Layout
from flows.model import open_model
from storage.catalog import query
from storage.results import ResultRow
from storage.store import JobStore
from storage.verify import verify
from tests.conftest import TINY_CONTEXT
from tests.finished import NEW_TOKENS, FinishedJob, ordinary_rows
from tests.jobs import Row, greedy_ids, log_names, results, write_job, write_prompts

FAULTY = {
    "empty": "empty_prompt",
    "one-too-long": "prompt_too_long",
    "too-cold": "invalid_sampling",
}


def copied_store(job: FinishedJob, folder: Path) -> Path:
    return Path(shutil.copytree(job.store, folder / "store"))


def test_every_answer_is_what_transformers_says(finished_job: FinishedJob) -> None:
    job, answers = finished_job, results(finished_job.store)
    assert answers.keys() == job.rows.keys()
    for name in job.rows.keys() - FAULTY.keys() - {"stopped"}:
        answer, ids = answers[name], job.greedy(job.rows[name])
        ended = bool(ids) and ids[-1] in job.encoder.end_ids
        expected = ("ok", job.encoder.decode(ids), len(ids), "stop" if ended else "length")
        got = (answer["status"], answer["text"], answer["output_tokens"], answer["finish_reason"])
        assert got == expected, name


def test_a_stop_string_of_several_tokens_ends_the_answer_before_it(
    finished_job: FinishedJob,
) -> None:
    row, answer = finished_job.rows["stopped"], results(finished_job.store)["stopped"]
    decode, ids = finished_job.encoder.decode, finished_job.greedy(row)
    needed = next(n for n in range(len(ids)) if row["until"] in decode(ids[:n]))
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == decode(ids[:needed]).partition(row["until"])[0]
    assert answer["output_tokens"] == needed


@pytest.mark.parametrize(("name", "error_type"), FAULTY.items())
def test_a_row_at_fault_fails_alone(finished_job: FinishedJob, name: str, error_type: str) -> None:
    row = results(finished_job.store)[name]
    assert (row["status"], row["finish_reason"], row["text"]) == ("error", "error", None)
    assert row["error_type"] == error_type
    assert row["error_message"]


@pytest.mark.parametrize(
    ("name", "output_tokens", "truncated"),
    [("no-room", 0, True), ("little-room", NEW_TOKENS - 3, True), ("just-fits", NEW_TOKENS, False),
     ("nothing-wanted", 0, False), ("two-wanted", 2, False)],
)  # fmt: skip
def test_an_answer_ends_with_its_quota_or_the_context(
    finished_job: FinishedJob, name: str, output_tokens: int, truncated: bool
) -> None:
    row = results(finished_job.store)[name]
    assert (row["output_tokens"], row["truncated"]) == (output_tokens, truncated)
    assert row["finish_reason"] == "length"


def test_equal_prompts_under_two_ids_are_computed_once(finished_job: FinishedJob) -> None:
    answers = results(finished_job.store)
    first, second = (
        {
            k: answers[name][k]
            for k in ("text", "output_tokens", "queued_s", "prefill_s", "decode_s")
        }
        for name in ("twin-a", "twin-b")
    )
    assert first == second, "one was computed, and both say when"


def test_a_result_row_says_where_it_comes_from(finished_job: FinishedJob) -> None:
    job = load_job(finished_job.job_file)
    answers = results(finished_job.store)
    [plan] = query(str(finished_job.store), "select plan_id from runs", "demo").to_pylist()
    for row in answers.values():
        assert (row["job"], row["model"]) == ("demo", "model")
        assert row["model_revision"] == open_model(job).digest
        assert (row["run_id"], row["plan"]) == (finished_job.summary.run_id, plan["plan_id"])
        nowhere = row["status"] == "error" or row["output_tokens"] == 0
        assert (row["epoch"], row["pipeline"], row["seed"]) == (1, None if nowhere else 0, 7)
    computed = answers["ordinary-0-0"]
    assert computed["prompt_tokens"] == len(finished_job.rows["ordinary-0-0"]["prompt"])
    assert all(computed[part] >= 0 for part in ("queued_s", "prefill_s", "decode_s"))
    until = finished_job.rows["stopped"]["until"]
    in_force = {**job.sampling.model_dump(), "max_new_tokens": 24, "stop": [until]}
    assert json.loads(answers["stopped"]["sampling"]) == in_force


def test_the_finished_table_is_exported_in_the_inputs_order(finished_job: FinishedJob) -> None:
    table = pq.read_table(finished_job.job_file.parent / "out" / "results.parquet")
    assert table.column("custom_id").to_pylist() == list(finished_job.rows)
    assert set(table.column_names) == {field.name for field in fields(ResultRow)}
    answers = results(finished_job.store)
    assert {row["custom_id"]: row for row in table.to_pylist()} == answers


def test_summary_verification_and_sql_agree(finished_job: FinishedJob) -> None:
    summary, store = finished_job.summary, str(finished_job.store)
    found = verify(JobStore.open(store, "demo"))
    [job] = query(store, "select rows, rows_ok, rows_failed, verified from jobs").to_pylist()
    [run] = query(store, "select * from runs").to_pylist()
    counts = (len(finished_job.rows), len(finished_job.rows) - len(FAULTY), len(FAULTY))
    assert (summary.rows, summary.rows_ok, summary.rows_failed) == counts
    assert (found.rows, found.ok, found.failed) == counts
    assert tuple(job.values()) == (*counts, True)
    assert (run["rows"], run["rows_ok"], run["rows_failed"]) == counts
    assert (run["status"], run["output_tokens"]) == ("completed", summary.output_tokens)
    answered = results(finished_job.store).values()
    assert summary.output_tokens == sum(row["output_tokens"] for row in answered)
    assert (finished_job.store / "demo" / "_SUCCESS").is_file()


def test_both_stages_worked_and_activations_crossed_the_link_once(
    finished_job: FinishedJob,
) -> None:
    store = str(finished_job.store)
    stages = query(store, "select * from stages order by stage").to_pylist()
    assert [(s["first_layer"], s["end_layer"]) for s in stages] == [(0, 2), (2, 4)]
    assert stages[0]["tokens"] == stages[1]["tokens"] > 0
    assert all(stage["busy_s"] > 0 for stage in stages)
    links = query(store, "select source, target, payload_bytes, tokens from links").to_pylist()
    forward = next(x for x in links if (x["source"], x["target"]) == ("local-0", "local-1"))
    hidden_bytes = 64 * 4
    assert forward["payload_bytes"] < 1.5 * hidden_bytes * forward["tokens"]


def asked_of_prefect(api: str, what: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    answer = httpx.post(f"{api}/{what}/filter", json=wanted)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()
    return found


def flow_run_of(job: FinishedJob, api: str) -> dict[str, Any]:
    """The job's own: the last of its name that had started when its run began."""
    wanted = {"name": {"any_": ["demo"]}, "start_time": {"before_": job.summary.started_at}}
    newest = {"flow_runs": wanted, "sort": "START_TIME_DESC", "limit": 1}
    [found] = asked_of_prefect(api, "flow_runs", newest)
    return found


def test_prefect_shows_the_job_its_coarse_tasks_and_a_flow_for_each_stage(
    finished_job: FinishedJob, prefect_api: str
) -> None:
    job_run = flow_run_of(finished_job, prefect_api)
    of_the_job = {"flow_runs": {"id": {"any_": [job_run["id"]]}}}
    tasks = asked_of_prefect(prefect_api, "task_runs", of_the_job)
    names = sorted(run["name"].split("-")[0] for run in tasks if run["state_name"] == "Completed")
    assert names == [
        "measure", "plan", "process", "stage", "stage", "start_stages", "validate", "verify"
    ]  # fmt: skip
    begun, ended = job_run["start_time"], job_run["end_time"]
    stage_runs = asked_of_prefect(prefect_api, "flow_runs", {
        "flow_runs": {"start_time": {"after_": begun, "before_": ended}},
        "flows": {"name": {"any_": ["stage"]}},
    })  # fmt: skip
    stages = {run["name"]: run["state_name"] for run in stage_runs}
    assert stages == {"stage local-0": "Completed", "stage local-1": "Completed"}


def test_the_progress_artifact_ends_with_every_row(
    finished_job: FinishedJob, prefect_api: str
) -> None:
    of_the_run = {"any_": [flow_run_of(finished_job, prefect_api)["id"]]}
    [artifact] = asked_of_prefect(prefect_api, "artifacts", {
        "artifacts": {"key": {"any_": ["progress"]}, "flow_run_id": of_the_run},
    })  # fmt: skip
    rows = len(finished_job.rows)
    assert (artifact["type"], float(artifact["data"])) == ("progress", 100.0)
    assert artifact["description"].startswith(
        f"{rows} of {rows} rows, {len(FAULTY)} failed, {finished_job.summary.tokens_per_s:,.0f} "
    )
    assert artifact["description"].endswith("tokens/s, ETA 0 s")


def test_links_say_what_they_carried_by_kind_and_what_they_saw(
    finished_job: FinishedJob, capsys: pytest.CaptureFixture[str]
) -> None:
    store = str(finished_job.store)
    rows = query(store, "select * from links where wire_bytes > 0").to_pylist()
    links = {(link["source"], link["target"]): link for link in rows}
    ring = [("local-0", "local-1"), ("local-1", "local-0")]
    stages = ("local-0", "local-1")
    control = {("driver", name) for name in stages} | {(name, "driver") for name in stages}
    assert links.keys() == {*ring, *control}
    for link in (links[pair] for pair in ring):
        parts = link["payload_bytes"] + link["framing_bytes"] + link["control_bytes"]
        assert link["wire_bytes"] == parts
        assert 56 * link["frames"] <= link["ack_bytes"] <= 68 * link["frames"]
        assert (link["frames_waiting"], link["frames_sent_again"], link["reconnects"]) == (0, 0, 0)
        assert link["most_frames_waiting"] > 0
        assert 0 < link["seen_rtt_s"] < 1
    forward, back = (links[pair] for pair in ring)
    assert forward["activation_bytes"] == 64 * 4 * forward["tokens"]
    assert forward["ratio"] >= 1
    assert forward["seen_bytes_per_s"] > 1e5
    sampled = finished_job.summary.output_tokens - NEW_TOKENS  # one twin has the other's answer
    assert back["payload_bytes"] == 4 * sampled
    assert back["activation_bytes"] == 0
    assert exit_status(["status", "demo", "--store", store]) == 0
    assert "local-1 │ local-0" in capsys.readouterr().out


def test_a_rerun_computes_nothing_again(
    finished_job: FinishedJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = copied_store(finished_job, tmp_path)
    before, log = results(store), log_names(store)
    arguments = ["run", str(finished_job.job_file), "--store", str(store), "--stages", "2"]
    assert exit_status([*arguments, "--json"]) == 1, "some rows have failed, then as now"
    again = json.loads(capsys.readouterr().out)
    assert again["rows_earlier"] == again["rows"] == len(finished_job.rows)
    assert (again["output_tokens"], again["seconds"]) == (0, 0.0)
    assert results(store) == before
    assert log_names(store) == log


def test_a_grown_input_computes_only_its_new_rows(
    finished_job: FinishedJob, tmp_path: Path
) -> None:
    store = copied_store(finished_job, tmp_path)
    before = results(store)
    folder = Path(shutil.copytree(finished_job.job_file.parent, tmp_path / "job"))
    grown = [*ordinary_rows(seed=1, count=5), *finished_job.rows.values()]
    write_prompts(folder / "prompts.parquet", grown)
    summary = run_batch(load_job(folder / "job.yaml"), str(store), Layout(2))
    after = results(store)
    assert summary.rows_earlier == len(before)
    assert {name for name, row in after.items() if row["run_id"] == summary.run_id} == {
        row["id"] for row in grown[:5]
    }
    moved = {name: row | {"row_id": row["row_id"] + 5} for name, row in before.items()}
    assert {name: after[name] for name in before} == moved
    [asked] = query(str(store), "select * from prompts where row_id = 0", "demo").to_pylist()
    answer = after[asked["custom_id"]]
    assert answer["text"] == finished_job.encoder.decode(finished_job.greedy(grown[0]))


def test_other_sampling_under_the_same_name_is_refused(
    finished_job: FinishedJob, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = copied_store(finished_job, tmp_path)
    other = finished_job.job_file.with_name("other.yaml")
    other.write_text(finished_job.job_file.read_text().replace("seed: 7", "seed: 8"))
    assert exit_status(["run", str(other), "--store", str(store)]) == 2
    assert "sampling was" in capsys.readouterr().err
    assert log_names(store) == log_names(finished_job.store)


def test_a_job_that_asks_for_it_rounds_activations_and_weights_and_says_so_row_by_row(
    finished_job: FinishedJob, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    rows = [*ordinary_rows(seed=2, count=40), finished_job.rows["empty"]]
    job_file = write_job(
        tmp_path, tiny_model, rows, "prompts.parquet", activations="int8", weights="int8",
        prompts={"prompt_column": "prompt"}, sampling={"max_new_tokens": NEW_TOKENS},
    )  # fmt: skip
    store = tmp_path / "store"
    run_batch(load_job(job_file), str(store), Layout(2))
    kinds = ("activations", "weights")
    said = {name: [row[kind] for kind in kinds] for name, row in results(store).items()}
    assert said == {row["id"]: ["int8", "int8"] for row in rows} | {"empty": [None, None]}
    plain = {tuple(row[kind] for kind in kinds) for row in results(finished_job.store).values()}
    assert plain == {("exact", "stored"), (None, None)}
    [link] = query(str(store), "select * from links where codec = 'int8'").to_pylist()
    assert link["target"] == "local-1"
    assert link["payload_bytes"] < 0.5 * 64 * 4 * link["tokens"]
    for kind, other in (("activations", "exact"), ("weights", "stored")):
        changed = job_file.with_name(f"{other}.yaml")
        changed.write_text(job_file.read_text().replace(f"{kind}: int8", f"{kind}: {other}"))
        assert exit_status(["run", str(changed), "--store", str(store)]) == 2
        assert f"{kind} was" in capsys.readouterr().err


CHATS: list[Row] = [
    {"id": "plain", "messages": [{"role": "user", "content": "good morning"}]},
    {"id": "long", "messages": [{"role": "user", "content": "q" * TINY_CONTEXT}]},
    {
        "id": "turns",
        "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": "three"},
        ],
    },
    {"id": "unsaid", "messages": [{"role": "user", "content": ""}]},
    {"id": "nobody", "messages": []},
    {"id": "typed", "messages": [{"role": "user", "content": "<|assistant|>"}]},
]


def test_chats_are_answered_under_the_models_template(
    finished_job: FinishedJob, tiny_model: Path, tmp_path: Path
) -> None:
    job_file = write_job(
        tmp_path, tiny_model, CHATS, "chats.jsonl",
        name="chats", prompts={"messages_column": "messages"}, sampling={"max_new_tokens": 6},
    )  # fmt: skip
    summary = run_batch(load_job(job_file), str(tmp_path / "store"), Layout(2))
    answers = results(tmp_path / "store", "chats")
    failed = {name: row["error_type"] for name, row in answers.items() if row["status"] == "error"}
    assert failed == {
        "long": "prompt_too_long", "unsaid": "template_error", "nobody": "bad_messages"
    }  # fmt: skip
    assert summary.rows_failed == len(failed)
    for chat in CHATS:
        if chat["id"] not in failed:
            prompt = finished_job.encoder.encode_messages(chat["messages"])
            ids = greedy_ids(finished_job.model, prompt, 6)
            answer = answers[chat["id"]]
            assert answer["prompt_tokens"] == len(prompt)
            assert answer["text"] == finished_job.encoder.decode(ids), chat["id"]
