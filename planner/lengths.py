"""What a mean and a 95th percentile say of a distribution of lengths, taken as lognormal."""

import math
from statistics import NormalDist

from planner.facts import Lengths

Z95 = 1.645


def spread(lengths: Lengths) -> float:
    """The lognormal's sigma: ln(p95 / mean) = 1.645 sigma - sigma^2 / 2, which is at most 1.353."""
    log_ratio = math.log(max(lengths.p95 / lengths.mean, 1.0))
    return Z95 - math.sqrt(max(Z95**2 - 2.0 * log_ratio, 0.0))


def longest_tokens(lengths: Lengths, rows: int) -> float:
    """The length that one of so many rows exceeds on average."""
    sigma = spread(lengths)
    z = NormalDist().inv_cdf(max(1.0 - 1.0 / max(rows, 2), 0.5))
    return lengths.mean * math.exp(z * sigma - sigma**2 / 2.0)
