"""`python -m sidtune`: the command `sidtune`."""

from sidtune.core.cli import main

main()
