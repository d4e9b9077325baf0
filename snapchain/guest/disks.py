"""Find the disks of a guest by name, or those that can be protected."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound, Unsupported
from snapchain.guest.protocol import Guest, GuestDisk
from snapchain.host.terminal import shell_line


def find_disk(guest: Guest, name: str) -> GuestDisk:
    """The disk of this name. Raises NotFound."""
    disks = guest.disks()
    for disk in disks:
        if disk.name == name:
            return disk
    raise no_such_disk(guest.name, name, (disk.name for disk in disks))


def no_such_disk(guest: str, name: str, known: Iterable[str]) -> NotFound:
    """The error for a name that no disk of the guest has. known: the names of its disks"""
    return NotFound(f"the guest has no disk {name}", subject=guest, hint=f"its disks are: {', '.join(known) or 'none'}")


def disks_to_protect(guest: Guest, names: Sequence[str] = ()) -> list[GuestDisk]:
    """The disks of these names, or all that are not left out.

    Raises NotFound for a name that no disk has, InvalidInput for a disk that is left out, and for none at all.
    """
    found = [find_disk(guest, name) for name in names] or [disk for disk in guest.disks() if disk.left_out is None]
    for disk in found:
        if disk.left_out is not None:
            raise InvalidInput(
                f"the disk cannot be protected: {disk.left_out}",
                subject=f"{guest.name}/{disk.name}",
                hint="leave it out",
            )
    if not found:
        raise InvalidInput(
            "the guest has no disk that can be protected",
            subject=guest.name,
            hint=f"see `{shell_line(['snapchain', 'guests', guest.name])}`",
        )
    return found


def active_path(disk: GuestDisk, *, guest: Guest) -> Path:
    """The path of its active layer. Raises Unsupported where that is no file."""
    path = disk.active.path if disk.chain else None
    if path is None:
        raise Unsupported(
            "the active layer of the disk is no file of this host",
            subject=f"{guest.name}/{disk.name}",
            hint=f"leave the disk out; `{shell_line(['snapchain', 'guests', guest.name])}` shows where its data are",
        )
    return path
