"""Where a replica is, and how to reach it: an endpoint gives a channel to a receiver that runs there.

`dir:/path` is this machine: the receiver is a thread behind two pipes, so it goes the same way, word for word, as one
behind ssh.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from snapchain.errors import InvalidInput, SnapchainError
from snapchain.host import ssh
from snapchain.host.channel import PATIENCE, Channel
from snapchain.host.ssh import (
    RemoteAddress,
    SshProgram,
    is_remote,
    open_forward,
    open_ssh,
    open_ssh_lanes,
    parse_remote_address,
)
from snapchain.replica.stream.compression import Link

_PIPE_BYTES = 1 << 20


class Endpoint(Protocol):
    """A replica somewhere.

    url: for people; link: what lies between; replica: the directory to name to the receiver, None if it knows it
    directory: where it is, None on another host
    """

    @property
    def url(self) -> str: ...

    @property
    def link(self) -> Link: ...

    @property
    def replica(self) -> str | None: ...

    @property
    def directory(self) -> Path | None: ...

    def connect(self) -> AbstractContextManager[Channel]:
        """Start a receiver and open a channel to it, for the length of the block. Raises Unavailable."""
        ...


class GuestEndpoint(Endpoint, Protocol):
    """An Endpoint to whose host a guest can move while it runs."""

    def forwarded(self, sockets: Sequence[Path], directory: Path) -> AbstractContextManager[Sequence[Path]]:
        """Paths of this host behind which unix sockets of that host are, for the length of the block.

        directory: a private one of this host, for the paths. Raises Unavailable.
        """
        ...


class DirectoryEndpoint:
    """A replica in a directory of this machine, or of a share that is mounted here."""

    def __init__(self, directory: Path, *, patience: float = PATIENCE) -> None:
        self._directory = directory.absolute()
        self._patience = patience

    @property
    def url(self) -> str:
        return f"dir:{self._directory}"

    @property
    def link(self) -> Link:
        return Link.LOCAL

    @property
    def replica(self) -> str | None:
        return None

    @property
    def directory(self) -> Path:
        return self._directory

    @contextmanager
    def connect(self) -> Iterator[Channel]:
        """A receiver on a thread; what breaks it in a way that nobody foresaw is raised on leaving."""
        from snapchain.replica.receiver import receive  # inside: a client over ssh needs no receiver here

        ours, theirs = _pair(self.url, self._patience)
        broken: list[BaseException] = []

        def serve() -> None:
            with theirs:
                try:
                    receive(theirs, self._directory)
                except SnapchainError:
                    pass  # the sender got it as FAIL, and raises it
                except BaseException as error:  # noqa: BLE001 -- raised again below
                    broken.append(error)

        thread = threading.Thread(target=serve, name="receiver", daemon=True)
        thread.start()
        try:
            with ours:
                yield ours
        finally:
            thread.join()
            if broken:
                raise broken[0]

    @contextmanager
    def forwarded(self, sockets: Sequence[Path], directory: Path) -> Iterator[Sequence[Path]]:
        """See `GuestEndpoint`: it is the same host."""
        _ = directory
        yield sockets


def open_endpoint(url: str, *, connections: int = 1) -> GuestEndpoint:
    """The replica at ssh://[user@]host/path or dir:/path. Touches nothing. Raises InvalidInput."""
    if is_remote(url):
        return SshEndpoint(parse_remote_address(url), connections=connections)
    scheme, _, path = url.partition(":")
    if scheme.lower() != "dir" or not path.startswith("/"):
        if scheme.lower() == "dir" and path:
            raise InvalidInput(
                "the path of a replica must be absolute", subject=url, hint=f"write dir:{Path(path).absolute()}"
            )
        raise InvalidInput(
            "not an address of a replica",
            subject=url,
            hint="write dir:/path or ssh://[user@]host/path; repositories are for `snapchain ship`",
        )
    return DirectoryEndpoint(Path(path))


def _pair(url: str, patience: float) -> tuple[Channel, Channel]:
    there_read, here_write = os.pipe()
    here_read, there_write = os.pipe()
    with suppress(OSError):  # more than this user may have: the usual 64 KiB do
        fcntl.fcntl(here_write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return (
        Channel(here_read, here_write, peer=url, patience=patience),
        Channel(there_read, there_write, peer="the sender", patience=patience),
    )


# --- over ssh: the receiver is a process on the other host

_FRESH = 20.0
"""Seconds. The other side gives up a login that stays silent (`ops.receive.PATIENCE`)."""


@dataclass(frozen=True, slots=True)
class _Begun:
    channel: Channel
    at: float


class SshEndpoint:
    """An Endpoint. connections: how many carry the stream; more than one for links that are both long and fast."""

    def __init__(
        self,
        address: RemoteAddress,
        *,
        connections: int = 1,
        program: SshProgram | None = None,
        patience: float = ssh.PATIENCE,
    ) -> None:
        self._address = address
        self._connections = connections
        self._program = program
        self._patience = patience
        self._begun: _Begun | None = None
        self._foreseen = 0

    @property
    def url(self) -> str:
        return str(self._address)

    @property
    def link(self) -> Link:
        return Link.NETWORK

    @property
    def replica(self) -> str | None:
        return self._address.path

    @property
    def directory(self) -> None:
        return None

    @contextmanager
    def ahead(self, logins: int = 1) -> Iterator[None]:
        """Log in already for `connect`: that takes longer than to load what sends.

        logins: how many are foreseen; each is begun when the one before is taken.
        Raises what keeps ssh from being started. Does nothing where several connections are one, which must agree.
        """
        self._foreseen = logins if self._connections == 1 else 0
        self._begin()
        try:
            yield
        finally:
            self._foreseen = 0
            self._drop(self._begun)
            self._begun = None

    @contextmanager
    def connect(self) -> Iterator[Channel]:
        """Start `snapchain serve-replica` on the host. Raises what keeps ssh or snapchain from it."""
        begun, self._begun = self._begun, None
        if begun is not None and time.monotonic() - begun.at > _FRESH:
            self._drop(begun)
            begun = None
        with self._open() if begun is None else begun.channel as channel:
            self._begin()
            yield channel

    @contextmanager
    def forwarded(self, sockets: Sequence[Path], directory: Path) -> Iterator[Sequence[Path]]:
        """See `GuestEndpoint`. Through an ssh of its own, so that no port needs to be opened on either host."""
        pairs = [(directory / socket.name, socket) for socket in sockets]
        with open_forward(self._address, pairs, program=self._program):
            yield [near for near, _ in pairs]

    def _begin(self) -> None:
        if self._foreseen:
            self._foreseen -= 1
            self._begun = _Begun(self._open(), time.monotonic())

    def _drop(self, begun: _Begun | None) -> None:
        if begun is not None:
            with suppress(SnapchainError):  # nobody will ever ask what became of it
                begun.channel.abort()
                begun.channel.close()

    def _open(self) -> Channel:
        if self._connections == 1:
            return open_ssh(self._address, program=self._program, patience=self._patience)
        return open_ssh_lanes(self._address, self._connections, program=self._program, patience=self._patience)
