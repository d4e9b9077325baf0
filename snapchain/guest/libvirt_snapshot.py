"""Snapshots of a domain: libvirt opens the new overlays and switches all disks to them, in one command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import Conflict, Unsupported
from snapchain.guest.libvirt_disks import AGAIN, size_of
from snapchain.guest.protocol import GuestDisk, NewOverlay, Outcome, State, Switch
from snapchain.host import libvirt
from snapchain.host.files import identity_of
from snapchain.host.qemu_processes import open_images
from snapchain.host.virsh import SECONDS_TO_CHANGE
from snapchain.host.virsh_session import VirshSession

if TYPE_CHECKING:
    from snapchain.guest.libvirt_guest import LibvirtGuest

_LOOK = (
    "keep all of its files, compare `virsh dumpxml` with its open files, and shut the guest down before its next use"
)


@contextmanager
def prepared(guest: LibvirtGuest, overlays: Sequence[NewOverlay]) -> Iterator[Switch]:
    """See `Guest.prepared`."""
    disks = {disk.name: disk for disk in guest.disks()}
    for overlay in overlays:
        _check_overlay(guest.name, disks.get(overlay.disk), overlay)
    guest.check_idle([disks[name] for name in _names(overlays)])
    # What is no disk of the request is named too: libvirt would snapshot it otherwise.
    others = [name for name in disks if name not in _names(overlays)]
    with guest.session() as session:
        session.ready()  # the guest will be frozen while it works
        yield LibvirtSwitch(guest, session, tuple(overlays), others)
    # After the block, since the guest may be frozen in it.
    _check_next_start(guest, overlays)


def _check_next_start(guest: LibvirtGuest, overlays: Sequence[NewOverlay]) -> None:
    """Raises Conflict where the next start of the domain would write to a layer that is sealed by now."""
    lasting = {disk.target: disk for disk in guest.lasting_disks()}
    for disk in guest.disks():
        new = next((each for each in overlays if each.disk == disk.name), None)
        shown = lasting.get(disk.name)
        if new is None or shown is None or not shown.layers or not _is_active(disk, new.path):
            continue
        starts_with = identity_of(guest.path_of(shown.layers[0]))
        if starts_with != disk.active.identity and starts_with in {layer.identity for layer in disk.chain}:
            raise Conflict(
                f"the definition for the guest's next start does not name {new.path}",
                subject=f"{guest.name}/{disk.name}",
                hint="correct it by `virsh edit` before the guest is started again, or what it writes is lost",
            )


class LibvirtSwitch:
    """Implements `protocol.Switch`."""

    def __init__(
        self, guest: LibvirtGuest, session: VirshSession, overlays: tuple[NewOverlay, ...], others: list[str]
    ) -> None:
        self._guest, self._session, self._overlays, self._others = guest, session, overlays, others

    def run(self) -> None:
        libvirt.forget()
        disks = [_disk_spec(each.disk, each.path) for each in self._overlays]
        disks += [_disk_spec(name, None) for name in self._others]
        self._session.text(
            "snapshot-create-as", "--domain", self._guest.uuid, "--disk-only", "--atomic", "--no-metadata",
            "--reuse-external", *disks, timeout=SECONDS_TO_CHANGE, subject=self._guest.name,
        )  # fmt: skip

    def outcome(self) -> Outcome:
        """By the definition that runs, and by the one of the next start.

        Raises Conflict where libvirt and QEMU do not have the same files open, or only some disks were switched: then
        no file may be removed.
        """
        name = self._guest.name
        is_off = self._guest.state() is State.OFF
        disks = {disk.name: disk for disk in self._guest.disks()}
        switched = {each.disk for each in self._overlays if _is_active(disks.get(each.disk), each.path)}
        if switched == _names(self._overlays):
            return Outcome.DONE
        if switched:
            raise Conflict(f"only {', '.join(sorted(switched))} has its new layer", subject=name, hint=_LOOK)
        process = None if is_off else self._guest.process()
        opened = (open_images(process[0]) if process is not None else None) or {}
        for each in self._overlays:
            if opened.get(identity_of(each.path) or (-1, -1), False):
                raise Conflict(f"QEMU writes to {each.path}, and libvirt does not know it", subject=name, hint=_LOOK)
        return Outcome.NOT_DONE


def _disk_spec(disk: str, overlay: Path | None) -> str:
    """What a snapshot does to a disk, as an option of `snapshot-create-as`. overlay: None leaves the disk as it is."""
    if overlay is None:
        return f"--diskspec={disk},snapshot=no"
    return f"--diskspec={disk},snapshot=external,driver=qcow2,file={str(overlay).replace(',', ',,')}"


def _names(overlays: Sequence[NewOverlay]) -> set[str]:
    return {each.disk for each in overlays}


def _is_active(disk: GuestDisk | None, path: Path) -> bool:
    return disk is not None and bool(disk.chain) and disk.active.path == path


def _check_overlay(guest: str, disk: GuestDisk | None, overlay: NewOverlay) -> None:
    """Raises Conflict where an overlay was not made for the disk as it is now."""
    if disk is None or not disk.chain:
        raise Conflict("the guest has no disk of this name any more", subject=f"{guest}/{overlay.disk}", hint=AGAIN)
    if disk.obstacle is not None:
        raise Unsupported(disk.obstacle, subject=f"{guest}/{overlay.disk}")
    if disk.active.identity != identity_of(overlay.backing):
        raise Conflict(
            f"the active layer of the disk is {disk.active.path} now, not {overlay.backing}",
            subject=f"{guest}/{overlay.disk}",
            hint=AGAIN,
        )
    size, _ = size_of(overlay.path, "qcow2")
    if size != disk.active.virtual_size:
        raise Conflict(
            f"the overlay has {size} bytes, and the disk {disk.active.virtual_size}",
            subject=f"{guest}/{overlay.disk}",
            hint=AGAIN,
        )
