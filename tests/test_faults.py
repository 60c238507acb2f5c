"""Whatever process of a run dies, committed rows stay and the same command goes on from them."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from flows.batch import run_batch
from flows.job import load_job
from flows.layout import Layout
from storage.catalog import query
from tests.jobs import WAGONWAY, Row, environment, results, wagonway, write_job

ROWS = 8500
"""Each of the runs below commits a thousand and some; the last has a few to do."""
RING = ("--stages", "3")
BESIDE = ("--pipelines", "3")
"""Three processes again, each a pipeline of its own."""
START_S = 180.0
"""For a run to commit its first rows, on a busy machine."""
END_S = {"server": 180.0}
"""For a run to end after its loss: 60 s, but where calls to the lost are repeated."""
OF_THE_RUN = {"run_id", "plan", "pipeline", "finished_at", "queued_s", "prefill_s", "decode_s"}
"""Columns in which two runs' rows may differ."""


@pytest.fixture(scope="module")
def job_file(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_job(tmp_path_factory.mktemp("faults"), tiny_model, new_tokens=3)


def write_long_job(folder: Path, model: Path, new_tokens: int) -> Path:
    rng = random.Random(3)
    texts = ("".join(rng.choices("abcdefgh .", k=rng.randint(2, 20))) for _ in range(ROWS))
    rows = [{"id": f"r{n}", "prompt": text} for n, text in enumerate(texts)]
    return write_job(
        folder, model, rows, "prompts.parquet",
        prompts={"prompt_column": "prompt"}, sampling={"max_new_tokens": new_tokens},
    )  # fmt: skip


@pytest.fixture(scope="module")
def store(job_file: Path) -> Path:
    """One store for all losses: each run goes on where the one before was stopped."""
    return job_file.parent / "store"


@dataclass(frozen=True, slots=True)
class Started:
    """A run that has committed rows and goes on."""

    process: subprocess.Popen[str]
    members: dict[str, psutil.Process]
    """Its processes: driver, stages by name, and server where it has its own."""

    def ended(self, within_s: float) -> tuple[int, str]:
        """(exit status, standard error); and no process of the run is left soon after."""
        _, said = self.process.communicate(timeout=within_s)
        _, left = psutil.wait_procs(list(self.members.values()), timeout=30)
        assert not left
        return self.process.returncode, said


@contextmanager
def started(
    job_file: Path, store: Path, api_url: str, layout: tuple[str, ...] = RING
) -> Iterator[Started]:
    """Start the run as a terminal would, in a process group of its own; killed at the end."""
    before = commits(store)
    with subprocess.Popen(
        [*WAGONWAY, "run", str(job_file), "--store", str(store), *layout],
        env=environment(api_url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + START_S
            while commits(store) == before:
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield Started(process, members_of(process.pid))
        finally:
            process.kill()


def commits(store: Path) -> int:
    """Appended parts that the job's log names."""
    entries = (path.read_text() for path in (store / "demo" / "_log").glob("*.json"))
    return sum(json.loads(entry)["kind"] == "append" for entry in entries)


def members_of(pid: int) -> dict[str, psutil.Process]:
    driver = psutil.Process(pid)
    members = {"driver": driver}
    for child in driver.children(recursive=True):
        command = child.cmdline()
        if "stages.worker" in command:
            members[Path(command[-1]).stem] = child
        elif "flows.embedded" in command:
            members["server"] = child
    return members


LOSSES = {
    "local-0": (RING, "stage local-0 "),
    "local-1": (BESIDE, "stage local-1 "),
    "local-2": (RING, "stage local-2 "),
    "driver": (BESIDE, ""),
    "server": (RING, "Prefect server does not answer"),
}
"""Process to how the run is laid out, and what it says of its loss."""


@pytest.mark.parametrize("victim", LOSSES)
def test_a_run_that_loses_a_process_ends_soon_and_says_which(
    victim: str, job_file: Path, store: Path, prefect_api: str
) -> None:
    layout, words = LOSSES[victim]
    earlier = results(store) if store.exists() else {}
    with started(job_file, store, "" if victim == "server" else prefect_api, layout) as run:
        os.kill(run.members[victim].pid, signal.SIGKILL)
        status, said = run.ended(END_S.get(victim, 60.0))
    assert status == (-signal.SIGKILL if victim == "driver" else 1)
    assert words in said
    assert "Traceback" not in said
    assert f" of {ROWS:,} rows, 0 failed" in said or victim == "driver"
    assert victim == "driver" or "the same command continues" in said
    after = results(store)
    assert len(after) >= len(earlier) + 1000
    assert earlier.items() <= after.items(), "a committed row was computed again, or lost"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children heed SIGINT, even where a shell has started the tests in its background, deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_heeded_while_libraries_load() -> None:
    command = [WAGONWAY[0], "-X", "importtime", *WAGONWAY[1:], "doctor"]
    with subprocess.Popen(
        command, env=environment(""), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "pyarrow" in line)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.endswith("wagonway: interrupted\n")
    assert "Traceback" not in said


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_a_run_in_good_order(
    tiny_model: Path, prefect_api: str, tmp_path: Path
) -> None:
    # Long answers: the run must not be over before this process, on a busy machine, interrupts it.
    job_file = write_long_job(tmp_path / "job", tiny_model, new_tokens=30)
    store = tmp_path / "store"
    with started(job_file, store, prefect_api) as run:
        committed = results(store)
        os.killpg(run.process.pid, signal.SIGINT)
        status, said = run.ended(within_s=30.0)
    assert status == 130
    assert said.endswith("wagonway: finished rows are kept; the same command continues\n")
    assert "Traceback" not in said
    assert committed
    assert committed.items() <= results(store).items()


@pytest.mark.usefixtures("prefect_api")
def test_after_all_losses_the_same_command_finishes_with_the_undisturbed_runs_rows(
    job_file: Path, store: Path, tmp_path: Path
) -> None:
    earlier = results(store)
    # This time with a Prefect server of its own, as on a machine that has none.
    done = wagonway("run", job_file, "--store", store, *RING, "--json")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr, "no colours where no terminal is"
    after = results(store)
    assert json.loads(done.stdout)["rows_earlier"] == len(earlier)
    assert earlier.items() <= after.items()
    run_batch(load_job(job_file), str(tmp_path / "undisturbed"), Layout(pipelines=2))
    undisturbed = results(tmp_path / "undisturbed")
    assert said_of_rows(after) == said_of_rows(undisturbed)
    assert_both_worked(tmp_path / "undisturbed", undisturbed)


def assert_both_worked(store: Path, rows: dict[str, Row]) -> None:
    """Result rows and views tell two pipelines of one stage apart, and agree."""
    said = Counter(row["pipeline"] for row in rows.values())
    assert said.keys() == {0, 1}
    stages = query(str(store), "select * from stages order by pipeline", "demo").to_pylist()
    assert [(s["pipeline"], s["stage"], s["node"]) for s in stages] == [
        (0, 0, "local-0"), (1, 0, "local-1")
    ]  # fmt: skip
    for stage in stages:
        assert (stage["first_layer"], stage["end_layer"]) == (0, 4)
        own = [row for row in rows.values() if row["pipeline"] == stage["pipeline"]]
        computed = {row["text"]: row for row in own}  # equal prompts are computed once, or nearly
        assert stage["tokens"] >= sum(row["output_tokens"] for row in computed.values()) > 0
    links = query(str(store), "select pipeline from links", "demo").to_pylist()
    assert all(link["pipeline"] is None for link in links), "what no ring uses has no pipeline"


def said_of_rows(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows without what is their run's."""
    return {
        name: {column: value for column, value in row.items() if column not in OF_THE_RUN}
        for name, row in rows.items()
    }
