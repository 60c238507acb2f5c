"""`python -m flows` is `wagonway`."""

from flows.cli import main

main()
