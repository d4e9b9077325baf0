"""A passphrase from a file, a program or a terminal: one line. Who else could read or replace the file is told.

What is judged is the file that was opened, not the one that has its name a moment later:

    writable by everybody                   refused: anybody could choose the key of the next repository
    readable by everybody                   a note; secrets that are mounted into containers are so
    of another user, who is not root        a note: that user can read and replace it
    in a directory of everybody's           refused: anybody could put another file in its place
    in a directory of another user          a note: that user can replace it

A pipe or a terminal has no such rights: `--password-file <(pass show backup)`.
"""

from __future__ import annotations

import os
import pwd
import stat
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.host.files import directory_of
from snapchain.host.processes import run
from snapchain.host.readable import is_readable
from snapchain.host.terminal import shell_word

_SECONDS = 60.0
"""A program, or the writer of a pipe, has so long."""
_LIMIT = 64 << 10
_MOST_QUESTIONS = 3
"""For one passphrase at a terminal, as cryptsetup and ssh ask."""
_STDIN = 0
_LOCAL_FLAGS = 3
"""Where they are in what tcgetattr gives."""

OnNotice = Callable[[str], None]


def from_file(path: Path, *, on_notice: OnNotice) -> str:
    """The passphrase in a file; links are followed. Raises InvalidInput."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is waited for below, with a limit
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                _check(path, status, on_notice)
                _check_place(path, status, on_notice)
                text = os.read(fd, _LIMIT)
            else:
                text = _arriving(fd, path)
        finally:
            os.close(fd)
    except OSError as error:
        raise InvalidInput(f"the passphrase cannot be read: {error.strerror}", subject=path) from error
    return _first_line(text, subject=str(path))


def from_program(argv: Sequence[str]) -> str:
    """The passphrase that a program prints. Raises InvalidInput, ToolFailed."""
    # The whole environment: a password manager finds its agent, its display and its home there.
    done = run(argv, timeout=_SECONDS, env=dict(os.environ))
    return _first_line(done.stdout, subject=argv[0])


def _check(path: Path, status: os.stat_result, on_notice: OnNotice) -> None:
    """Raises InvalidInput for a file that anybody may write to."""
    remedy = f"chmod 600 {shell_word(path)}"
    if status.st_mode & stat.S_IWOTH:
        raise InvalidInput("every user of this host can replace this passphrase", subject=path, hint=remedy)
    if status.st_mode & stat.S_IROTH:
        on_notice(f"{path}: every user of this host can read this passphrase ({remedy})")
    if status.st_uid not in (0, os.geteuid()):
        on_notice(f"{path}: the user {_name(status.st_uid)} can read and replace this passphrase, whose file it is")


def _check_place(path: Path, status: os.stat_result, on_notice: OnNotice) -> None:
    """The same for the directory, in which whoever may write to it can put another file in its place."""
    place = path.resolve().parent
    found = place.stat()
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        raise InvalidInput(
            "every user of this host can replace this passphrase", subject=path, hint=f"chmod o-w {shell_word(place)}"
        )
    if found.st_uid not in (0, os.geteuid(), status.st_uid):
        on_notice(f"{path}: the user {_name(found.st_uid)} can replace this passphrase, whose directory it is")


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def _arriving(fd: int, path: Path) -> bytes:
    """What comes through a pipe or a terminal, up to the end of a line."""
    text = b""
    deadline = time.monotonic() + _SECONDS
    while b"\n" not in text and len(text) < _LIMIT:
        left = deadline - time.monotonic()
        if left <= 0 or not is_readable(fd, left):
            raise InvalidInput(f"no passphrase has come within {_SECONDS:g} seconds", subject=path)
        piece = os.read(fd, _LIMIT)
        if not piece:
            break
        text += piece
    return text


def _first_line(text: bytes, *, subject: str) -> str:
    try:
        line = text.decode().partition("\n")[0].rstrip("\r")
    except UnicodeDecodeError as error:
        raise InvalidInput("the passphrase is not UTF-8 text", subject=subject) from error
    if not line:
        raise InvalidInput("the passphrase there is empty", subject=subject)
    return line


def write_new_file(path: Path, text: str) -> None:
    """Write a secret to a new file that only this user can read. Raises Conflict where it exists."""
    with directory_of(path) as directory:
        fd = directory.create(path.name)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(fd)
        except BaseException:
            directory.remove(path.name)
            raise
        directory.sync()


# --- At a terminal.


@dataclass(slots=True)
class PassphraseSource:
    """Calling it gives the passphrase, or None: what was set for the command; else what a person types.

    given: from a file, a program or the environment; ask: at a terminal. The answer is kept.
    """

    given: Callable[[], str | None]
    ask: Callable[[], str]
    _found: str | None = None
    _questions: int = 0

    def __call__(self) -> str | None:
        if self._found is None:
            self._found = self.given() or (self._typed() if is_at_terminal() else None)
        return self._found

    def _typed(self) -> str:
        self._questions += 1
        return self.ask()

    def may_ask_again(self, reason: str) -> bool:
        """Show why what a person typed was refused, and forget it: the next call asks anew.

        False where no person was asked, or often enough: the refusal is final then.
        """
        if not 0 < self._questions < _MOST_QUESTIONS:
            return False
        show(f"{reason[:1].upper()}{reason[1:]}. Try again.\n")
        self._found = None
        return True


def is_at_terminal() -> bool:
    """Whether a person can be asked: standard input is a terminal, and this process may read from it.

    Only in the main thread: a Ctrl-C would not end the question in another one.
    """
    if threading.current_thread() is not threading.main_thread() or not os.isatty(_STDIN):
        return False
    try:
        return os.tcgetpgrp(_STDIN) == os.getpgrp()  # one in the background would be stopped
    except OSError:  # a terminal without job control
        return True


def ask(words: str) -> str:
    """What a person types, without echo. Raises InvalidInput for an end of the input, and what is no UTF-8."""
    with _terminal() as fd:
        try:
            before = termios.tcgetattr(fd)
            silent = list(before)
            silent[_LOCAL_FLAGS] &= ~termios.ECHO
            try:
                termios.tcsetattr(fd, termios.TCSAFLUSH, silent)
                os.write(fd, words.encode("utf-8", "replace"))
                text = _typed_line(fd)
            finally:
                termios.tcsetattr(fd, termios.TCSAFLUSH, before)
                os.write(fd, b"\n")  # the one that was typed was not shown
        except (OSError, termios.error) as error:
            raise InvalidInput(f"no passphrase can be asked for at this terminal: {error}") from error
    return _first_line(text, subject="the terminal")


def show(text: str) -> None:
    """Write text to the terminal, whatever standard output is. Raises InvalidInput."""
    with _terminal() as fd:
        try:
            os.write(fd, text.encode("utf-8", "replace"))
        except OSError as error:
            raise InvalidInput(f"the terminal cannot be written to: {error.strerror}") from error


@contextmanager
def _terminal() -> Iterator[int]:
    """Standard input, for writing too."""
    try:
        fd = os.open(f"/dev/fd/{_STDIN}", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError as error:
        raise InvalidInput(f"the terminal cannot be opened: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _typed_line(fd: int) -> bytes:
    """One line, or what there is before the end of the input."""
    text = b""
    while b"\n" not in text and len(text) < _LIMIT:
        piece = os.read(fd, _LIMIT)
        if not piece:
            break
        text += piece
    return text
