"""Standard output and standard error that may be closed, full, or a pipe without a reader.

    stdout  the reader has gone       ReaderGone: the command ends quietly, with the 141 of a program that SIGPIPE ends
            full, closed, an I/O error  OutputFailed: a plain error with an exit code of its own
    stderr  whatever happens           nothing: no work stops because a note cannot be written

The stream itself raises them, so that typer, rich and the verbs end alike. ReaderGone is no OSError: rich
and typer would take one for theirs, and exit with 1.

The stream also escapes control characters but line feeds, tabs and colours (host/terminal.py): those that come from
outside have no way past it, be it in a traceback or in a warning of a library. A console escapes by itself, since it
moves the cursor, and has `unescaped`.
"""

from __future__ import annotations

import errno
import io
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from snapchain.errors import OutputFailed
from snapchain.host.terminal import printable_lines

_STDOUT = "standard output"


class ReaderGone(Exception):
    """The program that read the output has closed the pipe."""


def failure(error: OSError | None) -> Exception:
    """The error for a write to stdout that failed. error: None where stdout was closed from the start."""
    if error is not None and error.errno in (errno.EPIPE, errno.ECONNRESET):
        return ReaderGone()
    if error is None or error.errno == errno.EBADF:
        return OutputFailed("the output cannot be written: it is closed", subject=_STDOUT)
    words = (error.strerror or str(error)).lower()
    return OutputFailed(f"the output cannot be written: {words}", subject=_STDOUT)


class Stdout:
    """Standard output, as a text stream that raises the errors above. It has no `buffer`: all goes through `write`."""

    def __init__(self, inner: TextIO | None) -> None:
        self._inner = inner

    def write(self, text: str) -> int:
        """Write all of it. Raises ReaderGone, OutputFailed."""
        self._write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As `write`."""
        for line in lines:
            self.write(line)

    def _write(self, text: str) -> None:
        if self._inner is None:
            raise failure(None)
        try:
            self._inner.write(text)
        except OSError as error:
            raise failure(error) from error

    def flush(self) -> None:
        """Raises ReaderGone, OutputFailed."""
        try:
            if self._inner is not None:
                self._inner.flush()
        except OSError as error:
            raise failure(error) from error

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._inner is not None and self._inner.isatty()

    def __getattr__(self, name: str) -> Any:
        if name == "buffer" or self._inner is None:
            raise AttributeError(name)
        return getattr(self._inner, name)


class Stderr(Stdout):
    """Standard error: what cannot be written there is lost."""

    def _write(self, text: str) -> None:
        """Write what can be written."""
        with suppress(ReaderGone, OutputFailed):  # there is no third stream to report it on
            super()._write(text)

    def flush(self) -> None:
        """Never raises."""
        with suppress(ReaderGone, OutputFailed):
            super().flush()


class _Unescaped:
    """One of these streams for a caller that escapes by itself."""

    def __init__(self, stream: Stdout) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream._write(text)  # noqa: SLF001 - the two are one thing
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unescaped(stream: TextIO) -> TextIO:
    """The stream, with nothing escaped that is written to it."""
    found: object = getattr(stream, "rich_proxied_file", stream)  # while a progress bar is shown
    return cast("TextIO", _Unescaped(found)) if isinstance(found, Stdout) else stream


def claim_stdout() -> int:
    """A descriptor of standard output for a stream alone; what else is written there goes to standard error."""
    sys.stdout.flush()
    try:
        claimed = os.dup(1)
        os.dup2(2, 1)
    except OSError as error:
        raise failure(error) from error
    return claimed


def write_all(descriptor: int, data: memoryview) -> None:
    """Write all bytes to standard output as it was claimed. Raises ReaderGone, OutputFailed."""
    try:
        while data:
            data = data[os.write(descriptor, data) :]
    except OSError as error:
        raise failure(error) from error


@contextmanager
def checked() -> Iterator[None]:
    """While the block runs, sys.stdout and sys.stderr are streams of this module."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets '?' for what it lacks, not an error
    sys.stdout, sys.stderr = cast("TextIO", Stdout(sys.stdout)), cast("TextIO", Stderr(sys.stderr))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def occupy_descriptors() -> None:
    """Open descriptors 0, 1 and 2 on /dev/null where the caller has closed them.

    The next file that is opened would have that number: an image would receive what a program prints.
    """
    for descriptor, flags in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):  # stdout: a write must fail
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # the lowest free number
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))


def same_place() -> bool:
    """Whether stdout and stderr are the same pipe or file, or both are a terminal: then nothing is printed twice."""
    try:
        one, other = os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # io.UnsupportedOperation is both of the first
        return False
    # One terminal has several names: /dev/tty, /dev/pts/3.
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino) or (sys.stdout.isatty() and sys.stderr.isatty())


def is_piped_from_a_terminal() -> bool:
    """Whether a person sees stderr, and most likely what a program makes of stdout: `| tee report`, `| less`."""
    try:
        return sys.stderr.isatty() and stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False
