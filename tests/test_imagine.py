"""Imagined runs from the command line: what is asked for happens, and slips are named."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

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


def test_simulation_prints_the_plans_facts_under_the_plans_own_names(
    what_if: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["plan", "--what-if", str(what_if), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert exit_status(["simulate", "--what-if", str(what_if), "--json"]) == 0
    simulated = json.loads(capsys.readouterr().out)
    assert simulated.pop("simulated")["rows"] == 40
    assert simulated == planned


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


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("model", "layers"), 1e11, "layers is 1e+11, absurdly large; it is at most 10,000"),
        (("model", "layers"), 1e6, "layers is 1e+06, absurdly large; it is at most 10,000"),
        (("workload", "rows"), 1e20, "rows is 1e+20, absurdly large; it is at most 1,000,000,000"),
        (
            ("workload", "prompt_tokens"),
            {"mean": 1e9, "p95": 2e9},
            "mean is 1e+09, absurdly large; it is at most 10,000,000",
        ),
        (
            ("workload", "codec"),
            {"zip": {"ratio": 1.5, "bytes_per_s": 0}},
            "codec zip: bytes_per_s is 0; it must be above 0",
        ),
        (
            ("workload", "codec"),
            {"raw": {"ratio": 1.5, "bytes_per_s": 1e9}},
            "workload.codec: 'raw' is the name of a link without a codec",
        ),
        (
            ("nodes", 0, "layer_s"),
            {"prefill": [[float("inf"), 0.1]], "decode": []},
            "nodes[0].layer_s.prefill[0] is inf; it takes a whole number",
        ),
        (
            ("nodes", 0, "layer_s"),
            {"prefill": [[float("nan"), 0.1]], "decode": []},
            "nodes[0].layer_s.prefill[0] is nan; it takes a whole number",
        ),
        (
            ("nodes", 0, "layer_s"),
            {"prefill": [[8, float("nan")]], "decode": []},
            "node a: prefill profile has the impossible point (8, nan)",
        ),
        (
            ("links",),
            [{"from": ["a"], "to": "b", "latency_s": 0, "bytes_per_s": 1}],
            "links[0].from is ['a']; it takes a word",
        ),
        (
            ("links",),
            [{"from": "a", "to": "a", "latency_s": 0, "bytes_per_s": 1}],
            "links[0] leads from a to itself",
        ),
        (
            ("links",),
            [{"from": "a", "to": "b", "latency_s": 0, "bytes_per_s": 1}] * 2,
            "links[1] is from a to b, as links[0] is; keep one",
        ),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_absurd_facts_are_refused_with_their_number(
    tmp_path: Path,
    command: str,
    path: tuple[Any, ...],
    value: object,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = inside = yaml.safe_load(CLUSTER)
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(given), encoding="utf-8")
    assert exit_status([command, "--what-if", str(file)]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_more_rows_than_a_simulation_holds_are_refused_there_alone(
    what_if: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what_if.write_text(CLUSTER.replace("rows: 40", "rows: 1e12"), encoding="utf-8")
    assert exit_status(["plan", "--what-if", str(what_if)]) == 0
    assert exit_status(["simulate", "--what-if", str(what_if)]) == 2
    assert "plays every row, at most 10,000,000; the workload has 1,0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("parallax", "it gives weights half of each node's memory, and so 8 of 12 layers fit"),
        ("helix", "it gives weights half of each node's memory, and so 8 of 12 layers fit"),
        ("equal", "the first with layers a 6 -> b 6: a node has no room for its layers"),
    ],
)
def test_method_without_a_pipeline_names_its_own_rule(
    what_if: Path, method: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if method == "helix":
        pytest.importorskip("highspy")
    first, second = ("6.0e9", "2.0e9") if method == "equal" else ("3.9e9", "3.9e9")
    text = CLUSTER.replace("8.0e10", first, 1).replace("8.0e10", second, 1)
    what_if.write_text(text, encoding="utf-8")
    assert exit_status(["plan", "--what-if", str(what_if)]) == 0
    capsys.readouterr()
    assert exit_status(["plan", "--what-if", str(what_if), "--method", method]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{method} forms no pipeline on these nodes: " in error
    assert words in error
