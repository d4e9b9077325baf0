"""Where a replica is, and how to reach it: an endpoint gives a channel to a receiver that runs over there.

`dir:/path` is this machine: the receiver is a thread behind two pipes, so it goes the same way, word for word, as one
behind ssh.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from snapchain.errors import InvalidInput, SnapchainError
from snapchain.host.remote_address import is_remote, parse_remote_address
from snapchain.host.remote_channel import PATIENCE, Channel
from snapchain.replica.levels import Link
from snapchain.replica.ssh_endpoint import SshEndpoint

if TYPE_CHECKING:
    from snapchain.replica.merge_journal import Engine

_PIPE_BYTES = 1 << 20


class Endpoint(Protocol):
    """A replica somewhere.

    url: for people; link: what lies between; replica: the directory to name to the receiver, None when it knows
    """

    @property
    def url(self) -> str: ...

    @property
    def link(self) -> Link: ...

    @property
    def replica(self) -> str | None: ...

    def connect(self) -> AbstractContextManager[Channel]:
        """Start a receiver and open a channel to it, for the length of the block. Raises Unavailable."""
        ...


class DirectoryEndpoint:
    """A replica in a directory of this machine, or of a share that is mounted here."""

    def __init__(self, directory: Path, *, patience: float = PATIENCE, engine: Engine | None = None) -> None:
        """engine: of the receiver, which merges layers."""
        self._directory = directory.absolute()
        self._engine = engine
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

    @contextmanager
    def connect(self) -> Iterator[Channel]:
        """A receiver on a thread; what breaks it in a way that nobody foresaw is raised on leaving."""
        from snapchain.replica.receiver import receive  # inside: who connects over ssh has no receiver here

        ours, theirs = _pair(self.url, self._patience)
        broken: list[BaseException] = []

        def serve() -> None:
            with theirs:
                try:
                    receive(theirs, self._directory, engine=self._engine)
                except SnapchainError:
                    pass  # the sender was told, and raises it
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


def open_endpoint(url: str, *, connections: int = 1, engine: Engine | None = None) -> Endpoint:
    """The replica at ssh://[user@]host/path or dir:/path. Touches nothing. Raises InvalidInput.

    engine: what merges layers, where the receiver is here
    """
    if is_remote(url):
        return SshEndpoint(parse_remote_address(url), connections=connections)
    scheme, _, path = url.partition(":")
    if scheme.lower() != "dir" or not path.startswith("/"):
        raise InvalidInput(
            "not an address of a replica", subject=url, hint="write dir:/path, or ssh://[user@]host/path"
        )
    return DirectoryEndpoint(Path(path), engine=engine)


def _pair(url: str, patience: float) -> tuple[Channel, Channel]:
    there_read, here_write = os.pipe()
    here_read, there_write = os.pipe()
    with suppress(OSError):  # more than this user may have: the usual 64 KiB do
        fcntl.fcntl(here_write, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return (
        Channel(here_read, here_write, peer=url, patience=patience),
        Channel(there_read, there_write, peer="the sender", patience=patience),
    )
