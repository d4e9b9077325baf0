"""What a run would do now, without any effect: nothing is written, no hook runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.records import PointDecision
from snapchain.errors import NotFound, SnapchainError
from snapchain.guest.address import open_guest
from snapchain.guest.disks import disks_to_protect
from snapchain.guest.protocol import State as GuestState
from snapchain.guest.snapshot import LeftOut, SnapshotRequest, plan as plan_snapshot
from snapchain.host.hooks import missing
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops import guest_points_merge, snapshot
from snapchain.ops.copy.plan import plan as plan_copy
from snapchain.ops.copy.request import CopyPlan
from snapchain.ops.nightly import local_chain, outlook
from snapchain.ops.nightly.boot_tests import wanted as wanted_tests
from snapchain.ops.nightly.config import Nightly
from snapchain.ops.nightly.guest import wanted_disks
from snapchain.ops.nightly.guest_list import GuestList, SelectedGuest, guest_list
from snapchain.ops.nightly.hooks import missing_programs
from snapchain.ops.nightly.local_chain import ImageFacts, Sealed, look
from snapchain.ops.nightly.maintenance import turns
from snapchain.ops.nightly.mirror import check_whole, request_of
from snapchain.ops.nightly.open_destination import OpenDestination
from snapchain.ops.nightly.plan import limits_of
from snapchain.ops.nightly.report import Fault
from snapchain.ops.nightly.run import directory_of, now_utc
from snapchain.ops.nightly.selection import SelectedDisk, disk_list
from snapchain.ops.nightly.state import DestinationState, State, read_state
from snapchain.ops.nightly.steps import Steps
from snapchain.ops.ship.run import ShipRequest, plan as plan_ship


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class ShipPreview(_Shown):
    """bytes_to_read: guest bytes

    points: those that are there, with what the rules decide when the new point is there, too; points_dropped: numbers
    """

    destination: str
    layers_present: int | None = None
    bytes_to_read: int | None = None
    points_dropped: tuple[int, ...] = ()
    points: tuple[PointDecision, ...] = ()


class DiskPreview(_Shown):
    """sealed: the file that would be sealed now; None when nothing was written. merge: files that would become one."""

    disk: str
    image: Path
    sealed: Path | None = None
    destinations: tuple[ShipPreview, ...] = ()
    merge: tuple[str, ...] = ()
    why_not_merged: str | None = None
    chain_length: int | None = None
    faults: tuple[Fault, ...] = ()
    moved_to: str | None = None


class GuestDiskPreview(_Shown):
    """A disk of a guest. sealed: the file that would be sealed; chain_length: files afterwards"""

    disk: str
    sealed: Path | None = None
    chain_length: int | None = None


class GuestPreview(_Shown):
    """state: whether it runs; quiesces: whether a freeze would be tried; left_out: its disks that would not be taken"""

    guest: str
    option: str
    is_new: bool = False
    state: GuestState | None = None
    quiesces: bool = False
    disks: tuple[GuestDiskPreview, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    destinations: tuple[ShipPreview, ...] = ()
    faults: tuple[Fault, ...] = ()


class MaintenancePreview(_Shown):
    """verify: disks whose sample would be read.

    copy_of: the destination whose points would be copied to it, and would_copy: how many it lacks of it now
    bytes_to_copy: of the guest, at most; faults: what keeps points from being copied
    """

    destination: str
    copy_of: str | None = None
    would_copy: int = 0
    bytes_to_copy: int = 0
    faults: tuple[Fault, ...] = ()
    gc: bool
    verify: tuple[str, ...]


class TestPreview(_Shown):
    """A guest of which a clone would boot."""

    guest: str
    destination: str


class NightlyPlan(_Shown):
    """disks: in the order in which they would be worked on. left: why nothing would be begun now."""

    name: str
    closes: datetime | None
    left: tuple[str, ...]
    disks: tuple[DiskPreview, ...]
    guests: tuple[GuestPreview, ...] = ()
    destinations: tuple[MaintenancePreview, ...]
    tests: tuple[TestPreview, ...] = ()
    faults: tuple[Fault, ...]
    layers_left_out: tuple[Path, ...]
    leftovers: tuple[Path, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether nothing stands against a whole run, but for the hour."""
        turns = [*(disk.faults for disk in self.disks), *(guest.faults for guest in self.guests)]
        turns += [place.faults for place in self.destinations]
        return not self.faults and not any(turns)


def preview(
    config: Nightly,
    path: Path,
    *,
    any_time: bool = False,
    clock: Callable[[], datetime] = now_utc,
    on_event: OnEvent = ignore,
) -> NightlyPlan:
    """Look at everything. What is wrong with disks and destinations is in the plan."""
    state = _state(directory_of(config, path) / "state.json")
    steps = Steps()
    now = clock()
    found = disk_list(config, state, now=now)
    roll = guest_list(config, state, now=now) if config.guests else GuestList()
    limits = limits_of(
        now=now,
        clock=lambda: now,
        window=None if any_time else config.window,
        zone=config.zone,
        seconds=config.budget.time,
        ship=config.budget.ship,
        merge=config.budget.merge,
    )
    steps.attempt("all of it", limits.check)
    places = {
        each.name: OpenDestination(
            each, config.keep_of(each), writing=False, on_notice=lambda words: on_event(Notice(words))
        )
        for each in config.destinations
    }
    return NightlyPlan(
        name=config.name,
        closes=limits.closes,
        left=tuple(steps.left),
        disks=tuple(_Look(config, places, disk, now).disk() for disk in found.disks),
        guests=tuple(_LookAtGuest(config, places, guest, now).guest() for guest in roll.guests),
        destinations=tuple(
            _upkeep(config, places, place, state, [*found.disks, *roll.guests], now) for place in places.values()
        ),
        tests=tuple(
            TestPreview(guest=each.guest, destination=each.destination)
            for each in wanted_tests(config, roll.guests, state)
        ),
        faults=(
            *_faults_of_tests(config),
            *(Fault.of("selection", fault) for fault in (*found.faults, *roll.faults)),
            *(Fault.of("hooks", fault) for fault in missing_programs(config.hooks)),
        ),
        layers_left_out=found.layers,
        leftovers=found.leftovers,
    )


def _faults_of_tests(config: Nightly) -> Iterator[Fault]:
    argv = None if config.test is None else config.test.check
    if argv is not None and (error := missing("check", argv)) is not None:
        yield Fault.of("boot test", error)


def _state(path: Path) -> State:
    try:
        return read_state(path) or State()
    except SnapchainError:
        return State()  # a run says so


class _Look:
    def __init__(self, config: Nightly, places: dict[str, OpenDestination], disk: SelectedDisk, now: datetime) -> None:
        self._config, self._disk, self._now = config, disk, now
        self._places = [places[each.name] for each in config.destinations_of(disk.settings)]
        self._steps = Steps()
        self._dirs = (*disk.settings.image_dirs, disk.image.parent)

    def disk(self) -> DiskPreview:
        shown = DiskPreview(disk=self._disk.name, image=self._disk.image)
        seen = self._steps.attempt("snapshot", self._seen).value
        if seen is not None:
            facts, sealed = seen
            made = int(sealed is not None)
            shipped = Sealed(self._disk.image, self._disk.settings.format, beyond=0)
            results = [self._ship(place, shipped) for place in self._places]
            merge, why = self._merge(facts, made, results)
            shown = shown.model_copy(
                update={
                    "sealed": sealed,
                    "destinations": tuple(results),
                    "merge": merge,
                    "why_not_merged": why,
                    "chain_length": len(facts.files) + made,
                }
            )
        for fault in missing_programs(self._disk.settings.hooks):
            self._steps.note("hooks", fault)
        return shown.model_copy(update={"faults": tuple(self._steps.faults), "moved_to": self._steps.moved_to})

    def _seen(self) -> tuple[ImageFacts, Path | None]:
        if self._disk.fault is not None:
            raise self._disk.fault
        settings, image = self._disk.settings, self._disk.image
        facts = look(image, format=settings.format, image_dirs=self._dirs)
        if not settings.snapshot or facts.fresh:
            return facts, None
        return facts, snapshot.plan(image, image_format=settings.format, image_dirs=self._dirs).sealed

    def _ship(self, place: OpenDestination, sealed: Sealed) -> ShipPreview:
        shown = ShipPreview(destination=place.name)

        def look_there() -> ShipPreview:
            request = ShipRequest(
                image=sealed.path,
                top=self._disk.image,
                disk=self._disk.name,
                format=sealed.format,
                image_dirs=self._dirs,
            )
            with place.turn() as destination:
                plan = plan_ship(request, destination)
                update = {"layers_present": plan.layers_present, "bytes_to_read": plan.bytes_to_read}
                return shown.model_copy(update=update)

        def decided() -> tuple[PointDecision, ...]:
            name, zone, now = self._disk.name, self._config.zone, self._now
            try:
                (record,) = place.open().disks(name)
            except NotFound:  # its first point is yet to come
                return ()
            labels = self._disk.settings.labels
            return outlook.of_disk(record.points, place.policy, disk=name, labels=labels, zone=zone, now=now)

        done = self._steps.attempt(f"ship to {place.name}", look_there)
        if done.value is None or place.policy.is_empty:
            return done.value or shown
        points = self._steps.attempt(f"merge at {place.name}", decided).value or ()
        return _with_points(done.value, points)

    def _merge(self, facts: ImageFacts, made: int, results: list[ShipPreview]) -> tuple[tuple[str, ...], str | None]:
        if self._disk.settings.merge_above is None:
            return (), None
        if any(each.bytes_to_read is None for each in results):
            return (), "not every destination can hold it"
        if len(facts.files) + made <= self._disk.settings.merge_above:
            return (), None
        # By then every destination has what is sealed: all files here, or all but the fresh top.
        sealed = len(facts.files) if made or not self._disk.settings.snapshot else len(facts.files) - 1
        present = {place.name: sealed for place in self._places}
        found = self._steps.attempt(
            "local merge",
            lambda: local_chain.outlook(self._disk.image, self._disk.settings, present=present, more=made),
        ).value
        if not found:
            return (), "no neighbouring layers are free to be merged"
        return tuple(path.name for files in found for path in files), None


class _LookAtGuest:
    def __init__(
        self, config: Nightly, places: dict[str, OpenDestination], guest: SelectedGuest, now: datetime
    ) -> None:
        self._config, self._guest, self._now = config, guest, now
        self._places = [places[each.name] for each in config.destinations_of(guest.settings)]
        self._steps = Steps()

    def guest(self) -> GuestPreview:
        named = self._guest
        shown = GuestPreview(guest=named.name, option=named.option, is_new=named.is_new)
        seen = self._steps.attempt("snapshot", lambda: self._seen(shown)).value
        if seen is not None:
            shown = seen.model_copy(update={"destinations": tuple(map(self._at, self._places))})
        for fault in missing_programs(named.settings.hooks):
            self._steps.note("hooks", fault)
        return shown.model_copy(update={"faults": tuple(self._steps.faults)})

    def _seen(self, shown: GuestPreview) -> GuestPreview:
        named = self._guest
        if named.fault is not None:
            raise named.fault
        assert named.address is not None
        with open_guest(named.address) as guest:
            state = guest.state()
            found = wanted_disks(guest, named.settings)
            if state is GuestState.OFF:
                disks = tuple(
                    GuestDiskPreview(disk=disk.name, chain_length=len(disk.chain) + 1)
                    for disk in disks_to_protect(guest, found)
                )
                return shown.model_copy(update={"state": state, "disks": disks})
            planned = plan_snapshot(guest, SnapshotRequest(disks=found, quiesce=named.settings.quiesce))
            disks = tuple(
                GuestDiskPreview(disk=each.disk, sealed=each.sealed, chain_length=each.layers) for each in planned.disks
            )
            update = {"quiesces": planned.quiesces, "disks": disks, "left_out": planned.left_out}
            return shown.model_copy(update={"state": state, **update})

    def _at(self, place: OpenDestination) -> ShipPreview:
        shown = ShipPreview(destination=place.name)

        def decided() -> tuple[PointDecision, ...]:
            with place.turn() as destination:
                if place.policy.is_empty:
                    return ()
                try:
                    view = guest_points_merge.guest_at(destination, self._guest.name)
                except NotFound:  # its first point is yet to come
                    return ()
                labels = self._guest.settings.labels
                return outlook.of_guest(view, place.policy, labels=labels, zone=self._config.zone, now=self._now)

        return _with_points(shown, self._steps.attempt(f"ship to {place.name}", decided).value or ())


def _with_points(shown: ShipPreview, points: tuple[PointDecision, ...]) -> ShipPreview:
    dropped = tuple(each.point for each in points if not each.kept)
    return shown.model_copy(update={"points_dropped": dropped, "points": points})


def _upkeep(
    config: Nightly,
    places: dict[str, OpenDestination],
    place: OpenDestination,
    state: State,
    disks: Sequence[SelectedDisk | SelectedGuest],
    now: datetime,
) -> MaintenancePreview:
    wanted = place.config.verify
    there = [
        disk.name
        for disk in disks
        if place.config in (*config.destinations_of(disk.settings), *config.copies_of(disk.settings))
        and disk.fault is None
    ]
    known = state.destinations.get(place.name, DestinationState())
    verified = turns(there, known.verified, wanted.disks, now=now, damaged=known.damaged) if wanted else []
    shown = MaintenancePreview(
        destination=place.name, gc=place.config.gc and place.traits.needs_collecting, verify=tuple(verified)
    )
    of = place.config.copy_of
    return shown if of is None else _with_copies(shown, places[of], place, there)


def _with_copies(
    shown: MaintenancePreview, source: OpenDestination, place: OpenDestination, names: Sequence[str]
) -> MaintenancePreview:
    """What the copy lacks now; what the run itself ships comes on top."""
    steps = Steps()
    points = data = 0
    if steps.attempt(f"copy of {source.name}", lambda: (source.open(), place.open())).value is None:
        names = ()
    for name in names:

        def look_at(name: str = name) -> CopyPlan | None:
            with source.turn() as here, place.turn() as there:
                try:
                    return plan_copy(request_of(place, name), here, there)
                except NotFound:  # its first point is yet to come
                    return None

        if (plan := steps.attempt(f"copy {name} of {source.name}", look_at).value) is not None:
            points, data = points + plan.points, data + plan.data_bytes
            steps.attempt(f"copy {name} of {source.name}", partial(check_whole, plan.disks))
    update = {"copy_of": source.name, "would_copy": points, "bytes_to_copy": data, "faults": tuple(steps.faults)}
    return shown.model_copy(update=update)
