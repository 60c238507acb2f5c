"""Draws follow transformers' warpers, and depend on nothing but the row's own counters."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stages.errors import ProtocolError
from stages.ferry import Ferry
from stages.sampling import (
    NO_TOKEN,
    Sampler,
    SamplingParams,
    draw,
    draw_together,
    table_of,
    uniform,
)

torch.set_num_threads(1)  # cores are shared with the stages of other tests

VOCAB = 1000
GRID = 500
"""Chances that a row is drawn at; a token's share of them is its probability to 1 / GRID."""
CUTS = [
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=1e-300),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.7, top_k=40),
    SamplingParams(temperature=0.8, top_p=0.9),
    SamplingParams(temperature=3.0, top_p=0.97),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.2, top_p=0.8, top_k=50),
    SamplingParams(temperature=1.0, top_p=0.999999, top_k=10 * VOCAB),
]


def row(seed: int, spread: float = 2.0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def expected(logits: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities that `generate` draws from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    nothing = torch.empty(1, 0, dtype=torch.int64)
    if params.temperature < 1e-100:
        return torch.nn.functional.one_hot(logits.argmax(), VOCAB).double()
    scores: Tensor = warpers(nothing, logits[None].double())  # type: ignore[arg-type]
    return scores[0].softmax(-1)


def chi_square_limit(degrees: int) -> float:
    """What a chi-square of so many degrees of freedom passes once in ten thousand (Wilson-Hilferty)."""
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + 3.72 * math.sqrt(spread)) ** 3)


@pytest.mark.parametrize("params", CUTS, ids=str)
def test_every_quantile_is_the_one_that_transformers_warpers_give(params: SamplingParams) -> None:
    logits = row(5)
    drawn = Counter(draw(logits, params, (i + 0.5) / GRID) for i in range(GRID))
    share = torch.zeros(VOCAB, dtype=torch.float64)
    for token, count in drawn.items():
        share[token] = count / GRID
    assert (share - expected(logits, params)).abs().max() <= 1.0 / GRID


@pytest.mark.parametrize("params", [CUTS[0], CUTS[4], CUTS[8]], ids=str)
def test_frequencies_over_rows_pass_a_chi_square_test(params: SamplingParams) -> None:
    logits, draws = row(8), 4000
    sampler = Sampler(Ferry(torch.device("cpu")))
    sampler.admit(0, params, key=77, seed=123)
    ids = [int(sampler.sample(logits[None], [0], [position])) for position in range(draws)]
    wanted = expected(logits, params) * draws
    seen = torch.bincount(torch.tensor(ids), minlength=VOCAB)
    assert not seen[wanted == 0].any()
    often = wanted >= 5
    rest_wanted, rest_seen = wanted[~often].sum(), seen[~often].sum()
    chi_square = ((seen[often] - wanted[often]) ** 2 / wanted[often]).sum()
    if rest_wanted >= 5:
        chi_square += (rest_seen - rest_wanted) ** 2 / rest_wanted
    assert chi_square < chi_square_limit(int(often.sum()))


def test_uniform_numbers_are_uniform_in_each_counter() -> None:
    for numbers in (
        [uniform(1, 2, i) for i in range(4000)],
        [uniform(1, i, 3) for i in range(4000)],
        [uniform(2**64 - 1 - i, 2**64 - 1, 3) for i in range(4000)],
    ):
        assert 0.0 <= min(numbers) < max(numbers) < 1.0
        seen = Counter(int(number * 50) for number in numbers)
        assert sum((seen[i] - 80) ** 2 / 80 for i in range(50)) < chi_square_limit(49)


def test_a_row_draws_the_same_token_in_any_company() -> None:
    rows = torch.stack([row(seed) for seed in range(40)])
    sampler = Sampler(Ferry(torch.device("cpu")))
    for i in range(40):
        sampler.admit(i, CUTS[i % len(CUTS)], key=i * i, seed=9)
    alone = [int(sampler.sample(rows[i : i + 1], [i], [i + 3])) for i in range(40)]
    order = list(range(39, -1, -3))
    together = sampler.sample(rows[order], order, [i + 3 for i in order]).tolist()
    assert together == [alone[i] for i in order]


def test_seed_key_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(1, 10**6)
    sampler = Sampler(Ferry(torch.device("cpu")))
    drawn = set()
    for seed, key, position in [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)]:
        sampler.admit(0, SamplingParams(temperature=1.0), key, seed)
        drawn.add(int(sampler.sample(logits, [0], [position])))
    assert len(drawn) == 4


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0]])
    sampler = Sampler(Ferry(torch.device("cpu")))
    sampler.admit(4, SamplingParams(), key=0, seed=0)
    sampler.admit(5, SamplingParams(top_k=2, top_p=0.5), key=0, seed=0)
    assert sampler.sample(logits, [4, 5], [0, 0]).tolist() == [1, 0]


def test_equals_at_the_top_k_edge_are_all_kept_as_in_transformers() -> None:
    logits = torch.tensor([1.0, 5.0, 1.0, 1.0, 0.0])
    params = SamplingParams(temperature=1.0, top_k=2)
    drawn = {draw(logits, params, i / 1000) for i in range(1000)}
    assert drawn == set(expected(logits, params).nonzero().flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0 - 2.0**-53])
def test_a_token_of_no_probability_is_never_drawn(chance: float) -> None:
    logits = torch.tensor([-torch.inf, 0.0, -torch.inf, 0.3, -torch.inf])
    for params in (CUTS[0], CUTS[5], CUTS[9]):
        assert draw(logits, params, chance) in (1, 3)


def test_a_device_that_is_not_waited_for_draws_the_same_tokens() -> None:
    logits = torch.stack([row(seed) for seed in range(len(CUTS))])
    logits[:, 17] = logits[:, 400] = logits.sort(-1).values[:, -3]  # equals near the top
    for place in range(40):
        chances = [uniform(3, i, place) for i in range(len(CUTS))]
        alone = [draw(*each) for each in zip(logits, CUTS, chances, strict=True)]
        assert draw_together(logits, table_of(CUTS, chances)).tolist() == alone


def test_logits_that_are_no_numbers_give_no_token() -> None:
    sampler = Sampler(Ferry(torch.device("cpu")))
    for i in range(4):
        sampler.admit(i, SamplingParams(temperature=float(i % 2)), key=0, seed=0)
    logits = torch.zeros(4, 9)
    logits[0, 3], logits[1, 4], logits[2, 0] = torch.nan, torch.nan, torch.inf
    ids = sampler.sample(logits, range(4), [0] * 4).tolist()
    assert ids[:3] == [NO_TOKEN] * 3
    assert ids[3] >= 0


def test_a_sequence_that_was_not_admitted_or_has_ended_cannot_sample() -> None:
    sampler = Sampler(Ferry(torch.device("cpu")))
    sampler.admit(1, SamplingParams(), key=0, seed=0)
    sampler.drop([1, 2])
    with pytest.raises(ProtocolError, match="sequence 1"):
        sampler.sample(torch.zeros(1, 4), [1], [0])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.nan, math.inf)),
        *(("top_p", value) for value in (0.0, 1.1, math.nan)),
        ("top_k", -1),
    ],
)
def test_meaningless_parameters_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
