"""ship of a guest: all disks at one instant, the record last; judged at every kind of destination by qemu-img."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from snapchain.destination.guest_record import GuestRecord, decode, record_disk
from snapchain.destination.protocol import Destination
from snapchain.errors import Busy, Conflict, Diverged, InvalidInput, NotFound, Unavailable, Unsupported
from snapchain.guest.protocol import DefinitionFile
from snapchain.guest.snapshot import LeftOut, SnapshotRequest
from snapchain.model.consistency import Consistency
from snapchain.model.events import Event, Notice, Progress
from snapchain.model.retention import Policy
from snapchain.ops import guest_points_merge
from snapchain.ops.guest_points import GuestView, guests_of
from snapchain.ops.log import log
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship import guest as ops, run as one_disk
from snapchain.ops.ship.guest import GuestShipReport, GuestShipRequest
from snapchain.ops.ship.request import Divergence
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.stream import session
from snapchain.repository.crypto import AES, NONE
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.opening import create_repository, open_repository
from tests.guest.files import PASSWORD, FileGuest, sealing
from tests.ops.guest_points import missing_disks
from tests.ops.stacks import Layer, build, flat, qemu_img, same, write
from tests.repository.second_reader import Reader
from tests.servers import S3Server

MiB = 1 << 20
NAMES = ("vda", "vdb", "vdc")
ENCRYPTED, PLAIN, REPLICA, BUCKET = "encrypted", "plain", "replica", "bucket"


@dataclass
class Site:
    """A guest of three disks, a place for its points, and what each guest point must show."""

    folder: Path
    kind: str
    url: str
    guest: Any
    shown: dict[int, dict[str, Path]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    references: int = 0
    restored: set[int] = field(default_factory=set)

    def open(self) -> Destination:
        if self.kind == REPLICA:
            return ReplicaDestination(DirectoryEndpoint(self.folder / "replica"))
        return RepositoryDestination(open_repository(self.url, passphrase=lambda: "correct horse", writing=True))

    def ship(self, **options: object) -> GuestShipReport:
        self.references += 1
        expected = {
            name: flat(path, self.folder / f"{name}-{self.references}.raw")
            for name, path in self.guest.disks_now.items()
        }
        self.events.clear()
        report = ops.run(self.guest, GuestShipRequest(**options), self.open(), on_event=self.events.append)  # type: ignore[arg-type]
        taken = {each.disk.rpartition("/")[2] for each in report.disks}
        self.shown[report.guest_point] = {name: path for name, path in expected.items() if name in taken}
        return report

    def view(self) -> GuestView:
        (found,) = guests_of(self.open().disks())
        return found

    def record(self, point: str | None = None) -> GuestRecord:
        name = self.view().name
        out = self.folder / "record.raw"
        out.unlink(missing_ok=True)
        Restoration(self.open(), record_disk(name), out, point=point).run()
        return decode(out.read_bytes(), subject=out)

    def check(self, points: Sequence[int]) -> None:
        """These guest points are there, whole, and show what the guest's disks showed. Each is restored once."""
        view = self.view()
        assert [point.point for point in view.points] == list(points)
        for point in view.points:
            record = self.record(str(point.point))
            assert missing_disks(point, record) == ()
            assert (record.instant, record.consistency) == (point.instant, point.consistency)
            assert {each.name for each in record.disks} == set(self.shown[point.point])
            assert len({each.time for each in (*point.disks.values(), point.record)}) == 1
            for each in record.disks if point.point not in self.restored else ():
                out = self.folder / "restored.qcow2"
                out.unlink(missing_ok=True)
                Restoration(self.open(), each.disk, out, point=str(point.disks[each.disk].point)).run()
                assert same(out, self.shown[point.point][each.name]), (point.point, each.name)
            self.restored.add(point.point)
        report = self.open().verify(share=1.0)
        assert report.ok, report.findings

    @property
    def notices(self) -> list[str]:
        return [each.message for each in self.events if isinstance(each, Notice)]


@pytest.fixture(autouse=True)
def sealed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with sealing(monkeypatch):
        yield


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest's disks as each test begins with them."""
    folder = tmp_path_factory.mktemp("guest")
    for n, name in enumerate(NAMES):
        layers = [Layer(4 * MiB, [f"write -P {n + 1} 0 1M"]), Layer(4 * MiB, [f"write -P {n + 11} 1M 128k"])]
        build(folder / name, layers, names=["root.qcow2", f"{name}.qcow2"])
    return folder


Make = Callable[..., Site]


@pytest.fixture
def make(template: Path, tmp_path: Path) -> Make:
    def made(kind: str, url: str = "") -> Site:
        for name in NAMES:
            shutil.copytree(template / name, tmp_path / name)
        return _made(tmp_path, kind, url, {name: tmp_path / name / f"{name}.qcow2" for name in NAMES})

    return made


def _made(tmp_path: Path, kind: str, url: str, disks: dict[str, Path]) -> Site:
    if kind in (ENCRYPTED, PLAIN):
        url = str(tmp_path / "repository")
    if kind != REPLICA:
        create_repository(url, passphrase=lambda: "correct horse", encryption=NONE if kind == PLAIN else AES)
    return Site(tmp_path, kind, url, FileGuest("web1", disks))


@pytest.fixture(params=[ENCRYPTED, REPLICA])
def site(request: pytest.FixtureRequest, make: Make) -> Site:
    return make(request.param)


def test_a_guest_point_has_all_disks_of_one_instant(site: Site) -> None:
    first = site.ship(labels=("before",))
    for name in NAMES:
        write(site.guest.disks_now[name], "write -P 99 2M 64k")
    second = site.ship()
    assert (first.guest, first.guest_point, second.guest_point) == ("web1", 1, 2)
    assert [each.disk for each in first.disks] == ["web1/vda", "web1/vdb", "web1/vdc"]
    assert first.instant != second.instant
    assert [each.layers_sent for each in second.disks] == [1, 1, 1]
    assert [each.data_bytes for each in second.disks] == [64 << 10] * 3, "only what was written since"
    assert site.view().points[0].labels == ("before",)
    site.check([1, 2])
    record = site.record()
    assert (record.guest, record.kind, record.uuid, record.machine) == ("web1", "libvirt", "5a1e", "pc-q35-7.2")
    assert [(each.name, each.disk, each.virtual_size) for each in record.disks] == [
        (name, f"web1/{name}", 4 * MiB) for name in NAMES
    ]
    assert [Path(each.path).name for each in record.disks] == [f"{name}.1.qcow2" for name in NAMES], (
        "the paths are those that the definition names"
    )
    phases = [each for each in site.events if isinstance(each, Progress) and each.phase == "ship"]
    assert [each.done for each in phases] == sorted(each.done for each in phases), "progress never falls"


def test_a_bucket(make: Make, moto: S3Server) -> None:
    site = make(BUCKET, f"s3://{moto.new_bucket()}/guests")
    del site.guest.disks_now["vdc"]
    site.ship()
    write(site.guest.disks_now["vda"], "write -P 99 2M 64k")
    site.ship()
    site.check([1, 2])


@pytest.mark.parametrize("kind", [ENCRYPTED, PLAIN, REPLICA])
def test_secrets_go_only_where_they_are_encrypted(make: Make, tmp_path: Path, kind: str) -> None:
    site = make(kind)
    site.guest.files = (
        DefinitionFile("nvram", "web1_VARS.fd", b"\1" * 1000, secret=True),
        DefinitionFile("tpm", "tpm2-00.permall", b"\2" * 1000, secret=True),
        DefinitionFile("nvram", "public.fd", b"\3", secret=False),
    )
    report = site.ship()
    record = site.record()
    assert report.secrets is (kind == ENCRYPTED)
    assert [(each.name, each.data) for each in record.files] == [
        (each.name, each.data) for each in site.guest.files if kind == ENCRYPTED or not each.secret
    ]
    assert (PASSWORD in (record.live or "")) is (kind == ENCRYPTED)
    told = [each for each in site.notices if "not encrypted" in each]
    if kind == ENCRYPTED:
        assert (told, record.unreadable) == ([], ("the swtpm's lock",))
        return
    what = "passwords in the definition", "firmware variables (web1_VARS.fd)", "the state of the TPM (tpm2-00.permall)"
    why = "not stored, since the destination is not encrypted"
    assert told == [f"web1: {why}: {', '.join(what)}"]
    assert record.unreadable[1:] == tuple(f"{why}: {each}" for each in what)
    folder = tmp_path / ("replica" if kind == REPLICA else "repository")
    stored = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"secret-of-vnc" not in stored
    assert not list((tmp_path / "state").rglob("record.raw")), "nor does it stay here"


def test_files_that_are_too_large_are_left_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "LARGEST", 8192)
    site = make(ENCRYPTED)
    site.guest.files = tuple(
        DefinitionFile("nvram", f"{size}.fd", b"\1" * size, secret=False) for size in (2000, 6000, 7000)
    )
    site.ship()
    record = site.record()
    assert [each.name for each in record.files] == ["2000.fd"]
    assert record.unreadable[1:] == (
        "not stored, since it is too large: firmware variables (7000.fd)",
        "not stored, since it is too large: firmware variables (6000.fd)",
    )


@pytest.mark.parametrize("broken", ["vda", "vdb", ".guest"])
def test_all_disks_or_none(site: Site, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """A fault at any of them: no guest point; the next run continues, and earlier points are whole."""
    site.ship()
    write(site.guest.disks_now["vda"], "write -P 99 2M 64k")
    real = one_disk._run

    def faulty(request: one_disk.ShipRequest, *others: object, **more: object) -> one_disk.ShipReport:
        if request.disk.endswith(broken):
            raise Unavailable("the link is gone", subject="kvm2")
        return real(request, *others, **more)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(one_disk, "_run", faulty)
        with pytest.raises(Unavailable) as failed:
            site.ship()
    which = "its record" if broken == ".guest" else f"disk {broken}"
    assert failed.value.message == (
        f"no guest point of web1 is published, since {which} could not be shipped: the link is gone"
    )
    assert failed.value.hint == "run it again: what was sent is not sent twice"
    site.check([1])
    before = NAMES.index(broken) if broken in NAMES else 3
    leftovers = site.view().leftovers
    assert [sorted(each.disks) for each in leftovers] == (
        [[f"web1/{name}" for name in NAMES[:before]]] if before else []
    )
    again = site.ship()
    assert again.guest_point == 2
    sent = dict(zip(NAMES, (each.data_bytes for each in again.disks), strict=True))
    assert sent == {"vda": 64 << 10 if before == 0 else 0, "vdb": 0, "vdc": 0}, "what was sent is not sent twice"
    site.check([1, 2])
    shown = log(site.open()).guests[0]
    assert [each.point for each in shown.points] == [1, 2]
    assert [list(each.disks) for each in shown.leftovers] == [list(each.disks) for each in leftovers]


def test_what_stops_a_run_before_the_guest_is_touched(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """No night leaves one overlay more at a guest whose destination refuses it."""
    with pytest.raises(NotFound, match="no disk vdx"):
        site.ship(snapshot=SnapshotRequest(disks=("vdx",)))
    with pytest.raises(InvalidInput, match="cannot name a guest"):
        site.ship(name="a:b")
    with pytest.raises(InvalidInput, match="the guest has no name"):
        ops.run(replace(site.guest, name=""), GuestShipRequest(), site.open())
    with pytest.raises(InvalidInput, match="cannot be a label"):
        site.ship(labels=("7",))
    with ops.alone("web1", site.open().url), pytest.raises(Busy, match="another run ships guest web1 to"):
        site.ship()
    one_disk.run(one_disk.ShipRequest(image=site.guest.disks_now["vda"], disk="web2"), site.open())
    with pytest.raises(Conflict, match="'web2' is a disk there, and no guest"):
        site.ship(name="web2")
    if site.kind == REPLICA:
        features = tuple(each for each in session.FEATURES if each != "guest-point")
        with monkeypatch.context() as patch:
            patch.setattr(session, "FEATURES", features)
            with pytest.raises(Unsupported, match="does not support 'guest-point'"):
                site.ship()
    assert site.guest.snapshots == 0
    site.guest.name = "web1"
    assert site.ship(name="prod/web1").guest == "prod/web1"


def test_a_plan_changes_nothing(site: Site) -> None:
    site.ship()
    for name in NAMES:
        write(site.guest.disks_now[name], "write -P 99 2M 192k")
    before = site.guest.snapshots
    plan = ops.plan(site.guest, GuestShipRequest(labels=("a",)), site.open())
    assert (plan.guest, plan.labels) == ("web1", ("a",))
    assert [(each.disk, each.layers_present, len(each.layers)) for each in plan.disks] == [
        (f"web1/{name}", 2, 1) for name in NAMES
    ]
    # The active layer is not parsed, as its guest writes to it: its file is a little larger than its data.
    assert all(192 << 10 <= each.data_bytes <= MiB for each in plan.disks)
    assert [each.disk for each in plan.snapshot.disks] == list(NAMES)
    assert site.guest.snapshots == before
    site.check([1])


def test_disks_come_and_go(site: Site) -> None:
    """Attached, detached, left out, resized between two points: each guest point has what the guest had."""
    vdc = site.guest.disks_now.pop("vdc")
    site.ship()
    site.guest.disks_now["vdc"] = vdc
    site.guest.left_out = {"sda": "a CD-ROM"}
    site.ship()
    del site.guest.disks_now["vdb"]
    resized = site.guest.disks_now["vda"]
    qemu_img("resize", "-q", "-f", "qcow2", resized, str(6 * MiB))
    write(resized, "write -P 77 5M 64k")
    third = site.ship()
    assert third.left_out == (LeftOut(disk="sda", reason="a CD-ROM"),)
    assert [(each.disk, each.virtual_size) for each in third.disks] == [("web1/vda", 6 * MiB), ("web1/vdc", 4 * MiB)]
    fourth = site.ship(snapshot=SnapshotRequest(disks=("vdc",)))
    assert [each.disk for each in fourth.disks] == ["web1/vdc"]
    site.check([1, 2, 3, 4])
    assert site.record("3").left_out == (("sda", "a CD-ROM"),)


def test_another_disk_under_the_same_name(site: Site) -> None:
    """A disk was detached, and a new one attached in its place. A replica keeps one chain a disk."""
    site.ship()
    (other,) = build(site.folder / "other", [Layer(2 * MiB, ["write -P 55 0 1M"])], names=["vdb.qcow2"])
    site.guest.disks_now["vdb"] = other
    site.ship()
    site.check([1, 2])
    if site.kind != REPLICA:
        return
    (site.folder / "state").rename(site.folder / "lost")
    (third,) = build(site.folder / "third", [Layer(2 * MiB, ["write -P 66 0 1M"])], names=["vdb.qcow2"])
    site.guest.disks_now["vdb"] = third
    with pytest.raises(Diverged, match="since disk vdb could not be shipped: the replica holds another disk"):
        site.ship()
    site.check([1, 2])
    site.ship(divergence=Divergence.CUT_REPLICA)
    view = site.view()
    whole = [f"web1/{name}" for name in NAMES]
    assert [sorted(each.disks) for each in view.points] == [["web1/vda", "web1/vdc"]] * 2 + [whole]
    assert missing_disks(view.points[0], site.record("1")) == ("web1/vdb",), "and it is known what is missing"


def test_a_record_follows_the_one_before_from_any_host(site: Site, tmp_path: Path) -> None:
    """The state of this host is gone, or it is another host: the record's disk goes on all the same, small."""
    site.ship()
    (tmp_path / "state").rename(tmp_path / "lost")
    report = site.ship()
    assert report.guest_point == 2
    site.check([1, 2])
    assert not [each for each in site.notices if ".guest" in each or "comparing" in each]
    if site.kind == REPLICA:
        assert site.open().disks(record_disk("web1"))[0].points[-1].layers == 2


def test_a_snapshot_that_was_taken_before_is_shipped_as_it_was(site: Site) -> None:
    """Whatever was written and sealed since: `nightly` ships one snapshot to several destinations."""
    from snapchain.guest import snapshot

    request = SnapshotRequest()
    expected = {name: flat(path, site.folder / f"early-{name}.raw") for name, path in site.guest.disks_now.items()}
    taken = snapshot.run(site.guest, snapshot.plan(site.guest, request), request)
    for name in NAMES:
        write(site.guest.disks_now[name], "write -P 99 2M 64k")
    later = snapshot.run(site.guest, snapshot.plan(site.guest, request), request)
    report = site.ship(taken=taken)
    site.shown[1] = expected
    assert (report.instant, report.time, site.guest.snapshots) == (taken.instant, taken.time, 2)
    site.check([1])
    newest = {
        name: flat(each.sealed, site.folder / f"late-{name}.raw") for name, each in zip(NAMES, later.disks, strict=True)
    }
    assert site.ship(taken=later).instant == later.instant
    site.shown[2] = newest
    site.check([1, 2])


def test_retention_keeps_what_a_point_belongs_to(site: Site) -> None:
    """Instants outlive merges at the destination."""
    for name in NAMES:
        site.ship()
        write(site.guest.disks_now[name], "write -P 99 2M 64k")
    guest_points_merge.run(site.open(), "web1", Policy(last=2))
    del site.shown[1]
    site.check([2, 3])


def test_the_consistency_that_was_reached_is_recorded(site: Site) -> None:
    site.guest.consistency = Consistency.FILESYSTEM
    report = site.ship()
    assert report.consistency is Consistency.FILESYSTEM
    assert {each.consistency for disk in site.open().disks() for each in disk.points} == {Consistency.FILESYSTEM}
    assert log(site.open(), "web1").guests[0].points[0].consistency is Consistency.FILESYSTEM


def test_a_guest_that_is_off(site: Site) -> None:
    """Its images are sealed at rest and keep their paths; what nobody wrote to is not sealed once more."""
    site.guest.is_off = True
    plan = ops.plan(site.guest, GuestShipRequest(), site.open())
    assert [(Path(each.image).name, each.data_bytes > MiB) for each in plan.disks] == [
        (f"{name}.qcow2", True) for name in NAMES
    ]
    first = site.ship()
    assert first.consistency is Consistency.OFFLINE
    files = {name: sorted(path.name for path in (site.folder / name).glob("*.qcow2")) for name in NAMES}
    assert files == {name: ["root.qcow2", f"{name}.1.qcow2", f"{name}.qcow2"] for name in NAMES}
    site.ship()
    assert {name: len(list((site.folder / name).glob("*.qcow2"))) for name in NAMES} == dict.fromkeys(NAMES, 3)
    write(site.guest.disks_now["vdb"], "write -P 99 2M 64k")
    third = site.ship()
    assert [each.data_bytes for each in third.disks] == [0, 64 << 10, 0]
    assert {name: len(list((site.folder / name).glob("*.qcow2"))) for name in NAMES} == dict.fromkeys(NAMES, 4)
    site.check([1, 2, 3])


def test_the_second_reader_reads_a_guest_point(make: Make) -> None:
    """docs/format.md is enough: the record as JSON, and the disks that it names, by a program of its own."""
    site = make(ENCRYPTED)
    site.guest.files = (DefinitionFile("tpm", "tpm2-00.permall", b"\2" * 1000, secret=True),)
    report = site.ship()
    reader = Reader(Path(site.url), "correct horse")
    catalogues = reader.disks()
    (point,) = catalogues["web1/.guest"]["points"]
    record = json.loads(reader.compose(reader.chain("web1/.guest", point["point"])))
    assert (record["instant"], record["consistency"]) == (report.instant, "crash") == (
        point["instant"], point["consistency"],
    )  # fmt: skip
    assert base64.b64decode(record["files"][0]["data"]) == b"\2" * 1000
    for disk in record["disks"]:
        (newest,) = catalogues[disk["disk"]]["points"]
        assert (newest["instant"], newest["content_id"]) == (record["instant"], disk["content_id"])
        shown = reader.compose(reader.chain(disk["disk"], newest["point"]))
        assert shown == site.shown[1][disk["name"]].read_bytes()
