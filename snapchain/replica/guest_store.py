"""Where a replica keeps the states of its guests: a small file each, beside the disks, changed under a lock.

ROOT/.guests/web1.json          the newest record of guest web1 (model/guest_state.py)
ROOT/.guests/web1.checks.json   what came of the last checks of it (model/guest_checks.py)
ROOT/.guests/web1.lease         how often its lease was renewed (model/lease.py)
ROOT/.guests/web1.lock          locked by the process that changes it
ROOT/.guests/web1.0.nvram  its firmware variables, since it came here while it ran
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from snapchain.errors import Busy, SnapchainError
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import GuestStanding, describe_takeover
from snapchain.model.lease import Renewals, counted
from snapchain.replica import names
from snapchain.replica.access import Access
from snapchain.replica.catalogue import read_record, write_record
from snapchain.replica.store import GRACE, Replica, ReplicaDisk, opened_lock

FOLDER = ".guests"
_POLL_SECONDS = 0.05


def read_standing(root: Path, guest: str) -> GuestStanding | None:
    """What is recorded of a guest. Raises Corrupt, InvalidInput for a name that no guest has."""
    return read_record(GuestStanding, _place(root, guest, ".json"))


def with_renewals(root: Path, standing: GuestStanding) -> GuestStanding:
    """The same, with how often its lease was renewed."""
    if standing.lease is None:
        return standing
    lease = counted(standing.lease, read_record(Renewals, _place(root, standing.guest, ".lease")))
    return standing.model_copy(update={"lease": lease})


def write_renewals(root: Path, guest: str, renewals: Renewals) -> None:
    """Replace what is recorded of the renewals of a lease. Only under the lock of the guest."""
    with os_errors(root):
        access = Access.of(root.stat())
    write_record(_place(root, guest, ".lease"), renewals, access=access)


def write_standing(root: Path, standing: GuestStanding) -> None:
    """Replace the record of a guest, durably. Only under its lock."""
    with os_errors(root):
        access = Access.of(root.stat())
    write_record(_place(root, standing.guest, ".json"), standing.model_copy(update={"here": None}), access=access)


def read_checks(root: Path, guest: str) -> GuestChecks:
    """What came of the last checks of a guest."""
    return read_record(GuestChecks, _place(root, guest, ".checks.json")) or GuestChecks()


def note_check(root: Path, check: GuestCheck) -> GuestChecks:
    """Record one. Only under the guest's lock."""
    checks = read_checks(root, check.guest).after(check)
    with os_errors(root):
        access = Access.of(root.stat())
    write_record(_place(root, check.guest, ".checks.json"), checks, access=access)
    return checks


@contextmanager
def alone_with(root: Path, guest: str) -> Iterator[None]:
    """Keep others from changing the state of a guest. Raises Busy."""
    lock = _place(root, guest, ".lock")
    with os_errors(root), Directory.open(root) as above:
        if not above.has(FOLDER):
            with suppress(FileExistsError):
                above.make_directory(FOLDER)
            above.sync()
        with Directory.open(root / FOLDER) as here:
            with suppress(PermissionError):
                access = Access.of(os.fstat(above.fd))
                access.give(here.opened(), access.directory)
            fd = opened_lock(here, lock.name)
    try:
        until = time.monotonic() + GRACE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise Busy(
                        "another snapchain is changing the state of this guest",
                        subject=root / FOLDER / guest,
                        hint="wait for it to end",
                    ) from error
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def make_nvram(root: Path, guest: str, number: int, size: int) -> Path:
    """An empty file for firmware variables of a guest that comes here, durably; its whole path. size: bytes

    One of an earlier stay goes: the guest is another host's, and so are its variables.
    """
    path = _place(root.resolve(), guest, f".{number}.nvram")
    with alone_with(root, guest), os_errors(path), Directory.open(path.parent) as here:
        with suppress(FileNotFoundError):
            here.remove(path.name)
        fd = here.create(path.name)
        try:
            os.truncate(fd, size)
            os.fsync(fd)
        finally:
            os.close(fd)
        here.sync()
    return path


def disks_of(replica: Replica, guest: str) -> list[ReplicaDisk]:
    """All disks right below the guest's name, the one of its records included."""
    return [disk for disk in replica.disks() if guest_of(disk.name) == guest]


def guest_of(disk: str) -> str:
    """The guest that a disk belongs to by its name; '' for none."""
    return disk.rpartition("/")[0]


def takeover_of(disk: ReplicaDisk, epoch: int) -> str | None:
    """Who took the guest of a disk over, where a record says so for a later epoch than the sender's."""
    try:
        standing = read_standing(disk.root, guest_of(disk.name)) if guest_of(disk.name) else None
    except SnapchainError:  # the epoch of the disk is what refuses
        return None
    if standing is None or not standing.is_taken_over or standing.epoch <= epoch:
        return None
    return describe_takeover(standing)


def _place(root: Path, guest: str, suffix: str) -> Path:
    return root / FOLDER / (names.directory_of(guest) + suffix)
