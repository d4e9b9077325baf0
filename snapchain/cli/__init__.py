"""The command line: parse, plan, show, run, show. One file a verb; everything that matters happens in `snapchain.ops`.

Nothing heavy is imported here or at the top of a verb's file, so that `snapchain --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from gc import set_threshold
from typing import NoReturn

from snapchain.cli import exits, streams
from snapchain.cli.exits import interrupting
from snapchain.cli.verbs import check_verb, help_page
from snapchain.errors import Unsupported
from snapchain.host import process_limits

__all__ = ["main", "program"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (the table is in docs/guide/scripting.md)."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    # numpy's linear algebra, which nothing here uses, would start a thread for each processor and spin in them.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # pydantic would look through all installed packages for plugins, and load what it finds: no command needs any.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    # What a command loads and makes stays until its end: to look for garbage every 700 objects is a tenth of a start.
    set_threshold(50_000, 20, 20)
    process_limits.raise_limit()
    with interrupting(), streams.checked():
        return _run(words)


def _run(words: Sequence[str]) -> int:
    try:
        _check_words(words)
        # inside: a Ctrl-C while they load gets a clean end too
        from snapchain.cli.preconnect import logging_in, serve_directly

        if serve_directly(words):
            return 0
        if _answered_from_table(words):
            sys.stdout.flush()
            return 0
        if "_SNAPCHAIN_COMPLETE" in os.environ:
            from snapchain.cli.completion import prepare

            prepare(os.environ)
        with logging_in(words):
            from snapchain.cli.app import app

            status = app(words, prog_name="snapchain", standalone_mode=False)
        sys.stdout.flush()  # a reader that has gone shows here, not in the interpreter's last breath
        return int(status or 0)
    except BaseException as error:  # noqa: BLE001 - the last handler: everything becomes words and an exit code
        verb = words[0] if words and not words[0].startswith("-") else ""
        return exits.report(error, as_json="--json" in words, verb=verb)


def _answered_from_table(words: Sequence[str]) -> bool:
    """Whether the table of verbs alone can answer this command line, without loading the parser.

    Raises InvalidInput for a first word that is no verb.
    """
    if words and not words[0].startswith("-"):
        check_verb(words[0])
    if list(words) not in (["--help"], ["-h"]):
        return False
    from shutil import get_terminal_size

    sys.stdout.write(help_page(width=get_terminal_size().columns, bold=sys.stdout.isatty()))
    return True


def program() -> NoReturn:
    """The console script. Leaves at once: after a Ctrl-C threads may still wait for something, and taking a hundred
    modules down again would be a fifth of a short command's time. Nothing here is left to an exit handler, and what
    stdout would not take is not offered to it again.
    """
    process_limits.harden()
    streams.occupy_descriptors()
    os._exit(main())


def _check_words(words: Sequence[str]) -> None:
    """Names are stored and shown as text; a name that is none would fail somewhere half-way."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            shown = word.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise Unsupported("not UTF-8 text", subject=shown, hint="rename the file, or make a link to it") from None
