"""The options that several verbs share, each said once: name, environment variable, help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from snapchain.cli.progress import Mode

_OUTPUT = "Output"
_KEY = "Passphrase"

Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object: sizes in bytes, times in UTC.", rich_help_panel=_OUTPUT),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", "-n", help="Print what would be done, and do nothing.", rich_help_panel=_OUTPUT),
]
Progress = Annotated[
    Mode,
    typer.Option(
        "--progress",
        help="On stderr: a bar if it is a terminal (auto), one JSON object a line (json), or nothing (none).",
        rich_help_panel=_OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No progress, no notes, no report; errors only.", rich_help_panel=_OUTPUT),
]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        metavar="FILE",
        envvar="SNAPCHAIN_PASSWORD_FILE",
        help="Read the repository's passphrase from the first line of this file.",
        rich_help_panel=_KEY,
    ),
]
PasswordCommand = Annotated[
    str | None,
    typer.Option(
        "--password-command",
        metavar="COMMAND",
        envvar="SNAPCHAIN_PASSWORD_COMMAND",
        help="Run this program (no shell) and read the passphrase from the first line that it prints.",
        rich_help_panel=_KEY,
    ),
]
ImageDir = Annotated[
    list[Path] | None,
    typer.Option(
        "--image-dir",
        metavar="DIR",
        help="Backing files may lie here too, besides the directory of the image itself. May be repeated; "
        "SNAPCHAIN_IMAGE_DIRS holds a list of them, colon separated.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        "-f",
        metavar="qcow2|raw",
        help="Format of the image itself. By default by its suffix; never guessed from what it holds.",
    ),
]
LimitRate = Annotated[
    str | None,
    typer.Option("--limit-rate", metavar="BYTES", help="At most so many bytes a second to or from the store: 10M."),
]
