"""Another destination that a command reads, with a passphrase and an S3 server of its own: of `copy` and `repair`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities
from snapchain.cli.output import Output
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from snapchain.destination.protocol import Destination

PANEL = "The source"
ENVIRONMENT = "SNAPCHAIN_SOURCE_PASSWORD"

PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--source-password-file",
        readable=False,
        metavar="FILE",
        help="Read the passphrase of the source from the first line of this file.",
        rich_help_panel=PANEL,
    ),
]
PasswordCommand = Annotated[
    str | None,
    typer.Option(
        "--source-password-command",
        metavar="COMMAND",
        help="Run this program (no shell) and read the passphrase of the source from the first line that it prints.",
        rich_help_panel=PANEL,
    ),
]


def passphrase(file: Path | None, command: str | None, out: Output, source: str) -> Callable[[], str | None]:
    """The passphrase of the source: from its own options or variable, else the one of the destination.

    source: its address, for the question to a person at a terminal
    """
    if file is not None or command is not None:
        return options.given_passphrase(out, file, command, options="--source-password", variable=ENVIRONMENT)
    if ENVIRONMENT in os.environ:
        return lambda: os.environ[ENVIRONMENT] or None
    return options.passphrase_source(out, source)


def opened(
    url: str,
    out: Output,
    *,
    passphrase: Callable[[], str | None],
    endpoint: str | None = None,
    profile: str | None = None,
    limit_rate: str | None = None,
) -> Destination:
    """Open a source, and show its notices."""
    from snapchain.destinations import open_destination
    from snapchain.model.events import Notice

    try:
        found = open_destination(
            url,
            passphrase=passphrase,
            limit_rate=None if limit_rate is None else quantities.parse_size(limit_rate),
            endpoint=endpoint,
            profile=profile,
        )
    except InvalidInput as error:
        # What says how to give a passphrase means the destination's.
        hint = (
            (error.hint or "").replace("SNAPCHAIN_PASSWORD", ENVIRONMENT).replace("--password-", "--source-password-")
        )
        raise type(error)(error.message, subject=error.subject, hint=hint or None) from error
    out.counts(found)
    for notice in found.notices:
        out.on_event(Notice(notice))
    return found
