"""forget: which points go, and that every other point reads as before, whatever dies or comes meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.destination.records import DiskRecord, HoldRecord, PointRecord
from snapchain.errors import Busy, Conflict, InvalidInput, NotFound
from snapchain.model.retention import DropAll, DropPoints, Policy
from snapchain.objects.memory import MemoryStore
from snapchain.ops import forget as forgetting, guest_verify
from snapchain.ops.forget import ForgetRequest, choose
from snapchain.ops.hold import hold_guest
from snapchain.repository import collecting, packs
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import crash_points
from tests.ops.guest_points import GUEST, Guest, Open, numbers, opened
from tests.ops.shipping import DISK, MiB, ship
from tests.ops.stacks import Layer, build, flat, qemu_img, write
from tests.ops.test_crash import copied, reads, sound
from tests.ops.test_guest_keeping import comes_back
from tests.repository.synthetic import again, repository

BEGIN = datetime(2026, 1, 1, 12, tzinfo=UTC)
URL = "/backup"
HOLD = (HoldRecord(tag="audit", since=BEGIN),)


# ---- which points go


def disk(name: str, *labels: str, instants: Sequence[int | None] = (), held: Sequence[int] = ()) -> DiskRecord:
    """A disk with a point a day for each label; '' for none."""
    points = [
        PointRecord(
            point=number,
            time=BEGIN + timedelta(days=number),
            labels=(label,) if label else (),
            virtual_size=MiB,
            content_id="0" * 64,
            layers=1,
            holds=HOLD if number in held else (),
            instant=None if not instants or instants[number - 1] is None else f"{instants[number - 1]:032x}",
        )
        for number, label in enumerate(labels, 1)
    ]
    return DiskRecord(name=name, epoch=1, points=tuple(points))


GUEST_DISKS = (
    disk("web1/.guest", "", "", instants=(1, 2)),
    disk("web1/vda", "", "", "", instants=(1, 2, 3)),
    disk("web1/vdb", "", "", instants=(1, 2)),
)
DISKS = (disk("db", "old", "", "new"), disk("lone/vda", "", ""), *GUEST_DISKS)


def chosen(*names: str, disks: Sequence[DiskRecord] = DISKS, **more: Any) -> dict[str, object]:
    """By name, what goes. names: of disks and guests, each with @POINT or without."""
    targets = tuple((name, point or None) for name, _, point in (each.partition("@") for each in names))
    return {each.name: each.rules for each in choose(URL, disks, ForgetRequest(targets=targets, **more))}


def drops(*numbers: int, newest: bool = False) -> DropPoints:
    return DropPoints(frozenset(numbers), newest=newest)


def test_points_are_named_by_number_label_and_time() -> None:
    assert chosen("db@1") == {"db": drops(1)}
    assert chosen("db@old", "db@2026-01-03T12:00:00Z") == {"db": drops(1, 2)}
    assert chosen("db@3", "lone/vda@1") == {"db": drops(3, newest=True), "lone/vda": drops(1)}
    assert chosen("db@latest") == chosen("db@new") == chosen("db@3")
    assert chosen("web1@1") == {"web1": drops(1)}
    for bad, words in (("db@9", "has no point 9"), ("db@gone", "is no label"), ("web2@1", "no disk or guest")):
        with pytest.raises(NotFound, match=words):
            chosen(bad)
    with pytest.raises(NotFound, match="came one by one"):
        chosen("lone@1")


def test_a_time_does_not_name_the_newest_point() -> None:
    with pytest.raises(InvalidInput, match="means point 3, which is the newest") as refused:
        chosen("db@2026-02-01")
    assert refused.value.hint == "the newest point goes only by its number, its label, or as @latest"
    with pytest.raises(InvalidInput, match="means point 2, which is the newest"):
        chosen("web1@2026-02-01")


def test_whole_disks_and_guests_go() -> None:
    assert chosen("db", "web1", all_points=True) == {"db": drops(1, 2, 3, newest=True), "web1": DropAll()}
    assert chosen(patterns=("w*", "d?"), all_points=True) == {"db": drops(1, 2, 3, newest=True), "web1": DropAll()}
    with pytest.raises(InvalidInput, match="every point of every disk"):
        chosen(all_points=True)
    everything = chosen(patterns=("*",), all_points=True)
    assert everything.keys() == {"db", "lone/vda", "web1"}


def test_rules_apply_to_each_guest_and_to_each_other_disk() -> None:
    policy = Policy(last=1)
    assert chosen(policy=policy) == dict.fromkeys(("db", "lone/vda", "web1"), policy)
    assert chosen(policy=policy, patterns=("*/vda", "*/vdb")) == dict.fromkeys(("lone/vda", "web1"), policy)
    assert chosen(policy=policy, patterns=("web1/*",)) == {"web1": policy}
    with pytest.raises(InvalidInput, match="takes web1/vda and not web1/vdb") as refused:
        chosen(policy=policy, patterns=("*/vda",))
    assert refused.value.hint == "--disks web1 takes the guest"
    with pytest.raises(NotFound, match="no disk or guest has such a name") as missed:
        chosen(policy=policy, patterns=("db", "x*"))
    assert missed.value.subject == "x*"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("web1/vda@1", "name the guest: DEST::web1@1"),
        ("web1/vdb@2", "name the guest: DEST::web1@2"),
        ("web1/vda@3", "name the guest: DEST::web1"),  # its guest point may be under way
        ("web1/vda", "name the guest: DEST::web1"),
        ("web1/.guest@1", "name the guest: DEST::web1@1"),
        ("web1/.guest", "name the guest: DEST::web1"),
    ],
)
def test_no_guest_point_is_torn_apart(name: str, hint: str) -> None:
    with pytest.raises(InvalidInput, match="of a guest") as refused:
        chosen(name, all_points="@" not in name)
    assert refused.value.hint == hint


@pytest.mark.parametrize(
    ("names", "more", "words"),
    [
        (("db",), {}, "nothing says which points go"),
        ((), {}, "nothing says which points go"),
        (("db@1",), {"all_points": True}, "a point is named, and so are rules"),
        (("db@1",), {"policy": Policy(last=1)}, "a point is named, and so are rules"),
        (("db@1", "lone/vda"), {}, "no point of it is named"),
        (("db",), {"policy": Policy(last=1), "all_points": True}, "leaves nothing for a rule to keep"),
        (("db",), {"policy": Policy(last=1), "patterns": ("d*",)}, "chooses among all disks"),
    ],
)
def test_a_request_that_is_unclear_is_refused(names: Sequence[str], more: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        chosen(*names, **more)


def test_held_points_are_never_named() -> None:
    disks = (
        disk("db", "", "", "", held=(2,)),
        disk("web1/.guest", "", "", instants=(1, 2)),
        disk("web1/vda", "", "", "", instants=(None, 1, 2), held=(1, 2)),
    )
    assert chosen("db@1", "db@3", disks=disks) == {"db": drops(1, 3, newest=True)}
    assert chosen("web1@2", disks=disks) == {"web1": drops(2, newest=True)}
    for names, words in [
        (("db@1", "db@2"), r"never forgotten: db@2 \(audit\)$"),
        (("db",), r"never forgotten: db@2 \(audit\)$"),
        (("web1@1",), r"never forgotten: web1@1 \(audit\)$"),
        (("web1",), r"never forgotten: web1@1 \(audit\), web1/vda@1 \(audit\)$"),
    ]:
        with pytest.raises(Conflict, match=words) as refused:
            chosen(*names, disks=disks, all_points="@" not in names[0])
        assert refused.value.hint is not None
        assert refused.value.hint.startswith(f"release them first: snapchain release {URL}::")
    policy = Policy(last=1)
    assert chosen(disks=disks, policy=policy) == {"db": policy, "web1": policy}, "rules go around them"


# ---- every other point reads as before


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several packs, so that there are moments between them."""
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, dict[int, bytes]]:
    """Five points of a disk: three on one chain, two on another one that lies on the second file. With what each shows.

        0 - 1 - 2          points 1, 2, 3
             \\
              a - b        points 4, 5
    """
    directory = tmp_path_factory.mktemp("forked")
    layers = [
        Layer(2 * MiB, [f"write -P {9 * n + at + 1} {(3 * n + at) * 64}k 64k" for at in range(4)]) for n in range(3)
    ]
    files = build(directory / "chain", layers)
    for number, name in enumerate(("a", "b")):
        top = files[1].with_name(f"{name}.qcow2")
        below = files[1] if name == "a" else files[-1]
        qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", top)
        write(top, f"write -P {100 + number} {number * 96}k 128k", "write -z 512k 64k")
        files.append(top)
    time.sleep(0.02)
    repo = repository(MemoryStore(), block_size=64 * 1024)
    for path in files:
        ship(path, repo)
    shown = {number: flat(path, directory / f"{number}.raw").read_bytes() for number, path in enumerate(files, 1)}
    assert {number: reads(repo, number) for number in shown} == shown
    return repo, shown


@given(first=st.sets(st.integers(1, 5)), held=st.sets(st.integers(1, 5), max_size=1), second=st.sets(st.integers(1, 5)))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_points_that_stay_read_as_before(
    forked: tuple[Repository, dict[int, bytes]], first: set[int], held: set[int], second: set[int]
) -> None:
    origin, shown = forked
    repo = again(origin, copied(origin))
    for number in held:
        repo.hold(DISK, number, "audit")
    left = set(shown)
    for gone in (first, second):
        report = RepositoryMerge(repo, DISK, DropPoints(frozenset(gone), newest=True)).run()
        left -= gone - held
        assert {*report.points_kept} == left
        sound(repo, {number: shown[number] for number in left})
        collecting.run(repo)
        sound(repo, {number: shown[number] for number in left})
    assert repo.catalogue(DISK).next_point == 6
    if not left:
        assert not repo.catalogue(DISK).parents
        assert not list(repo.store.list("layers/"))


@pytest.mark.parametrize("gone", [{5}, {2, 3, 5}, {1, 2, 3, 4, 5}], ids=["newest", "some", "all"])
def test_a_crash_at_every_moment(forked: tuple[Repository, dict[int, bytes]], gone: set[int]) -> None:
    origin, shown = forked
    rules = DropPoints(frozenset(gone), newest=True)
    kept = shown.keys() - gone

    def job(repo: Repository) -> None:
        RepositoryMerge(repo, DISK, rules).run()

    moments = 0
    for moment, store in crash_points(lambda: copied(origin), lambda store: job(again(origin, store))):
        moments = moment + 1
        left = again(origin, store)
        there = {point.point for point in left.catalogue(DISK).points}
        assert there in (set(shown), kept), "all or nothing"
        sound(left, {number: shown[number] for number in there}, whole=False)
        job(again(origin, store))
        done = again(origin, store)
        assert {point.point for point in done.catalogue(DISK).points} == kept
        sound(done, {number: shown[number] for number in kept}, whole=False)
    assert moments >= 4, "lease and catalogue: before and after each"


def test_a_shipment_whose_base_is_forgotten_meanwhile(
    forked: tuple[Repository, dict[int, bytes]], tmp_path: Path
) -> None:
    """It gives up, and does the whole job when it is run again; it publishes no point on layers that are gone."""
    origin, _ = forked
    store = copied(origin)
    path = build(tmp_path / "next", [Layer(2 * MiB, ["write -P 7 0 1M"])])[0]
    number = ship(path, again(origin, store)).point
    assert number == 6
    overlay = path.with_name("over.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", path.name, "-F", "qcow2", overlay)
    write(overlay, "write -P 8 1M 64k")

    repo = again(origin, store)
    put, begun = store.put, False

    def forget_first(name: str, data: Any) -> None:
        nonlocal begun
        if name.startswith("layers/") and not begun:
            begun = True
            RepositoryMerge(again(origin, store), DISK, drops(*range(1, 7), newest=True)).run()
        put(name, data)

    store.put = forget_first  # type: ignore[method-assign]
    with pytest.raises(Conflict, match="merged away meanwhile"):
        ship(overlay, repo)
    assert begun
    assert again(origin, store).catalogue(DISK).points == ()
    assert ship(overlay, again(origin, store)).point == 7
    assert reads(again(origin, store), 7) == flat(overlay, tmp_path / "over.raw").read_bytes()
    assert verify(again(origin, store), share=1.0).ok


def test_of_several_disks_one_that_fails_is_reported(
    forked: tuple[Repository, dict[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, _ = forked
    destination = RepositoryDestination(again(origin, copied(origin)))
    real = destination.merging
    listed = (*destination.disks(), destination.disks()[0].model_copy(update={"name": "other"}))
    monkeypatch.setattr(destination, "disks", lambda *_: listed)

    def merging(name: str, *args: Any, **more: Any) -> Any:
        if name == "other":
            raise Busy("somebody has it open", subject=name)
        return real(name, *args, **more)

    monkeypatch.setattr(destination, "merging", merging)
    report = forgetting.run(destination, ForgetRequest(policy=Policy(last=2)))
    assert [(each.disk, each.kind) for each in report.failed] == [("other", "busy")]
    assert [(each.disk, each.points_kept) for each in report.disks] == [(DISK, (4, 5))]
    with pytest.raises(Busy, match="somebody has it open"):
        forgetting.run(destination, ForgetRequest(targets=(("other", "1"),)))


def test_what_is_held_meanwhile_stays_and_is_told(
    forked: tuple[Repository, dict[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    origin, shown = forked
    destination = RepositoryDestination(again(origin, copied(origin)))
    real = destination.merging

    def merging(*args: Any, **more: Any) -> Any:
        destination.hold(DISK, "2", "audit")
        return real(*args, **more)

    monkeypatch.setattr(destination, "merging", merging)
    report = forgetting.run(destination, ForgetRequest(targets=((DISK, "2"), (DISK, "3"))))
    assert [(each.name, each.point) for each in report.staying] == [(DISK, 2)]
    assert report.points_dropped == 1
    assert reads(destination.repository, 2) == shown[2]


# ---- guests


@pytest.fixture(params=["directory", "replica"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened(request.param, request, tmp_path)


def forget(place: Open, *names: str, **more: Any) -> forgetting.ForgetReport:
    targets = tuple((name, point or None) for name, _, point in (each.partition("@") for each in names))
    request = ForgetRequest(targets=targets, **more)
    before = numbers(place())
    plan = forgetting.plan(place(), request)
    assert numbers(place()) == before, "a plan changes nothing"
    report = forgetting.run(place(), request)
    assert plan.points_dropped == report.points_dropped
    return report


def test_points_of_a_guest_go_whole(place: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g")
    for number in (1, 2, 3):
        guest.point(place(), number)
    guest.point(place(), 4, names=["vda"], with_record=False)  # may be under way
    forget(place, "web1@2")
    assert numbers(place()) == {"vda": [1, 3, 4], "vdb": [1, 3], ".guest": [1, 3]}
    hold_guest(place(), GUEST, "audit", point="1")
    with pytest.raises(Conflict, match=r"web1@1 \(audit\)"):
        forget(place, "web1", all_points=True)
    forget(place, "web1@latest")
    assert numbers(place()) == {"vda": [1, 4], "vdb": [1], ".guest": [1]}
    comes_back(place, guest, 1, tmp_path / "out")
    assert guest_verify.verify(place(), share=1.0).ok
    for name in ("vda", "vdb", ".guest"):
        place().release(f"web1/{name}", "1", "audit")
    report = forget(place, "web1", all_points=True)
    assert (report.guests[0].leftovers, report.failed) == (1, ())
    assert numbers(place()) == {"vda": [], "vdb": [], ".guest": []}
    assert forget(place, "web1", all_points=True).points_dropped == 0
    guest.point(place(), 5)
    assert {each.points[0].point for each in place().disks()} == {4, 5}, "no number is given twice"
    comes_back(place, guest, 5, tmp_path / "again")


def test_a_kill_between_two_disks_leaves_no_torn_guest_point(
    place: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = Guest(tmp_path / "g")
    for number in (1, 2):
        guest.point(place(), number)
    destination = place()
    real, runs = destination.merging, 0

    class Dying:
        def __init__(self, work: Any) -> None:
            self.plan, self._work = work.plan, work

        def run(self, **more: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 2:
                raise KeyboardInterrupt
            return self._work.run(**more)

    monkeypatch.setattr(destination, "merging", lambda *args, **more: Dying(real(*args, **more)))
    request = ForgetRequest(targets=(("web1", None),), all_points=True)
    with pytest.raises(KeyboardInterrupt):
        forgetting.run(destination, request)
    assert numbers(place()) == {"vda": [1, 2], "vdb": [1, 2], ".guest": []}
    assert guest_verify.verify(place()).ok
    assert forgetting.run(place(), request).guests[0].leftovers == 2
    assert numbers(place()) == {"vda": [], "vdb": [], ".guest": []}


def test_nothing_of_a_guest_goes_while_a_disk_of_it_is_in_use(tmp_path: Path) -> None:
    """At a replica the newest point's layer may lie under an image: then its record stays, too."""
    place = opened("replica", None, tmp_path)  # type: ignore[arg-type]
    guest = Guest(tmp_path / "g")
    for number in (1, 2):
        guest.point(place(), number)
    (top,) = (tmp_path / "replica" / "web1%2Fvdb").glob("vdb.2*.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", top.name, "-F", "qcow2", top.with_name("clone.qcow2"))
    before = numbers(place())
    for act in (forgetting.plan, forgetting.run):
        with pytest.raises(Conflict, match="cannot be removed"):
            act(place(), ForgetRequest(targets=(("web1", "2"),)))
        assert numbers(place()) == before
    forgetting.run(place(), ForgetRequest(targets=(("web1", "1"),)))
    assert numbers(place()) == {"vda": [2], "vdb": [2], ".guest": [2]}
