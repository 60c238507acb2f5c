"""The shipped example as its users run it: one command that brings its own Prefect server.

Three stages; from the command's start to its end, and from the first lease to the last commit.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.record import Claim, record

JOB = Path(__file__).parent.parent / "examples" / "job.yaml"
STAGES = 3
LIMIT_S = 180.0


def main() -> None:
    """Run it into a store that is gone afterwards; RuntimeError unless every row was answered."""
    with tempfile.TemporaryDirectory() as store:
        words = ["run", str(JOB), "--store", store, "--stages", str(STAGES), "--json"]
        started = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-m", "flows", *words], stdout=subprocess.PIPE, check=True
        )
        seconds = time.perf_counter() - started
        plan = json.loads(next(Path(store).glob("*/runs/*/plan.json")).read_text())
    summary = json.loads(ended.stdout)
    if summary["rows_ok"] != summary["rows"]:
        raise RuntimeError(f"{summary['rows'] - summary['rows_ok']} rows have no answer")
    name = f"the example's {summary['rows']:,} rows in {STAGES} stages"
    record("demo", [
        Claim(f"{name}: from the first lease to the last commit", summary["seconds"], "s",
              limit=LIMIT_S),
        Claim(f"{name}: the whole command", seconds, "s"),
        Claim(f"{name}: output", summary["tokens_per_s"], "tokens/s"),
        Claim(f"{name}: output, over the plan's", summary["tokens_per_s"] / plan["tokens_per_s"],
              "ratio"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
