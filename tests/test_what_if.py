"""The imagined cluster: read as written, refused by place, and advice from planning again."""

import copy
import json
from typing import Any

import pytest
import yaml

from planner.advice import advise
from planner.explain import explain
from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.plan import as_mapping
from planner.problem import problem
from planner.solve import solve, solve_in_order
from planner.what_if import WhatIfError, what_if

TEXT = """
nodes:
  - {name: a, region: eu, kind: a100, flop_per_s: 1.5e14, memory_bytes: 8.0e10, memory_bytes_per_s: 1.5e12,
     host_bytes: 2.56e11, host_to_device_bytes_per_s: 1.2e10, disk_bytes_per_s: 2.0e9, up_bytes_per_s: 1.25e8, down_bytes_per_s: 1.25e8,
     layer_s: {prefill: [[128, 0.004], [1024, 0.030]], decode: [[1, 512, 0.0008], [32, 512, 0.0011]]}}
  - {name: b, flop_per_s: 7.0e13, memory_bytes: 8.0e10, memory_bytes_per_s: 9.0e11}
links:
  - {from: a, to: b, latency_s: 0.020, bytes_per_s: 1.25e7, loss: 0.0}
default_link: {latency_s: 0.050, bytes_per_s: 1.25e7, loss: 0.0}
model: {layers: 80, hidden: 8192, layer_bytes: 1.71e9, kv_bytes_per_token_layer: 4096, activation_value_bytes: 2, embedding_bytes: 5.2e8, head_bytes: 5.2e8, flop_per_token_layer: 1.7e9}
workload: {rows: 10000, prompt_tokens: {mean: 512, p95: 1500}, output_tokens: {mean: 128, p95: 400}, shared_prefix_fraction: 0.0, acceptance: [], codec: {lossless: {ratio: 1.47, bytes_per_s: 8.0e8}}}
"""  # noqa: E501


def mapping() -> Any:
    return copy.deepcopy(yaml.safe_load(TEXT))


def facts_of(given: Any) -> tuple[Cluster, ModelShape, Workload]:
    """What a whole mapping says."""
    imagined = what_if(given)
    assert imagined.model is not None
    assert imagined.workload is not None
    return imagined.cluster, imagined.model, imagined.workload


def test_every_fact_arrives_with_its_number() -> None:
    imagined = what_if(mapping())
    a = imagined.cluster.nodes[0]
    assert a.memory_bytes == 8e10
    assert a.layer_s is not None
    assert a.layer_s.decode == ((1, 512, 0.0008), (32, 512, 0.0011))
    assert imagined.cluster.links[0].latency_s == 0.02
    assert imagined.model is not None
    assert imagined.model.layers == 80
    assert imagined.workload is not None
    assert imagined.workload.codec["lossless"].ratio == 1.47


def test_number_that_yaml_reads_as_a_word_counts() -> None:
    given = mapping()
    given["nodes"][0]["memory_bytes"] = "8.0e10"
    assert what_if(given).cluster.nodes[0].memory_bytes == 8e10


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("nodes", 0, "memroy"), 1, r"nodes\[0\]: 'memroy' is not a key"),
        (("nodes", 1, "flop_per_s"), "fast", r"nodes\[1\].flop_per_s is 'fast'; it takes a number"),
        (("nodes", 1, "flop_per_s"), True, "is True; it takes a number"),
        (("links", 0, "to"), "c", r"links\[0\]: to is 'c', which no node is called"),
        (("links", 0, "source"), "a", "'source' is not a key; say 'from'"),
        (("default_link", "from"), "a", "default_link: 'from' is not a key"),
        (("model", "layers"), 3.5, "model.layers is 3.5; it takes a whole number"),
        (("model", "windows"), [1024, 0], "model.windows has 2 numbers; there are 80 layers"),
        (("model", "windows"), [-9] * 80, "model.windows has -9; a layer sees"),
        (("model", "windows"), [1.5], r"model.windows\[0\] is 1.5; it takes a whole number"),
        (("workload", "codec"), [1], r"workload.codec is \[1\]; it takes keys and values"),
        (("nodes", 0, "layer_s", "decode"), [[1, 2]], r"decode\[0\] has 2 numbers; it takes 3"),
        (("nodes",), {}, "nodes is {}; it takes a list"),
        (("cluster",), 1, "the file: 'cluster' is not a key"),
    ],
)
def test_slips_are_named_by_their_place(path: tuple[Any, ...], value: object, words: str) -> None:
    given = mapping()
    inside = given
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    with pytest.raises(WhatIfError, match=words):
        what_if(given)


def test_missing_fact_is_named() -> None:
    given = mapping()
    del given["model"]["hidden"]
    with pytest.raises(WhatIfError, match="model: 'hidden' is missing"):
        what_if(given)


@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("decode", [[1, 512, 0.0012], [8, 512, 0.0009], [32, 512, 0.0011]]),
        ("decode", [[8, 512, 0.0012], [8, 2048, 0.0009]]),
        ("prefill", [[128, 0.004], [256, 0.003], [1024, 0.030]]),
        ("head", [[1, 0.002], [8, 0.001]]),
    ],
)
def test_uneven_profile_is_smoothed_and_the_plan_says_so(
    kind: str, points: list[list[float]]
) -> None:
    given = mapping()
    given["nodes"][0]["layer_s"][kind] = points
    posed = problem(*facts_of(given))
    assert any(f"node a: its {kind} profile was uneven" in line for line in posed.notes)
    assert posed.nodes[0].layer_s is not None
    seconds = [point[-1] for point in getattr(posed.nodes[0].layer_s, kind)]
    assert seconds == sorted(seconds)
    basis = solve_in_order(*facts_of(given), micro_batch_rows=4, in_flight=4).basis
    assert any(line in posed.notes for line in basis)


def test_advice_is_what_planning_again_gives() -> None:
    facts = facts_of(mapping())
    plan = solve(*facts)
    advice = advise(*facts, plan)
    assert {a.change for a in advice} >= {"one more node like a"}
    assert [a.finish_s for a in advice] == sorted(a.finish_s for a in advice)
    assert all(a.finish_s < plan.finish_s for a in advice)
    assert str(advice[0]) in explain(plan, advice)


def test_no_advice_is_given_that_brings_nothing() -> None:
    given = mapping()
    given["workload"]["rows"] = 100
    facts = facts_of(given)
    # Loading and the way of the longest row are all that so few rows wait for.
    assert advise(*facts, solve(*facts)) == ()


def test_plan_says_over_which_plans_and_settings_its_bound_holds() -> None:
    given = mapping()
    given["workload"]["rows"] = 40
    facts = facts_of(given)
    said = explain(solve(*facts))
    assert "No plan on these nodes without replicas, over the grid below, beats" in said
    assert (
        "The grid: micro-batches of 1, 2, 4, 8, 16 or 32 rows, or of what cuts the job into 1 to 4 "
        "even waves; 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48 or 64 of them in flight; 0 drafted tokens; "
        "links with codec raw or lossless; any number of layers streamed; 0%, 50%, 75% or 100% of "
        "KV parked."
    ) in said
    chosen = solve_in_order(*facts, micro_batch_rows=4, in_flight=2)
    assert "The grid: micro-batches of 4 rows; 2 of them in flight;" in explain(chosen)
    assert "without replicas" not in explain(solve(*facts, replicate=True))


def test_plan_as_json_has_every_setting_under_its_documented_name() -> None:
    shown = json.loads(json.dumps(as_mapping(solve(*facts_of(mapping())))))
    assert list(shown) == [
        "pipelines", "rows_per_s", "tokens_per_s", "finish_s", "bound_tokens_per_s", "gap",
        "bound_over", "grid", "binding", "basis",
    ]  # fmt: skip
    ring = shown["pipelines"][0]
    assert set(ring) == {"stages", "links", "micro_batch_rows", "in_flight", "draft_len"}
    assert set(ring["stages"][0]) == {
        "node", "first_layer", "end_layer", "weights_offloaded", "kv_offloaded",
    }  # fmt: skip
    assert all(set(link) == {"from", "to", "codec"} for link in ring["links"])


def test_impossible_facts_are_the_planners_to_refuse() -> None:
    given = mapping()
    given["nodes"][0]["memory_bytes"] = -1
    facts = facts_of(given)
    with pytest.raises(InfeasibleError, match="node a: memory_bytes is -1; it cannot be negative"):
        solve(*facts)
