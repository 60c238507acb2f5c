"""How a worker's process ends."""

import os
import subprocess
import sys
from pathlib import Path

from stages.worker import UNSURE
from tests.linked import plan_in

FAILING = """
import sys
import threading
from pathlib import Path
from stages import worker
from stages.mailbox import LinkDown
from stages.outbox import Outbox
from tests import linked

def forgetful(down: LinkDown) -> None:
    raise LookupError("nobody foresaw this")

net = linked.plan_in(Path(sys.argv[1]))
near, far = net.pair()
Outbox(near, forgetful)
threading.Timer(0.5, far.close).start()
sys.argv[1:] = [sys.argv[2]]
worker.main()
"""


def test_a_worker_whose_link_thread_fails_unforeseen_dies_and_says_of_what(tmp_path: Path) -> None:
    plan_in(tmp_path)
    spec = tmp_path / "spec"
    os.mkfifo(spec)  # nobody writes it: the worker's own thread waits, as it would for a frame
    child = subprocess.run(
        [sys.executable, "-c", FAILING, str(tmp_path), str(spec)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert child.returncode == UNSURE
    assert "thread failed name=outbox-b" in child.stderr
    assert child.stderr.strip().splitlines()[-1] == "LookupError: nobody foresaw this"
