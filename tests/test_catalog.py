"""SQL over a store: what the views show, and what a query may not do."""

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from storage.catalog import query
from storage.errors import CorruptStoreError, JobNotFoundError, QueryError, StoreError
from storage.progress import progress, unanswered
from storage.prompts import PromptSource
from storage.results import ResultWriter
from storage.schema import RESULT_SCHEMA
from storage.store import JobStore
from storage.verify import verify
from tests.stored import FINGERPRINT, answer, begun, prompts_at, run

VIEWS = ("prompts", "results", "errors", "pending", "jobs", "runs", "stages", "links", "nodes")

PLAN = {
    "plan_id": "plan-1",
    "epoch": 2,
    "created_at": "2030-01-02T03:04:05+00:00",
    "pipelines": [
        {
            "stages": [
                {"node": "a", "first_layer": 0, "end_layer": 3, "weights_offloaded": 0},
                {"node": "b", "first_layer": 3, "end_layer": 6, "kv_offloaded": 0.5},
            ],
            "links": [
                {"source": "a", "target": "b", "codec": "zstd"},
                {"source": "b", "target": "a", "codec": "raw"},
            ],
            "micro_batch_rows": 16,
            "in_flight": 4,
            "draft_len": 0,
        }
    ],
    "tokens_per_s": 90.0,
    "bound_tokens_per_s": 100.0,
    "binding": "link a -> b",
    "basis": ["measured"],
}
CLUSTER = {
    "nodes": [
        {"name": "a", "flop_per_s": 1e12, "memory_bytes": 8e9, "up_bytes_per_s": float("inf")},
        {"name": "b", "flop_per_s": 5e11, "memory_bytes": 4e9, "added_later": True},
    ],
    "links": [
        {"source": "a", "target": "b", "latency_s": 0.05, "bytes_per_s": 2.5e6, "loss": 0.0},
        {"source": "a", "target": "c", "latency_s": 0.01, "bytes_per_s": 1e6},
    ],
}
SUMMARY = {
    "run_id": "run-1",
    "job": "demo",
    "status": "completed",
    "started_at": "2030-01-02T03:04:06+00:00",
    "rows": 4,
    "tokens_per_s": 80.0,
    "stages": [{"node": "a", "busy_s": 1.5, "frames": 7, "tokens": 20}],
    "links": [{"source": "a", "target": "b", "frames": 7, "payload_bytes": 100, "wire_bytes": 120}],
}


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store")
    else:
        name = f"memory://store-{uuid4().hex}"
        yield name
        memory = fsspec.filesystem("memory")
        for path in memory.find(name):
            memory.rm_file(path)


@pytest.fixture
def source(tmp_path: Path) -> PromptSource:
    return prompts_at(tmp_path / "p.parquet", ["a", "b", "", "d"])


def half_done(root: str, source: PromptSource, job: str = "demo") -> JobStore:
    """Rows 0 (an answer) and 2 (an error) are finished, 1 and 3 are not."""
    store = begun(root, source, job)
    done = progress(store)
    writer = ResultWriter(store, done)
    for row in unanswered(store, source, done):
        if row.row_id % 2 == 0:
            writer.append(answer(row, job))
    writer.commit()
    return store


def test_the_views_show_what_is_done_and_what_is_not(root: str, source: PromptSource) -> None:
    half_done(root, source)

    def ids(view: str) -> list[object]:
        rows = query(root, f"select custom_id from {view} order by row_id")
        return list(rows.column("custom_id").to_pylist())

    assert ids("prompts") == ["row-0", "row-1", "row-2", "row-3"]
    assert ids("results") == ["row-0", "row-2"]
    assert ids("errors") == ["row-2"]
    assert ids("pending") == ["row-1", "row-3"]
    [job] = query(root, "select * from jobs").to_pylist()
    counts = ("rows", "rows_ok", "rows_failed", "rows_pending", "verified")
    assert [job[name] for name in counts] == [4, 1, 1, 2, False]
    assert json.loads(job["fingerprint"]) == FINGERPRINT


def test_results_have_the_schema_and_prompts_their_text(root: str, source: PromptSource) -> None:
    half_done(root, source)
    assert query(root, "from results").schema.names == RESULT_SCHEMA.names
    joined = "select prompt, text from prompts join results using (job, custom_id) order by prompt"
    assert query(root, joined).to_pylist() == [
        {"prompt": "", "text": None},
        {"prompt": "a", "text": "A"},
    ]


def test_messages_are_shown_as_json(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Grüß Gott"}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"m": turns}))
    begun(str(tmp_path / "store"), PromptSource(str(tmp_path / "m.jsonl"), messages_column="m"))
    [row] = query(str(tmp_path / "store"), "select prompt, messages from prompts").to_pylist()
    assert (row["prompt"], json.loads(row["messages"])) == (None, turns)


def test_without_its_input_a_prompt_has_no_text(tmp_path: Path, source: PromptSource) -> None:
    root = str(tmp_path / "store")
    half_done(root, source)
    prompts_at(Path(source.uri), ["a", "changed"])
    texts = query(root, "select prompt from prompts order by row_id").column("prompt")
    assert texts.to_pylist() == ["a", None, None, None]
    Path(source.uri).unlink()
    assert query(root, "select count(*) as n, count(prompt) as m from prompts").to_pylist() == [
        {"n": 4, "m": 0}
    ]


def test_an_input_that_is_broken_by_now_is_named(tmp_path: Path, source: PromptSource) -> None:
    half_done(str(tmp_path / "store"), source)
    Path(source.uri).write_bytes(b"PAR1 no more")
    with pytest.raises(QueryError, match=r"p\.parquet: is no readable Parquet file"):
        query(str(tmp_path / "store"), "select * from prompts")
    assert query(str(tmp_path / "store"), "select * from results").num_rows == 2


@pytest.mark.parametrize("begun_only", [True, False])
def test_every_view_is_there_before_anything_is(
    root: str, source: PromptSource, begun_only: bool
) -> None:
    if begun_only:
        JobStore.create(root, "demo", FINGERPRINT, {})
    else:
        begun(root, source)
    for view in VIEWS:
        table = query(root, f"select * from {view}")
        assert "job" in table.schema.names
        expected = {"jobs": 1} if begun_only else {"jobs": 1, "prompts": 4, "pending": 4}
        assert table.num_rows == expected.get(view, 0)


def test_a_query_spans_all_jobs_or_one(root: str, source: PromptSource) -> None:
    half_done(root, source, "first")
    half_done(root, source, "second")
    count = "select job, count(*) as n from results group by job order by job"
    assert query(root, count).to_pylist() == [{"job": "first", "n": 2}, {"job": "second", "n": 2}]
    assert query(root, count, job="second").to_pylist() == [{"job": "second", "n": 2}]
    assert query(root, "select count(*) as n from pending").to_pylist() == [{"n": 4}]


def test_runs_stages_links_and_nodes_come_from_the_runs_files(
    root: str, source: PromptSource
) -> None:
    store = half_done(root, source)
    store.write_run_file("run-1", "plan", PLAN)
    store.write_run_file("run-1", "cluster", CLUSTER)
    store.write_run_file("run-1", "summary", SUMMARY)
    store.write_run_file("run-2", "plan", {"plan_id": "plan-2"})
    first, second = query(root, "select * from runs order by run_id").to_pylist()
    assert (first["status"], first["tokens_per_s"], first["planned_tokens_per_s"]) == (
        "completed",
        80.0,
        90.0,
    )
    assert first["started_at"] == datetime(2030, 1, 2, 3, 4, 6, tzinfo=UTC)
    assert (second["plan_id"], second["status"]) == ("plan-2", None)
    stages = "select node, first_layer, end_layer, in_flight, busy_s from stages order by stage"
    assert [tuple(row.values()) for row in query(root, stages).to_pylist()] == [
        ("a", 0, 3, 4, 1.5),
        ("b", 3, 6, 4, None),
    ]
    links = (
        "select source, target, pipeline, codec, bytes_per_s, wire_bytes from links order by all"
    )
    assert [tuple(row.values()) for row in query(root, links).to_pylist()] == [
        ("a", "b", 0, "zstd", 2.5e6, 120),
        ("a", "c", None, None, 1e6, None),
        ("b", "a", 0, "raw", None, None),
    ]
    nodes = query(root, "select name, up_bytes_per_s from nodes order by name").to_pylist()
    assert nodes[0] == {"name": "a", "up_bytes_per_s": float("inf")}


def test_a_run_file_that_does_not_fit_is_named(tmp_path: Path, source: PromptSource) -> None:
    store = begun(str(tmp_path), source)
    store.write_run_file("run-1", "plan", {"epoch": "soon"})
    with pytest.raises(CorruptStoreError, match=r"runs/run-1/plan\.json is no plan file: epoch"):
        query(str(tmp_path), "select 1")


def test_row_ids_are_those_of_the_newest_input(root: str, tmp_path: Path) -> None:
    half_done(root, prompts_at(tmp_path / "p.parquet", ["a", "b", "", "d"]))
    (tmp_path / "q.csv").write_text('id,prompt\nnew,x\nrow-2,""\nrow-0,changed\n')
    moved = PromptSource(str(tmp_path / "q.csv"), id_column="id", prompt_column="prompt")
    begun(root, moved)
    rows = query(root, "select row_id, custom_id from results").to_pylist()
    assert rows == [{"row_id": 1, "custom_id": "row-2"}]


@pytest.mark.parametrize(
    "sql",
    [
        "copy results to 'out.csv'",
        "copy (select 1) to '{folder}/out.csv'",
        "explain analyze copy (select 1) to '{folder}/out.csv'",
        "export database '{folder}/out'",
        "select * from read_csv('{folder}/secret.csv')",
        "select * from '{folder}/secret.csv'",
        "select * from read_text('{folder}/secret.csv')",
        "select * from glob('{folder}/*')",
        "attach '{folder}/out.db'",
        "attach ':memory:' as other",
        "install httpfs",
        "load httpfs",
        "set enable_external_access = true",
        "set lock_configuration = false",
        "pragma enable_profiling",
        "create table t as select 1",
        "insert into results select * from results",
        "drop view results",
        "call pragma_version()",
        "select 1; select 2",
        "select 1; copy results to '{folder}/out.csv'",
        "",
        "-- nothing",
    ],
)
def test_a_query_can_only_read_the_views(tmp_path: Path, source: PromptSource, sql: str) -> None:
    half_done(str(tmp_path / "store"), source)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.csv").write_text("secret\n1\n")
    with pytest.raises(QueryError):
        query(str(tmp_path / "store"), sql.format(folder=outside))
    assert [path.name for path in outside.iterdir()] == ["secret.csv"]


@pytest.mark.parametrize(
    "sql", ["from results", "describe results", "show tables", "explain from jobs"]
)
def test_reading_in_any_form_is_allowed(tmp_path: Path, source: PromptSource, sql: str) -> None:
    half_done(str(tmp_path / "store"), source)
    assert query(str(tmp_path / "store"), sql).num_rows


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("select * from answers", "answers does not exist"),
        ("select txt from results", "txt"),
        ("selekt", "syntax error"),
        ("select 'x'::int", "Could not convert"),
    ],
)
def test_bad_sql_is_told_in_the_database_s_words(
    tmp_path: Path, source: PromptSource, sql: str, words: str
) -> None:
    half_done(str(tmp_path / "store"), source)
    with pytest.raises(QueryError, match=words):
        query(str(tmp_path / "store"), sql)


def test_a_store_without_the_job_says_so(tmp_path: Path, source: PromptSource) -> None:
    with pytest.raises(JobNotFoundError, match="no job is stored there"):
        query(str(tmp_path), "select 1")
    begun(str(tmp_path), source)
    with pytest.raises(JobNotFoundError, match="no job 'other'; jobs there: demo"):
        query(str(tmp_path), "select 1", job="other")
    with pytest.raises(StoreError, match="cannot name a job"):
        query(str(tmp_path), "select 1", job="../demo")


def test_queries_work_while_the_job_is_written(root: str, tmp_path: Path) -> None:
    source = prompts_at(tmp_path / "p.parquet", [f"text {n}" for n in range(60)])
    store = begun(root, source)
    writing = threading.Thread(target=run, args=(store, source, "run-1", 3))
    writing.start()
    counts = []
    while writing.is_alive():
        [row] = query(
            root, "select count(*) as n, count(distinct custom_id) as ids from results"
        ).to_pylist()
        assert row["n"] == row["ids"]
        counts.append(row["n"])
    writing.join()
    assert counts == sorted(counts)
    assert verify(store).complete
