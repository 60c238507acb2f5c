"""What memory a stage's process takes at most, against what a plan counts for it."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.record import Claim
from planner.cost import STEP_TOKENS, WORKSPACE_COPIES
from stages.kv_cache import KvCache
from stages.probe import own_bytes
from stages.selfcheck import check
from stages.shard import Shard

SAMPLE_S = 0.002


@dataclass(frozen=True, slots=True)
class Taken:
    """Memory of a stage's process that no file stands behind."""

    peak_bytes: int
    planned_bytes: int

    def __str__(self) -> str:
        """As a process of its own tells it."""
        return json.dumps(asdict(self))


def taken(folder: Path, compute: Callable[[], tuple[Shard, KvCache]]) -> Taken:
    """What loading and computing takes at most, as another thread sees it; and as a plan counts it."""
    check(folder)
    planned = own_bytes()
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            peak[0] = max(peak[0], own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    shard, cache = compute()
    ended.set()
    watcher.join()
    facts = shard.facts
    planned += facts.weight_bytes + cache.bytes
    planned += WORKSPACE_COPIES * STEP_TOKENS * facts.hidden * facts.dtype.itemsize
    return Taken(peak[0], planned)


def taken_apart(module: str, folder: Path, *words: str) -> Taken:
    """What a process of its own says of itself, asked by --memory-of."""
    command = [sys.executable, "-m", module, "--memory-of", str(folder), *words]
    child = subprocess.run(command, check=True, capture_output=True, text=True)
    return Taken(**json.loads(child.stdout))


def memory_claims(resident: Taken, all_of_it: str, ours: Taken, part: str) -> list[Claim]:
    """The two beside one another, and ours beside the plan's."""
    return [
        Claim(all_of_it, resident.peak_bytes / 1e6, "MB"),
        Claim(part, ours.peak_bytes / 1e6, "MB"),
        Claim("the same over the plan's", ours.peak_bytes / ours.planned_bytes, "ratio", limit=1.1),
    ]
