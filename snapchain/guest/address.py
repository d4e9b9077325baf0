"""How a user names a guest: --domain NAME [--connect URI], or --qmp SOCKET; and the one door to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import InvalidInput
from snapchain.host.terminal import shell_word
from snapchain.model.events import OnEvent, ignore

if TYPE_CHECKING:
    from snapchain.guest.protocol import Guest


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestAddress:
    """domain, connect: of libvirt; connect None: the system's daemon, or as LIBVIRT_DEFAULT_URI says

    qmp: path of a QMP socket; agent: of the guest agent's socket, None to find it in the monitor
    name: what the guest is called, where it has no name itself
    """

    domain: str | None = None
    connect: str | None = None
    qmp: Path | None = None
    agent: Path | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if (self.domain is None) == (self.qmp is None):
            raise InvalidInput("a guest is named either by --domain or by --qmp", hint="give one of them")
        if self.connect is not None and self.domain is None:
            raise InvalidInput(
                "--connect belongs to --domain", subject=self.connect, hint="leave it out, or add --domain"
            )
        if self.agent is not None and self.qmp is None:
            raise InvalidInput("--agent belongs to --qmp; libvirt has the agent of its domains", subject=self.agent)

    @property
    def option(self) -> str:
        """As it would be typed, quoted for a shell; --connect stays as it was given."""
        if self.qmp is not None:
            return f"--qmp {shell_word(self.qmp)}"
        connect = f" --connect {shell_word(self.connect)}" if self.connect is not None else ""
        return f"--domain {shell_word(self.domain)}{connect}"


@contextmanager
def open_guest(address: GuestAddress, *, on_event: OnEvent = ignore) -> Iterator[Guest]:
    """Connect to a guest. Raises NotFound for a domain or socket that is not there, Unavailable without an answer."""
    guest: Guest
    if address.qmp is not None:
        from snapchain.guest.qmp_guest import QmpGuest

        guest = QmpGuest(address, on_event=on_event)
    else:
        from snapchain.guest.libvirt_guest import LibvirtGuest

        guest = LibvirtGuest(address)
    try:
        yield guest
    finally:
        guest.close()
