"""`python -m snapchain`: the same as the `snapchain` command."""

from snapchain.cli import program

program()
