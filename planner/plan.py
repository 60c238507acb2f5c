"""A plan: all pipelines and their settings, what it will cost, and how sure that is."""

from dataclasses import asdict, dataclass
from itertools import groupby

RAW = "raw"
"""The codec of a link that carries activations as they are."""


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Contiguous layers [first_layer, end_layer) on one node."""

    node: str
    first_layer: int
    end_layer: int
    weights_offloaded: int = 0
    """How many of its layers live in host memory or on disk, and stream through the device's."""
    kv_offloaded: float = 0.0
    """Share of its KV that a round fetches from where it is parked: see cost.resident_kv."""
    slots: tuple[int, ...] = ()
    """The pipeline's slots that it computes, where replicas share them; empty: all."""

    @property
    def layers(self) -> int:
        return self.end_layer - self.first_layer


@dataclass(frozen=True, slots=True)
class LinkPlan:
    """The link that leaves one stage of a pipeline; the last one returns to the head."""

    source: str
    target: str
    codec: str = RAW


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Stages that together hold the model, in ring order, and how work goes round them.

    Replicas stand side by side: stages with the same layers, each with slots of its own. A slot's rows
    pass the same replica on every round, whose link to the next carries the slots that both have.
    """

    stages: tuple[StagePlan, ...]
    links: tuple[LinkPlan, ...]
    micro_batch_rows: int
    in_flight: int
    """Micro-batches that circulate at once: the ring's slots."""
    draft_len: int = 0

    @property
    def ranges(self) -> tuple[tuple[StagePlan, ...], ...]:
        """The stages by layer range, in ring order; several of one range are replicas."""
        found = groupby(self.stages, key=lambda stage: stage.first_layer)
        return tuple(tuple(stages) for _, stages in found)

    @property
    def replicated(self) -> bool:
        """Whether any layer range has replicas: a ring must then deal slots to them."""
        return any(stage.slots for stage in self.stages)


@dataclass(frozen=True, slots=True)
class Plan:
    """What runs where, the predicted speed, and a bound that no plan over a grid can beat."""

    pipelines: tuple[Pipeline, ...]
    rows_per_s: float
    tokens_per_s: float
    finish_s: float
    bound_tokens_per_s: float
    binding: str
    """What limits the job, in the planner's words: a node, a link, memory, or what is in flight."""
    basis: tuple[str, ...] = ()
    """The facts that the plan rests on, a line each, for people."""
    bound_over: str = "without replicas"
    """The plans that the bound holds for."""
    grid: str = ""
    """The settings that the bound holds for, in words."""

    @property
    def gap(self) -> float:
        """How far from the optimum the plan may be at most, as a fraction of the bound."""
        return 1.0 - self.tokens_per_s / self.bound_tokens_per_s if self.bound_tokens_per_s else 0.0


def as_mapping(plan: Plan) -> dict[str, object]:
    """The plan as JSON shows it; a link's ends are its `from` and `to`; replicas have `slots`."""
    return {
        "pipelines": [
            {
                "stages": [_stage_mapping(stage) for stage in pipeline.stages],
                "links": [
                    {"from": link.source, "to": link.target, "codec": link.codec}
                    for link in pipeline.links
                ],
                "micro_batch_rows": pipeline.micro_batch_rows,
                "in_flight": pipeline.in_flight,
                "draft_len": pipeline.draft_len,
            }
            for pipeline in plan.pipelines
        ],
        "rows_per_s": plan.rows_per_s,
        "tokens_per_s": plan.tokens_per_s,
        "finish_s": plan.finish_s,
        "bound_tokens_per_s": plan.bound_tokens_per_s,
        "gap": plan.gap,
        "bound_over": plan.bound_over,
        "grid": plan.grid,
        "binding": plan.binding,
        "basis": plan.basis,
    }


def _stage_mapping(stage: StagePlan) -> dict[str, object]:
    return {key: value for key, value in asdict(stage).items() if key != "slots" or stage.slots}
