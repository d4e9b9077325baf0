"""A file system of a point, read by a child that has no rights: starting it, asking it, and giving it bytes.

The child sees no path, no key and no network; it has a socket to this process, and asks for bytes of the disk.
Time is bounded: how long the child may work without finding anything, time for which it waits for bytes left out.
So is what it finds: the number of entries, and the bytes of files.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from pydantic import BaseModel, ValidationError

from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.files import messages
from snapchain.files.messages import Hangup, Kind
from snapchain.files.records import MISSING, VOLUMES, Entry, Failure, Opened, Problem, VolumeSaid, Walked, trouble_of
from snapchain.host.detached import start_module

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)

PATIENCE = 120.0
"""Seconds for which the child may work without finding anything."""
MOST_ENTRIES = 20_000_000
_MODULE = "snapchain.files.child"
_EXTRA = "pip install 'snapchain[files]'"
_SERVE = "`snapchain serve` gives the point to a guest of your own, which can mount it"
_MOST_PROBLEMS = 1000
_READS, _MORE = 2, 64 << 20
"""The child reads the disk so many times, and so many bytes more, before it must have found something."""


class Bytes(Protocol):
    """A disk. size: bytes"""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int, /) -> bytes:
        """So many bytes. Raises SnapchainError."""
        ...


class Unreadable(Corrupt):
    """One file cannot be read to its end; the rest can."""


@dataclass(frozen=True, slots=True)
class Found:
    """An entry. content: of a file whose bytes were asked for; it must be used up before the next entry is taken

    A number in it is a hole of so many bytes. It raises Unreadable where the file cannot be read to its end.
    """

    entry: Entry
    content: Iterator[bytes | int]


class Session:
    """A disk, and the child that reads it. A context manager.

    subject: what errors name; patience: seconds
    most_bytes: that the files of one walk may have together, holes included
    """

    def __init__(self, disk: Bytes, *, subject: str, most_bytes: int, patience: float = PATIENCE) -> None:
        self._disk, self._subject, self._patience, self._left = disk, subject, patience, most_bytes
        self._most_bytes = most_bytes
        self._socket: socket.socket | None = None
        self._pid = 0
        self._lost: SnapchainError | None = None
        self._lost_range = (0, 0)
        self.missing: Sequence[str] = ()
        self.problems: list[Problem] = []
        self.dropped_problems = 0

    def __enter__(self) -> Self:
        """Raises Unavailable where no child can be started, Unsupported where it cannot give up its rights."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                # No environment: it may hold a passphrase.
                environment = {"TZ": "UTC", "LC_ALL": "C.UTF-8"}
                argument = f"{os.getpid()} {self._disk.size}"
                self._pid = start_module(_MODULE, argument, fd=theirs.fileno(), environment=environment)
            self._socket = ours
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # for half a message, and for one it does not take
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", int(self._patience) + 1, 0))
            kind, payload = self._next(time.monotonic() + self._patience)
            if kind is not Kind.READY:
                raise self._failure(payload) if kind is Kind.FAILED else self._strange()  # noqa: TRY301 - ends the child
            self.missing = MISSING.validate_json(payload)
        except BaseException:
            self._socket = ours
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()
        if self._pid:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._pid = 0

    def volumes(self) -> list[VolumeSaid]:
        """The volumes of the disk."""
        return self._checked(lambda: VOLUMES.validate_json(self._asked({"do": "volumes"})))

    def open(self, name: str) -> Opened:
        """Open the file system of a volume, for `walk`.

        Raises Corrupt where it cannot be read, InvalidInput where a library for it is missing.
        """
        payload = self._asked({"do": "open", "name": name})
        return self._checked(lambda: Opened.model_validate_json(payload))

    @contextmanager
    def walk(
        self,
        path: Sequence[str],
        *,
        depth: int,
        contents: bool = False,
        attributes: bool = False,
        links: bool = False,
        match: str | None = None,
    ) -> Iterator[Iterator[Found]]:
        """The node at a path and what is below it; directories before what they hold. Links in the path are followed.

        depth: levels below the node; match: a pattern of names, of which alone is told
        links: a further name of a file that was told of has no content but `same_as`
        What cannot be read is in `problems`. Raises NotFound, Corrupt, Unavailable; InvalidInput for too many bytes.
        """
        self._left = self._most_bytes
        self._send(
            {
                "do": "walk",
                "path": list(path),
                "depth": depth,
                "contents": contents,
                "attributes": attributes,
                "links": links,
                "match": match,
            }
        )
        yield self._entries(contents=contents)

    def unread(self, path: Sequence[str]) -> SnapchainError:
        """The error for a walk that has told of nothing, not even of the node at its path."""
        words = self.problems[0].words if self.problems else "it cannot be read"
        return Corrupt(words, subject=f"{self._subject}: /{'/'.join(path)}", hint=_SERVE)

    def _entries(self, *, contents: bool) -> Iterator[Found]:
        deadline = _Deadline(self._patience)
        count = 0
        while True:
            kind, payload = self._next(deadline.at)
            if kind is Kind.READ:
                self._serve(payload, deadline)
                continue
            count += 1
            if count > MOST_ENTRIES:
                raise Corrupt(
                    f"its directories hold more than {MOST_ENTRIES} entries", subject=self._subject, hint=_SERVE
                )
            if kind is Kind.ALIVE:
                deadline.renew()
            elif kind is Kind.PROBLEM:
                self._note(self._said(Problem, payload))
            elif kind is Kind.DONE:
                self._said(Walked, payload)
                self._note_silent()
                return
            elif kind is Kind.FAILED:
                raise self._failure(payload)
            elif kind is Kind.ENTRY:
                deadline.renew()
                self._note_silent()
                entry = self._said(Entry, payload)
                content: Iterator[bytes | int] = iter(())
                if contents and entry.kind == "file" and entry.same_as is None:
                    content = self._content(entry, deadline)
                bad = next(filter(None, map(trouble_of, (*entry.path, *(entry.same_as or ())))), None)
                if bad is not None:
                    self._note(Problem(path=entry.path, words=bad))
                else:
                    yield Found(entry, content)
                with suppress(Unreadable):
                    for _ in content:
                        pass
                deadline.renew()
            else:
                raise self._strange()

    def _content(self, entry: Entry, deadline: _Deadline) -> Iterator[bytes | int]:
        left = entry.size
        if left > self._left:
            raise InvalidInput(
                f"its files have more than {self._most_bytes} bytes together",
                subject=self._subject,
                hint="say --max-bytes if that is right; a damaged file system may claim any size",
            )
        self._left -= left
        deadline.renew()
        while True:
            kind, payload = self._next(deadline.at)
            if kind is Kind.READ:
                self._serve(payload, deadline)
                continue
            if kind is Kind.END:
                lost = self._lost_words()
                if payload or left or lost:
                    words = payload.decode("utf-8", "replace") or f"{left} of its {entry.size} bytes are missing"
                    raise Unreadable(lost or words, subject="/".join(entry.path))
                return
            if kind is Kind.DATA and payload:
                piece: bytes | int = payload
                size = len(payload)
            elif kind is Kind.HOLE and len(payload) == messages.HOLE.size:
                piece = size = messages.HOLE.unpack(payload)[0]
            else:
                raise self._strange()
            if not 0 < size <= left:
                raise self._strange()
            left -= size
            yield piece
            deadline.renew()

    def _note(self, problem: Problem) -> None:
        """Keep it, with the store's own reason where that is the reason."""
        if (words := self._lost_words()) is not None:
            problem = Problem(path=problem.path, words=words)
        if len(self.problems) < _MOST_PROBLEMS:
            self.problems.append(problem)
        else:
            self.dropped_problems += 1

    def _note_silent(self) -> None:
        """A library may take bytes that it could not read for the end of a directory, and say nothing."""
        if (words := self._lost_words()) is not None:
            self._note(Problem(path=(), words=f"{words}: files may be missing"))

    def _lost_words(self) -> str | None:
        """Why bytes of the disk could not be given since the last call. Raises it where it is no damage."""
        lost, self._lost = self._lost, None
        if lost is not None and not isinstance(lost, Corrupt):
            raise lost
        return None if lost is None else str(lost)

    # ---- messages

    def _asked(self, command: dict[str, object]) -> bytes:
        """Send a command that finds nothing but its end."""
        self._send(command)
        deadline = _Deadline(self._patience)
        while True:
            kind, payload = self._next(deadline.at)
            if kind is Kind.READ:
                self._serve(payload, deadline)
            elif kind is Kind.FAILED:
                raise self._failure(payload)
            elif kind is Kind.DONE:
                return payload
            else:
                raise self._strange()

    def _send(self, command: dict[str, object]) -> None:
        assert self._socket is not None
        try:
            messages.send(self._socket.fileno(), Kind.COMMAND, json.dumps(command).encode())
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            raise self._ended() from None

    def _serve(self, payload: bytes, deadline: _Deadline) -> None:
        """Give the child the bytes that it asks for."""
        assert self._socket is not None
        if len(payload) != messages.READ.size:
            raise self._strange()
        offset, length = messages.READ.unpack(payload)
        if not 0 < length <= messages.MOST or offset + length > self._disk.size:
            raise self._strange()
        deadline.read += length
        if deadline.read > _READS * self._disk.size + _MORE:
            raise self._hung(f"read {deadline.read} bytes and found nothing")
        began = time.monotonic()
        try:
            kind, data = Kind.BYTES, self._disk.read(offset, length)
        except SnapchainError as error:
            self._lost = error.detached()
            self._lost_range = (offset, offset + length)
            kind, data = Kind.LOST, b""
        else:
            if self._lost_range[0] <= offset and offset + length <= self._lost_range[1]:
                self._lost = None  # a part of what could not be given at once
        deadline.at += time.monotonic() - began  # our time does not count
        try:
            messages.send(self._socket.fileno(), kind, data)
        except (BrokenPipeError, ConnectionResetError, BlockingIOError):
            raise self._ended() from None

    def _next(self, deadline: float) -> tuple[Kind, bytes]:
        assert self._socket is not None
        fd = self._socket.fileno()
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise self._hung(f"found nothing for {self._patience:.0f} s")
        try:
            return messages.receive(fd, deadline=time.monotonic() + self._patience)
        except (Hangup, ConnectionResetError):
            raise self._ended() from None
        except (BlockingIOError, TimeoutError):  # half a message
            raise self._strange() from None

    def _failure(self, payload: bytes) -> SnapchainError:
        """The error for a command that failed."""
        failure = self._said(Failure, payload)
        lost, self._lost = self._lost, None
        if lost is not None:
            return lost
        if failure.kind == "not-found":
            return NotFound(failure.words, subject=self._subject)
        if failure.kind == "missing":
            return InvalidInput(
                f"this Python lacks {failure.words}, which reads this file system", subject=self._subject, hint=_EXTRA
            )
        if failure.kind == "unconfined":
            return Unsupported(
                f"the reader of file systems could not give up its rights: {failure.words}",
                subject=self._subject,
                hint=_SERVE,
            )
        return Corrupt(failure.words, subject=self._subject, hint=_SERVE)

    def _hung(self, what: str) -> SnapchainError:
        return Corrupt(
            f"the reader of its file system {what}, and was ended: the file system is damaged, or was made to hang it",
            subject=self._subject,
            hint=_SERVE,
        )

    def _ended(self) -> SnapchainError:
        """The error for a child that has gone."""
        pid, self._pid = self._pid, 0
        status = 0
        if pid:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it may live, and have closed its side
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"
        return Corrupt(
            f"the reader of its file system {how}: the file system is damaged, or was made to break a reader",
            subject=self._subject,
            hint=_SERVE,
        )

    def _strange(self) -> SnapchainError:
        return Corrupt(
            "the reader of its file system sends what it should not: the file system has probably taken it over",
            subject=self._subject,
            hint="treat the guest as compromised",
        )

    def _said(self, kind: type[M], payload: bytes) -> M:
        return self._checked(lambda: kind.model_validate_json(payload))

    def _checked(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except ValidationError:
            raise self._strange() from None


class _Deadline:
    """When the child must have found something. at: on the monotonic clock; read: bytes since it last did"""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """It has found something."""
        self.at, self.read = time.monotonic() + self._seconds, 0
