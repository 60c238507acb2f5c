"""What the tests of storage run in processes of their own; imports little, so that they start fast."""

import os
import signal
from multiprocessing.synchronize import Barrier
from pathlib import Path

from storage.compact import compact
from storage.files import LocalFiles
from storage.index import built_index
from storage.progress import progress, unanswered
from storage.prompts import PromptSource
from storage.results import ResultWriter
from storage.store import JobStore
from storage.verify import verify
from tests.stored import FINGERPRINT, answer


class DyingFiles(LocalFiles):
    """A folder whose process is killed before its n-th step, or in the middle of it if it writes."""

    def __init__(self, root: Path, steps: int) -> None:
        super().__init__(root)
        self.steps = steps

    def _die_in(self) -> None:
        self.steps -= 1
        if self.steps == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _write(self, path: Path, content: bytes | Path) -> None:
        if self.steps == 1 and isinstance(content, bytes):
            path.write_bytes(content[: len(content) // 2])
        self._die_in()
        super()._write(path, content)

    def _sync_file(self, path: Path) -> None:
        self._die_in()
        super()._sync_file(path)

    def _sync_folder(self, path: Path) -> None:
        self._die_in()
        super()._sync_folder(path)

    def _replace(self, temporary: Path, target: Path) -> None:
        self._die_in()
        super()._replace(temporary, target)

    def _link(self, temporary: Path, target: Path) -> None:
        self._die_in()
        super()._link(temporary, target)

    def _unlink(self, path: Path) -> None:
        self._die_in()
        super()._unlink(path)


def doomed(folder: Path, source: PromptSource, steps: int) -> None:
    """Commit, compact and verify, and tell of each commit once it has returned."""
    store = JobStore(DyingFiles(folder / "demo", steps), "demo")
    done = progress(store)
    writer = ResultWriter(store, done)
    for row in unanswered(store, source, done):
        writer.append(answer(row, run_id="doomed"))
    writer.commit()
    (folder / "acknowledged").touch()
    compact(store, grace_s=0.0)
    verify(store)
    (folder / "survived").touch()


def doomed_beginning(folder: Path, source: PromptSource, steps: int) -> None:
    """Begin the job and set its input."""
    store = JobStore(DyingFiles(folder / "demo", steps), "demo")
    with built_index(source) as index:
        store.begin(FINGERPRINT, {})
        store.set_input(index)
    (folder / "survived").touch()


def race(root: str, source: PromptSource, name: str, start: Barrier) -> None:
    store = JobStore.open(root, "demo")
    done = progress(store)
    writer = ResultWriter(store, done)
    rows = list(unanswered(store, source, done))
    start.wait()
    for row in rows:
        writer.append(answer(row, run_id=name))
        if writer.pending == 10:
            writer.commit()
    writer.commit()
