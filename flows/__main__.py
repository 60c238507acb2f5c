"""`python -m flows` is `wagonway`. Imports little by itself, so that Ctrl-C is heeded at once."""

import os
import sys
from typing import NoReturn

INTERRUPTED = 130


def main() -> NoReturn:
    """Entry point of the command; one may leave it while its libraries are still loading."""
    try:
        from flows.cli import main as command  # noqa: PLC0415

        command()
    except KeyboardInterrupt:
        sys.stderr.write("wagonway: interrupted\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # as after any other end: libraries' threads are not waited for


if __name__ == "__main__":
    main()
