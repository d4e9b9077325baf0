"""Retention of guest points: each is kept or goes whole, whatever interrupted shipments and merges left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings, strategies as st

from snapchain.destination.records import DiskRecord, HoldRecord, PointRecord
from snapchain.model.holds import hold_reasons
from snapchain.model.retention import DropPoints, Policy, decide, decide_by
from snapchain.ops.guest_points import GuestView, guest_named
from snapchain.ops.guest_points_merge import GuestDecision, decide_guest

BEGIN = datetime(2026, 1, 1, 12, tzinfo=UTC)
NOW = BEGIN + timedelta(days=400)
NAMES = ("vda", "vdb", "vdc")
RECORDS = "web1/.guest"
HOLD = (HoldRecord(tag="audit", since=BEGIN),)
POLICIES = st.builds(
    Policy,
    last=st.integers(0, 4),
    daily=st.integers(0, 4),
    weekly=st.integers(0, 2),
    labels=st.sampled_from([frozenset(), frozenset({"release"})]),
).filter(lambda policy: not policy.is_empty)


@st.composite
def histories(draw: st.DrawFn) -> list[DiskRecord]:
    """Nights of a guest whose disks come and go; some shipments were interrupted, some disks shipped alone."""
    points: dict[str, list[PointRecord]] = defaultdict(list)

    def add(disk: str, night: int, instant: int | None, held: bool, label: bool) -> None:
        number = points[disk][-1].point + draw(st.integers(1, 2)) if points[disk] else 1
        points[disk].append(
            PointRecord(
                point=number,
                time=BEGIN + timedelta(hours=9 * night),
                labels=("release",) if label else (),
                virtual_size=1 << 20,
                content_id="0" * 64,
                layers=1,
                holds=HOLD if held else (),
                instant=None if instant is None else f"{instant:032x}",
            )
        )

    for night in range(1, draw(st.integers(1, 12)) + 1):
        kind = draw(st.sampled_from(["whole", "whole", "whole", "interrupted", "alone", "twice"]))
        disks = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
        label = draw(st.integers(0, 4)) == 0
        for name in disks:
            for _ in range(2 if kind == "twice" else 1):
                held = draw(st.integers(0, 9)) == 0
                add(f"web1/{name}", night, None if kind == "alone" else night, held, label)
        if kind in ("whole", "twice"):
            add(RECORDS, night, night, draw(st.integers(0, 9)) == 0, label)
    return [DiskRecord(name=name, epoch=1, points=tuple(found)) for name, found in sorted(points.items())]


def view_of(disks: Sequence[DiskRecord]) -> GuestView | None:
    return guest_named(disks, "web1")


def applied(disks: Sequence[DiskRecord], drop: dict[str, frozenset[int]]) -> list[DiskRecord]:
    """What is left when some disks' points were dropped, as a destination does it."""
    left = []
    for disk in disks:
        rules = DropPoints(drop.get(disk.name, frozenset()))
        decided = decide_by(disk.points, rules, disk=disk.name, zone=UTC, now=NOW, holds=hold_reasons)
        left.append(disk.model_copy(update={"points": tuple(each.point for each in decided if each.kept)}))
    return left


def decided(disks: Sequence[DiskRecord], policy: Policy) -> tuple[GuestView, GuestDecision] | None:
    view = view_of(disks)
    return None if view is None else (view, decide_guest(view, disks, policy, zone=UTC, now=NOW))


def disks_of(view: GuestView, instant: str) -> set[str]:
    return next((set(each.disks) for each in view.points if each.instant == instant), set())


@given(histories(), POLICIES)
@settings(max_examples=150)
def test_a_guest_point_is_kept_or_goes_whole(disks: list[DiskRecord], policy: Policy) -> None:
    found = decided(disks, policy)
    if found is None:
        return
    view, decision = found
    kept = {each.point.instant for each in decision.points if each.kept}
    # Exactly the guest points that the policy names, or that are held in any part.
    expected = decide(view.points, policy, zone=UTC, now=NOW, holds=_holds)
    assert kept == {each.point.instant for each in expected if each.kept}
    order = sorted(decision.drop, key=lambda name: name != RECORDS)
    for stop in range(len(order) + 1):
        # A kill between two disks: what is still shown as a guest point has all its disks.
        left = applied(disks, {name: decision.drop[name] for name in order[:stop]})
        now = view_of(left)
        assert now is not None
        for point in now.points:
            assert set(point.disks) == disks_of(view, point.instant), "a guest point is torn"
        if stop:
            assert {each.instant for each in now.points} == kept
        # The next run finishes it, and a further one finds nothing.
        again = decided(left, policy)
        assert again is not None
        end = applied(left, dict(again[1].drop))
        last = view_of(end)
        assert last is not None
        for point in last.points:
            assert set(point.disks) == disks_of(view, point.instant)
    # Leftovers stay only where a shipment may be under way, where they are held, or as a disk's last point.
    final = view_of(applied(disks, dict(decision.drop)))
    assert final is not None
    if view.points:
        newest = max(view.points, key=lambda each: each.point)
        for leftover in final.leftovers:
            for name, part in leftover.disks.items():
                ends = next(disk for disk in disks if disk.name == name).points[-1].point == part.point
                assert part.holds or ends or part.time >= newest.time


def _holds(point: object) -> list[str]:
    parts = [point.record, *point.disks.values()]  # type: ignore[attr-defined]
    return [why for each in parts for why in hold_reasons(each)]


@given(histories(), POLICIES)
def test_points_of_a_disk_alone_go_by_the_same_rules(disks: list[DiskRecord], policy: Policy) -> None:
    found = decided(disks, policy)
    if found is None:
        return
    for disk in disks:
        alone = [point for point in disk.points if point.instant is None]
        gone = {
            each.point.point for each in decide(alone, policy, zone=UTC, now=NOW, holds=hold_reasons) if not each.kept
        }
        mine = {point.point for point in alone}
        assert found[1].drop[disk.name] & mine == gone
