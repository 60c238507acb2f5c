"""From a running plan and a changed cluster to the next plan, and whether changing pays.

Pipelines that the change leaves alone keep running; where a replica left, the others of its layers take
its slots over. The other pipelines' nodes, and those that came, form new rings; on few nodes a plan made
from nothing replaces it all if it ends the rows sooner, with the layers that it must load and the keys
and values it must compute again counted.
"""

from dataclasses import dataclass, replace

from planner.exact import solve_exactly
from planner.facts import Cluster, ModelShape, Workload
from planner.finish import running_s
from planner.grid import cells
from planner.infeasible import why_none
from planner.large import HASTY, solve_large
from planner.plan import Pipeline, Plan, StagePlan
from planner.problem import Found, Problem, among, problem
from planner.replicas import in_runs, shared
from planner.ring import rings_of
from planner.solve import best_rings, capped_bound, compute_bound, plan_of

EXACT_SOON = 10
"""So many nodes are planned exactly at once; more would keep a broken run waiting for seconds."""
FRESH_NODES = 8
"""Up to so many nodes a plan from nothing is made too: it takes a fraction of a second."""


@dataclass(frozen=True, slots=True)
class Change:
    """The next plan, and what going there costs."""

    plan: Plan
    layers_to_load: dict[str, int]
    """Layers by node that it does not hold already."""
    load_s: float
    """Until the slowest node has read them; 0 where disks are unknown."""
    rows_prefilled_again: int
    """Rows in flight whose keys and values are lost."""
    finish_s: float
    """Until the remaining rows are answered, all of that included."""
    keep_s: float
    """The same if the running plan's pipelines that still can were kept; infinite of none."""

    @property
    def pays(self) -> bool:
        """Whether changing finishes the remaining rows sooner than staying."""
        return self.finish_s < self.keep_s


def replan(running: Plan, cluster: Cluster, model: ModelShape, remaining: Workload) -> Change:
    """The best way on for the remaining rows after nodes left, joined, slowed or sped up.

    Raises:
        InfeasibleError: nothing fits any more; the message says what is missing.
    """
    given = problem(cluster, model, remaining)
    tried = cells(remaining)
    alive = rings_of(given, running)
    closed = alive + rings_of(given, replace(running, pipelines=_closed_up(given, running)))
    patched = closed + _rings_of_the_rest(given, closed)
    dealt = any(ring.dealt for ring in closed)
    bound = (capped_bound if dealt else compute_bound)(given, tried)
    tries = [alive, patched] if len(closed) == len(alive) else [alive, closed, patched]
    keep_s = running_s(given, alive)
    options = [_change(given, running, rings, bound, keep_s) for rings in tries if rings]
    if not options or len(given.nodes) <= FRESH_NODES:
        fresh = best_rings(given, tried)
        options.extend([_change(given, running, fresh, bound, keep_s)] if fresh else [])
    if not options:
        raise why_none(given, tried)
    return min(options, key=lambda change: change.finish_s)


def _closed_up(given: Problem, running: Plan) -> tuple[Pipeline, ...]:
    """Pipelines that lost replicas of layers which others still hold: those take the slots over."""
    there = {node.name for node in given.nodes}
    closed = []
    for pipeline in running.pipelines:
        left = [[s for s in stages if s.node in there] for stages in pipeline.ranges]
        if all(left) and sum(map(len, left)) < len(pipeline.stages):
            stages = [stage for each in left for stage in _taken_over(each, pipeline.in_flight)]
            closed.append(replace(pipeline, stages=tuple(stages)))
    return tuple(closed)


def _taken_over(stages: list[StagePlan], in_flight: int) -> list[StagePlan]:
    """Replicas of one layer range with all slots dealt to them, in the shares that they had."""
    counts = shared(in_flight, [float(len(stage.slots) or in_flight) for stage in stages])
    alone = len(stages) == 1
    return [
        replace(stage, slots=() if alone else slots)
        for stage, slots in zip(stages, in_runs(counts), strict=True)
    ]


def _rings_of_the_rest(given: Problem, alive: list[Found]) -> list[Found]:
    used = {node for ring in alive for node in ring.order}
    rest = tuple(i for i in range(len(given.nodes)) if i not in used)
    if not rest:
        return []
    own = among(given, rest)
    exact = len(rest) <= EXACT_SOON
    rings = solve_exactly(own) if exact else solve_large(own, effort=HASTY)
    return [Found(r.cell, tuple(rest[i] for i in r.order), r.split) for r in rings]


def _change(
    given: Problem, running: Plan, rings: list[Found], bound_rows_per_s: float, keep_s: float
) -> Change:
    plan = plan_of(given, rings, bound_rows_per_s)
    load = {
        stage.node: new
        for pipeline in plan.pipelines
        for stage in pipeline.stages
        if (new := stage.layers - _kept_layers(running, stage))
    }
    load_s = max((_load_s(given, name, count) for name, count in load.items()), default=0.0)
    lost = [p for p in running.pipelines if p not in plan.pipelines]
    names = {node.name for node in given.nodes}
    given_up = [p for p in lost if all(stage.node in names for stage in p.stages)]
    # A row given up costs at worst a whole row again; those of dead nodes are lost either way.
    again_s = _rows_in(given_up, given) / plan.rows_per_s
    finish = load_s + again_s + running_s(given, rings)
    return Change(plan, load, load_s, _rows_in(lost, given), finish, keep_s)


def _rows_in(pipelines: list[Pipeline], given: Problem) -> int:
    in_flight = sum(p.micro_batch_rows * p.in_flight for p in pipelines)
    return min(in_flight, given.work.rows)


def _kept_layers(running: Plan, stage: StagePlan) -> int:
    """Layers of a new stage that its node holds already."""
    kept = [
        range(max(old.first_layer, stage.first_layer), min(old.end_layer, stage.end_layer))
        for pipeline in running.pipelines
        for old in pipeline.stages
        if old.node == stage.node
    ]
    return sum(len(layers) for layers in kept)


def _load_s(given: Problem, name: str, layers: int) -> float:
    disk = given.cluster.node(name).disk_bytes_per_s
    return layers * given.model.layer_bytes / disk if disk > 0 else 0.0
