"""A killed process's scratch folder is removed by the next; a living one's never."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.embedded import embedded_server
from storage.scratch import YOUNG_S, Scratch, sweep

HOLDER = """
import sys, tempfile
from storage.scratch import Scratch
tempfile.tempdir = sys.argv[1]
scratch = Scratch("run")
(scratch.path / "key.pem").write_text("secret")
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, for these tests."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def age(path: Path) -> None:
    long_ago = path.stat().st_mtime - YOUNG_S - 1
    os.utime(path, (long_ago, long_ago))


def test_a_scratch_folder_is_private_and_gone_after_its_work() -> None:
    with Scratch("test") as path:
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "big").write_bytes(b"x")
    assert not path.exists()


def test_what_a_killed_process_leaves_is_removed_and_a_living_ones_stays(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().decode().strip())
        age(held)
        sweep()
        assert (held / "key.pem").exists()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with Scratch("next"):
            assert not held.exists()


def test_a_running_servers_home_is_a_living_processs(folder: Path) -> None:
    with embedded_server():
        [home] = folder.glob("wagonway-prefect-*")
        age(home)
        sweep()
        assert home.exists()
    assert not home.exists()


def test_young_folders_and_what_is_no_folder_are_left_alone(folder: Path) -> None:
    young, file, link = (folder / f"wagonway-{name}" for name in ("young", "file", "link"))
    young.mkdir()
    file.write_text("not mine")
    link.symlink_to(young)
    age(file)
    sweep()
    assert young.exists()
    assert file.exists()
    assert link.is_symlink()
