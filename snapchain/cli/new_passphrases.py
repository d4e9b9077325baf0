"""A new passphrase: as a program gives it, or typed twice by a person, who may not choose a weak one."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Callable

from snapchain.cli.output import Output
from snapchain.errors import InvalidInput
from snapchain.host import passphrases
from snapchain.host.terminal import printable
from snapchain.model.events import Notice
from snapchain.model.passphrases import weakness


def new_passphrase(given: Callable[[], str | None], out: Output, dest: str, *, advice: str = "") -> str | None:
    """The passphrase that was set for the command, or that a person types; None where there is neither.

    given: from a file, a program or the environment: a weak one is a notice, since scripts must go on working
    advice: shown before the question
    """
    names = _names(dest)
    found = given()
    if found:
        if reason := weakness(found, names):
            out.on_event(Notice(f"the passphrase is weak: {reason}. `snapchain key change` replaces it"))
        return found
    return _chosen(dest, names, advice) if passphrases.is_at_terminal() else None


def _chosen(dest: str, names: list[str], advice: str) -> str:
    if advice:
        passphrases.show(f"{advice}\n")
    while True:
        try:
            text = passphrases.ask(f"New passphrase of {printable(dest)}: ")
        except InvalidInput as error:
            raise InvalidInput(f"no new passphrase was given: {error.message}", subject=dest) from error
        if reason := weakness(text, names):
            passphrases.show(f"This passphrase is refused: {reason}. Several unrelated words make a good one.\n")
        elif passphrases.ask("The same again: ") != text:
            passphrases.show("The two are not the same.\n")
        else:
            return text


def _names(dest: str) -> list[str]:
    """What a guesser knows: the host, the user, and the parts of the address."""
    parts = [part for part in re.split(r"[/:.@_-]+", dest) if part]
    host = socket.gethostname()
    try:
        user = [getpass.getuser()]
    except (KeyError, OSError):  # a user without a name
        user = []
    return [*parts, "".join(parts), host, *host.split("."), *user]
