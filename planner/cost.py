"""Seconds and bytes that a plan costs, each term in one function; same facts, same seconds.

Everything is normalised to one row: a row costs a stage `busy_s`, a link `occupied_s`, and stays in
the ring for its life. A pipeline then finishes a row every

    row_s = max(longest stage busy_s, longest link occupied_s, life_s / (in_flight x rows))

the last term being Little's law for the rows that are in flight. A row's life is one prefill pass
round the ring and `rounds` decode passes.
"""

import math
from dataclasses import dataclass
from enum import Flag

import numpy as np
from numpy.typing import NDArray

from planner.admission import GROWTH_TOKENS
from planner.facts import CodecRate, ModelShape, Node, Workload
from planner.layer_times import decode_layer_s, head_s, prefill_layer_s
from planner.lengths import Z95, apart, met_tokens, spread_tokens
from planner.windows import AHEAD_TOKENS, Window

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

PARKED_KV = (0.0, 0.5, 0.75, 1.0)
"""Shares of a stage's KV that a round may fetch from where it is parked: the grid of the choice."""
STREAM_BUFFERS = 2
"""Layers of device memory that streamed weights need: one computed, one on its way."""
WORKSPACE_COPIES = 16
"""Activations alive at once inside a layer, in copies of the step's hidden states."""
STEP_TOKENS = 512
"""Least tokens of a step that its workspace is sized for: a prefill chunk."""
FRAME_BYTES = 256
"""Header, checksum and TLS record of one frame."""
ROW_BYTES = 12
"""What a frame's header says of one row."""
ID_BYTES = 4
"""One token id on the return link."""


class Role(Flag):
    """What a stage does beside its layers: the first embeds, the last has the LM head."""

    MIDDLE = 0
    FIRST = 1
    LAST = 2


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid that the solver searches: what the stages of a pipeline share."""

    micro_batch_rows: int
    in_flight: int
    draft_len: int = 0

    @property
    def rows(self) -> int:
        """Rows in flight."""
        return self.micro_batch_rows * self.in_flight


def tokens_per_round(acceptance: tuple[float, ...], draft_len: int) -> float:
    """Tokens that a verify round commits: 1 + sum over i of the chance that i drafts all hold.

    With equal chances a this is (1 - a^(n+1)) / (1 - a): Leviathan et al. 2023, equation 1.
    """
    expected, all_hold = 1.0, 1.0
    for chance in acceptance[:draft_len]:
        all_hold *= chance
        expected += all_hold
    return expected


def decode_rounds(work: Workload, draft_len: int) -> float:
    """Mean decode passes of a row; its first token comes from the prefill."""
    return max(work.output_tokens.mean - 1.0, 0.0) / tokens_per_round(work.acceptance, draft_len)


def prefill_tokens(work: Workload) -> float:
    """Mean positions that a row's prefill computes; a shared prefix is computed once for all."""
    return work.prompt_tokens.mean * (1.0 - work.shared_prefix_fraction)


def mean_context(work: Workload) -> float:
    """Tokens that a decoding row attends to, averaged over its life."""
    return work.prompt_tokens.mean + work.output_tokens.mean / 2.0


def kv_tokens(work: Workload, rows: int) -> float:
    """Tokens that so many rows hold together at most, except one time in twenty; a shared prefix once.

    n mean + 1.645 sqrt(n) deviation, for few are long at a time: but at least one row at its 95th
    percentile, and at most all. Where that was too little, a ring has its newest row make way. Rows of
    one age all come to their ends; those that came as others ended are met anywhere on their way.
    """
    prompts, outputs = work.prompt_tokens, work.output_tokens
    shared = prompts.mean * work.shared_prefix_fraction
    longest = prompts.p95 + outputs.p95 - shared

    def together(made: float, spread: float) -> float:
        deviation = math.sqrt(rows * (spread_tokens(prompts) ** 2 + spread**2))
        return rows * (prompts.mean - shared + made) + Z95 * deviation

    at_ends = together(outputs.mean, spread_tokens(outputs))
    on_their_way = together(*met_tokens(outputs)) + rows * GROWTH_TOKENS / 2.0
    saved = max(0.0, at_ends - on_their_way) * apart(outputs, work.rows / rows)
    return shared + min(rows * longest, max(longest, at_ends - saved))


def kv_layer_bytes(model: ModelShape, work: Workload, rows: int) -> float:
    """KV of one layer for so many rows, of lengths as they come together.

    Where some layers keep only a window this is the mean, and their share of a prefix each row's own.
    """
    tokens = kv_tokens(work, rows)
    if model.window:
        share = model.windowed_layers(0, model.layers) / model.layers
        longest = work.prompt_tokens.p95 + work.output_tokens.p95
        near = min(longest, Window(model.window, 0).most_tokens(AHEAD_TOKENS))
        tokens = (1.0 - share) * tokens + share * rows * near
    return tokens * model.kv_bytes_per_token_layer


def resident_kv(parked: float, in_flight: int) -> float:
    """Share of a stage's KV that its device has room for, if a round is to fetch so much of it.

    With room for r of m slots, two slots' room goes from hand to hand, one computed and one on its
    way; in the rest stay r - 2 of the m - 1 slots that are not computed (Belady 1966).
    """
    return min(1.0, 1.0 - parked + (1.0 + parked) / in_flight) if parked else 1.0


def workspace_bytes(model: ModelShape, cell: Cell) -> float:
    """Device memory of a step's activations."""
    tokens = max(cell.micro_batch_rows * (cell.draft_len + 1), STEP_TOKENS)
    return WORKSPACE_COPIES * tokens * model.activation_bytes_per_token


def role_bytes(model: ModelShape, role: Role) -> float:
    """Device memory of the embedding (first stage) and the LM head (last stage)."""
    embedding = model.embedding_bytes if Role.FIRST in role else 0.0
    return embedding + (model.head_bytes if Role.LAST in role else 0.0)


@dataclass(frozen=True, slots=True)
class StageTable:
    """What stages of 1..layers layers cost on each of n nodes; shapes (n, layers).

    `busy_s` is seconds per row, infinite where the stage does not fit, and never falls with layers.
    """

    busy_s: Floats
    weights_offloaded: Ints
    kv_offloaded: Floats


@dataclass(frozen=True, slots=True)
class _Passes:
    """One layer's seconds on each node, shape (n, 1), for a micro-batch's prefill and a round."""

    prefill_s: Floats
    round_s: Floats
    beside_s: Floats
    """Over a micro-batch's life: steps' overhead, and the LM head where there is one."""

    def of(self, nodes: list[int]) -> "_Passes":
        """The same of some nodes."""
        return _Passes(self.prefill_s[nodes], self.round_s[nodes], self.beside_s[nodes])


def stage_table(
    nodes: tuple[Node, ...], model: ModelShape, work: Workload, cell: Cell, role: Role
) -> StageTable:
    """Cost of every (node, number of layers), each with the offload that makes it fastest.

    Per micro-batch and life, a stage of k layers is busy for
    max(k prefill_s, streamed) + rounds x max(k round_s, streamed) + its steps' overhead,
    streaming overlapping computing. KV is parked by PARKED_KV; of the weights, the fewest layers.
    """
    passes = _passes(nodes, model, work, cell, role)
    k = _counts_worth_trying(nodes, model, work, cell, role)
    # What no node holds is not looked at.
    whole = np.full((len(nodes), model.layers), np.inf), *np.zeros((2, len(nodes), model.layers))
    best, offloaded, parked = (table[:, : k.shape[1]] for table in whole)
    # Only who has something to park in has a choice to make; what is within a window is not parked.
    able = [i for i, n in enumerate(nodes) if n.kv_stream_bytes_per_s and not model.window]
    for fraction in PARKED_KV:
        if fraction and (not able or resident_kv(fraction, cell.in_flight) >= 1.0):
            continue
        at = able if fraction else list(range(len(nodes)))
        some = tuple(nodes[i] for i in at)
        omega = _layers_to_offload(some, model, work, cell, role, k, fraction)
        fits = np.isfinite(omega)
        omega = np.where(fits, omega, 0.0)
        busy = _busy_s(some, model, work, cell, passes.of(at), k, omega, fraction)
        better = fits & (busy < best[at])
        best[at] = np.where(better, busy, best[at])
        offloaded[at] = np.where(better, omega, offloaded[at])
        parked[at] = np.where(better, fraction, parked[at])
    busy_s, weights, kv = whole
    return StageTable(busy_s, weights.astype(np.int64), kv)


def _counts_worth_trying(
    nodes: tuple[Node, ...], model: ModelShape, work: Workload, cell: Cell, role: Role
) -> Floats:
    """Numbers of layers from 1 to as many as any node holds with all of its memory; (1, counts)."""
    room = max(node.memory_bytes + _room_beside(node) for node in nodes)
    room -= workspace_bytes(model, cell) + role_bytes(model, role)
    each = model.layer_bytes + kv_layer_bytes(model, work, cell.rows)
    most = min(max(room / each + 1.0, 0.0), model.layers)  # one more, against rounding
    return np.arange(1.0, int(most) + 1.0)[None, :]


def _passes(
    nodes: tuple[Node, ...], model: ModelShape, work: Workload, cell: Cell, role: Role
) -> _Passes:
    rows, width = cell.micro_batch_rows, cell.draft_len + 1
    rounds, context = decode_rounds(work, cell.draft_len), mean_context(work)
    tokens = rows * prefill_tokens(work)
    prefill = [prefill_layer_s(n, model, tokens, work.prompt_tokens.mean) for n in nodes]
    decode = [decode_layer_s(n, model, rows, context, width) for n in nodes]
    beside = [(1.0 + rounds) * n.step_s for n in nodes]
    if Role.LAST in role:
        heads = [head_s(n, model, rows) + rounds * head_s(n, model, rows * width) for n in nodes]
        beside = [a + b for a, b in zip(beside, heads, strict=True)]
    return _Passes(_column(prefill), _column(decode), _column(beside))


def _column(values: list[float]) -> Floats:
    return np.array(values, np.float64)[:, None]


def _room_beside(node: Node) -> float:
    """Bytes beside the device's that layers stream from; none where they cannot."""
    # A disk holds the whole model already, and may hold a part of it twice.
    streams = node.stream_bytes_per_s or node.kv_stream_bytes_per_s
    return (node.host_bytes or np.inf) if streams else 0.0


def _layers_to_offload(
    nodes: tuple[Node, ...],
    model: ModelShape,
    work: Workload,
    cell: Cell,
    role: Role,
    k: Floats,
    parked: float,
) -> Floats:
    """Fewest of k layers whose weights must stream, shape (n, k); infinite where none suffice."""
    memory = _column([n.memory_bytes for n in nodes])
    host = _column([_room_beside(n) for n in nodes])
    stream = _column([n.stream_bytes_per_s for n in nodes])
    kv = kv_layer_bytes(model, work, cell.rows)
    fixed = workspace_bytes(model, cell) + role_bytes(model, role)
    resident = resident_kv(parked, cell.in_flight) * kv
    over = k * (model.layer_bytes + resident) + fixed - memory
    omega = np.where(over <= 0, 0.0, np.ceil(over / model.layer_bytes) + STREAM_BUFFERS)
    beside = k * kv if parked else 0.0  # whatever may come to be parked has its place
    fits = (omega <= k) & (omega * model.layer_bytes + beside <= host)
    fits &= (stream > 0) | (omega == 0)
    return np.where(fits | ((omega == 0) & (parked == 0.0)), omega, np.inf)


def _busy_s(
    nodes: tuple[Node, ...],
    model: ModelShape,
    work: Workload,
    cell: Cell,
    passes: _Passes,
    k: Floats,
    omega: Floats,
    parked: float,
) -> Floats:
    """Seconds per row of k layers with `omega` of them and a fraction of the KV streamed."""
    fetched_kv = parked * cell.micro_batch_rows * mean_context(work)
    stream = _column([n.stream_bytes_per_s for n in nodes])
    kv_stream = _column([n.kv_stream_bytes_per_s for n in nodes])
    weights = omega * model.layer_bytes
    kv = fetched_kv * k * model.kv_bytes_per_token_layer
    rounds = decode_rounds(work, cell.draft_len)
    with np.errstate(divide="ignore", invalid="ignore"):  # no way to stream: masked by the caller
        prefill_stream = np.where(weights > 0, weights / stream, 0.0)
        round_stream = prefill_stream + np.where(kv > 0, kv / kv_stream, 0.0)
        life = np.maximum(k * passes.prefill_s, prefill_stream)
        life = life + rounds * np.maximum(k * passes.round_s, round_stream) + passes.beside_s
    return np.asarray(life / cell.micro_batch_rows, np.float64)


@dataclass(frozen=True, slots=True)
class LinkCost:
    """One way over one link with one codec, per row; floats or arrays of one shape."""

    occupied_s: Floats
    """Seconds that the link, or the codec beside it, is busy with a row."""
    hop_s: Floats
    """Seconds of a row's life that it spends on this link."""


def forward_link(
    latency_s: Floats,
    bytes_per_s: Floats,
    codec: CodecRate | None,
    model: ModelShape,
    work: Workload,
    cell: Cell,
) -> LinkCost:
    """A stage's activations on their way to the next: every position crosses once.

    The codec is a step of the pipeline beside the link, so the slower of the two counts; a row's
    own way pays encoding, the wire and decoding.
    """
    rounds = decode_rounds(work, cell.draft_len)
    positions = prefill_tokens(work) + rounds * (cell.draft_len + 1)
    raw = positions * model.activation_bytes_per_token
    coding_s = raw / codec.bytes_per_s if codec else 0.0
    wire = raw / (codec.ratio if codec else 1.0)
    return _link(latency_s, bytes_per_s, wire, coding_s, rounds, cell)


def return_link(latency_s: Floats, bytes_per_s: Floats, work: Workload, cell: Cell) -> LinkCost:
    """Token ids from the last stage back to the head."""
    rounds = decode_rounds(work, cell.draft_len)
    ids = work.output_tokens.mean * ID_BYTES
    return _link(latency_s, bytes_per_s, ids, 0.0, rounds, cell)


def _link(
    latency_s: Floats,
    bytes_per_s: Floats,
    row_bytes: float,
    coding_s: float,
    rounds: float,
    cell: Cell,
) -> LinkCost:
    passes = 1.0 + rounds
    sent = row_bytes + passes * (ROW_BYTES + FRAME_BYTES / cell.micro_batch_rows)
    with np.errstate(divide="ignore"):
        wire_s = sent / np.asarray(bytes_per_s, np.float64)
    hop_s = passes * latency_s + cell.micro_batch_rows * (wire_s + 2.0 * coding_s)
    return LinkCost(np.maximum(wire_s, coding_s), np.asarray(hop_s, np.float64))
