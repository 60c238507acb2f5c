"""Takes connections from members of the plan, and turns everybody else away."""

import contextlib
import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from stages.control import Hello, Refused, Welcome, decode
from stages.errors import (
    LinkTimeoutError,
    PeerRefusedError,
    ProtocolError,
    StageError,
)
from stages.frame import (
    CONTROL_KINDS,
    RING_KINDS,
    run_number,
)
from stages.greeting import Address, read_greeting, send_greeting
from stages.link import Connection, Purpose
from stages.tcp import part, tune
from stages.trust import Trust

log = logging.getLogger(__name__)

HANDSHAKE_S = 10.0  # for TLS and hello together, however slowly the bytes drip
MAX_HANDSHAKES = 32
PROOF_S = 1.0  # for a peer to prove its key while others wait: several round trips of a long wire
MAKE_WAY_S = 0.05  # how often it is looked for who has not


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

    Every handshake has its own thread and a deadline, so a peer that dribbles holds nobody up. When
    there are MAX_HANDSHAKES, those that have proved no key for PROOF_S make way for others.
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
        self._unproven: dict[ssl.SSLSocket, float] = {}
        """Connections whose peers have proved no key, and since when they are there."""
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
            accepted = self._next()
            if accepted is None:
                continue
            while not self._handshakes.acquire(timeout=MAKE_WAY_S):  # the rest wait in the backlog
                self._make_way()
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

    def _make_way(self) -> None:
        """End handshakes that should have proved a key by now; a member dials again."""
        before_s = time.monotonic() - PROOF_S
        with self._changed:
            late = [tls for tls, since_s in self._unproven.items() if since_s < before_s]
            for tls in late:
                del self._unproven[tls]
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(tls, socket.SHUT_RDWR)  # wakes its thread

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
            proven = self._proven(trust, tls)
            hello = decode(read_greeting(tls, deadline_s))
            if not isinstance(hello, Hello) or isinstance(hello, Welcome):
                raise ProtocolError(f"{proven} opened with something else than a hello")
            own = self._greeting()
            refused = _objection(own, proven, hello)
            if refused is None and self._over:
                refused = Refused(reason=self._over, cause="run", epoch=own.epoch)
            if refused is not None:
                send_greeting(tls, refused.encode(run_number(own.run), own.epoch))
                raise PeerRefusedError(f"{proven}: {refused.reason}")
            send_greeting(tls, self._welcome(own, hello).greeting())
            tls.settimeout(None)
            undo.pop_all()
            return tls, hello

    def _proven(self, trust: Trust, tls: ssl.SSLSocket) -> str:
        """The member whose key the peer holds; raises where it is nobody's."""
        with self._changed:
            self._unproven[tls] = time.monotonic()
        try:
            tls.do_handshake()
            return trust.name_of(tls)
        finally:
            with self._changed:
                self._unproven.pop(tls, None)

    def _welcome(self, own: Hello, hello: Hello) -> Welcome:
        route = self._routes.get((hello.name, hello.purpose))
        last_frame = own.last_frame if route is None else route.last_frame()
        stripe = hello.model_dump(include={"stream", "stripe", "stripes", "in_turns"})
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
