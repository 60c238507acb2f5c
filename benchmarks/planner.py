"""How fast and how good the planner is: exact, grown, certified, replanned.

    python -m benchmarks.planner [--clusters N]

Seconds are CPU seconds of this process (one thread), so that a busy machine does not count.
"""

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import fmean, median
from typing import TypeVar

from benchmarks.planner_clusters import (
    MODEL_32,
    MODEL_40,
    MODEL_80,
    MODEL_126,
    WORK,
    random_cluster,
    shared_cluster,
)
from benchmarks.record import Claim, record
from planner.bounds import capped_compute_bound
from planner.exact import solve_exactly
from planner.facts import Cluster, Workload
from planner.grid import cells
from planner.large import STEADY, solve_large
from planner.milp_bound import flow_bound
from planner.problem import Found, Problem, problem
from planner.replan import replan
from planner.replica_exact import REPLICA_NODES
from planner.simulate import simulate
from planner.solve import best_rings, floor_of_cells, plan_of, solve

T = TypeVar("T")
# So many rows that no pipeline is dropped for its tail: gaps are of rates.
LONG = replace(WORK, rows=10**6)
PROGRAM_S = 20.0
WORTH = 1.01
"""Gains above this are worth a simulation."""


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result, and CPU seconds."""
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def rate(rings: list[Found]) -> float:
    """Rows per second of all rings."""
    return sum(ring.rows_per_s for ring in rings)


def small(clusters: int) -> list[Claim]:
    """Exact and grown on 12 nodes, two models."""
    exact_s, grown_s, of_exact = [], [], []  # the large method as it is for 100 nodes
    for seed in range(clusters):
        for model in (MODEL_80, MODEL_40):
            given = problem(random_cluster(seed, 12, 3), model, WORK)
            exact, seconds = timed(lambda given=given: solve_exactly(given))  # type: ignore[misc]
            grown, grown_seconds = timed(lambda given=given: solve_large(given, effort=STEADY))  # type: ignore[misc]
            exact_s.append(seconds)
            grown_s.append(grown_seconds)
            of_exact.append(rate(grown) / rate(exact))
    within = sum(ratio >= 0.99 for ratio in of_exact) / len(of_exact)
    count = f"{len(exact_s)} clusters of 12 nodes, 40 and 80 layers"
    return [
        Claim(
            f"{count}: exact solver, median; 2 s over this is the target",
            2.0 / median(exact_s),
            "x",
            1.0,
        ),
        Claim(
            f"{count}: exact solver, slowest; 10 s over this is the target",
            10.0 / max(exact_s),
            "x",
            1.0,
        ),
        Claim(f"{count}: exact solver, median", median(exact_s), "s"),
        Claim(f"{count}: large method over exact, median", median(of_exact), "ratio", 0.99),
        Claim(f"{count}: large method over exact, worst", min(of_exact), "ratio", 0.99),
        Claim(f"{count}: large method within 1 % of exact", within, "fraction", 1.0),
        Claim(f"{count}: large method, median", median(grown_s), "s"),
    ]


def hundred(clusters: int) -> list[Claim]:
    """The certified gap on 100 nodes in 8 regions."""
    gaps, seconds = [], []
    for seed in range(clusters):
        cluster = random_cluster(1000 + seed, 100, 8)
        plan, took = timed(lambda cluster=cluster: solve(cluster, MODEL_80, LONG))  # type: ignore[misc]
        print(f"cluster {seed} of 100 nodes: {took:.1f} s, gap {plan.gap:.1%}", flush=True)
        gaps.append(plan.gap)
        seconds.append(took)
    count = f"{clusters} clusters of 100 nodes, 80 layers"
    return [
        Claim(f"{count}: 1 - certified gap, median", 1 - median(gaps), "fraction", 0.9),
        Claim(f"{count}: 1 - certified gap, worst", 1 - max(gaps), "fraction"),
        Claim(f"{count}: solve, median", median(seconds), "s"),
        Claim(f"{count}: solve, slowest", max(seconds), "s"),
    ]


def thousand() -> list[Claim]:
    """1,000 nodes, 126 layers, all cells."""
    cluster = random_cluster(7, 1000, 80)
    plan, took = timed(lambda: solve(cluster, MODEL_126, LONG))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    name = "1,000 nodes, 126 layers, full grid"
    return [
        Claim(f"{name}: 10 s over the solver's time", 10.0 / took, "x", 1.0),
        Claim(f"{name}: solver", took, "s"),
        Claim(f"{name}: 1 GB over the peak memory", 1.0 / memory, "x", 1.0),
        Claim(f"{name}: 1 - certified gap", 1 - plan.gap, "fraction"),
    ]


def leaving() -> list[Claim]:
    """Replanning after one node of each pipeline left, 12 and 100 nodes."""
    claims = []
    for nodes in (12, 100):
        cluster = random_cluster(3, nodes, max(3, nodes // 12))
        # As many rows as keep all pipelines, and so few that some nodes stand idle.
        seconds = [took for work in (LONG, WORK) for took in _replans(cluster, work)]
        name = f"{nodes} nodes: 1 s over the time to replan after one left"
        claims.append(Claim(f"{name}, median of {len(seconds)}", 1 / median(seconds), "x"))
        claims.append(Claim(f"{name}, slowest", 1 / max(seconds), "x", 1.0))
    return claims


def _replans(cluster: Cluster, work: Workload) -> Iterator[float]:
    plan = solve(cluster, MODEL_80, work)
    for pipeline in plan.pipelines:
        gone = pipeline.stages[0].node
        left = replace(cluster, nodes=tuple(n for n in cluster.nodes if n.name != gone))
        yield timed(lambda left=left: replan(plan, left, MODEL_80, work))[1]  # type: ignore[misc]


def replicated(clusters: int) -> list[Claim]:
    """What replicated stages add where links are slow: exact on 5 nodes, searched for on 12."""
    claims = []
    for nodes, count in ((REPLICA_NODES, clusters), (12, max(clusters // 2, 1))):
        gains, seconds, played = [], [], []
        for seed in range(count):
            given = problem(shared_cluster(seed, nodes), MODEL_32, WORK)
            tried = cells(given.work)
            plain = best_rings(given, tried)
            if not plain:
                continue
            with_them = partial(best_rings, given, tried, replicate=True)
            rings, took = timed(with_them)
            gains.append(rate(rings) / rate(plain))
            seconds.append(took)
            if gains[-1] > WORTH:
                played.append(_finish_s(given, plain) / _finish_s(given, rings))
        name = f"{len(gains)} clusters of {nodes} nodes, shares of machines, 32 layers: replicas"
        claims += [
            Claim(f"{name}, share where they add over 1 %", len(played) / len(gains), "share"),
            Claim(f"{name}, rate over the best without, mean", fmean(gains), "ratio", 1.0),
            Claim(f"{name}, rate over the best without, most", max(gains), "ratio"),
            Claim(f"{name}, solver, median", median(seconds), "s"),
            Claim(f"{name}, solver, slowest", max(seconds), "s"),
        ]
        if played:
            claims.append(Claim(f"{name} that add, simulated, mean", fmean(played), "ratio"))
    return claims


def programs(clusters: int) -> list[Claim]:
    """How near the integer program's bound comes to the exact rate, beside that of all compute."""
    of_program, of_compute = [], []
    for seed in range(clusters):
        given = problem(random_cluster(seed, 5, 2), replace(MODEL_40, layers=12), WORK)
        tried = cells(given.work)
        floor = floor_of_cells(given, tried)
        assert floor is not None, "there are cells"
        exact = rate(solve_exactly(given, tried))
        of_program.append(exact / flow_bound(floor, PROGRAM_S))
        of_compute.append(exact / capped_compute_bound(floor))
    name = f"{clusters} clusters of 5 nodes, 12 layers: exact rate"
    return [
        Claim(f"{name} over the integer program's bound, mean", fmean(of_program), "ratio"),
        Claim(f"{name} over the integer program's bound, greatest", max(of_program), "ratio"),
        Claim(f"{name} over what all nodes compute, mean", fmean(of_compute), "ratio"),
    ]


def _finish_s(given: Problem, rings: list[Found]) -> float:
    """When a job of some rows is done in the simulator."""
    some = replace(given.work, rows=2_000)
    return simulate(plan_of(given, rings, 0.0), given.cluster, given.model, some).finish_s


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", type=int, default=50, help="of 100 nodes; a tenth of 12")
    clusters = parser.parse_args().clusters
    # Memory first: the peak of the process is the peak of this case only while it is the first.
    claims = thousand() + small(max(clusters // 5, 1)) + hundred(clusters) + leaving()
    claims += replicated(max(clusters // 2, 2))
    # It needs HiGHS; without, the rest is worth recording all the same.
    if find_spec("highspy"):
        claims += programs(max(clusters // 10, 1))
    record("planner", claims)


if __name__ == "__main__":
    main()
