"""What of this host makes links slow or runs fail, and what to do about each; changes nothing."""

import ctypes
import platform
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

import psutil
from packaging.requirements import Requirement

from stages import codec_compiled
from stages.tcp import BUFFER_BYTES, link_habits

Verdict = Literal["ok", "note", "problem"]

LONG_WIRE = "100 Mbit/s and a round trip of 200 ms"
LONG_WIRE_BYTES = (
    2 * 2_500_000
)  # twice what is under way there: what was lost is sent again from it
OPEN_FILES = 1024
MEMORY_BYTES = 2 * 2**30
SCRATCH_BYTES = 2**30
UNKNOWN, UNSYNCHRONISED = -1, 0x40
_TIMEX_BYTES, _STATUS_OFFSET = 256, 40


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    found: str
    verdict: Verdict
    advice: str = ""
    """What to do; empty where nothing is to be done."""


def examine() -> list[Finding]:
    """Look at all of it; the gravest verdict is the host's."""
    return [
        *_links(),
        _codec(),
        _clock(),
        _open_files(),
        _memory(),
        _scratch(),
        _python(),
        *_packages(),
    ]


def _links() -> Iterator[Finding]:
    habits = link_habits()
    order = "in turns" if habits.bundle.in_turns else "at once"
    found = f"{habits.congestion_control}, {habits.bundle.stripes} TLS connections a link, {order}"
    if habits.congestion_control == "bbr":
        yield Finding("congestion control", found, "ok")
    else:
        yield Finding(
            "congestion control", found, "note",
            "on a wire that loses packets BBR carries many times as much: as root, `modprobe tcp_bbr` "
            "and add bbr to net.ipv4.tcp_allowed_congestion_control",
        )  # fmt: skip
    for way, room_bytes, limits in (
        ("send", habits.send_bytes, "net.core.wmem_max and the last of net.ipv4.tcp_wmem"),
        ("receive", habits.receive_bytes, "net.core.rmem_max and the last of net.ipv4.tcp_rmem"),
    ):
        fits = room_bytes >= LONG_WIRE_BYTES
        yield Finding(
            f"{way} buffer", f"up to {_mib(room_bytes)} a connection", "ok" if fits else "note",
            "" if fits else f"a wire of {LONG_WIRE} needs {_mib(LONG_WIRE_BYTES)}: as root, raise "
            f"{limits} to {BUFFER_BYTES}",
        )  # fmt: skip


def _codec() -> Finding:
    if codec_compiled.installed():
        return Finding("dense codec", "used where the other end has it, too", "ok")
    return Finding(
        "dense codec", "numba is not installed", "note",
        "links that wait for their wire could carry 3 to 8 % more: "
        "pip install -c constraints.txt -e '.[stage,dense]'",
    )  # fmt: skip


def _clock() -> Finding:
    state = _clock_status()
    if state == UNKNOWN:
        found = "this system does not say whether it is right"
    elif state & UNSYNCHRONISED:
        found = "follows no time server"
    else:
        return Finding("clock", "follows a time server", "ok")
    return Finding("clock", found, "note",
                   "start chrony or systemd-timesyncd: certificates count on a day's accuracy, times "
                   "in results on seconds")  # fmt: skip


def _clock_status() -> int:
    """Linux's clock status bits; UNKNOWN elsewhere."""
    if sys.platform != "linux":
        return UNKNOWN
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: only ask
    if ctypes.CDLL(None).adjtimex(timex) < 0:
        return UNKNOWN
    return int.from_bytes(timex.raw[_STATUS_OFFSET : _STATUS_OFFSET + 4], sys.byteorder)


def _open_files() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = limit == resource.RLIM_INFINITY or limit >= OPEN_FILES
    found = "no limit" if limit == resource.RLIM_INFINITY else f"up to {limit:,}"
    advice = "" if enough else f"`ulimit -n {OPEN_FILES}`, or LimitNOFILE= in the service"
    return Finding("open files", found, "ok" if enough else "problem", advice)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    found = f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free"
    if memory.available >= MEMORY_BYTES:
        return Finding("memory", found, "ok")
    return Finding("memory", found, "note",
                   "a stage needs its layers, KV cache and about 0.5 GiB: end other programs, or give "
                   "this node fewer layers")  # fmt: skip


def _scratch() -> Finding:
    folder = tempfile.gettempdir()
    free_bytes = shutil.disk_usage(folder).free
    enough = free_bytes >= SCRATCH_BYTES
    return Finding(
        "scratch folder", f"{folder}: {free_bytes / 2**30:.1f} GiB free",
        "ok" if enough else "problem", "" if enough else "make room there, or name another in TMPDIR",
    )  # fmt: skip


def _python() -> Finding:
    found = f"{platform.python_version()} on {platform.system()} {platform.release()}"
    return Finding("Python", found, "ok")


def _packages() -> Iterator[Finding]:
    """Whether what is installed is what the project asks for."""
    for line in requires("wagonway") or []:
        wanted = Requirement(line)
        needed = _applies(wanted, "")
        if not (needed or _applies(wanted, "stage")):
            continue
        try:
            installed = version(wanted.name)
        except PackageNotFoundError:
            yield _missing(wanted.name, needed)
            continue
        right = wanted.specifier.contains(installed, prereleases=True)
        yield Finding(
            wanted.name, installed, "ok" if right else "problem",
            "" if right else f"wagonway is made for {wanted.specifier}: install with constraints.txt",
        )  # fmt: skip


def _missing(package: str, needed: bool) -> Finding:
    if needed:
        return Finding(package, "not installed", "problem", "pip install -c constraints.txt -e .")
    return Finding(package, "not installed", "note",
                   "this host can drive a run but not compute: pip install -c constraints.txt "
                   "-e '.[stage]'")  # fmt: skip


def _applies(wanted: Requirement, extra: str) -> bool:
    return wanted.marker is None or wanted.marker.evaluate({"extra": extra})


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
