"""Published placements, against their own published examples and invariants."""

import contextlib
import itertools
import random

import pytest

from planner.baselines import METHODS, PROGRAMS, baseline
from planner.exact import solve_exactly
from planner.facts import InfeasibleError
from planner.placement import (
    Server,
    Sizes,
    Span,
    blocks_held,
    cg_bp,
    cg_bp_bound_s,
    chain_s,
    equal_split,
    gbp_cr,
    most_sessions,
    parallax,
    petals,
    petals_blocks,
    sessions_held,
    water_fill,
)
from planner.problem import problem
from planner.routing import route_s, shortest_route
from tests.planner_oracle import random_case

BLOOM_BLOCK = 1.3234e9
BLOOM_CACHE = 2 * 14_336 * (20 + 128) * 2
"""Bytes of one session in one block: 20 prompt tokens and 128 more."""


def a100(memory_bytes: float) -> Server:
    return Server("a100", memory_bytes, 0.1, 0.0032)


def servers(seed: int, count: int, equal_memory: bool = False) -> list[Server]:
    pick = random.Random(seed)
    memory = pick.uniform(20, 60)
    return [
        Server(
            f"s{i}",
            memory if equal_memory else pick.uniform(10, 90),
            pick.uniform(0.01, 0.3),
            pick.uniform(0.002, 0.05),
        )
        for i in range(count)
    ]


def test_80_gb_with_53_blocks_hold_21_sessions() -> None:
    sizes = Sizes(70, BLOOM_BLOCK, BLOOM_CACHE)
    assert sessions_held(a100(80e9), sizes, 53) == 21


@pytest.mark.parametrize(("memory", "blocks"), [(86.13e9, 53), (79.14e9, 49)])
def test_petals_places_53_or_49_bloom_blocks_on_an_a100(memory: float, blocks: int) -> None:
    assert petals_blocks(a100(memory), BLOOM_BLOCK, 14_336) == blocks


@pytest.mark.parametrize("seed", range(40))
def test_cg_bp_is_feasible_exactly_when_the_blocks_add_up(seed: int) -> None:
    pick = random.Random(seed)
    sizes = Sizes(pick.randint(4, 20), 4.0, 0.3)
    sessions = pick.randint(1, 12)
    crowd = servers(seed, pick.randint(1, 6))
    total = sum(blocks_held(s, sizes, sessions) for s in crowd)
    spans = cg_bp(crowd, sizes, sessions)
    assert (spans is not None) == (total >= sizes.blocks)
    if 1 <= sessions <= most_sessions(crowd, sizes):
        assert spans is not None


@pytest.mark.parametrize("seed", range(40))
def test_cg_bp_routes_stay_within_theorem_2(seed: int) -> None:
    pick = random.Random(seed)
    sizes, sessions = Sizes(pick.randint(4, 16), 4.0, 0.2), pick.randint(1, 8)
    crowd = servers(seed, pick.randint(2, 7))
    spans = cg_bp(crowd, sizes, sessions)
    if spans is None:
        return
    route = shortest_route(spans, sizes.blocks)
    assert route is not None
    assert route_s(route) <= cg_bp_bound_s(crowd, sizes, sessions) * (1 + 1e-9)


def test_conservative_placement_can_be_arbitrarily_worse_than_the_best() -> None:
    blocks = 6
    sizes = Sizes(blocks, 1.0, 1.0)
    # Each of L^2 servers could hold the whole model and one session; CG gives each one block.
    crowd = [Server(f"s{i}", blocks + blocks, 1.0, 0.0) for i in range(blocks**2)]
    spans = cg_bp(crowd, sizes, 2 * blocks - 1)
    assert spans is not None
    assert {span.blocks for span in spans} == {1}
    route = shortest_route(spans, blocks)
    assert route is not None
    assert route_s(route) == blocks * route_s(
        shortest_route([Span(crowd[0], 0, blocks)], blocks) or []
    )


@pytest.mark.parametrize("seed", range(25))
def test_chains_are_optimal_for_equal_memories(seed: int) -> None:
    pick = random.Random(seed)
    sizes, sessions = Sizes(pick.choice([4, 6]), 8.0, 0.5), 4
    crowd = servers(seed, pick.randint(2, 6), equal_memory=True)
    held = blocks_held(crowd[0], sizes, sessions)
    if not held:
        return
    per_chain = -(-sizes.blocks // held)
    if sizes.blocks % held:
        return  # with whole servers only, all chains have as many and the order is everything
    chains = gbp_cr(crowd, sizes, sessions)
    rate = sum(1 / chain_s(chain) for chain in chains)
    assert rate >= _best_total_rate(crowd, per_chain, held) * (1 - 1e-9)


def _best_total_rate(crowd: list[Server], per_chain: int, held: int) -> float:
    """Over all ways to form disjoint chains of whole servers."""
    time = {s.name: s.round_trip_s + s.block_s * held for s in crowd}
    best = 0.0
    for order in itertools.permutations(crowd):
        total = 0.0
        for i in range(0, len(order) - per_chain + 1, per_chain):
            total += 1 / sum(time[s.name] for s in order[i : i + per_chain])
        best = max(best, total)
    return best


def test_parallax_forms_two_equal_pipelines_of_its_own_example() -> None:
    groups = parallax((40, 40, 20, 20, 10, 10), 70)
    assert [[(40, 40, 20, 20, 10, 10)[i] for i in group] for group in groups] == [[40, 20, 10]] * 2


def test_water_filling_gives_layers_by_speed_within_capacity() -> None:
    assert water_fill((10, 10, 10), (1.0, 1.0, 2.0), 12) == [3, 3, 6]
    assert water_fill((10, 10, 4), (1.0, 1.0, 8.0), 12) == [4, 4, 4]


def test_petals_covers_the_worst_served_blocks_first() -> None:
    spans = petals(servers(0, 3), 8, (4, 4, 4))
    assert [(s.first, s.end) for s in spans[:2]] == [(0, 4), (4, 8)]


def test_equal_split_differs_by_at_most_one_layer() -> None:
    assert equal_split(3, 80) == [27, 27, 26]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_makes_whole_disjoint_pipelines_or_says_why_not(method: str) -> None:
    made = 0
    # Integer programs take a second each; the others are quick.
    for seed in range(3 if method in PROGRAMS else 20):
        cluster, model, work = random_case(seed, 3 if method in PROGRAMS else 5, 8)
        try:
            plan = baseline(method, cluster, model, work)
        except InfeasibleError as error:
            assert method in str(error)
            continue
        made += 1
        nodes = [stage.node for pipeline in plan.pipelines for stage in pipeline.stages]
        assert len(nodes) == len(set(nodes))
        for pipeline in plan.pipelines:
            ends = [0, *(stage.end_layer for stage in pipeline.stages)]
            assert [stage.first_layer for stage in pipeline.stages] == ends[:-1]
            assert ends[-1] == model.layers
    assert made


def test_bound_beside_a_methods_plan_is_on_all_plans() -> None:
    gaps = []
    for seed in range(4):
        facts = random_case(seed, 3, 8)
        best = solve_exactly(problem(*facts))
        best_tokens_per_s = sum(ring.rows_per_s for ring in best) * facts[2].output_tokens.mean
        for method in sorted(set(METHODS) - set(PROGRAMS)):
            with contextlib.suppress(InfeasibleError):
                plan = baseline(method, *facts)
                assert plan.bound_tokens_per_s >= best_tokens_per_s * (1 - 1e-9)
                gaps.append(plan.gap)
    assert max(gaps) > 0.05
