"""
How two members of a plan meet: `dial` and `Listener` make connections whose both ends are known.

Both ends prove their key, compare the certificate with the plan's for that name, and exchange a
hello (name, run, epoch) before anything else. In TLS 1.3 a refused client learns of it only at its
next read, so `dial` returns a connection only after the listener's own hello came back.
"""

import contextlib
import logging
import secrets
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TypeAlias

from stages.control import Hello, Refused, Welcome, decode
from stages.errors import (
    LinkError,
    LinkTimeoutError,
    PeerClosedError,
    PeerRefusedError,
    ProtocolError,
    StageError,
)
from stages.frame import (
    ACK_KINDS,
    CONTROL_KINDS,
    GREETING_KINDS,
    RING_KINDS,
    EpochMismatchError,
    Frame,
    FrameReader,
    Kind,
    Packet,
    RunMismatchError,
    run_number,
)
from stages.link import Connection, Purpose, Trust, link_error, link_habits, part, tune

log = logging.getLogger(__name__)

Address: TypeAlias = tuple[str, int]

HANDSHAKE_S = 10.0  # for TLS and hello together, however slowly the bytes drip
MAX_HANDSHAKES = 32


def dial(
    trust: Trust,
    peer: str,
    address: Address,
    hello: Hello,
    timeout_s: float,
    stripes: int | None = None,
) -> Connection:
    """
    A connection to the member of that name, tried until it stands or the time is over.

    Data takes as many `stripes` as suit this host's congestion control, where none are named. Raises
    PeerRefusedError where another certificate answers or the listener refuses ours,
    RunMismatchError and EpochMismatchError where the listener serves another run or a later plan,
    LinkTimeoutError where nobody answers in time.
    """
    deadline_s = time.monotonic() + timeout_s
    pause_s = 0.05
    while True:
        try:
            return dial_once(trust, peer, address, hello, deadline_s - time.monotonic(), stripes)
        except LinkError as error:
            if time.monotonic() + pause_s >= deadline_s:
                place = f"{peer} at {address[0]}:{address[1]}"
                raise LinkTimeoutError(f"no link to {place} in {timeout_s} s: {error}") from error
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)


def dial_once(
    trust: Trust,
    peer: str,
    address: Address,
    hello: Hello,
    timeout_s: float,
    stripes: int | None = None,
) -> Connection:
    """One attempt of `dial`: raises LinkError at once where nobody listens."""
    deadline_s = time.monotonic() + timeout_s
    if stripes is None:
        stripes = link_habits().stripes if hello.purpose == "data" else 1
    stream = {"stream": secrets.randbits(64) if stripes > 1 else 0, "stripes": stripes}
    hellos = [hello.model_copy(update=stream | {"stripe": stripe}) for stripe in range(stripes)]
    with ThreadPoolExecutor(stripes) as pool, contextlib.ExitStack() as undo:
        dialled = [pool.submit(_dialled, trust, peer, address, h, deadline_s) for h in hellos]
        wait(dialled)
        for each in dialled:
            if each.exception() is None:
                undo.callback(each.result()[0].close)
        sockets, welcomes = zip(*(each.result() for each in dialled), strict=True)
        undo.pop_all()
    incoming = ACK_KINDS | {Kind.REFUSED} if hello.purpose == "data" else CONTROL_KINDS
    earliest = min(welcomes, key=lambda welcome: welcome.last_frame)
    return Connection(sockets, earliest, hello.purpose, incoming)


def _dialled(
    trust: Trust, peer: str, address: Address, hello: Hello, deadline_s: float
) -> tuple[ssl.SSLSocket, Welcome]:
    """One TLS connection to the member of that name, and its greeting."""
    place = f"{peer} at {address[0]}:{address[1]}"
    with contextlib.ExitStack() as undo:
        try:
            raw = _connected(address, deadline_s)
            undo.callback(raw.close)
            tls = trust.client.wrap_socket(raw, do_handshake_on_connect=False)
            undo.callback(tls.close)
            tls.do_handshake()
            if trust.name_of(tls) != peer:
                raise PeerRefusedError(f"{trust.name_of(tls)} answers in place of {place}")
            _send_greeting(tls, hello.greeting())
            answer = decode(_read_greeting(tls, deadline_s))
        except ssl.SSLError as error:
            raise _handshake_error(place, error) from error
        except OSError as error:
            raise link_error(place, error) from error
        welcome = _welcome(place, hello, answer)
        tls.settimeout(None)
        undo.pop_all()
        return tls, welcome


def _connected(address: Address, deadline_s: float) -> socket.socket:
    """A TCP connection, tuned before it stands, so that both ends know how much it can hold."""
    family, kind, _, _, place = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    with contextlib.ExitStack() as undo:
        raw = socket.socket(family, kind)
        undo.callback(raw.close)
        tune(raw)
        raw.settimeout(_left_s(deadline_s))
        raw.connect(place)
        undo.pop_all()
    return raw


def _welcome(place: str, hello: Hello, answer: object) -> Welcome:
    """The listener's greeting, checked; raises where it is a refusal or not the one we asked."""
    if isinstance(answer, Refused):
        complaint = f"{place} refused us: {answer.reason}"
        if answer.cause == "epoch" and answer.epoch < hello.epoch:
            raise LinkError(complaint)  # it will hear of our plan soon
        causes = {"run": RunMismatchError, "epoch": EpochMismatchError, "name": PeerRefusedError}
        raise causes[answer.cause](complaint)
    if not isinstance(answer, Welcome):
        raise ProtocolError(f"{place} answered a hello with something else")
    if answer.run != hello.run:
        raise RunMismatchError(f"{place} serves run {answer.run}, not {hello.run}")
    if hello.purpose == "data" and answer.epoch != hello.epoch:
        raise EpochMismatchError(f"{place} is in epoch {answer.epoch}, not {hello.epoch}")
    return answer


@dataclass(frozen=True, slots=True)
class Refusal:
    """A connection that was turned away, for the log and for people."""

    address: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Route:
    """Who takes the connections of one peer and purpose."""

    take: Callable[[Connection], None]
    last_frame: Callable[[], int]


@dataclass(slots=True)
class _Stream:
    """Connections of one stream, of which some are still to come."""

    number: int
    stripes: int
    sockets: dict[int, ssl.SSLSocket] = field(default_factory=dict)

    def close(self) -> None:
        for tls in self.sockets.values():
            tls.close()


class Listener:
    """
    Takes connections from members of the plan, at one given address and nowhere else.

    Every handshake has its own thread and a deadline, so a peer that dribbles holds nobody up.
    `greeting` gives this end's hello anew for each connection: its epoch is the plan in force.
    A stranger is refused, noted in `refusals`, and otherwise no event.
    """

    def __init__(
        self,
        trust: Trust,
        greeting: Callable[[], Hello],
        host: str,
        port: int = 0,
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        if host in ("", "0.0.0.0", "::"):
            raise ValueError(f"listen on an address that peers can dial, not on {host!r}")
        self.trust = trust
        """Replace it when the plan's members change."""
        self.refusals: deque[Refusal] = deque(maxlen=256)
        self._greeting = greeting
        self._handshake_s = handshake_s
        self._socket = _listen(host, port)
        self._ready: deque[Connection] = deque()
        self._routes: dict[tuple[str, Purpose], _Route] = {}
        self._begun: dict[tuple[str, Purpose], _Stream] = {}
        self._changed = threading.Condition()
        self._handshakes = threading.BoundedSemaphore(MAX_HANDSHAKES)
        self._closing = False
        self._over = ""
        self._thread = threading.Thread(target=self._serve, name="link-accept", daemon=True)
        self._thread.start()

    @property
    def address(self) -> Address:
        """Where it really listens: the host as given, the port as the system chose it."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    def accept(self, timeout_s: float) -> Connection:
        """The next checked connection, oldest first; LinkTimeoutError if none comes in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready, timeout_s):
                turned_away = f"; refused last: {self.refusals[-1].reason}" if self.refusals else ""
                raise LinkTimeoutError(f"no member connected in {timeout_s} s{turned_away}")
            return self._ready.popleft()

    def route(
        self,
        peer: str,
        take: Callable[[Connection], None],
        last_frame: Callable[[], int],
        purpose: Purpose = "data",
    ) -> None:
        """
        From now on hand that peer's connections of that purpose to `take`, as soon as they stand.

        `last_frame` goes into the welcome: the peer sends again what comes after it. Both are
        called from a handshake's thread.
        """
        with self._changed:
            self._routes[peer, purpose] = _Route(take, last_frame)
            early = [c for c in self._ready if (c.peer, c.purpose) == (peer, purpose)]
            for connection in early:
                self._ready.remove(connection)
        for connection in early:
            take(connection)

    def unroute(self, peer: str, purpose: Purpose = "data") -> None:
        """Hand that peer's connections of that purpose to `accept` again."""
        with self._changed:
            self._routes.pop((peer, purpose), None)

    def turn_away(self, reason: str) -> None:
        """From now on refuse every member, and tell it why."""
        self._over = reason

    def close(self) -> None:
        """Stop listening and drop connections that nobody accepted."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # where it wakes the accepting thread, sooner
        self._thread.join()
        self._socket.close()
        with self._changed:
            while self._ready:
                self._ready.popleft().close()
            while self._begun:
                self._begun.popitem()[1].close()

    def _serve(self) -> None:
        while not self._closing:
            self._handshakes.acquire()  # the rest wait in the backlog
            accepted = self._next()
            if accepted is None:
                self._handshakes.release()
                continue
            threading.Thread(
                target=self._greet, args=accepted, name="link-handshake", daemon=True
            ).start()

    def _next(self) -> tuple[socket.socket, str] | None:
        """The next TCP connection and where it comes from; None where none came for a while."""
        try:
            raw, address = self._socket.accept()
        except TimeoutError:
            return None
        except OSError as error:
            if not self._closing:
                log.error("accept failed, trying on address=%s error=%s", self.address, error)
                time.sleep(0.1)
            return None
        return raw, f"{address[0]}:{address[1]}"

    def _greet(self, raw: socket.socket, place: str) -> None:
        try:
            tls, hello = self._checked(raw)
        except (StageError, OSError) as error:
            reason = str(error) or type(error).__name__
            log.warning("peer refused address=%s reason=%s", place, reason)
            self.refusals.append(Refusal(place, reason))
        else:
            connection = self._whole(tls, hello)
            if connection is not None:
                self._deliver(connection)
        finally:
            self._handshakes.release()

    def _deliver(self, connection: Connection) -> None:
        with self._changed:
            route = self._routes.get((connection.peer, connection.purpose))
            if route is None:
                self._ready.append(connection)
                self._changed.notify()
        if route is not None:
            route.take(connection)
        if self._closing:
            connection.close()

    def _whole(self, tls: ssl.SSLSocket, hello: Hello) -> Connection | None:
        """The data or control connection that this TLS connection completes, if it does."""
        with self._changed:
            place = hello.name, hello.purpose
            begun = self._begun.setdefault(place, _Stream(hello.stream, hello.stripes))
            if (begun.number, begun.stripes) != (hello.stream, hello.stripes):
                begun.close()  # its dialer has given it up
                begun = self._begun[place] = _Stream(hello.stream, hello.stripes)
            if hello.stripe in begun.sockets:
                begun.sockets[hello.stripe].close()
            begun.sockets[hello.stripe] = tls
            if len(begun.sockets) < begun.stripes:
                return None
            del self._begun[place]
        incoming = RING_KINDS if hello.purpose == "data" else CONTROL_KINDS
        sockets = [begun.sockets[stripe] for stripe in range(begun.stripes)]
        return Connection(sockets, hello, hello.purpose, incoming)

    def _checked(self, raw: socket.socket) -> tuple[ssl.SSLSocket, Hello]:
        """The TLS connection of a peer whose key, name, run and epoch hold; raises otherwise."""
        deadline_s = time.monotonic() + self._handshake_s
        trust = self.trust
        raw.settimeout(self._handshake_s)
        with contextlib.ExitStack() as undo:
            undo.callback(part, raw)
            tune(raw)
            tls = trust.server.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
            undo.pop_all()
            undo.callback(part, tls)
            tls.do_handshake()
            proven = trust.name_of(tls)
            hello = decode(_read_greeting(tls, deadline_s))
            if not isinstance(hello, Hello) or isinstance(hello, Welcome):
                raise ProtocolError(f"{proven} opened with something else than a hello")
            own = self._greeting()
            refused = _objection(own, proven, hello)
            if refused is None and self._over:
                refused = Refused(reason=self._over, cause="run", epoch=own.epoch)
            if refused is not None:
                _send_greeting(tls, refused.encode(run_number(own.run), own.epoch))
                raise PeerRefusedError(f"{proven}: {refused.reason}")
            _send_greeting(tls, self._welcome(own, hello).greeting())
            tls.settimeout(None)
            undo.pop_all()
            return tls, hello

    def _welcome(self, own: Hello, hello: Hello) -> Welcome:
        route = self._routes.get((hello.name, hello.purpose))
        last_frame = own.last_frame if route is None else route.last_frame()
        stripe = {"stream": hello.stream, "stripe": hello.stripe, "stripes": hello.stripes}
        return Welcome(**(own.model_dump() | stripe | {"last_frame": last_frame}))


def _objection(own: Hello, proven: str, hello: Hello) -> Refused | None:
    """Why a peer with that proven name and that hello has no place here, or None."""
    if hello.name != proven:
        reason = f"the certificate is {proven}'s, the hello says {hello.name}"
        return Refused(reason=reason, cause="name", epoch=own.epoch)
    if hello.run != own.run:
        reason = f"this is run {own.run}, not {hello.run}"
        return Refused(reason=reason, cause="run", epoch=own.epoch)
    if hello.purpose == "data" and hello.epoch != own.epoch:
        reason = f"this is epoch {own.epoch}, not {hello.epoch}"
        return Refused(reason=reason, cause="epoch", epoch=own.epoch)
    return None


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.create_server(address[:2], family=family, backlog=128)
    tune(listening)  # what it accepts inherits its room
    listening.settimeout(0.25)  # how soon the accepting thread sees that it is to end
    return listening


def _send_greeting(tls: ssl.SSLSocket, packet: Packet) -> None:
    tls.sendall(bytes(packet))


def _read_greeting(tls: ssl.SSLSocket, deadline_s: float) -> Frame:
    """One greeting frame and not a byte more, before the deadline."""
    reader = FrameReader(GREETING_KINDS)
    frame = None
    while frame is None:
        tls.settimeout(_left_s(deadline_s))
        count = tls.recv_into(reader.buffer())
        if count == 0:
            raise PeerClosedError("the peer went away before its hello")
        frame = reader.advance(count)
    return frame


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise LinkTimeoutError("the handshake took too long")
    return left_s


def _handshake_error(place: str, error: ssl.SSLError) -> StageError:
    """What a TLS error before the first frame means: mostly that one end refuses the other."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return PeerClosedError(f"{place} hung up in the handshake")
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerRefusedError(f"{place} is not who the plan names: {error.verify_message}")
    return PeerRefusedError(f"{place} refused the handshake: {error.reason}")
