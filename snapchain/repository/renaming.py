"""Giving a disk another name: its catalogue moves to another folder, and its layers and packs stay where they are.

        OLD                          NEW
    1   renamed_to NEW               -                      nobody may change OLD any more; it is still read
    2   renamed_to NEW               points, renamed_from   both name the layers
    3   renamed_to NEW, no points    points, renamed_from   OLD only tells where its points are
    4   renamed_to NEW, no points    points                 NEW is a disk like any other

Each step is one generation, made by create-if-absent.  At every moment at least one newest catalogue names the layers.
A run that was killed is finished by the same command: the catalogues tell at which step it was.

The disks of a guest go one after the other, that of its records last: a guest point is there as a whole, or is not
shown under the new name.  The records name the guest and its disks as they were; a reader takes them for those of the
guest that they lie with (destination/guest_record.py).

OLD stays for ever, so that a host that still ships there is refused, with the new name.  Programs that do not know
renaming refuse a catalogue with these fields, as one of a newer program.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from snapchain.destination.guest_record import guest_of
from snapchain.destination.reading import Work
from snapchain.destination.records import RenamePlan, RenameReport
from snapchain.errors import Conflict, InvalidInput, NotFound, Unsupported
from snapchain.model.disk_name import check_disk_name
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.repository import first_reads, guest_states
from snapchain.repository.catalogue import ATTEMPTS, Catalogue
from snapchain.repository.first_reads import StoredFirstReads
from snapchain.repository.leases import Lease, Mode
from snapchain.repository.repository import Repository

Current = tuple[Catalogue, str]


def renaming(repository: Repository, old: str, new: str) -> Work[RenamePlan, RenameReport]:
    """The renaming of a disk, or of a guest where there is no disk of that name.

    Raises InvalidInput for a name that no disk or guest can have, NotFound where there is neither.
    """
    if check_disk_name(old) == check_disk_name(new):
        raise InvalidInput("the new name is the old one", subject=old)
    for name in (old, new):
        if guest_of(name) is not None:
            raise InvalidInput("disks of this name hold the records of guests", subject=name)
    if repository.disk(old).read() is not None:
        return DiskRename(repository, old, new)
    return GuestRename(repository, old, new)


class DiskRename:
    """A disk of a repository, and its new name. with_guest: whether the guest that it belongs to is renamed."""

    def __init__(self, repository: Repository, old: str, new: str, *, with_guest: bool = False) -> None:
        self._repository, self._with_guest = repository, with_guest
        self._old, self._new = repository.disk(old), repository.disk(new)

    def plan(self) -> RenamePlan:
        """What `run` will do. Raises as `run`."""
        source, target = self._looked()
        moved = self._is_made(target)
        found = target[0] if moved and target is not None and not source[0].points else source[0]
        return RenamePlan(
            destination=self._repository.store.url,
            old=self._old.name,
            new=self._new.name,
            disks=(self._old.name,),
            points=len(found.points),
            layers=len(found.parents),
            finishes=source[0].renamed_to is not None,
        )

    def run(self, *, on_event: OnEvent = ignore) -> RenameReport:
        """Rename it.

        Raises NotFound where there is no such disk, InvalidInput for a name that is taken, Unsupported for a disk of a
        guest, Conflict when others change the disk time and again.
        """
        names = [self._old.name, self._new.name]
        with self._repository.lease(
            Mode.WRITE,
            f"rename {self._old.name}",
            on_wait=lambda words: on_event(Notice(words)),
            disks=names,
            spends=True,
        ) as lease:
            planned = self.plan()
            self.move(lease)
        return RenameReport(**planned.model_dump())

    def move(self, lease: Lease) -> None:
        """Take the steps that are left. lease: to write, which names both disks. Raises as `run`."""
        for attempt in range(ATTEMPTS):
            try:
                self._move(lease)
            except Conflict:
                if attempt == ATTEMPTS - 1:
                    raise
            else:
                return

    def _looked(self) -> tuple[Current, Current | None]:
        """Both disks as they stand. Raises as `run`."""
        source, target = self._old.read(), self._new.read()
        if source is None:
            raise NotFound(f"there is no disk {self._old.name!r} here", subject=self._repository.store.url)
        catalogue = source[0]
        if catalogue.renamed_to not in (None, self._new.name):
            if catalogue.is_gone:
                self._old.existing()  # raises: it has another name by now
            raise InvalidInput(
                f"the disk is being renamed to {catalogue.renamed_to}",
                subject=catalogue.disk,
                hint=f"finish that first: snapchain rename DEST::{catalogue.disk} DEST::{catalogue.renamed_to}",
            )
        if catalogue.renamed_to is None:
            if not self._with_guest:
                self._check_of_no_guest(catalogue)
            self._check_free(catalogue, target)
        elif catalogue.is_gone and target is not None and not self._is_made(target) and not self._is_free(target):
            self._old.existing()  # raises: it is done
        return source, target

    def _move(self, lease: Lease) -> None:
        """As `move`, once. Raises Conflict where somebody else was faster: look again."""
        source, target = self._looked()
        if source[0].renamed_to is None:
            lease.check()
            source = self._old.advance(source, time=datetime.now(UTC), renamed_to=self._new.name)
        if not self._is_made(target):
            if not self._is_free(target):
                # Somebody has made a disk of the new name since step 1: this one is as it was before.
                lease.check()
                source = self._old.advance(source, time=datetime.now(UTC), renamed_to=None)
                self._check_free(source[0], target)
            lease.check()
            target = self._made(source[0], target)
        assert target is not None
        if target[0].epoch < source[0].epoch:  # a failover has raised it since step 2
            lease.check()
            target = self._new.advance(target, time=datetime.now(UTC), epoch=source[0].epoch, owner=source[0].owner)
        if source[0].points or source[0].parents:
            lease.check()
            self._old.advance(source, time=datetime.now(UTC), points=(), parents={})
        lease.check()
        self._new.advance(target, time=datetime.now(UTC), renamed_from=None)
        first_reads.move(*(self._first_reads(each.name) for each in (self._old, self._new)))

    def _first_reads(self, disk: str) -> StoredFirstReads:
        return StoredFirstReads(self._repository.store, self._repository.keys, disk)

    def _made(self, source: Catalogue, target: Current | None) -> Current:
        """Step 2."""
        return self._new.advance(
            target,
            time=datetime.now(UTC),
            points=source.points,
            parents=source.parents,
            next_point=max(source.next_point, 1 if target is None else target[0].next_point),
            epoch=max(source.epoch, 0 if target is None else target[0].epoch),
            owner=source.owner,
            renamed_to=None,
            renamed_from=self._old.name,
        )

    def _is_made(self, target: Current | None) -> bool:
        """Whether step 2 is done."""
        return target is not None and target[0].renamed_from == self._old.name

    def _is_free(self, target: Current | None) -> bool:
        """Whether the new name has never had a point, or its points went to the old name: no number is given twice."""
        if target is None:
            return True
        catalogue = target[0]
        is_fresh = catalogue.next_point == 1 and catalogue.renamed_to is None
        return not catalogue.points and (is_fresh or catalogue.renamed_to == self._old.name)

    def _check_free(self, source: Catalogue, target: Current | None) -> None:
        if not self._is_free(target):
            raise InvalidInput(
                "the name is used here, or was: a number of a point must never mean two points",
                subject=self._new.name,
                hint=f"choose another name for {source.disk}",
            )

    def _check_of_no_guest(self, catalogue: Catalogue) -> None:
        """Raises Unsupported where the name of the disk stands in records of its guest."""
        guest = catalogue.disk.rpartition("/")[0]
        of_guest = any(point.instant is not None for point in catalogue.points)
        if of_guest or (guest and guest_states.is_recorded(self._repository, guest)):
            raise Unsupported(
                "the disk belongs to a guest, whose points are kept as a whole",
                subject=catalogue.disk,
                hint=f"rename the guest: DEST::{guest}",
            )


class GuestRename:
    """A guest of a repository, and its new name: each of its disks is renamed, that of its records last."""

    def __init__(self, repository: Repository, old: str, new: str) -> None:
        """Raises NotFound where there is no disk right below the guest's name."""
        self._repository, self._old_name, self._new_name = repository, old, new
        found = [each for key in repository.disk_keys() if (each := repository.catalogue_of(key)) is not None]
        names = _left(found, old)
        if not names:
            there = {each.renamed_to.rpartition("/")[0] for each in found if each.renamed_to and _is_of(each.disk, old)}
            gone = f"the guest {old!r} was renamed to {', '.join(sorted(there))!r}"
            raise NotFound(gone if there else f"there is no disk or guest {old!r} here", subject=repository.store.url)
        self._begun = any(
            each.is_gone and _is_of(each.disk, old) and each.renamed_to and _is_of(each.renamed_to, new)
            for each in found
        )
        self._names = sorted(names, key=lambda name: (guest_of(name) is not None, name))
        self._parts = [DiskRename(repository, name, self._renamed(name), with_guest=True) for name in self._names]

    def _renamed(self, name: str) -> str:
        return f"{self._new_name}/{name.rpartition('/')[2]}"

    def plan(self) -> RenamePlan:
        """What `run` will do. Raises as `run`."""
        plans = [part.plan() for part in self._parts]
        begun = self._begun or any(each.finishes for each in plans)
        for name in (self._old_name, self._new_name):
            if not begun and guest_states.is_recorded(self._repository, name):
                raise Unsupported(
                    "the guest has a record of who may run it, which cannot be renamed",
                    subject=name,
                    hint="ship the guest under its new name, and forget the old one later",
                )
        return RenamePlan(
            destination=self._repository.store.url,
            old=self._old_name,
            new=self._new_name,
            disks=tuple(self._names),
            points=plans[-1].points if guest_of(self._names[-1]) else 0,
            layers=sum(each.layers for each in plans),
            finishes=begun,
        )

    def run(self, *, on_event: OnEvent = ignore) -> RenameReport:
        """Rename the disks one after the other. A run that was killed is run again.

        Raises Unsupported for a guest whose state is recorded, and as `DiskRename.run`.
        """
        with self._repository.lease(
            Mode.WRITE,
            f"rename {self._old_name}",
            on_wait=lambda words: on_event(Notice(words)),
            disks=[*self._names, *map(self._renamed, self._names)],
            spends=True,
        ) as lease:
            planned = self.plan()
            for part in self._parts:
                part.move(lease)
        return RenameReport(**planned.model_dump())


def _left(catalogues: Sequence[Catalogue], guest: str) -> set[str]:
    """Old names of a guest's disks that are not yet renamed, or not to the end."""
    there = {each.disk for each in catalogues if not each.is_gone}
    begun = {each.renamed_from for each in catalogues if each.renamed_from is not None}
    return {name for name in there | begun if _is_of(name, guest)}


def _is_of(disk: str, guest: str) -> bool:
    """Whether a disk lies right below a guest's name."""
    return disk.rpartition("/")[0] == guest
