"""Which rows of an answer are numbers; a row that is not ends as an error, never as text."""

from torch import Tensor


def finite_rows(answer: Tensor) -> Tensor:
    """Whether each row of [n, width] is free of NaNs and infinities; [n], on the same device."""
    low, high = (
        answer.amin(-1),
        answer.amax(-1),
    )  # a NaN is both; cheaper than a look at each number
    return low.isfinite() & high.isfinite()
