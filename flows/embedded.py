"""A Prefect server of a run's own, for a run that names no other; it ends when its parent does.

As a module (`python -m flows.embedded FD`) it is the child: it serves on the inherited socket until
its standard input closes, which happens however the parent dies.
"""

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flows.errors import ServerError
from storage.scratch import Scratch

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

DRAIN_S = 5.0
START_LIMIT_S = 180.0
"""A first start migrates a fresh database: about 20 s on two busy cores."""
CLIENT_RETRIES = 1
"""Of a call to a server of our own, after 2 s: once such a server is gone it stays gone."""


class EmbeddedServer:
    """The child process; start it early, since it takes long, and wait when it is needed."""

    def __init__(self) -> None:
        self._scratch = Scratch("prefect")
        self._home = self._scratch.path
        self._log = (self._home / "server.log").open("wb")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.api_url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "flows.embedded",
                    str(listener.fileno()),
                ],
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[listener.fileno()],
                env={**os.environ, **_server_settings(self._home)},
                start_new_session=True,  # Ctrl-C is the parent's alone, which still needs a server
            )

    @property
    def pid(self) -> int:
        """The server's process id."""
        return self._process.pid

    def wait_until_healthy(self) -> None:
        """Return once the API answers; ServerError with the server's last words if it does not."""
        deadline = time.monotonic() + START_LIMIT_S
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                words = (self._home / "server.log").read_text(errors="replace")[-2000:]
                raise ServerError(f"the embedded Prefect server did not start: {words}")
            time.sleep(0.1)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api_url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """End the child and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()
        self._scratch.cleanup()


@contextmanager
def embedded_server() -> Iterator[EmbeddedServer]:
    """A server that starts now, in the background, and is gone at the end."""
    server = EmbeddedServer()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def control_plane() -> Iterator[None]:
    """The Prefect server that the user has configured, or else one of this run's own.

    Raises ServerError for a server that cannot be reached, or no longer.
    """
    import httpx  # noqa: PLC0415  (the child needs none of these)
    from prefect.settings import get_current_settings  # noqa: PLC0415

    url = get_current_settings().api.url
    try:
        if url:
            yield
        else:
            with embedded_server() as server:
                server.wait_until_healthy()
                with _spoken_to(server.api_url):
                    yield
    except httpx.HTTPError as error:
        if not url:
            raise ServerError(f"the embedded Prefect server does not answer: {error}") from error
        raise ServerError(
            f"the Prefect server at {url} does not answer: {error}; start it, or unset "
            "PREFECT_API_URL for the run to bring its own"
        ) from error


@contextmanager
def _spoken_to(api_url: str) -> Iterator[None]:
    """Prefect's calls in the context go to a server of our own."""
    from prefect.events.worker import EventsWorker  # noqa: PLC0415
    from prefect.settings import (  # noqa: PLC0415
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        PREFECT_LOGGING_TO_API_ENABLED,
        temporary_settings,
    )

    own = {
        PREFECT_API_URL: api_url,
        PREFECT_CLIENT_MAX_RETRIES: CLIENT_RETRIES,
        PREFECT_LOGGING_TO_API_ENABLED: False,  # nobody could read them there: it has no pages
    }
    with temporary_settings(own):
        try:
            yield
        finally:
            # What is still to be said to the server; once it is gone this would wait and wait.
            EventsWorker.drain_all(timeout=DRAIN_S, at_exit=False)


def _server_settings(home: Path) -> dict[str, str]:
    return {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": "",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_UI_ENABLED": "0",
        # A run of minutes needs the API alone: no scheduler, no telemetry, no late-run checks.
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }


def _end_with_parent() -> None:
    while os.read(
        sys.stdin.fileno(), 4096
    ):  # no buffer: its lock would hold up the interpreter's end
        pass
    os._exit(0)  # whoever asked is gone: there is nobody to shut down for in good order


def patient(app: "ASGIApp") -> "ASGIApp":
    """
    The same server, which asks to be called again when it is busy.

    On a crowded machine its database may be held for seconds. Prefect's clients count such a 503 as
    they count a server that is gone, unless it says that this is maintenance.
    """

    async def answer(scope: "Scope", receive: "Receive", send: "Send") -> None:
        async def told(message: "Message") -> None:
            if message["type"] == "http.response.start" and message["status"] == 503:
                again = (b"prefect-maintenance", b"true"), (b"retry-after", b"1")
                message = {**message, "headers": [*message.get("headers", ()), *again]}
            await send(message)

        await app(scope, receive, told)

    return answer


def _serve(listener_fd: int) -> None:
    import uvicorn  # noqa: PLC0415  (the child's alone; the driver's start should not pay for it)

    threading.Thread(target=_end_with_parent, daemon=True).start()
    from prefect.server.api.server import create_app  # noqa: PLC0415

    config = uvicorn.Config(patient(create_app()), log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=listener_fd)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
