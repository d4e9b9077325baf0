"""A replica on another host: the receiver is a process over there, behind the user's ssh."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from snapchain.errors import SnapchainError
from snapchain.host.remote_address import RemoteAddress
from snapchain.host.remote_channel import Channel
from snapchain.host.ssh import PATIENCE, SshProgram, open_ssh, open_ssh_lanes
from snapchain.replica.levels import Link

_FRESH = 20.0
"""Seconds. Who is logged in and says nothing is given up over there (`ops.serve_replica.PATIENCE`)."""


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
        patience: float = PATIENCE,
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
        """Start `snapchain serve-replica` over there. Raises what keeps ssh or snapchain from it."""
        begun, self._begun = self._begun, None
        if begun is not None and time.monotonic() - begun.at > _FRESH:
            self._drop(begun)
            begun = None
        with self._open() if begun is None else begun.channel as channel:
            self._begin()
            yield channel

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
