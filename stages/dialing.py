"""Dials a member of the plan: what comes back is a connection whose both ends are known."""

import contextlib
import secrets
import socket
import ssl
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

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
    EpochMismatchError,
    Kind,
    RunMismatchError,
)
from stages.greeting import Address, left_s, read_greeting, send_greeting
from stages.link import Connection
from stages.tcp import Bundle, link_error, link_habits, tune
from stages.trust import Trust


def dial(
    trust: Trust,
    peer: str,
    address: Address,
    hello: Hello,
    timeout_s: float,
    bundle: Bundle | None = None,
) -> Connection:
    """
    A connection to the member of that name, tried until it stands or the time is over.

    Data takes the `bundle` that suits this host's congestion control, where none is named. Raises
    PeerRefusedError where another certificate answers or the listener refuses ours,
    RunMismatchError and EpochMismatchError where the listener serves another run or a later plan,
    LinkTimeoutError where nobody answers in time.
    """
    deadline_s = time.monotonic() + timeout_s
    pause_s = 0.05
    while True:
        try:
            return dial_once(trust, peer, address, hello, deadline_s - time.monotonic(), bundle)
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
    bundle: Bundle | None = None,
) -> Connection:
    """One attempt of `dial`: raises LinkError at once where nobody listens."""
    deadline_s = time.monotonic() + timeout_s
    if bundle is None:
        bundle = link_habits().bundle if hello.purpose == "data" else Bundle()
    stripes = bundle.stripes
    number = secrets.randbits(64) if stripes > 1 else 0
    stream = {"stream": number, "stripes": stripes, "in_turns": bundle.in_turns}
    hellos = [hello.model_copy(update=stream | {"stripe": stripe}) for stripe in range(stripes)]
    with ThreadPoolExecutor(stripes) as pool, contextlib.ExitStack() as undo:
        dialled = [pool.submit(_dialled, trust, peer, address, h, deadline_s) for h in hellos]
        first, _ = wait(dialled, return_when=FIRST_EXCEPTION)  # others may only time out
        wait(dialled)
        for each in dialled:
            if each.exception() is None:
                undo.callback(each.result()[0].close)
        for each in first:
            each.result()
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
            send_greeting(tls, hello.greeting())
            answer = decode(read_greeting(tls, deadline_s))
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
        raw.settimeout(left_s(deadline_s))
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


def _handshake_error(place: str, error: ssl.SSLError) -> StageError:
    """What a TLS error before the first frame means: mostly that one end refuses the other."""
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return PeerClosedError(f"{place} hung up in the handshake")
    if isinstance(error, ssl.SSLCertVerificationError):
        return PeerRefusedError(f"{place} is not who the plan names: {error.verify_message}")
    return PeerRefusedError(f"{place} refused the handshake: {error.reason}")
