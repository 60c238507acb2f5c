"""Runs a program that is killed when its parent ends: python wan_child.py PARENT_PID PROGRAM WORD..."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1


def as_child(words: Sequence[str]) -> list[str]:
    """
    The command that runs `words` so; FileNotFoundError where there is no such program.

    The kernel watches the thread that starts it. Other systems than Linux have no such bond.
    """
    if shutil.which(words[0]) is None:
        raise FileNotFoundError(f"no program {words[0]} to run in a host")
    if sys.platform != "linux":
        return list(words)
    return [sys.executable, "-I", __file__, str(os.getpid()), *words]


def line_of(process: "subprocess.Popen[bytes]") -> bytes:
    """The next line that a child prints; RuntimeError where it has ended instead."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{process.args!r} ended early with {process.wait()}")
    return line


def main() -> None:
    """Ask for the signal, then become the program."""
    parent, *words = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the parent ended first")
    os.execvp(words[0], words)


if __name__ == "__main__":
    main()
