"""What the planner's simulator expects of a lap round timed stages, from the same facts."""

from benchmarks.ring_arithmetic import HIDDEN, stage_s
from benchmarks.ring_hosts import Lap
from planner.facts import Cluster, LayerTimes, Lengths, Link, ModelShape, Node, Workload
from planner.plan import LinkPlan, Pipeline, Plan, StagePlan
from planner.rows import Row
from planner.simulate import Simulated, simulate
from stages.codec import RAW

_STEPS = (1, 8, 32, 64)
_AMPLE = 1e15


def forecast_tokens_per_s(lap: Lap) -> float:
    """Output tokens a second of the whole lap, its first and last rounds included."""
    return _played(lap).tokens_per_s


def forecast_steady_rows_per_s(lap: Lap) -> float:
    """Rows' steps a second of rows of equal quotas, between the rounds that `Ran.steady_rows_per_s`
    counts: past the first ones, and until the first rows end."""
    sent_s = [event.at_s for event in _played(lap).trace if event.what == "step"]
    first, last = lap.warm_rounds * lap.slots - 1, len(sent_s) - 1 - lap.slots
    return lap.slot_rows * (last - first) / (sent_s[last] - sent_s[first])


def _played(lap: Lap) -> Simulated:
    """The lap, event by event; its wires are as fast from the first byte on."""
    names = [f"n{number}" for number in range(len(lap.paces))]
    wire = Link("", "", lap.path.delay_s, lap.path.rate_bit_per_s / 8)
    nodes = tuple(_node(name, pace) for name, pace in zip(names, lap.paces, strict=True))
    stages = tuple(StagePlan(name, at, at + 1) for at, name in enumerate(names))
    ends = zip(names, [*names[1:], names[0]], strict=True)
    links = tuple(LinkPlan(here, there, RAW) for here, there in ends)
    pipeline = Pipeline(stages, links, lap.slot_rows, lap.slots)
    model = ModelShape(
        layers=len(names), hidden=HIDDEN, layer_bytes=1.0, kv_bytes_per_token_layer=1.0,
        activation_value_bytes=2, embedding_bytes=0.0, head_bytes=0.0, flop_per_token_layer=1.0,
    )  # fmt: skip
    outputs = Lengths(sum(lap.quotas) / len(lap.quotas), float(max(lap.quotas)))
    prompts = lap.prompts or (1,) * len(lap.quotas)
    prompt = Lengths(sum(prompts) / len(prompts), float(max(prompts)))
    return simulate(
        Plan((pipeline,), 0.0, 0.0, 0.0, 0.0, ""),
        Cluster(nodes, default_link=wire),
        model,
        Workload(len(lap.quotas), prompt, outputs),
        rows=[
            Row(tokens, quota, quota=quota)
            for tokens, quota in zip(prompts, lap.quotas, strict=True)
        ],
        trace=True,
    )


def _node(name: str, pace: float) -> Node:
    decode = tuple((rows, 1, pace * stage_s(rows)) for rows in _STEPS)
    prefill = tuple((tokens, pace * stage_s(tokens)) for tokens in _STEPS)
    return Node(name, _AMPLE, _AMPLE, _AMPLE, layer_s=LayerTimes(prefill, decode))
