"""Whether the dense level's compiled code is at hand, and how it comes without anybody waiting for it.

Compiling takes seconds, once on a machine, and happens in a process of its own; what it leaves in
numba's cache is then loaded by a thread beside the stage's own.
"""

import logging
import subprocess
import sys
import threading
from importlib import import_module
from importlib.util import find_spec
from typing import Final

log = logging.getLogger(__name__)

_KERNEL: Final = "stages.codec_dense_kernel"
_COMPILE_LIMIT_S: Final = 300.0

_ready = threading.Event()
_starting = threading.Lock()
_threads: list[threading.Thread] = []


def installed() -> bool:
    """Whether this installation has what compiles the dense level (extra `dense`)."""
    return find_spec("numba") is not None


def ready() -> bool:
    """Whether frames can be coded and decoded densely now."""
    return _ready.is_set()


def prepare() -> None:
    """Have it become ready soon, if it can; returns at once."""
    with _starting:
        if installed() and not _threads:
            thread = threading.Thread(target=_load, name="dense-compiler", daemon=True)
            _threads.append(thread)
            thread.start()


def await_ready(timeout_s: float = _COMPILE_LIMIT_S) -> bool:
    """Wait for what `prepare` has begun; whether it has come to be ready."""
    for thread in _threads:
        thread.join(timeout_s)
    return ready()


def _load() -> None:
    """Compile where nobody waits, then load; what is in the way is said once, and fast goes on."""
    compiling = [sys.executable, "-P", "-m", _KERNEL]
    try:
        subprocess.run(
            compiling,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_COMPILE_LIMIT_S,
        )
        import_module(_KERNEL)
    except (subprocess.SubprocessError, ImportError, RuntimeError) as error:
        told = getattr(error, "stderr", None) or b""
        reason = told.decode(errors="replace").strip().rpartition("\n")[2]
        log.warning("no dense codec error=%s reason=%s", error, reason)
        return
    _ready.set()
