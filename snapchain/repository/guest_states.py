"""The states of guests in a repository: one object a step, made by create-if-absent, so that no lock is needed.

    guests/GUEST/NUMBER     the record with that number (model/guest_state.py); kind G, sealed, never changed
    guests/GUEST/renewals   how often its lease was renewed (model/lease.py); kind G, sealed, replaced by the holder
    guests/GUEST/checks     what came of the last checks of it (model/guest_checks.py); kind G, sealed, replaced

A renewal counts when the newest record was read after it was sent, and has the lease: so nobody had taken the guest
over when it was sent.  What it writes only shows that the holder lives.

SWITCH needs files that a guest can run on, and belongs to replicas.  PROMOTE and WITHDRAW raise the epoch in the
catalogue of each disk after the record is made: from then on a writer in an older epoch cannot publish (`check_epoch`).
A run that is cut off in between is finished by the same change.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Literal

from snapchain.destination.summary import possible_guest
from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import (
    GuestChange,
    GuestStanding,
    Place,
    Transition,
    after,
    as_disks_stand,
    describe_takeover,
    epoch_of,
    is_done,
    unrecorded,
)
from snapchain.model.lease import Renewals, counted, unfit_for_leases
from snapchain.objects.exclusive import create_exclusively
from snapchain.objects.store import ObjectStore
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.envelope import StoredModel, parse as parse_stored, seal, unseal
from snapchain.repository.leases import Mode
from snapchain.repository.repository import Repository
from snapchain.repository.summaries import GUESTS as FOLDER, summaries

KIND = b"G"
CHECKS = "checks"


class _Stored(StoredModel):
    """The object. nonce: tells our own write from another's."""

    format: Literal[1] = 1
    nonce: str
    standing: GuestStanding


class _StoredRenewals(StoredModel):
    """The object that each renewal replaces."""

    format: Literal[1] = 1
    renewals: Renewals


class _StoredChecks(StoredModel):
    """The object with the last checks."""

    format: Literal[1] = 1
    nonce: str
    checks: GuestChecks


def look(repository: Repository, guest: str) -> GuestStanding:
    """How a guest stands. Raises NotFound where nothing is of such a guest, Corrupt."""
    disks, record = _disks(repository, guest), _read(repository, guest)
    if not disks and record is None:
        raise NotFound(f"there is no guest {guest!r} here", subject=repository.store.url)
    newest = max(disks, key=lambda each: each.epoch, default=None)
    owner = None if newest is None else newest.owner
    standing = as_disks_stand(record, guest, epoch_of([each.epoch for each in disks]), master=owner)
    if standing.lease is not None:
        standing = _with_renewals(repository, standing)
    return standing.model_copy(update={"here": place_of(repository)})


def place_of(repository: Repository) -> Place:
    """This repository, for whoever keeps a list of a guest's destinations."""
    return Place(id=repository.config.id, url=repository.store.url)


def change(repository: Repository, asked: GuestChange) -> GuestStanding:
    """Take one step; how the guest stands then. May be repeated.

    Raises as `guest_state.after`, NotFound for a point that is not there, Unsupported for steps of a live move.
    """
    subject = f"{repository.store.url}::{asked.guest}"
    if asked.transition in (Transition.MOVE, Transition.SWITCH):
        hint = "move it to a replica"
        raise Unsupported("a repository has no files that a guest can run on", subject=subject, hint=hint)
    if asked.transition in (Transition.LEASE, Transition.RENEW):
        _check_reads_newest(repository)
    if asked.transition is Transition.RENEW:
        return _renewed(repository, asked)
    now = _stands(repository, asked)
    if asked.transition is Transition.PROMOTE:
        _check_points(repository, asked)
    if asked.transition is Transition.START:
        _check_complete(repository, now, subject)
    if not is_done(now, asked):
        new = after(now, asked, time=datetime.now(UTC), subject=subject)
        if not _create(repository, new):
            now = look(repository, asked.guest)
            if not is_done(now, asked):
                after(now, asked, time=datetime.now(UTC), subject=subject)  # raises: it was decided on an older record
                raise Conflict("the state of the guest was changed meanwhile", subject=subject, hint="run it again")
            new = now
        now = new
    if asked.raises:
        _raise_epochs(repository, now)
    return now


def _check_reads_newest(repository: Repository) -> None:
    """Raises Unsupported for a store that may let a renewal succeed after another host has taken the guest over."""
    store = repository.store
    if (kind := store.properties.stale_through) is not None:
        raise unfit_for_leases(kind, store.url)
    if not repository.conditional:
        raise Unsupported(
            "it grants no leases: its store has no conditional writes, so a late one may undo a failover",
            subject=store.url,
            hint="use another destination, or another store, for the lease and its witness",
        )


def _renewed(repository: Repository, asked: GuestChange) -> GuestStanding:
    """RENEW: how the guest stands by its record alone. Two requests to read it, one to list, one to write.

    The lease is renewed where it still has the token that was asked for.
    """
    now = _read(repository, asked.guest)
    if now is None:
        return look(repository, asked.guest)
    if now.lease is None or now.lease.token != asked.token:
        return now
    now = _with_renewals(repository, now)
    assert now.lease is not None
    renewals = Renewals(token=asked.token, count=now.lease.count + 1, time=datetime.now(UTC))
    name = _renewals_name(repository, asked.guest)
    body = _StoredRenewals(renewals=renewals).model_dump_json().encode()
    repository.store.put(name, seal(repository.keys, KIND, name, body))
    return now.model_copy(update={"lease": counted(now.lease, renewals), "here": place_of(repository)})


def checks(repository: Repository, guest: str) -> GuestChecks:
    """What came of the last checks of a guest. Raises Corrupt."""
    name = _name(repository, guest, CHECKS)
    try:
        body = unseal(repository.keys, KIND, name, repository.store.get(name))
    except NotFound:
        return GuestChecks()
    return parse_stored(_StoredChecks, body, what="the checks of a guest", subject=name).checks


def note_check(repository: Repository, check: GuestCheck) -> None:
    """Record one. Of two at the same time one may be lost. Raises NotFound where there is no such guest."""
    if not _disks(repository, check.guest):
        raise NotFound(f"there is no guest {check.guest!r} here", subject=repository.store.url)
    try:
        before = checks(repository, check.guest)
    except Corrupt:
        before = GuestChecks()
    name = _name(repository, check.guest, CHECKS)
    stored = _StoredChecks(nonce=secrets.token_hex(16), checks=before.after(check))
    repository.store.put(name, seal(repository.keys, KIND, name, stored.model_dump_json().encode()))


def _stands(repository: Repository, asked: GuestChange) -> GuestStanding:
    try:
        return look(repository, asked.guest)
    except NotFound:
        if asked.transition is not Transition.KNOW:
            raise
    # It comes before the first layer: no guest point is to be here without the names of the other destinations.
    return unrecorded(asked.guest, 1).model_copy(update={"here": place_of(repository)})


def check_epoch(repository: Repository, catalogue: Catalogue, epoch: int) -> None:
    """Raises Conflict where a writer of that epoch was replaced by another host. Nothing is read unless it was."""
    if epoch >= catalogue.epoch:
        return
    standing = None
    guest = catalogue.disk.rpartition("/")[0]
    if guest:
        try:
            standing = _read(repository, guest)
        except SnapchainError:  # the epoch of the disk is what refuses
            standing = None
    there = f"and here it is in epoch {catalogue.epoch}"
    if standing is not None and standing.is_taken_over and standing.epoch > epoch:
        raise Conflict(
            f"{describe_takeover(standing)}; this host writes the disk in epoch {epoch}",
            subject=f"{repository.store.url}::{catalogue.disk}",
            hint="start no guest on these images; `snapchain fence` shows what they hold that no point has",
        )
    raise Conflict(
        f"this host writes the disk in epoch {epoch}, {there}: another host has taken it over since",
        subject=f"{repository.store.url}::{catalogue.disk}",
        hint=f"ship nothing from here; if this host is the one that may write it, ship with --epoch {catalogue.epoch}",
    )


def _check_points(repository: Repository, asked: GuestChange) -> None:
    points = {each.disk: {point.point for point in each.points} for each in _disks(repository, asked.guest)}
    for taken in asked.disks:
        if taken.point not in points.get(taken.disk, set()):
            raise NotFound(f"disk {taken.disk!r} has no point {taken.point}", subject=repository.store.url)


def _check_complete(repository: Repository, now: GuestStanding, subject: str) -> None:
    for disk in _disks(repository, now.guest):
        if disk.epoch < now.epoch:
            raise Conflict(
                f"disk {disk.disk} is in epoch {disk.epoch}, and the guest in {now.epoch}: it was not finished",
                subject=subject,
                hint="run the same command again: it finishes that first",
            )


def _raise_epochs(repository: Repository, now: GuestStanding) -> None:
    def fields(catalogue: Catalogue) -> Mapping[str, object] | None:
        return None if catalogue.epoch >= now.epoch else {"epoch": now.epoch, "owner": now.master}

    disks = [each.disk for each in _disks(repository, now.guest) if each.epoch < now.epoch]
    if not disks:
        return
    with repository.lease(
        Mode.WRITE, f"failover {now.guest}", on_wait=repository.notices.append, disks=disks, spends=True
    ) as lease:
        for name in disks:
            repository.disk(name).update(fields, time=datetime.now(UTC), check=lease.check)


def is_recorded(repository: Repository, guest: str) -> bool:
    """Whether a state of the guest is recorded. Raises Corrupt."""
    return _read(repository, guest) is not None


def _disks(repository: Repository, guest: str) -> list[Catalogue]:
    """The disks right below the guest's name. Reads no other catalogue that this machine has seen already.

    Raises as `catalogues` where any disk cannot be read: it may be one of them.
    """
    disks = summaries(repository, datetime.now(UTC))
    if any(disk.trouble for disk in disks):
        return [each for each in repository.catalogues() if possible_guest(each.disk) == guest]
    return [repository.catalogue(disk.name) for disk in disks if possible_guest(disk.name) == guest]


# --- objects


def _name(repository: Repository, guest: str, last: int | str) -> str:
    return f"{FOLDER}{repository.keys.disk_key(guest)}/{last if isinstance(last, str) else f'{last:020d}'}"


def _read(repository: Repository, guest: str) -> GuestStanding | None:
    newest = _newest(repository.store, f"{FOLDER}{repository.keys.disk_key(guest)}/")
    if newest is None:
        return None
    name = _name(repository, guest, newest)
    body = unseal(repository.keys, KIND, name, repository.store.get(name))
    standing = parse_stored(_Stored, body, what="the state of a guest", subject=name).standing
    if (standing.guest, standing.number) != (guest, newest):
        raise Corrupt("the state belongs to another guest or number", subject=name)
    return standing


def _renewals_name(repository: Repository, guest: str) -> str:
    return f"{FOLDER}{repository.keys.disk_key(guest)}/renewals"


def _with_renewals(repository: Repository, standing: GuestStanding) -> GuestStanding:
    """The same, with how often its lease was renewed, where that was ever recorded."""
    assert standing.lease is not None
    name = _renewals_name(repository, standing.guest)
    try:
        body = unseal(repository.keys, KIND, name, repository.store.get(name))
    except NotFound:
        return standing
    renewals = parse_stored(_StoredRenewals, body, what="the renewals of a lease", subject=name).renewals
    return standing.model_copy(update={"lease": counted(standing.lease, renewals)})


def _newest(store: ObjectStore, folder: str) -> int | None:
    numbers = (info.name.removeprefix(folder) for info in store.list(folder))
    return max((int(number) for number in numbers if number.isdecimal() and len(number) == 20), default=None)


def _create(repository: Repository, standing: GuestStanding) -> bool:
    """Whether the record was made: nobody else has made one of that number."""
    name = _name(repository, standing.guest, standing.number)
    stored = standing.model_copy(update={"here": None})
    body = _Stored(nonce=secrets.token_hex(16), standing=stored).model_dump_json().encode()
    sealed = seal(repository.keys, KIND, name, body)
    return create_exclusively(repository.store, name, sealed, conditional=repository.conditional)
