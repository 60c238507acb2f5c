"""A plan in plain sentences: what limits it, and which facts it rests on."""

from collections.abc import Sequence

import numpy as np

from planner.cost import Cell, mean_context
from planner.layer_times import decode_layer_s, prefill_layer_s
from planner.plan import Pipeline, Plan, StagePlan
from planner.problem import Found, Problem, ring_in, stages_in
from planner.replicas import stages_of

REPLICATED = (
    "Nodes with the same layers are replicas: each computes the slots dealt to it. A run plans "
    "without them, as its ring does not deal slots yet."
)
TIED = 0.98
"""A cost this close to the longest one binds too."""


def binding_words(given: Problem, found: Found) -> str:
    """What limits a pipeline: its slowest stage, its slowest link, or what is in flight."""
    ring = ring_in(given, found.cell, found.order, found.dealt)
    split, places = found.split, stages_of(len(found.order), found.dealt)
    stages = ring.busy_s[np.arange(len(places)), np.array(split.layers) - 1]
    names = [" + ".join(given.nodes[found.order[i]].name for i in stage) for stage in places]
    words: list[str] = []
    if stages.max() >= TIED * split.row_s:
        words.append(_stage_words(given, found, int(stages.argmax()), float(stages.max())))
    for link, codec in enumerate(split.codecs):
        if ring.occupied_s[link, codec] >= TIED * split.row_s:
            ends = f"{names[link]} -> {names[(link + 1) % len(names)]}"
            words.append(
                f"link {ends} is busy {_seconds(ring.occupied_s[link, codec])} for every row"
            )
    if not words:
        cell = found.cell
        words.append(
            f"in flight: a row lives {_seconds(split.life_s)} in the ring, and only "
            f"{cell.rows} rows ({cell.in_flight} x {cell.micro_batch_rows}) are in it at a time"
        )
    return "; ".join(words)


def _stage_words(given: Problem, found: Found, stage: int, busy_s: float) -> str:
    places, layers = stages_of(len(found.order), found.dealt), found.split.layers[stage]
    tables = list(stages_in(given, found.cell, found.order, found.dealt))
    parts = {place: len(found.dealt[place]) if found.dealt else 1 for place in places[stage]}
    worst = max(parts, key=lambda at: parts[at] * tables[at][0].busy_s[tables[at][1], layers - 1])
    table, row = tables[worst]
    ends = "s and the LM head" if stage == len(places) - 1 else "s" if layers > 1 else ""
    words = f"node {given.nodes[found.order[worst]].name}: its {layers} layer{ends} take "
    words += f"{_seconds(busy_s)} for every row"
    if len(parts) > 1:
        words += f", of which it computes {parts[worst]} in {found.cell.in_flight}"
    offloaded = int(table.weights_offloaded[row, layers - 1])
    return words + (f", {offloaded} layers streaming" if offloaded else "")


def basis_lines(given: Problem, cell: Cell) -> tuple[str, ...]:
    """The facts that a plan rests on, a line each."""
    context = mean_context(given.work)
    lines = [_work_line(given)]
    for node in given.nodes:
        decode = decode_layer_s(node, given.model, cell.micro_batch_rows, context)
        tokens = given.work.prompt_tokens.mean * cell.micro_batch_rows
        prefill = prefill_layer_s(node, given.model, tokens, given.work.prompt_tokens.mean)
        source = "profiled" if node.layer_s else "roofline"
        lines.append(
            f"node {node.name}: {node.memory_bytes / 1e9:.2f} GB free; {source}: a layer takes "
            f"{_seconds(decode)} to decode {cell.micro_batch_rows} rows at {context:.0f} tokens "
            f"of context, {_seconds(prefill)} to prefill {tokens:.0f} tokens"
        )
    n = len(given.nodes)
    for i in range(n if n > 1 else 0):
        j = (i + 1) % n
        lines.append(
            f"link {given.nodes[i].name} -> {given.nodes[j].name}: "
            f"{given.net.latency_s[i, j] * 1e3:.3g} ms, {_rate(given.net.bytes_per_s[i, j])}"
        )
    return (*lines, *given.notes)


def _work_line(given: Problem) -> str:
    work = given.work
    return (
        f"{work.rows} rows of {work.prompt_tokens.mean:.4g} prompt tokens (95 %: "
        f"{work.prompt_tokens.p95:.4g}) and {work.output_tokens.mean:.4g} output tokens (95 %: "
        f"{work.output_tokens.p95:.4g}) on average"
    )


def explain(plan: Plan, advice: Sequence[object] = ()) -> str:
    """The plan, its speed, its certificate, its limit and what would help, in plain sentences."""
    if not plan.pipelines:
        return f"Nothing to do: {plan.binding}."
    lines = [
        f"{_count(len(plan.pipelines), 'pipeline')}, {plan.rows_per_s:.4g} rows/s, "
        f"{plan.tokens_per_s:.4g} output tokens/s; the workload takes {_seconds(plan.finish_s)}.",
        f"No plan on these nodes {plan.bound_over}, over the grid below, beats "
        f"{plan.bound_tokens_per_s:.4g} tokens/s; this one's {plan.tokens_per_s:.4g}, while it has "
        f"rows enough, are within {100 * plan.gap:.1f} % of that.",
        f"What limits it: {plan.binding}.",
    ]
    for number, pipeline in enumerate(plan.pipelines):
        lines.append(f"Pipeline {number}: {_ring_words(pipeline)}.")
    if any(pipeline.replicated for pipeline in plan.pipelines):
        lines.append(REPLICATED)
    if advice:
        lines.append("What would help most:")
        lines.extend(f"  {change}" for change in advice)
    grid = [f"The grid: {plan.grid}."] if plan.grid else []
    return "\n".join([*lines, *grid, "It rests on:", *(f"  {line}" for line in plan.basis)])


def _ring_words(pipeline: Pipeline) -> str:
    hops = [" beside ".join(map(_hop_words, replicas)) for replicas in pipeline.ranges]
    coded = {link.codec for link in pipeline.links} - {"raw"}
    return (
        " -> ".join(hops)
        + f"; {under_way(pipeline)}"
        + (f"; codec {', '.join(sorted(coded))}" if coded else "")
        + (f"; {pipeline.draft_len} drafted tokens" if pipeline.draft_len else "")
    )


def _hop_words(stage: StagePlan) -> str:
    return (
        f"{stage.node} layers {stage.first_layer}-{stage.end_layer}"
        + (f" for {_count(len(stage.slots), 'slot')}" if stage.slots else "")
        + (f" ({stage.weights_offloaded} streamed)" if stage.weights_offloaded else "")
        + (f" ({stage.kv_offloaded:.0%} of KV parked)" if stage.kv_offloaded else "")
    )


def under_way(pipeline: Pipeline) -> str:
    """What circulates in a pipeline, in words."""
    if pipeline.in_flight == 1:
        return f"one micro-batch of {_count(pipeline.micro_batch_rows, 'row')} in flight"
    return f"{pipeline.in_flight} micro-batches of {pipeline.micro_batch_rows} rows in flight"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"


def _seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 1.0:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.4g} s" if seconds < 600 else f"{seconds / 3600:.3g} h"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.3g} MB/s"
