"""The master of a disk changes: the replica's side of giving disks to a host, and of taking them back.

All disks of a guest at once: every one is locked and judged before the first is changed, and what is written is one
catalogue a disk, by the token of the handover.  Interrupted in between, the same request completes the rest.

The epoch does the work: from the moment that a catalogue has the new one, whoever writes in the old one is refused.
To give a disk back is a step forward, too: what was still on its way in the epoch in between comes too late.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import Conflict, Corrupt, Diverged, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host import files
from snapchain.host.directory import Directory
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import ACTIVE, temporary_beside
from snapchain.image import ImageChain, scan
from snapchain.image.dependents import SEEN
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.write import write_overlay
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.replica import names
from snapchain.replica.arrival import settle
from snapchain.replica.catalogue import Catalogue, empty_catalogue
from snapchain.replica.merge_journal import others_on, undisturbed
from snapchain.replica.status import verify_disk
from snapchain.replica.store import Replica, ReplicaDisk
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.guest_messages import HandedDisk, Standing
from snapchain.replica.stream.messages import Active, ActiveState, Readiness
from snapchain.source.handed_over import HandedOver

if TYPE_CHECKING:
    from snapchain.replica.receiver import Transfer


@dataclass(frozen=True, slots=True)
class Case:
    """A disk in question. overlay: from its directory; state: of that now."""

    disk: ReplicaDisk
    catalogue: Catalogue
    asked: HandedDisk
    directory: str
    overlay: str
    state: ActiveState

    @property
    def path(self) -> Path:
        return Path(self.directory) / self.overlay

    def was_given(self, token: str) -> bool:
        """Whether it was, as far as this replica knows."""
        handover = self.catalogue.handover
        return handover is not None and handover.token == token

    def given(self, token: str) -> bool:
        """Whether it was, and nobody has taken it over since."""
        return self.was_given(token) and not self.is_given_on

    @property
    def is_given_on(self) -> bool:
        """Whether this host has given it away itself: then it has made the overlay read-only (source/ownership.py)."""
        try:
            return not self.path.stat().st_mode & 0o222
        except OSError:
            return False

    def is_back(self, token: str) -> bool:
        """Whether it was taken back, by an earlier run."""
        return (self.catalogue.epoch, self.catalogue.taken_back) == (self.asked.epoch, token)

    def check_free_for(self, token: str) -> None:
        """Raises Conflict where this host has the disk by another handover, or for another file."""
        handover = self.catalogue.handover
        if handover is None or (handover.token, handover.overlay) == (token, self.overlay):
            return
        raise self.conflict(
            f"this host has the disk by another handover, and the disk is in epoch {self.catalogue.epoch}",
            "find out which host runs the guest before anything else; only the host that has given a disk can take it "
            "back",
        )

    def conflict(self, message: str, hint: str) -> Conflict:
        return Conflict(message, subject=self.path, hint=hint)


def cases_of(replica: Replica, disks: Sequence[HandedDisk]) -> list[Case]:
    """The disks of a request as they stand. All of them are locked."""
    return [_case(replica.disk(each.disk), each) for each in disks]


def _case(disk: ReplicaDisk, asked: HandedDisk) -> Case:
    catalogue = settle(disk)
    look = look_at_active(disk, catalogue, asked.overlay.model_copy(update={"make": False, "prove": False}))
    return Case(disk, catalogue, asked, look.directory, look.file, look.state)


def give(
    cases: list[Case],
    token: str,
    stack: ExitStack,
    *,
    decide: Callable[[], None] = lambda: None,
    most: int = 1,
) -> list[Case]:
    """Make this replica's host the master of all disks, or of none. Disks that were given by this token stay.

    decide: called when all disks are judged, before the first is changed; most: steps that an epoch may rise by
    """
    new = [case for case in cases if not case.given(token)]
    for case in new:
        case.check_free_for(token)
        _check_next(case, "given", most)
        if case.state is not ActiveState.READY:
            raise case.conflict(
                "it is not the empty overlay on the newest layer any more that was prepared for the guest",
                "another transfer was faster, or somebody uses it: run the migration again",
            )
        stack.enter_context(ImageLock(case.path, LockMode.WRITE))  # nobody runs on it yet
    decide()
    done = {case.disk.name: _record(case, token) for case in new}
    return [done.get(case.disk.name, case) for case in cases]


def _check_next(case: Case, what: str, most: int) -> None:
    """Raises Conflict for an epoch that is not the disk's next one. most: steps that it may be ahead."""
    now, asked = case.catalogue.epoch, case.asked.epoch
    if asked <= now:
        raise case.conflict(
            f"the disk is in epoch {now} already, and would be {what} in {asked}: another host has taken it over since",
            "find out which host runs the guest before anything else",
        )
    if asked > now + most:
        raise case.conflict(
            f"the disk is in epoch {now}, and would be {what} in {asked}: an epoch rises by one at a time",
            f"send it there first; if it was handed over elsewhere meanwhile, with --epoch {asked - 1}",
        )


def _record(case: Case, token: str) -> Case:
    now = datetime.now(UTC)
    handover = HandedOver(token=token, epoch=case.asked.epoch, overlay=case.overlay, time=now)
    return _written(case, case.catalogue.after(epoch=case.asked.epoch, handover=handover))


def take_back(cases: list[Case], token: str, stack: ExitStack) -> list[Case]:
    """Make all disks their sender's again, or none."""
    for case in cases:
        if case.is_back(token):
            continue
        case.check_free_for(token)
        # A disk that was not given is two steps behind: the one that its sender had in mind, and the one back.
        _check_next(case, "taken back", 1 if case.was_given(token) else 2)
        if case.is_given_on and case.was_given(token):
            raise case.conflict(
                "it is read-only: the host there has given the disk on to another one",
                "`snapchain inspect` of it there shows which one; take it back to there first",
            )
        if not case.given(token):
            continue  # it never came to that, and cannot any more once the epoch is a later one
        stack.enter_context(ImageLock(case.path, LockMode.WRITE))  # no guest runs on it
        if case.state is not ActiveState.READY:
            raise case.conflict(
                "a guest has written to it since it was given: to go back now would lose that",
                "shut that guest down, and migrate it from there to here",
            )
        check_unused(case.disk, case.path)
    return [case if case.is_back(token) else _revoke(case, token) for case in cases]


def _revoke(case: Case, token: str) -> Case:
    """The epoch first: what is left of the overlay then is nobody's."""
    done = _written(case, case.catalogue.after(epoch=case.asked.epoch, handover=None, taken_back=token))
    if case.given(token):
        files.remove(case.path)
    return done


def _written(case: Case, catalogue: Catalogue) -> Case:
    case.disk.write(catalogue)
    return Case(case.disk, catalogue, case.asked, case.directory, case.overlay, case.state)


def standing_of(case: Case, token: str) -> Standing:
    """How a disk stands, for the one who asked."""
    return Standing(disk=case.disk.name, given=case.given(token), epoch=case.catalogue.epoch, overlay=str(case.path))


# --- For a guest that comes while it runs (guest_server.py): its overlay is not empty any more when it is given.


def check_may_be_given(case: Case, token: str) -> None:
    """Raises Conflict where the disk is this host's by another handover, or the epoch is not a later one."""
    case.check_free_for(token)
    _check_next(case, "given", LARGEST_EPOCH)


def record_given(case: Case, token: str) -> Case:
    """From now on this host is the master of the disk. May be repeated."""
    return case if case.given(token) else _record(case, token)


def revoke_given(case: Case, token: str) -> Case:
    """Take back a disk whose guest came to this host and never ran here: the sender goes on. Its QEMU is gone."""
    if case.catalogue.taken_back == token:
        return case
    return _written(case, case.catalogue.after(epoch=case.asked.epoch + 1, handover=None, taken_back=token))


# --- The overlay that a live migration writes to: empty, on the newest layer, in a directory of its own.
#
# ROOT/web1%2Fvda/active/web1.qcow2     names the newest layer by its whole path
#
# libvirt's incremental storage copy needs it beforehand, with the size of the source's top. The whole path allows a
# symbolic link to stand for it anywhere: QEMU resolves a relative name from the link's directory. An empty overlay may
# be replaced by the next one; one that was written to, or is open, is never touched.

_SECTOR = 512


def answer_active(current: Transfer, offer: Active) -> None:
    """ACTIVE. Raises as `look_at_active` and `make_active`."""
    disk = current.disk
    if current.looks:
        found = undisturbed(
            disk,
            lambda: look_at_active(disk, disk.read() or empty_catalogue(disk.name), offer),
            is_fine=lambda seen: seen.state is ActiveState.READY and not seen.broken,
        )
    else:
        found = (make_active if offer.make else look_at_active)(disk, current.catalogue, offer)
    current.session.reply(Kind.READINESS, found)


def look_at_active(disk: ReplicaDisk, catalogue: Catalogue, offer: Active) -> Readiness:
    """What stands there now; with `prove`, whether each layer still shows what it did. Changes nothing.

    Raises Corrupt for a name that no sender of ours would ask for.
    """
    path = _path(disk, offer)
    directory = str(disk.directory.resolve())
    if not directory.isprintable():
        raise Unsupported("its path has characters that no command can be given", subject=ascii(directory))
    return Readiness(
        directory=directory,
        file=f"{names.ACTIVE}/{path.name}",
        state=_state(disk, catalogue, offer, path),
        proven=offer.prove,
        broken=tuple(_broken(disk, catalogue)) if offer.prove else (),
    )


def make_active(disk: ReplicaDisk, catalogue: Catalogue, offer: Active) -> Readiness:
    """Make the overlay unless it is there. The disk is locked.

    Raises Diverged when `offer.on` is not the newest layer, Conflict when the name is taken by what is not to be
    replaced, Busy when somebody has it open, Corrupt when a layer no longer is what it was.
    """
    path = _path(disk, offer)
    tip = catalogue.tip
    if tip is None or tip.id != offer.on:
        raise Diverged(
            "the layer below the overlay is not the newest one here",
            subject=disk.directory,
            hint="another transfer was faster: run it again",
        )
    if path.parent.is_dir():
        files.remove_temporaries(path, purpose=ACTIVE)  # of runs that were killed: we hold the lock
    found = look_at_active(disk, catalogue, offer)
    if found.broken:
        raise Corrupt(
            "it no longer shows what it did when it came", subject=disk.path(found.broken[0]), hint="verify that disk"
        )
    if found.state is ActiveState.READY:
        return found
    if found.state is ActiveState.FOREIGN:
        raise Conflict(
            "it is no empty overlay on this disk: a guest may have written to it",
            subject=path,
            hint="look what it is; if it may go, remove it there and run this again",
        )
    if found.state is ActiveState.STALE:
        with ImageLock(path, LockMode.WRITE):
            check_unused(disk, path)
            files.remove(path)
    make_overlay(disk, disk.path(tip.file).resolve(), offer, path)
    state = _state(disk, catalogue, offer, path)
    if state is not ActiveState.READY:
        raise Corrupt("the overlay that was just made is not what was asked for", subject=path)
    return found.model_copy(update={"state": state})


def check_unused(disk: ReplicaDisk, overlay: Path) -> None:
    """Raises Conflict for an overlay that is to go although other images depend on it."""
    status = overlay.stat()
    why = others_on(disk, [overlay], own=[(status.st_dev, status.st_ino)], opened=overlay).reason(overlay, *SEEN)
    if why is not None:
        raise Conflict(f"it cannot be removed: {why}", subject=overlay, hint="move or remove that image first")


def is_untouched(disk: ReplicaDisk, overlay: Path) -> bool:
    """Whether a file of `active` is an overlay on which nobody has written anything yet."""
    try:
        with scan(overlay, format="qcow2", image_dirs=[disk.directory]) as chain:
            top = chain.top.extents
            return len(chain.files) > 1 and not top.data_bytes and not top.zero_bytes
    except SnapchainError:
        return False


def _path(disk: ReplicaDisk, offer: Active) -> Path:
    return disk.path(names.ACTIVE) / names.check_offered(offer.name, subject=str(disk.directory))


def make_overlay(disk: ReplicaDisk, backing: Path, offer: Active, path: Path) -> None:
    """Make an empty overlay on a layer's file, under a name that is free. The disk is locked. Raises InvalidInput."""
    if offer.size % _SECTOR:
        raise InvalidInput(f"a qcow2 overlay cannot have {offer.size} bytes", subject=path)
    with files.directory_of(path.parent) as above:
        if not above.has(names.ACTIVE):
            above.make_directory(names.ACTIVE)
            above.sync()
            with Directory.open(path.parent) as place:
                disk.access.give(place.opened(), disk.access.directory)
    temporary = temporary_beside(path, purpose=ACTIVE).name
    with files.directory_of(path) as place:
        fd = place.create(temporary)
        made = os.fstat(fd)
        try:
            write_overlay(
                fd,
                offer.size,
                Backing(str(backing), "qcow2"),
                cluster_size=offer.cluster_size,
                extended_l2=offer.extended_l2,
                subject=path.parent,
            )
            disk.access.give(fd, disk.access.overlay)
            with os_errors(path.parent):
                os.fsync(fd)
            place.give_name(fd, temporary, path.name, replacing=None)
        finally:
            os.close(fd)
            with suppress(OSError):
                place.remove(temporary, only=made)


def _state(disk: ReplicaDisk, catalogue: Catalogue, offer: Active, path: Path) -> ActiveState:
    if not os.path.lexists(path):
        return ActiveState.ABSENT
    try:
        with scan(path, format="qcow2", image_dirs=[disk.directory]) as chain:
            return _judged(disk, catalogue, offer, chain)
    except NotFound:
        return ActiveState.ABSENT if not os.path.lexists(path) else ActiveState.FOREIGN
    except SnapchainError:
        return ActiveState.FOREIGN


def _judged(disk: ReplicaDisk, catalogue: Catalogue, offer: Active, chain: ImageChain) -> ActiveState:
    top = chain.top
    if top.extents.data_bytes or top.extents.zero_bytes or top.header is None or len(chain.files) < 2:
        return ActiveState.FOREIGN
    stands_on = chain.files[-2].path.resolve()
    place = next((at for at, layer in enumerate(catalogue.layers) if disk.path(layer.file).resolve() == stands_on), -1)
    if place < 0:
        return ActiveState.FOREIGN
    whole = [(file.path.name, file.size, file.format) for file in chain.files[:-1]]
    wanted = [(layer.file, layer.size, "qcow2") for layer in catalogue.layers[: place + 1]]
    exact = (chain.size, top.cluster_size, top.header.extended_l2) == (
        offer.size,
        offer.cluster_size,
        offer.extended_l2,
    )
    # One that the host here has given on to another is read-only (source/ownership.py): the next guest needs its own.
    exact = exact and bool(top.real_path.stat().st_mode & 0o222)
    is_ready = exact and whole == wanted and catalogue.layers[place].id == offer.on == catalogue.layers[-1].id
    return ActiveState.READY if is_ready else ActiveState.STALE


def _broken(disk: ReplicaDisk, catalogue: Catalogue) -> list[str]:
    """Files of the layers that do not show what they should; of all, where the chain cannot even be read."""
    try:
        return [finding.file for finding in verify_disk(disk, on_bytes=lambda _count: None)]
    except SnapchainError:
        return [layer.file for layer in catalogue.layers]
