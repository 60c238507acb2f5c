"""Mixed-integer linear programs, solved by HiGHS; nothing here knows what its variables mean.

HiGHS comes with the extra `milp` and is loaded when a program is solved, so all else works without.
"""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

INFINITE = float("inf")


class MissingSolverError(RuntimeError):
    """HiGHS is not installed; the message names the extra that brings it."""


@dataclass(frozen=True, slots=True)
class Solution:
    """The best values found, if any; `proved` where nothing better exists."""

    values: tuple[float, ...]
    value: float
    bound: float
    """No solution can be better."""
    proved: bool


@dataclass(slots=True)
class Program:
    """Columns (variables) and rows (constraints), added one by one."""

    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    cost: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    rows: list[tuple[float, float, tuple[tuple[int, float], ...]]] = field(default_factory=list)

    def number(self, lower: float, upper: float, cost: float = 0.0) -> int:
        """A variable that may take any value in between; gives its column."""
        return self._column(lower, upper, cost, whole=False)

    def integer(self, lower: int, upper: int, cost: float = 0.0) -> int:
        """A variable of whole values."""
        return self._column(lower, upper, cost, whole=True)

    def switch(self, cost: float = 0.0) -> int:
        """A variable that is 0 or 1."""
        return self.integer(0, 1, cost)

    def _column(self, lower: float, upper: float, cost: float, *, whole: bool) -> int:
        self.lower.append(float(lower))
        self.upper.append(float(upper))
        self.cost.append(float(cost))
        self.whole.append(whole)
        return len(self.cost) - 1

    def at_most(self, limit: float, *terms: tuple[int, float]) -> None:
        """Sum of coefficient x column <= limit."""
        self.rows.append((-INFINITE, limit, terms))

    def equal(self, value: float, *terms: tuple[int, float]) -> None:
        """Sum of coefficient x column = value."""
        self.rows.append((value, value, terms))

    def product(self, switch: int, column: int, most: float) -> int:
        """switch x column, for a column in [0, most]: McCormick's four inequalities."""
        both = self.number(0.0, most)
        self.at_most(0.0, (both, 1.0), (switch, -most))
        self.at_most(0.0, (both, 1.0), (column, -1.0))
        self.at_most(most, (column, 1.0), (switch, most), (both, -1.0))
        return both

    def solve(self, method: str, limit_s: float, *, maximise: bool = False) -> Solution | None:
        """The best solution within the time; None if there is none, or none was found.

        Raises:
            MissingSolverError: HiGHS is not installed.
        """
        highspy = _highspy(method)
        highs = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)
        highs.setOptionValue("time_limit", limit_s)
        highs.setOptionValue("mip_rel_gap", 1e-6)
        highs.passModel(self._model(highspy, maximise))
        highs.run()
        info = highs.getInfo()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        proved = highs.getModelStatus() == highspy.HighsModelStatus.kOptimal
        return Solution(
            tuple(highs.getSolution().col_value),
            info.objective_function_value,
            info.mip_dual_bound,
            proved,
        )

    def _model(self, highspy: Any, maximise: bool) -> Any:
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = len(self.cost), len(self.rows)
        model.col_cost_, model.col_lower_, model.col_upper_ = self.cost, self.lower, self.upper
        kinds = (highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger)
        model.integrality_ = [kinds[whole] for whole in self.whole]
        model.row_lower_ = [row[0] for row in self.rows]
        model.row_upper_ = [row[1] for row in self.rows]
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = _starts(len(terms) for *_, terms in self.rows)
        model.a_matrix_.index_ = [column for *_, terms in self.rows for column, _ in terms]
        model.a_matrix_.value_ = [factor for *_, terms in self.rows for _, factor in terms]
        if maximise:
            model.sense_ = highspy.ObjSense.kMaximize
        return model


def _highspy(method: str) -> Any:
    try:
        return importlib.import_module("highspy")
    except ModuleNotFoundError as error:
        raise MissingSolverError(
            f"{method} is an integer program and needs HiGHS: pip install 'wagonway[milp]'"
        ) from error


def _starts(counts: Iterable[int]) -> list[int]:
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    return starts
