"""Starting a guest on images that depend on served points, and copying the points into them while it runs.

Only under a QEMU that no libvirt manages: decision 0163.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import NotFound, SnapchainError
from snapchain.guest.address import GuestAddress
from snapchain.guest.qmp_guest import QmpGuest
from snapchain.guest.qmp_hydration import Hydration
from snapchain.host.openers import OpenFiles
from snapchain.host.qemu_processes import QemuProcess, qemu_process
from snapchain.merge.pace import Pace
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.failover.start import start_script
from snapchain.ops.instant import server
from snapchain.ops.instant.overlay import check_no_snapshots
from snapchain.ops.instant.prepare import Passphrase
from snapchain.ops.instant.record import InstantRecord


def start_guest(definition: Path | None, images: Sequence[Path], *, on_event: OnEvent = ignore) -> bool:
    """Start QEMU by its script, unless it runs; whether it was started. It goes on when snapchain ends.

    Raises NotFound for a record without a command line, ToolFailed where QEMU does not start.
    """
    if any(qemu_of(image) is not None for image in images):
        return False
    if definition is None:
        raise NotFound(
            "the record has no command line, so nothing starts the guest",
            subject=images[0].parent,
            hint="leave --start out",
        )
    start_script(definition, images)
    on_event(Notice.of(definition, "the guest runs"))
    return True


def qemu_of(image: Path) -> QemuProcess | None:
    """The QEMU that has an image open for writing, if that has a monitor and no libvirt manages it."""
    for opener in OpenFiles().openers(image.stat()):
        if opener.writing and opener.pid is not None:
            found = qemu_process(opener.pid)
            if found is not None and found.qmp and not found.arguments.is_libvirt:
                return found
    return None


@dataclass(frozen=True, slots=True)
class UnderQemu:
    """Copies a point into an image that a QEMU has open. Implements `UnderGuest`.

    passphrase: for the server, where it is started again; limit: bytes a second at most, 0 for no limit
    """

    passphrase: Passphrase
    limit: int = 0
    on_event: OnEvent = ignore

    def __call__(self, image: Path, record: InstantRecord) -> bool:
        """False where no QEMU can be asked for it. True when all is copied, and where the guest has ended meanwhile.

        Raises Unavailable where the server cannot be started, and where the point or the image cannot be read or
        written: run again, it continues.
        """
        process = qemu_of(image)
        if process is None:
            return False
        try:
            guest = QmpGuest(GuestAddress(qmp=process.qmp[0]), on_event=self.on_event)
        except SnapchainError as error:
            self.on_event(Notice.of(image, f"its QEMU cannot be asked to copy: {error}"))
            return qemu_of(image) is None
        pace = Pace(limit=self.limit, idle=True, wait=lambda _seconds: None)
        try:
            Hydration(
                guest,
                image,
                job_id=f"sc-fill-{record.token}-{record.beside.index(image.name)}",
                bitmap=record.bitmap,
                check=lambda: check_no_snapshots(image),
                serve=lambda: server.ensure(image, self.passphrase),
                pace=pace.begin,
                first_speed=pace.first_speed,
                on_event=self.on_event,
            ).run()
        except SnapchainError:
            # A guest that has ended leaves an image at rest, which is copied as such.
            if qemu_of(image) is not None:
                raise
            self.on_event(Notice.of(image, "the guest ended before all was copied; what it has flushed is kept"))
        finally:
            guest.close()
        return True
