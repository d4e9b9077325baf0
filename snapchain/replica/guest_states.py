"""The answer to GUEST: how a guest stands at this replica, and its steps from one state to another.

    lock the guest -> lock and judge all of its disks -> write the record -> write the catalogues, one a disk

The record is the decision.  What comes after it only follows: a run that is cut off there is finished by the same
request, by its token, and START is refused as long as a disk is not in the epoch of the record.  Everything that can be
refused is refused before the record, so all disks are taken over, or none.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from blake3 import blake3

from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError
from snapchain.host import files
from snapchain.host.file_systems import network_file_system
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.image import scan
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.guest_state import (
    GuestChange,
    GuestStanding,
    GuestState,
    Place,
    TakenDisk,
    Transition,
    after,
    as_disks_stand,
    epoch_of,
    is_done,
    unrecorded,
)
from snapchain.model.lease import Renewals, counted, unfit_for_leases
from snapchain.replica import handover, names
from snapchain.replica.arrival import settle
from snapchain.replica.catalogue import Catalogue, Layer
from snapchain.replica.epochs import overlay_of
from snapchain.replica.guest_store import (
    alone_with,
    disks_of,
    note_check,
    read_checks,
    read_standing,
    with_renewals,
    write_renewals,
    write_standing,
)
from snapchain.replica.store import Replica, ReplicaDisk, Work, in_turn, open_replica
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import AskGuest, HandedDisk, Standing, Stands
from snapchain.replica.stream.messages import Active
from snapchain.replica.stream.requests import Feature
from snapchain.source.handed_over import HandedOver
from snapchain.source.notes import Notes
from snapchain.source.ownership import note_epoch

if TYPE_CHECKING:
    from snapchain.replica.receiver import Receiver


def answer(receiver: Receiver, request: AskGuest) -> None:
    """GUEST. Raises as `look` and `change`."""
    knows = request.change is not None and request.change.transition is Transition.KNOW
    # It comes before the first layer: no guest point is to be here without the names of the other destinations.
    replica = open_replica(receiver.root(request.replica), make=knows)
    if request.check is not None:
        with alone_with(replica.root, request.guest):
            found = look(replica, request.guest)
            found = found.model_copy(update={"checks": note_check(replica.root, request.check)})
    else:
        found = look(replica, request.guest) if request.change is None else change(replica, request)
    if Feature.PLACES not in receiver.session.features:
        found = found.model_copy(update={"standing": found.standing.for_older()})
    if Feature.LEASE not in receiver.session.features:
        found = found.model_copy(update={"standing": found.standing.model_copy(update={"lease": None})})
    receiver.session.reply(Kind.STANDING, found)
    receiver.session.done()


def look(replica: Replica, guest: str) -> Stands:
    """How a guest stands; changes nothing. Raises NotFound where nothing here is of such a guest."""
    disks, record = disks_of(replica, guest), read_standing(replica.root, guest)
    if not disks and record is None:
        raise NotFound(f"there is no guest {guest!r} here", subject=replica.root)
    found = max((_written(disk) for disk in disks), key=lambda each: each.epoch, default=_Written(0))
    standing = as_disks_stand(record, guest, epoch_of([found.epoch]), master=found.master, at=found.at)
    return Stands(
        standing=with_renewals(replica.root, standing).model_copy(update={"here": place_of(replica)}),
        checks=read_checks(replica.root, guest),
    )


def _renewed(replica: Replica, asked: GuestChange) -> GuestStanding:
    """RENEW: how the guest stands. The lease is renewed where it still has the token that was asked for."""
    now = look(replica, asked.guest).standing
    if now.lease is None or now.lease.token != asked.token:
        return now
    renewals = Renewals(token=asked.token, count=now.lease.count + 1, time=datetime.now(UTC))
    write_renewals(replica.root, asked.guest, renewals)
    return now.model_copy(update={"lease": counted(now.lease, renewals)})


@dataclass(frozen=True, slots=True)
class _Written:
    """Who writes a disk, as it lies here. epoch: the latest that is known; at: where this host has given it on to"""

    epoch: int
    master: str | None = None
    at: Place | None = None


def _written(disk: ReplicaDisk) -> _Written:
    catalogue = disk.read()
    if catalogue is None:
        return _Written(0)
    held = catalogue.handover
    overlay = None if held is None else overlay_of(disk, held)
    if held is None or overlay is None or not overlay.exists():
        return _Written(catalogue.epoch)
    if overlay.stat().st_mode & 0o222:
        return _Written(catalogue.epoch, socket.gethostname() if held.epoch == catalogue.epoch else None)
    given = Notes().of(overlay.resolve()).given
    if given is None or given.epoch < catalogue.epoch:
        return _Written(catalogue.epoch)
    if not given.destination:
        return _Written(given.epoch)
    host = (urlsplit(given.destination).hostname or socket.gethostname())[:250]
    return _Written(given.epoch, host, Place(url=given.destination))


def place_of(replica: Replica) -> Place:
    """This replica, for whoever keeps a list of a guest's destinations.

    Its id is that of the file that makes the directory a replica: a copy of the directory is another one.
    """
    marker = replica.root / names.MARKER
    with os_errors(marker):
        status = marker.stat()
    text = f"{status.st_ino} {status.st_mtime_ns}"
    return Place(id=blake3(text.encode()).hexdigest(length=16), url=f"dir:{replica.root}", host=socket.gethostname())


def change(replica: Replica, request: AskGuest) -> Stands:
    """Take one step. Raises as `guest_state.after`; NotFound, Busy and Conflict for its disks, all before a change."""
    asked = request.change
    assert asked is not None, "else `look` answers"
    if asked.transition is Transition.SWITCH and not request.handed:
        raise InvalidInput("the disks that are handed over are not named", subject=request.guest)
    is_leased = asked.transition in (Transition.LEASE, Transition.RENEW)
    if is_leased and (kind := network_file_system(replica.root)) is not None:
        raise unfit_for_leases(kind, replica.root)
    with alone_with(replica.root, request.guest):
        if asked.transition is Transition.RENEW:
            return Stands(standing=_renewed(replica, asked))
        now = _stands(replica, asked)
        is_repeated = is_done(now, asked)
        subject = f"{replica.root}: {request.guest}"
        new = now if is_repeated else after(now, asked, time=datetime.now(UTC), subject=subject)
        if not asked.raises:
            if asked.transition is Transition.START:
                _check_complete(replica, now, subject)
            if not is_repeated:
                write_standing(replica.root, new)
            return Stands(standing=new)
        with ExitStack() as stack:
            work = _Raise(replica, asked, now, new, stack, is_repeated=is_repeated)
            return Stands(standing=new, disks=work.run(request.handed))


def _stands(replica: Replica, asked: GuestChange) -> GuestStanding:
    try:
        return look(replica, asked.guest).standing
    except NotFound:
        if asked.transition is not Transition.KNOW:
            raise
    return unrecorded(asked.guest, 1).model_copy(update={"here": place_of(replica)})


def _check_complete(replica: Replica, now: GuestStanding, subject: str) -> None:
    """Raises Conflict where a switch or failover was cut off before all disks were in its epoch."""
    for disk in disks_of(replica, now.guest):
        catalogue = disk.read()
        if catalogue is not None and catalogue.epoch < now.epoch:
            raise Conflict(
                f"disk {disk.name} is in epoch {catalogue.epoch}, and the guest in {now.epoch}: it was not finished",
                subject=subject,
                hint="run the same command again: it finishes that first",
            )


class _Raise:
    """SWITCH, PROMOTE or WITHDRAW: all disks of the guest enter the epoch of the new record. Locks last as `stack`."""

    def __init__(
        self,
        replica: Replica,
        asked: GuestChange,
        was: GuestStanding,
        new: GuestStanding,
        stack: ExitStack,
        *,
        is_repeated: bool,
    ) -> None:
        self._replica, self._asked, self._was, self._new, self._stack = replica, asked, was, new, stack
        self._is_repeated = is_repeated
        # In one order, so that two requests never wait for each other.
        self._disks = {disk.name: disk for disk in sorted(disks_of(replica, asked.guest), key=lambda each: each.name)}
        for disk in self._disks.values():
            stack.enter_context(in_turn(disk, Work.TRANSFER))
        self._catalogues = {name: settle(disk) for name, disk in self._disks.items()}

    def run(self, handed: Sequence[HandedDisk]) -> tuple[Standing, ...]:
        """Judge all, decide, then write all. The disks that were taken over."""
        match self._asked.transition:
            case Transition.SWITCH:
                return self._switch(handed)
            case Transition.PROMOTE:
                return self._promote()
            case Transition.FOLLOW:
                self._follow()
                return ()
            case _:
                self._withdraw()
                return ()

    def _decide(self) -> None:
        if not self._is_repeated:
            write_standing(self._replica.root, self._new)

    def _switch(self, handed: Sequence[HandedDisk]) -> tuple[Standing, ...]:
        for each in handed:
            self._check_known(each.disk)
            if each.epoch != self._new.epoch:
                raise InvalidInput(
                    f"{each.disk} would be in epoch {each.epoch}, and its guest in {self._new.epoch}",
                    subject=self._replica.root,
                )
        cases = handover.cases_of(self._replica, handed)
        cases = handover.give(cases, self._asked.token, self._stack, decide=self._decide, most=LARGEST_EPOCH)
        self._raise_others({each.disk for each in handed})
        return tuple(handover.standing_of(case, self._asked.token) for case in cases)

    def _promote(self) -> tuple[Standing, ...]:
        if not self._asked.disks:
            raise InvalidInput("the disks that are taken over are not named", subject=self._asked.guest)
        overlays = {each.disk: self._overlay(each) for each in self._asked.disks}
        self._decide()
        for name, overlay in overlays.items():
            if self._handover(name) is None:
                taken = HandedOver(
                    token=self._asked.token,
                    epoch=self._new.epoch,
                    overlay=f"{names.ACTIVE}/{overlay.name}",
                    time=datetime.now(UTC),
                )
                self._write(name, epoch=self._new.epoch, handover=taken)
        self._raise_others(set(overlays))
        return tuple(
            Standing(disk=name, given=True, epoch=self._new.epoch, overlay=str(overlay))
            for name, overlay in overlays.items()
        )

    def _overlay(self, taken: TakenDisk) -> Path:
        """The empty overlay on the layer of a point, made unless it is there."""
        self._check_known(taken.disk)
        disk, catalogue = self._disks[taken.disk], self._catalogues[taken.disk]
        if (mine := self._handover(taken.disk)) is not None:
            return overlay_of(disk, mine)
        self._check_free(disk, catalogue)
        point = next((each for each in catalogue.points if each.point == taken.point), None)
        if point is None:
            raise NotFound(f"it has no point {taken.point}", subject=disk.directory)
        layer = next(each for each in catalogue.layers if each.id == point.layer)
        offer = Active(
            name=names.offered_name(f"{taken.disk.rpartition('/')[2]}-epoch{self._new.epoch}"),
            size=layer.size,
            cluster_size=max(64 * 1024, layer.cluster_size),
            extended_l2=False,
            on=layer.id,
            make=True,
            prove=False,
        )
        path = disk.path(names.ACTIVE) / offer.name
        if path.exists():
            _check_made_before(disk, layer, path)
        else:
            handover.make_overlay(disk, disk.path(layer.file).resolve(), offer, path)
        self._stack.enter_context(ImageLock(path, LockMode.WRITE))
        return path.resolve()

    def _check_free(self, disk: ReplicaDisk, catalogue: Catalogue) -> None:
        """Raises Conflict where this replica's host is the master already, by a handover that is in force."""
        held = catalogue.handover
        if held is None:
            return
        overlay = overlay_of(disk, held)
        if overlay.exists() and overlay.stat().st_mode & 0o222:
            raise Conflict(
                f"this host is the master of the disk already, by a handover in epoch {held.epoch}",
                subject=overlay,
                hint="start the guest on that file; there is nothing to fail over",
            )

    def _withdraw(self) -> None:
        undone: dict[str, Path | None] = {}
        for name, disk in self._disks.items():
            catalogue = self._catalogues[name]
            if catalogue.taken_back == self._asked.token and catalogue.epoch == self._new.epoch:
                continue
            undone[name] = None
            held = self._handover(name)
            if held is None:
                continue
            path = overlay_of(disk, held)
            if path.exists():
                self._check_goes_back(disk, path)
                undone[name] = path
        self._decide()
        for name, overlay in undone.items():
            # The epoch first: what is left of the overlay then is nobody's.
            held = None if self._handover(name) is not None else self._catalogues[name].handover
            self._write(name, epoch=self._new.epoch, handover=held, taken_back=self._asked.token)
            if overlay is not None:
                files.remove(overlay)

    def _follow(self) -> None:
        """The guest was taken over elsewhere: no file here is its master's any more. What it holds stays."""
        self._decide()
        for name, catalogue in self._catalogues.items():
            held = catalogue.handover
            is_given_on = held is not None and _is_read_only(overlay_of(self._disks[name], held))
            kept = held if is_given_on else None
            if held is not None and kept is None:
                with suppress(SnapchainError):  # without it, the images count as older than they are
                    note_epoch(overlay_of(self._disks[name], held), held.epoch)
            if catalogue.epoch < self._new.epoch or kept is not held:
                self._write(name, epoch=max(catalogue.epoch, self._new.epoch), handover=kept)
            if held is not None and self._was.state is GuestState.PROMOTING and held.token == self._was.token:
                self._remove_empty(self._disks[name], overlay_of(self._disks[name], held))

    def _remove_empty(self, disk: ReplicaDisk, overlay: Path) -> None:
        """The overlay of a failover that was overtaken before its guest was started; one that is in use stays."""
        with suppress(SnapchainError), ImageLock(overlay, LockMode.WRITE):
            if handover.is_untouched(disk, overlay):
                handover.check_unused(disk, overlay)
                files.remove(overlay)

    def _check_goes_back(self, disk: ReplicaDisk, overlay: Path) -> None:
        if not overlay.stat().st_mode & 0o222:
            raise Conflict("it is read-only: the host there has given the disk on to another one", subject=overlay)
        self._stack.enter_context(ImageLock(overlay, LockMode.WRITE))  # no guest runs on it
        if not handover.is_untouched(disk, overlay):
            raise Conflict(
                "a guest has written to it since it was taken over: to withdraw would lose that",
                subject=overlay,
                hint="shut that guest down, and move it back with `snapchain failback`",
            )
        handover.check_unused(disk, overlay)

    def _check_known(self, name: str) -> None:
        if name not in self._disks:
            raise NotFound(f"there is no disk {name!r} here", subject=self._replica.root)

    def _handover(self, name: str) -> HandedOver | None:
        """By which a disk was taken over with this token."""
        held = self._catalogues[name].handover
        return held if held is not None and held.token == self._asked.token else None

    def _raise_others(self, taken: set[str]) -> None:
        """The disks that no guest runs on, such as the one of the guest's records: their old sender is refused, too."""
        for name, catalogue in self._catalogues.items():
            if name not in taken and catalogue.epoch < self._new.epoch:
                self._write(name, epoch=self._new.epoch)

    def _write(self, name: str, **fields: object) -> None:
        catalogue = self._catalogues[name].after(**fields)
        self._disks[name].write(catalogue)
        self._catalogues[name] = catalogue


def _check_made_before(disk: ReplicaDisk, layer: Layer, path: Path) -> None:
    """Raises Conflict unless a file is an untouched overlay on a layer: of a run that was cut off before it decided."""
    try:
        with scan(path, format="qcow2", image_dirs=[disk.directory]) as chain:
            below = chain.files[-2].path.resolve() if len(chain.files) > 1 else None
            is_on_it = below == disk.path(layer.file).resolve() and chain.size == layer.size
    except SnapchainError:
        is_on_it = False
    if is_on_it and handover.is_untouched(disk, path):
        return
    raise Conflict(
        "it is no empty overlay on that point: a guest may have written to it",
        subject=path,
        hint="look what it is; if it may go, remove it there and run this again",
    )


def _is_read_only(path: Path) -> bool:
    try:
        return not path.stat().st_mode & 0o222
    except OSError:
        return False
