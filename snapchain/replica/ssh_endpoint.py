"""A replica on another host: the receiver is a process over there, behind the user's ssh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from snapchain.host.remote_address import RemoteAddress
from snapchain.host.remote_channel import Channel
from snapchain.host.ssh import PATIENCE, SshProgram, open_ssh, open_ssh_lanes
from snapchain.replica.levels import Link


class SshEndpoint:
    """An Endpoint. connections: how many carry the stream; more than one for links that are both long and fast."""

    def __init__(
        self,
        address: RemoteAddress,
        *,
        connections: int = 1,
        program: SshProgram | None = None,
        patience: float = PATIENCE,
    ) -> None:
        self._address = address
        self._connections = connections
        self._program = program
        self._patience = patience

    @property
    def url(self) -> str:
        return str(self._address)

    @property
    def link(self) -> Link:
        return Link.NETWORK

    @property
    def replica(self) -> str | None:
        return self._address.path

    @contextmanager
    def connect(self) -> Iterator[Channel]:
        """Start `snapchain serve-replica` over there. Raises what keeps ssh or snapchain from it."""
        with self._open() as channel:
            yield channel

    def _open(self) -> Channel:
        if self._connections == 1:
            return open_ssh(self._address, program=self._program, patience=self._patience)
        return open_ssh_lanes(self._address, self._connections, program=self._program, patience=self._patience)
