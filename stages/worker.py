"""The life of a stage worker: join the run, load a shard, compute frames in order, leave.

`python -m stages.worker SPEC` starts one. This thread computes; connections have threads of their
own and reach it through one mailbox. A worker that is unsure dies loudly: its rows are computed
again elsewhere, and a wrong answer never is one.
"""

import contextlib
import logging
import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from stages import codec_compiled
from stages.codec import INT8, LEVELS
from stages.compute import Compute, StageCompute, Tachograph
from stages.config import Address, StageSpec
from stages.control import (
    Answer,
    Answers,
    Capacity,
    Heartbeat,
    Hello,
    Message,
    OpenSlots,
    Ready,
    Recall,
    Returned,
    Rows,
    StageFailed,
    StepFailed,
    Stop,
    Topology,
    decode,
    messages_of,
)
from stages.cpu_share import CpuShare
from stages.dialing import dial, dial_once
from stages.duplex import Duplex
from stages.errors import LinkError, ProtocolError, StageError, StepError
from stages.frame import run_number
from stages.head import Head
from stages.identity import Identity, Member
from stages.inbox import Inbox
from stages.link import Connection
from stages.link_codec import LOSSLESS, LinkDecoder, LinkEncoder
from stages.listener import Listener
from stages.mailbox import LinkDown, Mailbox
from stages.outbox import Outbox
from stages.prompt import PromptEncoder
from stages.trust import Trust
from stages.wire import SampleFrame, StepFrame

log = logging.getLogger(__name__)

JOIN_S = 120.0
"""For the driver to answer."""
RING_S = 20.0
"""For one connection of the ring, all of whose stages are up and loaded."""
REDIAL_S = 5.0
"""Limit for one attempt to take up a connection that broke."""
FAREWELL_S = 5.0
"""A neighbour that leaves before us at the end of a run: the driver's word comes within this."""
ORPHANED, UNSURE = 3, 4
"""What the process ends with when its parent has gone, and when a thread failed as none foresaw."""


class Worker:
    """One stage in its run; everything here but the heartbeat happens in one thread."""

    def __init__(
        self, spec: StageSpec, load: Callable[[StageSpec], Compute] = StageCompute.load
    ) -> None:
        self._spec = spec
        self._load_compute = load
        self._run = run_number(spec.run)
        self._mailbox = Mailbox(capacity=64 + spec.ring.shape().capacity)
        self.done = Tachograph()
        """What it has done so far."""
        self._outbox: Outbox | None = None
        self._inbox: Inbox | None = None
        self._driver: Duplex
        self.levels: tuple[str, ...] = (INT8,) if spec.codec == INT8 else LOSSLESS
        """Among which the link to the next stage chooses; set before `live`."""
        self._incarnation = secrets.randbits(64)

    def live(self) -> None:
        """From joining to the driver's Stop; raises StageError for any other end."""
        spec = self._spec
        identity = Identity(spec.member, spec.certificate, spec.key)
        trust = Trust(identity, [Member(name, pem) for name, pem in spec.members.items()])
        with contextlib.ExitStack() as leave:
            listener = Listener(trust, self._hello, spec.listen.host, spec.listen.port)
            leave.callback(listener.close)
            host, port = listener.address
            self._join_driver(trust, Address(host=host, port=port))
            with self._last_words():
                compute = self._load()
                if self._join_ring(compute, trust, listener, leave):
                    if spec.is_head:
                        self._lead(compute)
                    else:
                        self._follow(compute)
            self._driver.send(self._vitals())  # the last word on what was done
            self._driver.close()

    def _cpu_s(self) -> float:
        """A codec beside layers that an accelerator computes is in nobody's way."""
        return self.done.cpu_s

    def _hello(self, listening: Address | None = None, purpose: str = "data") -> Hello:
        spec = self._spec
        return Hello(
            name=spec.member,
            run=spec.run,
            epoch=spec.epoch,
            incarnation=self._incarnation,
            purpose="control" if purpose == "control" else "data",
            dense=codec_compiled.installed(),
            host=listening.host if listening else "",
            port=listening.port if listening else 0,
        )

    def _join_driver(self, trust: Trust, listening: Address) -> None:
        spec, place = self._spec, self._spec.driver_address
        hello, address = self._hello(listening, "control"), (place.host, place.port)

        def redial(last_message: int) -> Connection:
            again = hello.model_copy(update={"last_frame": last_message})
            return dial_once(trust, spec.driver, address, again, REDIAL_S)

        self._driver = Duplex(
            dial(trust, spec.driver, address, hello, JOIN_S),
            self._mailbox,
            self._vitals,
            lost_after_s=spec.driver_lost_after_s,
            redial=redial,
        )

    def _vitals(self) -> Heartbeat:
        return Heartbeat(
            frames=self.done.frames,
            tokens=self.done.tokens,
            busy_s=self.done.busy_s,
            compute_cpu_s=self.done.cpu_s,
            cpu_s=time.process_time(),
            links=tuple(box.report() for box in (self._outbox, self._inbox) if box is not None),
        )

    @contextlib.contextmanager
    def _last_words(self) -> Iterator[None]:
        """Tell the driver what this stage dies of, if the driver can still be told."""
        try:
            yield
        except StageError as error:
            failed = StageFailed(
                node=self._spec.member, error_type=type(error).__name__, message=str(error)
            )
            with contextlib.suppress(LinkError):  # the error itself goes on to the log and the exit
                self._driver.send(failed, timeout_s=1.0)
                self._driver.close()
            raise

    def _load(self) -> Compute:
        started = time.monotonic()
        torch.set_num_threads(self._spec.model.threads)
        compute = self._load_compute(self._spec)
        load_s, model = time.monotonic() - started, self._spec.model
        log.info(
            "shard loaded member=%s layers=%d-%d seconds=%.1f",
            self._spec.member, model.first_layer, model.end_layer, load_s,
        )  # fmt: skip
        self._driver.send(Ready(epoch=self._spec.epoch, capacity=Capacity.of(compute.ring)))
        return compute

    def _join_ring(
        self, compute: Compute, trust: Trust, listener: Listener, leave: contextlib.ExitStack
    ) -> bool:
        """Connect to the next stage and be connected to by the previous one; False if told to stop.

        Once all stages are loaded, the driver says where everybody listens, so that nobody waits
        long, and what all of them can hold.
        """
        topology = self._next_message(None)
        if isinstance(topology, Stop):
            return False
        if not isinstance(topology, Topology):
            raise ProtocolError(f"{type(topology).__name__} came before the plan's topology")
        held = topology.capacity
        asked = self._spec.ring.shape()
        compute.settle(asked.holding(held.blocks, held.window_blocks, held.row_blocks))
        if len(self._spec.pipeline) == 1:
            return True
        places = {peer.name: (peer.host, peer.port) for peer in topology.peers}
        next_stage, place, hello = self._spec.next, places[self._spec.next], self._hello()
        self._outbox = Outbox(
            dial(trust, next_stage, place, hello, RING_S),
            self._mailbox.report_down,
            capacity=self._spec.ring.shape().capacity,
            redial=partial(dial_once, trust, next_stage, place, hello, REDIAL_S),
            patience_s=self._spec.lost_after_s,
            encoder=LinkEncoder(self._run, self.levels, self._spec.codec, CpuShare(self._cpu_s)),
        )
        leave.callback(self._outbox.abort)
        arriving = listener.accept(RING_S)
        if arriving.peer != self._spec.previous or arriving.purpose != "data":
            raise ProtocolError(f"{arriving.peer} connected in place of {self._spec.previous}")
        levels = LEVELS if self._spec.incoming_codec == INT8 else LOSSLESS
        decoder = LinkDecoder(levels, CpuShare(self._cpu_s))
        self._inbox = Inbox(arriving, self._mailbox, listener, self._spec.lost_after_s, decoder)
        leave.callback(self._inbox.close)
        return True

    def _next_message(self, timeout_s: float | None) -> Message | None:
        """The next message of driver or ring; None if none comes in time. Raises what went down."""
        mail = self._mailbox.get(timeout_s)
        if mail is None:
            return None
        if isinstance(mail, LinkDown):
            return self._farewell(mail)
        return decode(mail.frame)

    def _farewell(self, down: LinkDown) -> Message:
        """A connection ended: the driver's Stop explains it, or it is an error."""
        if down.source.share is not self._driver.connection.share:
            deadline = time.monotonic() + FAREWELL_S
            while (left := deadline - time.monotonic()) > 0:
                mail = self._mailbox.get(left)
                if mail is None or isinstance(mail, LinkDown):
                    continue
                message = decode(mail.frame)
                if isinstance(message, Stop):
                    return message
        raise down.error

    def _send(self, frame: StepFrame | SampleFrame | StepFailed) -> None:
        assert self._outbox is not None, "a pipeline of one stage sends nothing"
        # An activation is coded by the link's own thread, beside the next step's layers.
        self._outbox.put(frame if isinstance(frame, StepFrame) else frame.encode(self._run))

    def _follow(self, compute: Compute) -> None:
        """A later stage: compute each frame as it comes, pass on what comes of it."""
        while True:
            message = self._next_message(None)
            if isinstance(message, StepFrame):
                self._send(self._computed(compute, message))
            elif isinstance(message, StepFailed):
                self._send(message)
            elif isinstance(message, Stop):
                return
            else:
                raise ProtocolError(f"a {type(message).__name__} has no place at a later stage")

    def _computed(self, compute: Compute, frame: StepFrame) -> StepFrame | SampleFrame | StepFailed:
        try:
            with self._busy(frame.step.tokens):
                return compute.go_on(frame)
        except StepError as error:
            return self._step_failed(frame.step.frame, frame.step.slot, error)

    def _lead(self, compute: Compute) -> None:
        """The first stage: rows in, steps round the ring, answers out."""
        encoder = PromptEncoder.load(self._spec.model.folder, "parse")
        head = Head(compute.ring, encoder)
        idle = True
        while True:
            message = self._next_message(None if idle else 0.0)
            if message is None:
                idle = not self._advance(head, compute)
            elif isinstance(message, Stop):
                return
            else:
                self._report(self._take(head, message))
                idle = False

    def _take(self, head: Head, message: Message) -> list[Answer]:
        if isinstance(message, Rows):
            head.lease(message.rows)
            return []
        if isinstance(message, OpenSlots):
            head.open_slots(message.slots)
            return []
        if isinstance(message, Recall):
            # Said after the answers before it, and what is named here is answered no more.
            given = head.give_back(message.rows, message.most_tokens)
            self._driver.send(Returned(rows=given))
            return []
        if isinstance(message, SampleFrame):
            return head.sampled(message)
        if isinstance(message, StepFailed):
            return head.failed(message)
        raise ProtocolError(f"a {type(message).__name__} has no place at the head")

    def _advance(self, head: Head, compute: Compute) -> bool:
        """Compute and send the next step; False if there is none."""
        work = head.next_work()
        if work is None:
            return False
        out: StepFrame | SampleFrame | StepFailed
        try:
            with self._busy(work.step.tokens):
                out = compute.begin(work.step, torch.from_numpy(work.token_ids), work.admits)
        except StepError as error:
            out = self._step_failed(work.step.frame, work.step.slot, error)
        if self._outbox is not None:
            self._send(out)
        elif isinstance(out, StepFailed):
            self._report(head.failed(out))
        elif isinstance(out, SampleFrame):
            self._report(head.sampled(out))
        else:
            raise ProtocolError("a pipeline of one stage must sample")
        return True

    def _report(self, answers: list[Answer]) -> None:
        for part in messages_of(answers):
            self._driver.send(Answers(answers=part))

    def _step_failed(self, frame: int, slot: int, error: StepError) -> StepFailed:
        log.error("step failed frame=%d error=%s", frame, error)
        return StepFailed(
            epoch=self._spec.epoch,
            frame=frame,
            slot=slot,
            sequences=error.sequences,
            error_type=error.kind,
            message=str(error),
        )

    @contextlib.contextmanager
    def _busy(self, tokens: int) -> Iterator[None]:
        started, cpu_s = time.perf_counter(), time.thread_time()
        yield
        self.done.busy_s += time.perf_counter() - started
        self.done.cpu_s += time.thread_time() - cpu_s
        self.done.frames += 1
        self.done.tokens += tokens


def _end_with_parent() -> None:
    """Leave when the pipe from the supervising flow closes, however it died."""
    if stat.S_ISFIFO(os.fstat(sys.stdin.fileno()).st_mode):
        threading.Thread(target=_leave_at_end_of_input, daemon=True).start()


def _leave_at_end_of_input() -> None:
    while os.read(
        sys.stdin.fileno(), 4096
    ):  # no buffer: its lock would hold up the interpreter's end
        pass
    os._exit(ORPHANED)  # nobody is left to report to, and a run resumes from what was committed


def _die_of(failure: threading.ExceptHookArgs) -> None:
    """End the process when a thread dies of what it did not foresee: whoever waits for it would
    wait for ever."""
    if issubclass(failure.exc_type, SystemExit):
        return
    name = failure.thread.name if failure.thread else "unknown"
    error = failure.exc_value or failure.exc_type()
    log.critical("thread failed name=%s", name, exc_info=error)
    logging.shutdown()
    os._exit(UNSURE)


def main() -> int:
    """Run the worker of the spec file named on the command line; 0 after the driver's Stop."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    threading.excepthook = _die_of
    _end_with_parent()
    spec = StageSpec.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        Worker(spec).live()
    except StageError as error:
        log.error(
            "stage failed member=%s type=%s error=%s", spec.member, type(error).__name__, error
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
