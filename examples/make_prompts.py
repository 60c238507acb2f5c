"""Writes the example job's prompts: definitions from files that the model never saw.

`python -m examples.make_prompts` writes `examples/prompts.parquet`: half of the rows begin with one
of a few instructions, the other half is code to be continued. The same Python and the same model
folder give the same rows.
"""

import argparse
import random
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from examples import corpus, tasks
from examples.tasks import Task
from stages.prompt import PromptEncoder

EXAMPLES = Path(__file__).parent
ROWS = 1100
SHORTEST_TOKENS, LONGEST_TOKENS = 8, 400
SHARES = {"instructed": 0.5, "complete": 0.25, "excerpt": 0.25}
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("messages", pa.list_(MESSAGE))])


def held_out_tasks(rng: random.Random) -> dict[str, list[Task]]:
    """Every task of the held-out files, shuffled, by kind; only the instructed share a prefix."""
    tasks_of: dict[str, list[Task]] = {kind: [] for kind in SHARES}
    for source in (source for source in corpus.standard_library() if source.held_out):
        for found in corpus.definitions(source):
            tasks_of["instructed"] += tasks.instructed(found, rng)
            tasks_of["complete"].append(tasks.completion(found, rng))
            tasks_of["excerpt"].append(tasks.excerpt(source, found, rng))
    for candidates in tasks_of.values():
        rng.shuffle(candidates)
    return tasks_of


def fitting(candidates: Iterable[Task], encoder: PromptEncoder) -> Iterator[Task]:
    """Those of the right length in both forms, each prompt once."""
    seen: set[str] = set()
    allowed = range(SHORTEST_TOKENS, LONGEST_TOKENS + 1)
    for task in candidates:
        prompt = task.plain()
        forms = (encoder.encode(prompt), encoder.encode_messages(task.messages()))
        if prompt not in seen and all(len(ids) in allowed for ids in forms):
            seen.add(prompt)
            yield task


def prompt_table(encoder: PromptEncoder, seed: int) -> pa.Table:
    """ROWS rows of SCHEMA in random order; an id begins with the kind of its task."""
    rng = random.Random(seed)
    chosen: list[tuple[str, Task]] = []
    for kind, candidates in held_out_tasks(rng).items():
        wanted = round(ROWS * SHARES[kind])
        found = [(kind, task) for task in islice(fitting(candidates, encoder), wanted)]
        if len(found) < wanted:
            raise SystemExit(f"the held-out files hold {len(found)} of {wanted} {kind!r} prompts")
        chosen += found
    rng.shuffle(chosen)
    rows = [
        {"id": f"{kind}-{number:04d}", "prompt": task.plain(), "messages": task.messages()}
        for number, (kind, task) in enumerate(chosen)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def main() -> None:
    """Builds the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=EXAMPLES / "model")
    parser.add_argument("--out", type=Path, default=EXAMPLES / "prompts.parquet")
    options = parser.parse_args()
    table = prompt_table(PromptEncoder.load(options.model, "parse"), options.seed)
    pq.write_table(table, options.out, compression="zstd")
    print(f"{table.num_rows} rows written to {options.out}")


if __name__ == "__main__":
    main()
