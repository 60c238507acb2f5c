"""The flow of one stage: start its worker, wait, and say how it ended. It computes nothing itself.

The worker is a child process with a pipe to this one: when this flow dies, however it dies, the
pipe closes and the worker leaves.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from prefect import flow

from flows.errors import StageLostError

LAST_WORDS_CHARS = 2000


@flow(name="stage", flow_run_name="stage {member}", validate_parameters=False)
def stage(member: str, spec_path: str) -> None:
    """Run one stage worker to its end; StageLostError, with its last words, for a bad one."""
    log_path = Path(spec_path).with_suffix(".log")
    with log_path.open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "stages.worker", spec_path],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Threads that wait by spinning take the cores from the stage they wait for.
            env={"OMP_WAIT_POLICY": "PASSIVE", **os.environ},
            start_new_session=True,  # Ctrl-C is the driver's alone, which then says Stop
        )
        with worker:
            status = worker.wait()
    if status != 0:
        raise StageLostError(f"stage {member} {_end(status)}: {last_words(log_path)}")


def _end(status: int) -> str:
    """How a process ended, in words."""
    if status < 0:
        return f"was killed ({signal.Signals(-status).name})"
    return f"ended with status {status}"


def last_words(log_path: Path) -> str:
    """The last line of a process's log, for an error message."""
    if not log_path.is_file():
        return "it left no log"
    lines = log_path.read_text(errors="replace").strip().splitlines()
    return lines[-1][-LAST_WORDS_CHARS:] if lines else "it said nothing"
