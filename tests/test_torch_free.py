"""The driver's side works where torch is not installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.finished import FinishedJob
from tests.jobs import environment

DRIVER = """
import sys
from importlib.machinery import PathFinder

class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.partition(".")[0] in ("torch", "safetensors")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]

from pathlib import Path
from flows.cli import exit_status
from flows.job import load_job
from flows.model import open_model
from flows.run import prompt_source
from storage.index import built_index

job_file, store = sys.argv[1:]
job = load_job(Path(job_file))
model = open_model(job)
print(model.encoder.encode("abc"), model.encoder.encode_messages([{"role": "user", "content": "b"}]))
with built_index(prompt_source(job)) as index:
    print(index.rows)
print(exit_status(["query", "select count(*) as n from results", "--store", store, "--format", "csv"]))
print(exit_status(["verify", job_file, "--store", store]))
print(exit_status(["plan", job_file]))
print(sorted(name for name in sys.modules if name.partition(".")[0] in ("torch", "safetensors")))
"""


@pytest.fixture(scope="module")
def said(finished_job: FinishedJob) -> list[str]:
    child = subprocess.run(
        [sys.executable, "-c", DRIVER, finished_job.job_file, finished_job.store],
        env=environment(""), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr
    [only] = child.stderr.lower().splitlines()
    assert only.startswith("wagonway: there is no torch here")
    return child.stdout.splitlines()


def test_the_driver_validates_encodes_and_queries_without_torch(
    said: list[str], finished_job: FinishedJob
) -> None:
    rows = str(len(finished_job.rows))
    assert said[0].startswith("[97, 98, 99] [")
    assert said[1] == rows
    assert said[2:5] == ['"n"', rows, "0"]
    assert said[-3:] == ["0", "2", "[]"]


def test_the_installed_command_is_the_module(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("wagonway")
    for command in ([script], [sys.executable, "-m", "flows"]):
        shown = subprocess.run(
            [*command, "--help"], cwd=tmp_path, env=environment(""),
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "verify" in shown.stdout
