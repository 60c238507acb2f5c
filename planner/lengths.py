"""What a mean and a 95th percentile say of a distribution of lengths, taken as lognormal."""

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from planner.facts import Lengths

MOST_TOKENS = 10**7
"""No row is longer, whatever its distribution says: no context is."""
Z95 = 1.645
_NORMAL = NormalDist()


@lru_cache(maxsize=256)
def lognormal(lengths: Lengths) -> tuple[float, float]:
    """The mean and deviation of the logarithm, so that lengths cut at `most` have the given figures.

    Uncut, ln(p95 / mean) = 1.645 sigma - sigma^2 / 2, which is at most 1.353.
    """
    ratio = max(lengths.p95 / lengths.mean, 1.0)
    if math.isinf(lengths.most) or lengths.p95 >= lengths.most:
        sigma = Z95 - math.sqrt(max(Z95**2 - 2.0 * math.log(ratio), 0.0))
        return math.log(lengths.mean) - sigma**2 / 2.0, sigma
    low, high = 0.0, 2.0 * Z95
    for _ in range(50):  # the wider, the smaller the mean below a given percentile
        sigma = (low + high) / 2.0
        mean = _mean_cut(math.log(lengths.p95) - Z95 * sigma, sigma, lengths.most)
        low, high = (sigma, high) if mean > lengths.mean else (low, sigma)
    return math.log(lengths.p95) - Z95 * high, high


def _mean_cut(mu: float, sigma: float, most: float) -> float:
    if not sigma:
        return min(math.exp(mu), most)
    beyond = (math.log(most) - mu) / sigma
    whole = math.exp(mu + sigma**2 / 2.0) * _NORMAL.cdf(beyond - sigma)
    return whole + most * (1.0 - _NORMAL.cdf(beyond))


@lru_cache(maxsize=256)
def spread_tokens(lengths: Lengths) -> float:
    """The standard deviation: of X cut at m, E[min(X, m)^2] = e^(2 mu + 2 sigma^2) P + m^2 Q."""
    mu, sigma = lognormal(lengths)
    if not sigma:
        return 0.0
    if math.isinf(lengths.most):
        return lengths.mean * math.sqrt(math.expm1(sigma**2))
    beyond = (math.log(lengths.most) - mu) / sigma
    square = math.exp(2.0 * (mu + sigma**2)) * _NORMAL.cdf(beyond - 2.0 * sigma)
    square += lengths.most**2 * (1.0 - _NORMAL.cdf(beyond))
    return math.sqrt(max(square - _mean_cut(mu, sigma, lengths.most) ** 2, 0.0))


def longest_tokens(lengths: Lengths, rows: int) -> float:
    """The length that one of so many rows exceeds on average."""
    mu, sigma = lognormal(lengths)
    z = _NORMAL.inv_cdf(max(1.0 - 1.0 / max(rows, 2), 0.5))
    return min(math.exp(mu + z * sigma), lengths.most, MOST_TOKENS)


@lru_cache(maxsize=256)
def survival(lengths: Lengths, rows: int) -> NDArray[np.float64]:
    """The share of rows that are longer than 0, 1, 2, ... tokens, up to the longest of so many."""
    mu, sigma = lognormal(lengths)
    ends = range(max(math.ceil(longest_tokens(lengths, rows) - 1e-6), 1))
    if not sigma:
        return np.ones(len(ends))
    longer = (1.0 - _NORMAL.cdf((math.log(j) - mu) / sigma) for j in ends[1:])
    return np.array([1.0, *longer])


def met_tokens(lengths: Lengths) -> tuple[float, float]:
    """How far rows met at random are, where others come as they end: the mean, and the deviation.

    E[X^2] / 2 E[X], and by E[X^3] / 3 E[X]; the third moment as of one that is not cut.
    """
    mean, varied = lengths.mean, 1.0 + (spread_tokens(lengths) / lengths.mean) ** 2
    met = mean * varied / 2.0
    return met, math.sqrt(mean**2 * varied**3 / 3.0 - met**2)


def apart(lengths: Lengths, waves: float, prefilling: float = 0.0) -> float:
    """How near rows are to being met at random: 0 if all start together, 1 at the most.

    In a job of one wave all rows start together. Later ones start as others end; how far that spreads
    them, unequal rows and the share of the time in which prompts are prefilled decide.
    """
    unequal = (spread_tokens(lengths) / lengths.mean) ** 2
    # Starts that are spread evenly over a row's life have a variance of a twelfth of its square.
    spread = min(math.sqrt(12.0 * waves * unequal + prefilling**2), 1.0)
    return spread * min(max(waves - 1.0, 0.0), 1.0)
