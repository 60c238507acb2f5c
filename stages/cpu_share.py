"""Whether a link's codec takes its processor time from the stage's own work, and how much work that is.

A codec runs on a thread of its own. Where the machine has a core to spare it costs the work nothing;
where it has none, every second of coding is a second less of layers.
"""

import time
from collections.abc import Callable

import psutil

IDLE_CORES = 0.5  # with this much of the machine idle, a codec is in nobody's way
LOOK_EVERY_S = 1.0


def idle_s() -> float:
    """Seconds that this machine's cores have idled since it started, summed."""
    times = psutil.cpu_times()
    return float(times.idle + getattr(times, "iowait", 0.0))


def no_work() -> float:
    """The busy seconds of whoever only passes frames on."""
    return 0.0


class CpuShare:
    """The stage's seconds of work for each byte that a link carries; used by that link's thread.

    `busy_s` says how long the stage has worked since it started; the other clocks are the system's.
    """

    def __init__(
        self,
        busy_s: Callable[[], float] = no_work,
        idle_s: Callable[[], float] = idle_s,
        now_s: Callable[[], float] = time.perf_counter,
        thread_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._busy_s = busy_s
        self._idle_s = idle_s
        self._now_s = now_s
        self.thread_s = thread_s
        self._seen = (now_s(), idle_s(), busy_s())
        self._bytes = 0
        self._crowded = False
        self._s_per_byte = 0.0

    def started(self) -> tuple[float, float]:
        """Now, for `cost_s`: by the wall, and of this thread's processor time."""
        return self._now_s(), self.thread_s()

    def cost_s(self, started: tuple[float, float]) -> float:
        """What this thread has done since then has cost.

        Its processor time where no core idles: what coding waits for one, sending would wait as well.
        Otherwise the time that has passed.
        """
        if self._crowded:
            return self.thread_s() - started[1]
        return self._now_s() - started[0]

    def s_per_byte(self, nbytes: int) -> float:
        """With so many more bytes of activation carried: work a byte, or 0 while cores are idle."""
        self._bytes += nbytes
        now_s = self._now_s()
        before_s, idled_s, worked_s = self._seen
        if now_s - before_s >= LOOK_EVERY_S and self._bytes:
            self._seen = (now_s, self._idle_s(), self._busy_s())
            self._crowded = self._seen[1] - idled_s < IDLE_CORES * (now_s - before_s)
            work_s = self._seen[2] - worked_s if self._crowded else 0.0
            self._s_per_byte = work_s / self._bytes
            self._bytes = 0
        return self._s_per_byte
