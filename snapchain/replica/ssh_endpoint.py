"""A replica on another host: the receiver is a process over there, behind the user's ssh."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from snapchain.errors import SnapchainError
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
        self._begun: Channel | None = None

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
    def ahead(self) -> Iterator[None]:
        """Log in already, for the first `connect` within the block: that takes longer than to load what sends.

        Raises what keeps ssh from being started. Does nothing where there are several connections, which must agree.
        """
        if self._connections == 1:
            self._begun = self._open()
        try:
            yield
        finally:
            begun, self._begun = self._begun, None
            if begun is not None:
                with suppress(SnapchainError):
                    begun.abort()
                    begun.close()

    @contextmanager
    def connect(self) -> Iterator[Channel]:
        """Start `snapchain serve-replica` over there. Raises what keeps ssh or snapchain from it."""
        begun, self._begun = self._begun, None
        with begun or self._open() as channel:
            yield channel

    def _open(self) -> Channel:
        if self._connections == 1:
            return open_ssh(self._address, program=self._program, patience=self._patience)
        return open_ssh_lanes(self._address, self._connections, program=self._program, patience=self._patience)
