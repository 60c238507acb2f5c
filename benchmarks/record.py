"""What every benchmark leaves behind: a table for people and rows of JSON for whoever checks it."""

import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Claim:
    """One measured figure. Without a target it is reported, and neither met nor missed."""

    claim: str
    measured: float
    unit: str
    target: float | None = None
    """At least this much."""
    limit: float | None = None
    """At most this much."""

    @property
    def met(self) -> bool | None:
        """Whether target and limit are kept; None without either."""
        if self.target is None and self.limit is None:
            return None
        enough = self.target is None or self.measured >= self.target
        return enough and (self.limit is None or self.measured <= self.limit)

    @property
    def wanted(self) -> str:
        """The target and the limit, for people."""
        bounds = (("≥", self.target), ("≤", self.limit))
        return " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)


def record(name: str, claims: list[Claim], again: Sequence[str] = ()) -> None:
    """
    Print the claims and write benchmarks/results/<name>.json.

    Where a part was measured `again`, only earlier rows whose claims begin so give way to them.
    """
    table = Table("claim", "measured", "target", "unit", "met", title=name)
    for claim in claims:
        met = {True: "yes", False: "NO", None: ""}[claim.met]
        table.add_row(claim.claim, f"{claim.measured:,.4g}", claim.wanted, claim.unit, met)
    Console().print(table)
    facts = {"hardware": hardware(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    rows = [asdict(claim) | {"met": claim.met} | facts for claim in claims]
    path = RESULTS / f"{name}.json"
    if again and path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in earlier if not row["claim"].startswith(tuple(again))] + rows
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def hardware() -> str:
    """The machine in a few words, and how busy it was."""
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        named = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        model = named[0] if named else model
    return f"{len(os.sched_getaffinity(0))} cores of {model}, load {os.getloadavg()[0]:.1f}"
