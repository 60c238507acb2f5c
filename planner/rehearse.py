"""The plan that wins a rehearsal: candidates are simulated on sampled rows, and the first one done wins.

The solver maximises a steady rate. A finite job also has a start and a tail, and steps that jitter;
these decide between plans whose rates are close, and only a simulation knows them.
"""

from dataclasses import replace

from planner.baselines import METHODS, baseline
from planner.facts import Cluster, InfeasibleError, ModelShape, Workload
from planner.plan import Plan
from planner.problem import cell_of, judged, order_of, problem
from planner.ring import Found
from planner.simulate import simulate
from planner.solve import plan_of, solve

REHEARSED_ROWS = 1_000
"""Rows of a rehearsal at most: beyond, start and tail no longer decide."""


def rehearsed(cluster: Cluster, model: ModelShape, workload: Workload, seed: int) -> Plan:
    """The best by simulation of the solver's plan, its fastest pipelines alone, and all baselines.

    Raises:
        InfeasibleError: the facts are impossible, or nothing fits; the message has the numbers.
    """
    plans = candidates(cluster, model, workload)
    sample = replace(workload, rows=min(workload.rows, REHEARSED_ROWS))
    ends = [simulate(plan, cluster, model, sample, seed=seed).finish_s for plan in plans]
    best = plans[ends.index(min(ends))]
    return replace(best, bound_tokens_per_s=plans[0].bound_tokens_per_s)


def candidates(cluster: Cluster, model: ModelShape, workload: Workload) -> list[Plan]:
    """The solver's plan first, then the others worth a rehearsal."""
    own = solve(cluster, model, workload)
    given = problem(cluster, model, workload)
    rings = [
        Found(cell_of(pipeline), order_of(given, pipeline), judged(given, pipeline))
        for pipeline in own.pipelines
    ]
    plans = [own, *(plan_of(given, rings[:count], 0.0) for count in range(1, len(rings)))]
    for method in METHODS:
        try:
            plans.append(baseline(method, cluster, model, workload))
        except InfeasibleError:
            continue
    return plans
