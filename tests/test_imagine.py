"""Imagined runs from the command line: what is asked for happens, and slips are named."""

import json
from pathlib import Path

import pytest

from flows.cli import exit_status

CLUSTER = """
nodes:
  - {name: a, flop_per_s: 1.5e14, memory_bytes: 8.0e10, memory_bytes_per_s: 1.5e12}
  - {name: b, flop_per_s: 7.0e13, memory_bytes: 8.0e10, memory_bytes_per_s: 9.0e11}
default_link: {latency_s: 0.05, bytes_per_s: 1.25e7}
model: {layers: 12, hidden: 2048, layer_bytes: 4.0e8, kv_bytes_per_token_layer: 2048,
  activation_value_bytes: 2, embedding_bytes: 1.0e8, head_bytes: 1.0e8, flop_per_token_layer: 4.0e8}
workload: {rows: 40, prompt_tokens: {mean: 64, p95: 90}, output_tokens: {mean: 16, p95: 40}}
"""


@pytest.fixture
def what_if(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER, encoding="utf-8")
    return path


def test_run_with_a_node_that_leaves_and_one_that_joins_answers_every_row(
    what_if: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.jsonl"
    course = ("--leave", "a@0.2", "--join", "b@0.1", "--arrivals", "50", "--trace", str(trace))
    status = exit_status(["simulate", "--what-if", str(what_if), *course, "--json"])
    assert status == 0
    seen = json.loads(capsys.readouterr().out)["simulated"]
    assert seen["rows"] == 40
    assert seen["replans"] == 2
    assert len(seen["first_token_s"]) == len(seen["row_latency_s"]) == 3
    events = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert sorted(e["number"] for e in events if e["what"] == "end") == list(range(40))
    times = [e["at_s"] for e in events]
    assert times == sorted(times)


def test_rehearsed_plan_is_one_of_the_methods(
    what_if: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["plan", "--what-if", str(what_if), "--method", "rehearsed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pipelines"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--leave", "z@3"], "'z@3' is not NODE@SECONDS; nodes are a, b"),
        (["--join", "a@soon"], "'a@soon' is not NODE@SECONDS"),
        (["--leave", "a"], "'a' is not NODE@SECONDS"),
        (["--leave", "a@0.1", "--leave", "b@0.2"], "rows are left, and no node change"),
        (["--method", "magic"], "no method 'magic'; there are exact, replicated, rehearsed, cg-bp"),
        (["--trace", "/nowhere/t.jsonl"], "cannot write the trace: No such file"),
        (["--policy", "best"], "not one of"),
    ],
)
def test_slips_are_named(
    what_if: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["simulate", "--what-if", str(what_if), *arguments]) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
