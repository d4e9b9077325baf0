"""The master of a disk changes: what the replica's side does when it is given disks, or asked to give them back.

All disks of a guest at once: every one is locked and judged before the first is changed, and what is written is one
catalogue a disk, by the token of the handover.  Cut off in between, the same question asked again does the rest.

The epoch does the work: from the moment that a catalogue has the new one, whoever writes in the old one is refused.
To give a disk back is a step forward, too: what was still on its way in the epoch in between comes too late.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from snapchain.errors import Conflict, NotFound
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.replica.active import check_unused, look_at_active
from snapchain.replica.catalogue import Catalogue, HandedOver
from snapchain.replica.merge_journal import Engine
from snapchain.replica.progress import settle
from snapchain.replica.store import ReplicaDisk, Work, open_replica
from snapchain.replica.stream.handover_messages import Handed, HandedDisk, Handover, Standing, Step
from snapchain.replica.stream.messages import ActiveState
from snapchain.replica.waiting import in_turn


@dataclass(frozen=True, slots=True)
class _Case:
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


def hand_over(asked: Handover, root: Path, engine: Engine | None = None) -> Handed:
    """Do what is asked, for all disks or none. engine: for a merge of one's layers that was killed.

    Raises NotFound for a disk that is not here, Busy when one is being changed or its overlay is open, Conflict where
    a disk is not as it was prepared, another host has taken it over, or a guest has written to what is to go back.
    """
    replica = open_replica(root)
    with ExitStack() as stack:
        # In one order, whatever the sender's: two handovers at once must not wait for each other.
        for name in sorted(each.disk for each in asked.disks):
            disk = replica.disk(name)
            if not disk.directory.is_dir():
                raise NotFound(f"there is no disk {name!r} here", subject=root)
            stack.enter_context(in_turn(disk, Work.TRANSFER))
            if disk.read() is None:
                raise NotFound(f"there is no disk {name!r} here", subject=root)
        cases = [_case(replica.disk(each.disk), each, engine) for each in asked.disks]
        if asked.step is Step.GIVE:
            cases = _give(cases, asked.token, stack)
        elif asked.step is Step.BACK:
            cases = _take_back(cases, asked.token, stack)
    return Handed(disks=tuple(_standing(case, asked.token) for case in cases))


def _case(disk: ReplicaDisk, asked: HandedDisk, engine: Engine | None) -> _Case:
    catalogue = settle(disk, engine)
    look = look_at_active(disk, catalogue, asked.overlay.model_copy(update={"make": False, "prove": False}))
    return _Case(disk, catalogue, asked, look.directory, look.file, look.state)


def _give(cases: list[_Case], token: str, stack: ExitStack) -> list[_Case]:
    new = [case for case in cases if not case.given(token)]
    for case in new:
        case.check_free_for(token)
        _check_next(case, "given", 1)
        if case.state is not ActiveState.READY:
            raise case.conflict(
                "it is not the empty overlay on the newest layer any more that was prepared for the guest",
                "another transfer was faster, or somebody uses it: run the migration again",
            )
        stack.enter_context(ImageLock(case.path, LockMode.WRITE))  # nobody runs on it yet
    done = {case.disk.name: _record(case, token) for case in new}
    return [done.get(case.disk.name, case) for case in cases]


def _check_next(case: _Case, what: str, most: int) -> None:
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


def _record(case: _Case, token: str) -> _Case:
    now = datetime.now(UTC)
    handover = HandedOver(token=token, epoch=case.asked.epoch, overlay=case.overlay, time=now)
    return _written(case, case.catalogue.after(epoch=case.asked.epoch, handover=handover))


def _take_back(cases: list[_Case], token: str, stack: ExitStack) -> list[_Case]:
    for case in cases:
        if case.is_back(token):
            continue
        case.check_free_for(token)
        # A disk that was not given is two steps behind: the one that its sender had in mind, and the one back.
        _check_next(case, "taken back", 1 if case.was_given(token) else 2)
        if case.is_given_on and case.was_given(token):
            raise case.conflict(
                "it is read-only: the host there has given the disk on to another one",
                "`snapchain inspect` of it there tells to which; take it back to there first",
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


def _revoke(case: _Case, token: str) -> _Case:
    """The epoch first: what is left of the overlay then is nobody's."""
    done = _written(case, case.catalogue.after(epoch=case.asked.epoch, handover=None, taken_back=token))
    if case.given(token):
        files.remove(case.path)
    return done


def _written(case: _Case, catalogue: Catalogue) -> _Case:
    case.disk.write(catalogue)
    return _Case(case.disk, catalogue, case.asked, case.directory, case.overlay, case.state)


def _standing(case: _Case, token: str) -> Standing:
    return Standing(disk=case.disk.name, given=case.given(token), epoch=case.catalogue.epoch, overlay=str(case.path))
