"""Every error that snapchain raises on purpose, grouped by what the caller should do.

    SnapchainError
    ├── InvalidInput  (ValueError)   2   the request is wrong: change it
    │   └── WrongPassphrase          2   the passphrase opens nothing: give another one
    ├── NotFound      (LookupError)  3   the thing named is not there
    ├── Conflict                     4   somebody else was faster: look again, then retry
    │   └── Diverged                 4   both sides have changed: choose one
    ├── Corrupt                      5   stored bytes are not what was written
    ├── Unsupported                  6   a valid thing that snapchain refuses to handle
    ├── Unavailable                  7   a server, disk or network failed: retrying may help
    ├── ToolFailed                   8   an external program failed
    ├── Busy                         9   somebody has it open: wait, or stop them
    ├── PartialFailure              10   of many things some were not done: the report says which
    └── OutputFailed                11   the result could not be written to standard output

The number is the exit code of the command line.  `Interrupted` (130; 129 after SIGHUP) is not an error of this
tree: it derives from KeyboardInterrupt, so that no handler of errors swallows a Ctrl-C.

An error carries facts, not prose: what is wrong (`message`), with which file or object (`subject`), and
what to do (`hint`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self


class SnapchainError(Exception):
    """Root of all errors raised on purpose."""

    exit_code = 1
    kind = "error"
    has_rows = False
    """Whether the message is a list, one line each. In any other message a line feed belongs to a name."""

    def __init__(self, message: str, *, subject: object = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.subject = None if subject is None else str(subject)
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.subject is None else f"{self.subject}: {self.message}"

    def detached(self) -> Self:
        """The same error without the frames and causes that raised it: one that is kept holds all that they held."""
        self.__cause__ = self.__context__ = None
        return self.with_traceback(None)


class InvalidInput(SnapchainError, ValueError):
    """The request itself is wrong; nothing was done."""

    exit_code = 2
    kind = "invalid-input"


class WrongPassphrase(InvalidInput):
    """A passphrase was given, and the repository does not open with it."""


class NotFound(SnapchainError, LookupError):
    """The disk, point, layer, file or object named does not exist."""

    exit_code = 3
    kind = "not-found"


class Conflict(SnapchainError):
    """Another writer changed what this one was about to change."""

    exit_code = 4
    kind = "conflict"


class Diverged(Conflict):
    """Both sides hold layers that the other does not know."""

    kind = "diverged"


class Corrupt(SnapchainError):
    """Stored bytes are damaged, forged, or contradict each other."""

    exit_code = 5
    kind = "corrupt"


class Unsupported(SnapchainError):
    """A feature that snapchain refuses on purpose."""

    exit_code = 6
    kind = "unsupported"


class Unavailable(SnapchainError):
    """A server, disk or network did not do its part; the same call may succeed later."""

    exit_code = 7
    kind = "unavailable"


class ToolFailed(SnapchainError):
    """An external program failed. Holds its argument list, exit status and whole stderr."""

    exit_code = 8
    kind = "tool-failed"

    def __init__(
        self,
        message: str,
        *,
        argv: Sequence[str],
        status: int,
        stderr: str,
        subject: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, subject=subject, hint=hint)
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr


class Busy(SnapchainError):
    """Somebody has the image or the lease open."""

    exit_code = 9
    kind = "busy"


class PartialFailure(SnapchainError):
    """Of many disks or destinations some failed or were not reached; the others are done."""

    exit_code = 10
    kind = "partial-failure"


class OutputFailed(SnapchainError):
    """Standard output is full, closed or broken. The work is done, unless the message says otherwise."""

    exit_code = 11
    kind = "output-failed"


class Interrupted(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP arrived; what was done so far is as good as before the command."""

    exit_code = 130
