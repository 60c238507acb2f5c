"""One imagined pipeline: its ring, the way that its frames go, and the rows that it holds."""

import math
from dataclasses import dataclass

import numpy as np

from planner.cost import FRAME_BYTES, ID_BYTES, ROW_BYTES, kv_tokens
from planner.facts import Workload
from planner.kv_blocks import BLOCK_TOKENS
from planner.layer_times import head_s
from planner.leases import pace_of
from planner.plan import Pipeline
from planner.prefixes import SHARE_TOKENS
from planner.problem import Problem
from planner.rounds import CHUNKS_PER_STEP, draft_costs, stage_step_s
from planner.schedule import CHUNK_TOKENS, Ring, RingShape, Step
from planner.ways import Load, way_of

CONTEXT_GRAIN = 32
"""Mean contexts are rounded up to this, so that equal steps are costed once."""


@dataclass(slots=True)
class Flight:
    """A row in flight; its line counts its tokens."""

    number: int
    prompt_tokens: int
    """What must be prefilled: after a change, with the tokens that were made before."""
    left: int
    """Tokens still to make."""
    limit: int
    """Tokens that its KV blocks are granted for."""
    since_s: float
    """When it came, or was leased if it never waited to be."""
    context: int = 0
    """Tokens that its next step attends to."""
    first_s: float = float("nan")
    """When its first token was back."""


@dataclass(frozen=True, slots=True)
class _StepShape:
    """What a step costs by."""

    decodes: int
    context: int
    """Of the rows that decode, in the mean."""
    prefills: int
    samples: int
    width: int
    """Positions of a row that decodes: its next token's, and its drafts'."""

    @property
    def positions(self) -> int:
        """Positions that the LM head sees."""
        return self.samples + self.decodes * (self.width - 1)


class Line:
    """One pipeline: its ring, its frames' way, and the rows it holds; only the run moves it."""

    def __init__(
        self, given: Problem, pipeline: Pipeline, number: int, longest: int, starts_s: float
    ) -> None:
        self.given = given
        self.number = number
        self.pipeline = pipeline
        self.nodes = [given.cluster.node(stage.node) for stage in pipeline.stages]
        self.starts_s = starts_s
        self.way = way_of(given, pipeline, starts_s)
        self.ring = Ring(_ring_shape(given, pipeline, longest))
        self.pace = pace_of(given, pipeline)
        self.flights: dict[int, Flight] = {}
        """By sequence: the ring wants them numbered as they come."""
        self._sequences = 0
        self.wakes_s = float("inf")
        """When it must be looked at again; infinite while nothing can happen."""
        self._prefix = _prefix(given.work)
        self._drafts = _Drafts(given.work.acceptance, number)
        self._takes: dict[_StepShape, tuple[float, ...]] = {}

    def take(self, flight: Flight) -> None:
        """Queue a row in the ring."""
        sequence, self._sequences = self._sequences, self._sequences + 1
        flight.context = flight.prompt_tokens - 1
        marks = self._prefix[: flight.context // SHARE_TOKENS]
        self.ring.enqueue(sequence, flight.prompt_tokens, flight.limit, marks)
        self.flights[sequence] = flight

    def send(self, at_s: float) -> Step | None:
        """Send the next step round the ring; it is back when the head has its samples."""
        # With every slot in flight there is nothing to look for.
        step = self.ring.next_step() if self.way.in_flight < self.ring.shape.slots else None
        for sequence in self.ring.take_preempted():
            self.take(self._resumed(sequence))
        if step is None:
            return None
        shape = self._shape(step)
        forward = shape.decodes * shape.width + shape.prefills
        load = Load(
            self._stage_times(shape),
            raw_bytes=forward * self.given.model.activation_bytes_per_token,
            id_bytes=ID_BYTES * shape.positions,
            header_bytes=FRAME_BYTES + ROW_BYTES * len(step.spans),
        )
        self.way.send(at_s, step, load)
        return step

    def take_back(self, now_s: float) -> list[tuple[float, Flight]]:
        """Everything that is back by now; gives the rows that ended, and when."""
        ended: list[tuple[float, Flight]] = []
        flights = self.flights
        for at_s, step in self.way.back(now_s):
            done, held, draft_len = [], {}, self.ring.draft_len(step.slot)
            for span in step.spans:
                if span.samples:
                    flight = flights[span.sequence]
                    if flight.first_s != flight.first_s:  # not a number yet
                        flight.first_s = at_s
                    made = 1
                    if draft_len and span.decodes:
                        kept = min(self._drafts.held(draft_len), flight.left - 1)
                        held[span.sequence] = kept
                        made += kept
                    flight.left -= made
                    flight.context += made
                    if not flight.left:
                        done.append(span.sequence)
            self.ring.returned(step.slot, done, held)
            ended.extend((at_s, flights.pop(sequence)) for sequence in done)
        return ended

    def give_back(self, rows: int) -> list[Flight]:
        """Up to so many rows that it has not begun, for another pipeline."""
        unbegun = {n for n, flight in self.flights.items() if math.isnan(flight.first_s)}
        return [self.flights.pop(number) for number in self.ring.withdraw(rows, unbegun)]

    def give_up(self) -> list[Flight]:
        """The rows that it held, to be prefilled elsewhere with what they have made so far."""
        return [self._resumed(sequence) for sequence in list(self.flights)]

    def _resumed(self, sequence: int) -> Flight:
        """A sequence taken out, its tokens so far as the prompt that it comes again with."""
        flight = self.flights.pop(sequence)
        flight.prompt_tokens = flight.context + 1
        return flight

    def _shape(self, step: Step) -> _StepShape:
        decodes = total = prefills = samples = 0
        flights = self.flights
        for span in step.spans:
            samples += span.samples
            if span.decodes:
                decodes += 1
                total += flights[span.sequence].context
            else:
                prefills += span.tokens
        context = -(-total // (decodes * CONTEXT_GRAIN)) * CONTEXT_GRAIN if decodes else 0
        width = self.ring.draft_len(step.slot) + 1
        return _StepShape(decodes, context, prefills, samples, width)

    def _stage_times(self, key: _StepShape) -> tuple[float, ...]:
        if key not in self._takes:
            self._takes[key] = tuple(
                self._stage_s(i, key) + (self._head_s(i, key.positions) if key.samples else 0.0)
                for i in range(len(self.nodes))
            )
        return self._takes[key]

    def _head_s(self, stage: int, positions: int) -> float:
        """Seconds of the LM head, where it is."""
        model = self.given.model
        ends = self.pipeline.stages[stage].end_layer == model.layers
        return head_s(self.nodes[stage], model, positions) if ends else 0.0

    def _stage_s(self, stage: int, key: _StepShape) -> float:
        node, plan, model = self.nodes[stage], self.pipeline.stages[stage], self.given.model
        decodes, prompt = (key.decodes, key.context), self.given.work.prompt_tokens.mean
        return stage_step_s(node, plan, model, decodes, (key.prefills, prompt), key.width)


class _Drafts:
    """Draws how many drafts hold, by the workload's chances; mutable as its generator is."""

    def __init__(self, chances: tuple[float, ...], seed: int) -> None:
        self._all_hold = np.cumprod(chances)
        self._pick = np.random.default_rng(seed)

    def held(self, draft_len: int) -> int:
        """Drafts before the first refused one, of so many."""
        # The chance that the first i hold falls with i, so one draw decides all of them.
        return int(np.count_nonzero(self._all_hold[:draft_len] > self._pick.random()))


def _prefix(work: Workload) -> tuple[int, ...]:
    """Marks of the beginning that all prompts share, in the ring's units."""
    shared = work.prompt_tokens.mean * work.shared_prefix_fraction
    return tuple(range(int(shared) // SHARE_TOKENS))


def _ring_shape(given: Problem, pipeline: Pipeline, longest: int) -> RingShape:
    """The ring's settings: KV blocks for its rows as the plan has them, each row's last one begun."""
    rows = pipeline.micro_batch_rows * pipeline.in_flight
    blocks = rows + kv_tokens(given.work, rows) // BLOCK_TOKENS
    return RingShape(
        slots=pipeline.in_flight,
        slot_rows=pipeline.micro_batch_rows,
        blocks=int(max(blocks, -(-longest // BLOCK_TOKENS))),
        block_tokens=BLOCK_TOKENS,
        step_tokens=pipeline.micro_batch_rows + CHUNKS_PER_STEP * CHUNK_TOKENS,
        drafts=draft_costs(given, pipeline),
    )
