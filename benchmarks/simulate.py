"""Our plans beside the published methods', simulated on random heterogeneous clusters.

    python -m benchmarks.simulate [--clusters N]

Clusters have 4 to 8 nodes of four kinds in one to three regions, slow links between regions, and
memories of which others use a share. A job has 500 rows; answers end at 256 tokens at the latest, as a
job's `max_new_tokens` has it. Every plan runs in the same simulator on the same rows, with the ring's
own schedule and our leases (WS-RR with its own routing); where a method says nothing of micro-batches
in flight, it is given the best of our grid. Ours is *planned*: the solver's plan, from arithmetic alone;
or *rehearsed*: the first done of several plans on other rows than those of the race, the quick
baselines' own among them; or, on every tenth cluster, rehearsed with raw links, as no published method
has a codec. On every fifth the integer programs run too, for 20 s each. A race is three such jobs:
which rows turn out long decides a few per cent of each, so baselines that come near the first run nine,
and ours with them; a plan that takes twice as long as another runs one. Time counts from loading to the
last row's end.
"""

import argparse
import os
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import count, islice
from statistics import fmean, median
from typing import TypeAlias

from benchmarks.gains_picture import draw
from benchmarks.planner_clusters import MODEL_40, MODEL_126, random_cluster
from benchmarks.record import RESULTS, Claim, record
from planner.baselines import METHODS, PROGRAMS, baseline, policy_of
from planner.facts import Cluster, CodecRate, InfeasibleError, Lengths, ModelShape, Node, Workload
from planner.leases import Policy
from planner.plan import Pipeline, Plan
from planner.rehearse import candidates, rehearsed
from planner.rows import sample_rows
from planner.simulate import Simulated, simulate
from planner.solve import solve

WORK = Workload(
    500, Lengths(256, 700), Lengths(96, 250, 256), codec={"lossless": CodecRate(1.47, 8e8)}
)
RAW = replace(WORK, codec={})
LARGE_WORK = Workload(10_000, Lengths(128, 128), Lengths(128, 128))
TAILED_WORK = replace(WORK, rows=10_000)
SAMPLES, OTHERS = 3, 6
OURS, PLANNED, RAW_LINKS = "rehearsed", "planned", "rehearsed, raw links"
RAW_EVERY, PROGRAMS_EVERY = 10, 5
JOBS, MORE_JOBS = 3, 9
NEAR = 1.04
"""A plan that takes up to so many times as long as the first is not told from it by three jobs."""
FAR_BEHIND = 2.0
"""A plan that takes so much longer than the first for one job is spared the others."""


_Key: TypeAlias = tuple[tuple[Pipeline, ...], Policy]
"""What decides how a plan runs."""


@dataclass(frozen=True, slots=True)
class Race:
    """What every plan came to on one cluster; methods that form no pipeline are missing."""

    seed: int
    runs: dict[str, tuple[Simulated, ...]]
    """By plan, its run of every job."""
    stopped: tuple[str, ...]
    """Integer programs that ran out of time."""
    predicted_s: float
    """When the planned plan says that a job is done."""

    @property
    def best(self) -> str:
        """The baseline that is done first; of those that ran the most jobs, if some came near."""
        ran = [method for method in METHODS if method in self.runs]
        most = max(len(self.runs[method]) for method in ran)
        return min((m for m in ran if len(self.runs[m]) == most), key=self.finish_s)

    @property
    def best_leased(self) -> str:
        """The same of those whose rows wait in one queue: the others' latencies are of another kind."""
        leased = [m for m in METHODS if m in self.runs and policy_of(m) != "ws-rr"]
        return min(leased, key=self.finish_s)

    def finish_s(self, plan: str, jobs: int | None = None) -> float:
        """Mean seconds of the jobs that the plan ran, or of the first few of them."""
        return fmean(run.finish_s for run in self.runs[plan][:jobs])

    def latency_s(self, plan: str) -> float:
        """Mean seconds of a row."""
        return fmean(run.mean_latency_s for run in self.runs[plan])

    def gain(self, ours: str, theirs: str | None = None) -> float:
        """Tokens per second over a baseline's, or the best one's, on the same rows."""
        theirs = theirs or self.best
        return self.finish_s(theirs) / self.finish_s(ours, len(self.runs[theirs]))

    def worst_job(self, ours: str) -> float:
        """The same in the job that suits us least, each against the best baseline that ran it."""
        methods = [method for method in METHODS if method in self.runs]
        jobs = [
            [self.runs[m][job] for m in methods if job < len(self.runs[m])] for job in range(JOBS)
        ]
        return min(
            min(run.finish_s for run in runs) / self.runs[ours][job].finish_s
            for job, runs in enumerate(jobs)
            if runs
        )


def shrunk(cluster: Cluster, seed: int) -> Cluster:
    """The same cluster with smaller memories: shares of machines that others use too."""
    pick = random.Random(seed)
    nodes: list[Node] = [
        replace(n, memory_bytes=n.memory_bytes * pick.uniform(0.3, 1.0)) for n in cluster.nodes
    ]
    return replace(cluster, nodes=tuple(nodes))


def race(seed: int) -> Race | None:
    """One cluster's runs; None where nothing fits, or no baseline does."""
    cluster = shrunk(random_cluster(seed, 4 + seed % 5, 1 + seed % 3), seed)
    drawn = [sample_rows(WORK, seed + 10_000 * (i + 1)) for i in range(SAMPLES + OTHERS)]
    samples, others = drawn[:SAMPLES], drawn[SAMPLES:]
    try:
        tried = candidates(cluster, MODEL_40, WORK)
    except InfeasibleError:
        return None
    best = rehearsed(cluster, MODEL_40, WORK, samples, others=others, plans=tried)
    plans = {PLANNED: tried[0], OURS: best}
    if seed % RAW_EVERY == 0:
        plans[RAW_LINKS] = rehearsed(cluster, MODEL_40, RAW, samples, others=others)
    for method in METHODS:
        if method in PROGRAMS and seed % PROGRAMS_EVERY:
            continue
        try:
            # WS-RR is a routing: its placement is CG-BP's.
            same = plans.get("cg-bp") if method == "ws-rr" else None
            plans[method] = same or baseline(method, cluster, MODEL_40, RAW)
        except InfeasibleError:
            continue
    if not any(method in plans for method in METHODS):
        return None
    stopped = [name for name, plan in plans.items() if f"{name}: stopped" in "".join(plan.basis)]
    return Race(seed, _runs(cluster, plans, seed), tuple(stopped), plans[PLANNED].finish_s)


def _runs(cluster: Cluster, plans: dict[str, Plan], seed: int) -> dict[str, tuple[Simulated, ...]]:
    """Every plan's runs of the jobs; plans that are the same share theirs."""
    jobs = [sample_rows(WORK, seed + 1_000_000 * job) for job in range(MORE_JOBS)]
    keys = {name: (plan.pipelines, policy_of(name)) for name, plan in plans.items()}
    ours = {keys[name] for name in _OURS if name in plans}
    runs: dict[_Key, list[Simulated]] = {key: [] for key in keys.values()}
    by_key = {keys[name]: (plan, policy_of(name)) for name, plan in plans.items()}
    racing = set(runs)
    for number, rows in enumerate(jobs):
        if number == 1:
            racing = _within(FAR_BEHIND, runs)
        elif number == JOBS:
            near = _within(NEAR, {key: runs[key] for key in racing})
            racing = near | ours if near - ours else set()
        for key in racing:
            plan, policy = by_key[key]
            runs[key].append(simulate(plan, cluster, MODEL_40, WORK, rows=rows, policy=policy))
    return {name: tuple(runs[key]) for name, key in keys.items()}


def _within(times: float, runs: Mapping[_Key, Sequence[Simulated]]) -> set[_Key]:
    """Plans that take at most so many times as long as the first one."""
    ends_s = {key: fmean(run.finish_s for run in ran) for key, ran in runs.items()}
    return {key for key, end_s in ends_s.items() if end_s <= times * min(ends_s.values())}


def races(clusters: int, until_s: float) -> Iterator[Race]:
    """The first so many clusters on which there is a race, on all cores, as time allows."""
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        seeds = islice(count(), clusters + clusters // 4 + 10)
        found = (run for run in pool.map(race, seeds) if run is not None)
        for run in islice(found, clusters):
            sys.stderr.write(f"cluster {run.seed}: {run.gain(OURS):.3f} of {run.best}\n")
            yield run
            if time.monotonic() > until_s:
                break
        pool.shutdown(wait=True, cancel_futures=True)


def main() -> None:
    """Simulate, draw and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=30.0, help="race no longer than that")
    given = parser.parse_args()
    wall_s = time.monotonic()
    found = list(races(given.clusters, wall_s + 60.0 * given.minutes))
    gains = {ours: [run.gain(ours) for run in found if ours in run.runs] for ours in _OURS}
    draw(RESULTS / "simulate.png", gains)
    claims = [*_compared(found, gains), *_predicted(found), *_by_method(found), *_speed()]
    minutes = (time.monotonic() - wall_s) / 60.0
    claims.append(Claim("clusters raced", len(found), "clusters", 200))
    record("simulate", [*claims, Claim("the whole benchmark", minutes, "minutes", limit=30.0)])


_OURS = (OURS, PLANNED, RAW_LINKS)


def _compared(found: list[Race], gains: dict[str, list[float]]) -> list[Claim]:
    claims = []
    for ours, unsorted in gains.items():
        ordered = sorted(unsorted)
        name = f"{len(ordered)} clusters of 4-8 nodes, 500 rows: {ours}, over the best baseline"
        target = 0.99 if ours == OURS else None
        claims.append(Claim(f"{name}, worst", ordered[0], "ratio", target))
        claims.extend(
            Claim(f"{name}, {q} %", ordered[len(ordered) * q // 100], "ratio")
            for q in (5, 10, 25, 50, 75, 90)
        )
        near = fmean(gain >= 0.99 for gain in ordered)
        claims.append(Claim(f"{name}, share not beaten by over 1 %", near, "share"))
    worst = min(run.worst_job(OURS) for run in found)
    claims.append(Claim("one job alone: rehearsed over its best baseline, worst", worst, "ratio"))
    for ours in (OURS, PLANNED):
        slower = median(run.latency_s(ours) / run.latency_s(run.best_leased) for run in found)
        name = f"mean row latency, {ours} over the best baseline that leases, median"
        claims.append(Claim(name, slower, "ratio"))
    return claims


def _predicted(found: list[Race]) -> list[Claim]:
    """How near the planned plans' own word of when they are done comes."""
    ratios = sorted(run.predicted_s / run.finish_s(PLANNED) for run in found)
    return [
        Claim(
            f"planned: predicted over simulated time, {q} %",
            ratios[len(ratios) * q // 100],
            "ratio",
        )
        for q in (0, 5, 50, 95)
    ] + [Claim("planned: predicted over simulated time, most", ratios[-1], "ratio")]


def _by_method(found: list[Race]) -> list[Claim]:
    claims = []
    for method in METHODS:
        ran = [run for run in found if method in run.runs]
        if not ran:
            continue
        stopped = sum(method in run.stopped for run in ran)
        words = f", {stopped} of them stopped after 20 s" if method in PROGRAMS else ""
        gain = median(run.gain(OURS, method) for run in ran)
        slower = median(run.latency_s(OURS) / run.latency_s(method) for run in ran)
        claims.append(Claim(f"rehearsed over {method}, median of {len(ran)}{words}", gain, "ratio"))
        queued = ", whose rows wait at their pipelines" if policy_of(method) == "ws-rr" else ""
        name = f"mean row latency, rehearsed over {method}{queued}, median"
        claims.append(Claim(name, slower, "ratio"))
    return claims


def _speed() -> list[Claim]:
    """CPU seconds to simulate 10,000 rows on 24 nodes, equal and unequal, and 1,000 on 1,000."""
    few = replace(LARGE_WORK, rows=1_000)
    return [
        *_speed_on(random_cluster(5, 24, 2), MODEL_40, LARGE_WORK, 60.0),
        *_speed_on(random_cluster(5, 24, 2), MODEL_40, TAILED_WORK, 60.0),
        *_speed_on(random_cluster(7, 1000, 10), MODEL_126, few, None),
    ]


def _speed_on(
    cluster: Cluster, model: ModelShape, work: Workload, limit_s: float | None
) -> list[Claim]:
    plan = solve(cluster, model, work)
    start = time.process_time()
    run = simulate(plan, cluster, model, work)
    took_s = time.process_time() - start
    used = sum(len(pipeline.stages) for pipeline in plan.pipelines)
    mean, p95 = work.output_tokens.mean, work.output_tokens.p95
    length = f"{mean:g} tokens" + (f", 95 % up to {p95:g}" if p95 > mean else "")
    name = f"{len(cluster.nodes):,} nodes ({used} used), {work.rows:,} rows of {length}"
    return [
        Claim(f"{name}: CPU time to simulate", took_s, "s", limit=limit_s),
        Claim(f"{name}: predicted over simulated time", plan.finish_s / run.finish_s, "ratio"),
    ]


if __name__ == "__main__":
    main()
