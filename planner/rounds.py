"""Seconds of one way round a ring, with so many rows in its slots and some prompts beside them."""

from dataclasses import dataclass, replace

import numpy as np

from planner.cost import (
    FRAME_BYTES,
    ID_BYTES,
    ROW_BYTES,
    Floats,
    decode_rounds,
    mean_context,
    prefill_tokens,
    tokens_per_round,
)
from planner.drafts import DraftCosts
from planner.facts import ModelShape, Node, Workload
from planner.grid import DRAFT_LENGTHS
from planner.layer_times import head_s, step_layer_s
from planner.lengths import survival
from planner.plan import LinkPlan, Pipeline, StagePlan
from planner.problem import Problem, cell_of
from planner.schedule import CHUNK_TOKENS

CHUNKS_PER_STEP = 2
"""Prefill chunks that may travel with a step's decodes at most: while prompts fill all slots, else one.

Rows that share that one wait for one another, so a mean prompt takes about as many steps as if two
were always let through: predicted over simulated 0.87 to 1.15 on 14 clusters, medians 1.01 and 0.95
for prompts of 256 and 1,000 tokens.
"""


def stage_step_s(
    node: Node,
    stage: StagePlan,
    model: ModelShape,
    decodes: tuple[float, float],
    prefills: tuple[float, float],
    width: int,
) -> float:
    """One step's seconds on a stage, LM head aside: (rows, context) decoded, (tokens, prompt) prefilled.

    What streams from host memory or disk does so beside the computing.
    """
    step = step_layer_s(node, model, decodes, prefills, width)
    rows, context = decodes
    weights = stage.weights_offloaded * model.layer_bytes
    stream_s = weights / node.stream_bytes_per_s if weights else 0.0
    kv = rows * context * model.kv_bytes_per_token_layer * stage.layers
    stream_s += stage.kv_offloaded * kv / node.kv_stream_bytes_per_s if stage.kv_offloaded else 0.0
    return max(stage.layers * step, stream_s) + node.step_s


def round_s(given: Problem, pipeline: Pipeline, rows: float, prompts: float = 0.0) -> float:
    """Seconds in which each of so many rows decodes once, while so many prompts are prefilled.

    Either the slots keep the slowest stage, codec or link busy, or they follow one another all the
    way round. Frames keep their order: one that carries a chunk of a prompt takes longer at every
    station, and holds up the others behind it.
    """
    slots = min(pipeline.in_flight, max(rows, 1.0))
    bare_s, way_s = _stations(given, pipeline, rows / slots, 0.0)
    if not prompts:
        return float(max(slots * bare_s.max(), way_s))
    tokens = prompts * prefill_tokens(given.work) / slots
    chunk = max(prefill_tokens(given.work) / prefill_steps(given.work), tokens, 1.0)
    laden_s, long_way_s = _stations(given, pipeline, rows / slots, chunk)
    laden = tokens / chunk
    between = (1.0 - laden) / laden
    held_s = slots * (between * bare_s.max() + long_way_s) / (slots + between)
    steady_s = (slots * (bare_s + laden * (laden_s - bare_s))).max()
    return float(max(steady_s, way_s + laden * (long_way_s - way_s), held_s))


def prefill_steps(work: Workload) -> float:
    """Steps that a mean prompt takes, alone in its slot's steps."""
    longer = survival(work.prompt_tokens, work.rows)
    shared = work.prompt_tokens.mean * work.shared_prefix_fraction
    return float(longer[int(shared) :: CHUNKS_PER_STEP * CHUNK_TOKENS].sum())


@dataclass(frozen=True, slots=True)
class Steady:
    """A full ring, in which prompts come as answers end."""

    round_s: float
    rounds: float
    """Of a mean row, its prefill's steps among them."""
    rows: int

    @property
    def row_s(self) -> float:
        """Seconds per row."""
        return self.round_s * self.rounds / self.rows


def steady(given: Problem, pipeline: Pipeline) -> Steady:
    """How a pipeline goes on while rows are left."""
    cell = cell_of(pipeline)
    decodes = decode_rounds(given.work, cell.draft_len)
    rounds = decodes + prefill_steps(given.work)
    full_s = round_s(given, pipeline, cell.rows * decodes / rounds, cell.rows / rounds)
    return Steady(full_s, rounds, cell.rows)


def token_s(given: Problem, pipeline: Pipeline, rows: float) -> float:
    """Seconds per token of each of so many rows, with as many drafts as are best for them."""
    drafting = _drafting(given, pipeline).items()
    chances = given.work.acceptance
    return min(round_s(given, each, rows) / tokens_per_round(chances, n) for n, each in drafting)


def draft_costs(given: Problem, pipeline: Pipeline) -> DraftCosts | None:
    """What rounds of few and of many rows cost with drafts; None where nothing drafts."""
    chances = given.work.acceptance
    if not chances:
        return None
    drafting, full = _drafting(given, pipeline), cell_of(pipeline).rows
    counts = sorted({*(2**i for i in range(full.bit_length())), full})
    seconds = (tuple(round_s(given, each, rows) for each in drafting.values()) for rows in counts)
    return DraftCosts(tuple(counts), tuple(drafting), tuple(seconds), chances)


def _drafting(given: Problem, pipeline: Pipeline) -> dict[int, Pipeline]:
    """The pipeline by the numbers of drafts that its ring may come to."""
    lengths = {n for n in (*DRAFT_LENGTHS, pipeline.draft_len) if n <= len(given.work.acceptance)}
    return {length: replace(pipeline, draft_len=length) for length in sorted(lengths)}


def _stations(
    given: Problem, pipeline: Pipeline, rows: float, chunk: float
) -> tuple[Floats, float]:
    """Seconds that a step of so many rows and a chunk keeps each station busy, and is on its way.

    Means over the ring's slots: a station counts for those that pass it.
    """
    stages_s, parts = _stages_s(given, pipeline, rows, chunk), _parts(pipeline)
    busy_s = [parts[name] * seconds for name, seconds in stages_s.items()]
    way_s = sum(busy_s)
    at = {node.name: i for i, node in enumerate(given.nodes)}
    heads, width = {stage.node for stage in pipeline.ranges[0]}, pipeline.draft_len + 1
    for link in pipeline.links:
        i, j = at[link.source], at[link.target]
        codec, part = given.work.codec.get(link.codec), link_part(pipeline, link)
        forward = (rows * width + chunk) * given.model.activation_bytes_per_token
        raw = rows * width * ID_BYTES if link.target in heads else forward
        coding_s = raw / codec.bytes_per_s if codec else 0.0
        sent = raw / (codec.ratio if codec else 1.0) + FRAME_BYTES + ROW_BYTES * rows
        wire_s = sent / float(given.net.bytes_per_s[i, j])
        busy_s += [part * wire_s, parts[link.source] * coding_s]
        if pipeline.replicated:  # links that share a port
            out, into = given.nodes[i].up_bytes_per_s, given.nodes[j].down_bytes_per_s
            busy_s += [parts[link.source] * sent / out, parts[link.target] * sent / into]
        way_s += part * (wire_s + 2.0 * coding_s + float(given.net.latency_s[i, j]))
    return np.array(busy_s), way_s


def _stages_s(given: Problem, pipeline: Pipeline, rows: float, chunk: float) -> dict[str, float]:
    """Seconds of such a step by node."""
    width, prompt = pipeline.draft_len + 1, given.work.prompt_tokens.mean
    decodes, found = (rows, mean_context(given.work)), {}
    for stage in pipeline.stages:
        node = given.cluster.node(stage.node)
        seconds = stage_step_s(node, stage, given.model, decodes, (chunk, prompt), width)
        if stage.end_layer == given.model.layers:
            seconds += head_s(node, given.model, rows * width)
        found[stage.node] = seconds
    return found


def _parts(pipeline: Pipeline) -> dict[str, float]:
    """The share of the slots that each node computes."""
    return {
        stage.node: len(stage.slots) / pipeline.in_flight if stage.slots else 1.0
        for stage in pipeline.stages
    }


def link_part(pipeline: Pipeline, link: LinkPlan) -> float:
    """The share of the slots that a link carries: those that both of its ends compute."""
    of = {stage.node: stage.slots for stage in pipeline.stages}
    ends = [set(slots) for slots in (of[link.source], of[link.target]) if slots]
    return len(set.intersection(*ends)) / pipeline.in_flight if ends else 1.0
