"""status: how the guests of destinations stand: who may run each, how far behind each destination is, what is owed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from snapchain.destination.protocol import Destination
from snapchain.destination.records import DiskRecord
from snapchain.destination.summary import DiskSummary, possible_guest
from snapchain.errors import NotFound, SnapchainError
from snapchain.model.consistency import Consistency
from snapchain.model.guest_checks import GuestCheck, GuestChecks
from snapchain.model.guest_state import GuestStanding, GuestState, Place, Vouched, describe
from snapchain.model.lease import Lease
from snapchain.ops.failover.choose import loss_of
from snapchain.ops.guest_points import GuestView, guest_named
from snapchain.ops.other_destinations import OtherDestinations, Reach


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class GuestStatus(_Shown):
    """A guest at a destination.

    state, epoch, master, former, since, vouched, lease: as the destination records them
    guest_point, time, consistency: of the newest guest point; torn: newer moments that are no guest point
    lag_seconds: since its time; lag_bytes: what the guest wrote since, by the rate between its last two points, or None
    ahead_bytes: DATA that the destination has beyond it
    taken_at: the other destination at which the master took the guest over; others: all other destinations that are
    known; silent: those of them that did not answer, and why; gone: those that never come back, and who said so
    verified, booted: what came of the last verification of the guest, and of the last boot of a clone (failover --test)
    owed: what must still be done about it, sentences; fault: why it could not be asked
    """

    guest: str
    destination: str
    state: GuestState | None = None
    epoch: int | None = None
    master: str | None = None
    former: str | None = None
    since: datetime | None = None
    vouched: Vouched | None = None
    lease: Lease | None = None
    guest_point: int | None = None
    time: datetime | None = None
    consistency: Consistency | None = None
    torn: int = 0
    lag_seconds: float | None = None
    lag_bytes: int | None = None
    ahead_bytes: int = 0
    taken_at: str | None = None
    others: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    verified: GuestCheck | None = None
    booted: GuestCheck | None = None
    owed: tuple[str, ...] = ()
    fault: str | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether the destination has a record of its state."""
        return self.since is not None


class StatusReport(_Shown):
    """All guests by name, at each destination in the order in which these were named."""

    guests: tuple[GuestStatus, ...]


def status(
    places: Sequence[tuple[Destination, str | None]], *, now: datetime | None = None, reach: Reach | None = None
) -> StatusReport:
    """Ask destinations, each about one guest or about all. now: for ages; reach: how other destinations are asked, too

    A guest whose state cannot be asked is a row with the reason. Raises NotFound for a guest that a destination lacks.
    """
    now = now or datetime.now(UTC)
    rows: list[GuestStatus] = []
    for place, name in places:
        disks = place.summaries(now=now)
        guests = guests_among(disks) if name is None else [name]
        found = statuses(place, disks, guests, now=now, reach=reach)
        if name is not None and not found:
            raise NotFound("there is no such guest", subject=f"{place.url}::{name}")
        rows += found
    return StatusReport(guests=tuple(sorted(rows, key=lambda row: row.guest)))


def guests_among(disks: Iterable[DiskSummary]) -> list[str]:
    """The guests with points, and those of which only a state is recorded: one that was moved there has no points."""
    return sorted({disk.guest for disk in disks if disk.guest is not None})


def statuses(
    place: Destination,
    disks: Sequence[DiskSummary],
    guests: Sequence[str],
    *,
    now: datetime,
    reach: Reach | None = None,
) -> list[GuestStatus]:
    """How some guests of a destination stand. disks: all that it has; now, reach: as in `status`

    A name of which there is neither a guest point nor a state is left out.
    """
    records = _Records(place, disks)
    rows = []
    for name in guests:
        row, standing = _row(place, name, records, now)
        rows.append(row if reach is None or standing is None else _with_others(row, standing, place, reach))
    known = {*guests_among(disks)}
    return [row for row in rows if row.guest in known or row.is_recorded]


class _Records:
    """The records of the disks of guests, read as they are asked for; no others, where each can be read by itself."""

    def __init__(self, place: Destination, disks: Sequence[DiskSummary]) -> None:
        self._place = place
        self._members: dict[str | None, list[str]] = {}
        for disk in disks:
            self._members.setdefault(possible_guest(disk.name), []).append(disk.name)
        self._names = {disk.name for disk in disks}
        self._has_trouble = any(disk.trouble for disk in disks)
        self._all: tuple[DiskRecord, ...] | None = None

    def view(self, guest: str) -> GuestView | None:
        """As `guest_named`. Raises what keeps a disk of the guest from being read."""
        members = self._members.get(guest, [])
        if guest in self._names:
            return None
        if self._place.traits.streams and not self._has_trouble:
            # One answer is cheaper than a connection for each disk.
            self._all = self._all if self._all is not None else self._place.disks()
            found = [each for each in self._all if each.name in members]
        else:
            found = [record for name in members for record in self._place.disks(name)]
        return guest_named(found, guest)


_Row = tuple[GuestStatus, GuestStanding | None]


def _row(place: Destination, name: str, records: _Records, now: datetime) -> _Row:
    row, standing = GuestStatus(guest=name, destination=place.url), None
    try:
        view = records.view(name)
        standing, checks = place.guest_state(name), place.guest_checks(name)
        row = row.model_copy(
            update={
                "state": standing.state,
                "epoch": standing.epoch,
                "master": standing.master,
                "former": standing.former,
                "since": standing.time,
                "vouched": standing.vouched,
                "lease": standing.lease,
                "verified": checks.verified,
                "booted": checks.booted,
                "owed": owed(standing) + owed_by_checks(checks),
            }
        )
        if view is not None and view.points:
            newest = view.points[-1]
            loss = loss_of(place, view, newest, now=now)
            row = row.model_copy(
                update={
                    "guest_point": newest.point,
                    "time": newest.time,
                    "consistency": newest.consistency,
                    "torn": sum(each.time > newest.time for each in view.leftovers),
                    "lag_seconds": loss.seconds,
                    "lag_bytes": loss.likely_bytes,
                    "ahead_bytes": loss.known_bytes,
                }
            )
    except SnapchainError as error:
        return row.model_copy(update={"fault": str(error)}), standing
    return row, standing


def _with_others(row: GuestStatus, standing: GuestStanding, place: Destination, reach: Reach) -> GuestStatus:
    """What the guest's other destinations say. Where one has a newer master, that is what is shown."""
    known = [*standing.others, *([] if standing.at is None else [standing.at])]
    own = [Place(url=place.url), *([] if standing.here is None else [standing.here])]
    others = OtherDestinations(row.guest, known, reach, own=own, gone=standing.gone)
    newest = others.newest(standing)
    found: dict[str, object] = {
        "taken_at": None if standing.at is None else str(standing.at),
        "others": tuple(map(str, others.places)),
        "gone": tuple(f"{each.place}: {each}" for each in others.gone),
        "silent": tuple(f"{each.place}: {each.fault}" for each in others.answers if each.standing is None),
    }
    if newest.epoch > standing.epoch:
        where = newest.at or newest.here
        found["owed"] = (*row.owed, f"it was taken over since: it is {describe(newest)}, at {where}")
    return row.model_copy(update=found)


def owed(standing: GuestStanding) -> tuple[str, ...]:
    """What a state leaves to be done, and by whom."""
    master, former = standing.master or "the new host", standing.former or "the old host"
    match standing.state:
        case GuestState.MOVING:
            return (f"a move from {master} is under way: it must be finished or aborted there",)
        case GuestState.SWITCHED:
            return (f"the guest is not known to run on {master} yet: finish the move, or start it there",)
        case GuestState.PROMOTING:
            return (f"a failover to {master} is under way: run it again there, or --withdraw",)
        case GuestState.SUSPECT:
            return (f"{former} has come back: run `snapchain fence` there, to see what it holds",)
        case GuestState.DIVERGED:
            return (f"{former} holds data that no point has: `snapchain fence --keep-tail` there keeps it",)
        case GuestState.ACTIVE if standing.vouched is not None:
            return (f"{former} must not start it: run `snapchain fence` there before its guests start",)
        case GuestState.ACTIVE | GuestState.PROTECTED:
            return ()


def owed_by_checks(checks: GuestChecks) -> tuple[str, ...]:
    """What the last checks have found to be wrong."""
    found = []
    if checks.verified is not None and not checks.verified.ok:
        found.append(f"the last verification found damage: {checks.verified.words}")
    if checks.booted is not None and not checks.booted.ok:
        found.append(f"the last boot of a clone failed: {checks.booted.words}")
    return tuple(found)
