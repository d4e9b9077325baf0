"""The whole way on real S3 servers: moto honours conditional writes, rclone ignores them silently."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, Unavailable
from snapchain.model.events import Event, Notice
from snapchain.model.retention import Policy
from snapchain.ops import init
from snapchain.ops.log import log
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship.request import ShipReport
from snapchain.repository import collecting as gc
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.opening import create_repository, open_repository
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.ops.shipping import DISK, MiB, random_stack, same_bytes, shipment
from tests.ops.stacks import Layer, build, clean, flat, same
from tests.servers import S3Server, admin_client, free_port


@dataclass(frozen=True)
class Bucket:
    """A repository's address on a server. conditional: whether it honours If-None-Match."""

    url: str
    conditional: bool

    def create(self) -> Repository:
        return create_repository(self.url, passphrase=lambda: "correct horse")

    def open(self, *, writing: bool = True) -> Repository:
        return open_repository(self.url, passphrase=lambda: "correct horse", writing=writing)

    def ship(self, image: Path, disk: str = DISK, *, each_layer: bool = False) -> ShipReport:
        with shipment(image, self.open(), disk, each_layer=each_layer) as work:
            return work.run()


@pytest.fixture(params=["moto", "rclone"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server: S3Server = request.getfixturevalue(request.param)
    return Bucket(f"s3://{server.new_bucket()}/Some Prefix/x", conditional=request.param == "moto")


def test_init_says_what_the_store_does_not_keep_to(bucket: Bucket) -> None:
    said: list[Event] = []
    report = init.run(init.plan(bucket.url), passphrase=lambda: "correct horse", on_event=said.append)
    assert report.conditional_put is bucket.conditional
    told = " ".join(each.message for each in said if isinstance(each, Notice))
    assert ("conditional writes are not honoured" in told) is not bucket.conditional
    assert tuple(each.message for each in said if isinstance(each, Notice)) == report.findings
    assert bucket.open().conditional is bucket.conditional
    with pytest.raises(Conflict, match="already"):
        bucket.create()


def test_packs_that_a_server_has_lost_are_stored_again(bucket: Bucket, tmp_path: Path) -> None:
    """With a cache of indexes between, as the command has it."""
    bucket.create()
    files = build(tmp_path / "chain", [Layer(MiB, ["write -P 1 0 512k"]), Layer(MiB, ["write -P 2 256k 512k"])])
    for path in files:
        bucket.ship(path)
    for lost in [info.name for info in bucket.open().store.list("packs/")][::2]:
        bucket.open().store.delete(lost)
    assert not verify(bucket.open(writing=False)).ok
    assert bucket.ship(files[-1]).damaged == ()
    for collected in (False, True):
        if collected:
            assert gc.run(bucket.open()).findings == ()
        assert verify(bucket.open(writing=False), share=1.0).ok
        for point, path in enumerate((*files, files[-1]), start=1):
            out = tmp_path / f"{point}-{collected}.raw"
            Restoration(RepositoryDestination(bucket.open(writing=False)), DISK, out, point=str(point)).run()
            assert same(path, out)


def test_init_takes_no_prefix_that_holds_anything(bucket: Bucket, tmp_path: Path) -> None:
    name = bucket.url.removeprefix("s3://").split("/")[0]
    client = admin_client(os.environ["AWS_ENDPOINT_URL_S3"])
    client.put_object(Bucket=name, Key="Some Prefix/x/Photos/ONE.JPG", Body=b"theirs")
    with pytest.raises(Conflict, match="the place is not empty: Photos"):
        bucket.create()
    with pytest.raises(NotFound, match="only other objects: Photos"):
        bucket.open()
    client.delete_object(Bucket=name, Key="Some Prefix/x/Photos/ONE.JPG")
    bucket.create()
    bucket.ship(build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 256k"])])[0])
    client.delete_object(Bucket=name, Key="Some Prefix/x/config")
    for attempt in (bucket.create, bucket.open):
        with pytest.raises(Corrupt, match=r"`config` of this repository is missing.*1 in disks/, 1 in layers/"):
            attempt()


def test_ship_merge_and_restore(bucket: Bucket, tmp_path: Path) -> None:
    bucket.create()
    stack = random_stack(tmp_path / "stack", 7, layers=4, grown=lambda path: _ship(bucket, path))
    points = log(RepositoryDestination(bucket.open(writing=False))).disks[0].points
    assert [point.point for point in points] == [1, 2, 3, 4]
    _restored(bucket, tmp_path, {number + 1: shown for number, shown in enumerate(stack.shown)})
    merged = RepositoryMerge(bucket.open(), DISK, Policy(last=2)).run()
    assert merged.points_kept == (3, 4)
    assert merged.layers_after <= 2
    _restored(bucket, tmp_path / "merged", {3: stack.shown[2], 4: stack.shown[3]})
    assert gc.run(bucket.open()).objects_deleted > 0
    _restored(bucket, tmp_path / "collected", {3: stack.shown[2], 4: stack.shown[3]})
    report = verify(bucket.open(writing=False), share=1.0)
    assert report.findings == ()
    assert [point.content_id for point in log(RepositoryDestination(bucket.open(writing=False))).disks[0].points] == [
        point.content_id for point in points[2:]
    ]


def _ship(bucket: Bucket, path: Path) -> None:
    bucket.ship(path)


def _restored(bucket: Bucket, directory: Path, shown: dict[int, Path]) -> None:
    directory.mkdir(exist_ok=True)
    opened = bucket.open(writing=False)
    for point, content in shown.items():
        for name in (f"{point}.raw", f"{point}.qcow2"):
            out = directory / name
            Restoration(RepositoryDestination(opened), DISK, out, point=str(point)).run()
            if out.suffix == ".raw":
                assert same_bytes(out, content)
            else:
                assert same(out, content)
                assert clean(out)


def test_two_shippers_of_one_disk_and_of_two(bucket: Bucket, tmp_path: Path) -> None:
    bucket.create()
    images = [build(tmp_path / f"{number}", [Layer(MiB, [f"write -P {number + 1} 0 256k"])])[0] for number in range(3)]
    start = threading.Barrier(3)

    def shipper(number: int) -> int:
        opened = bucket.open()
        start.wait()
        with shipment(images[number], opened, "one" if number < 2 else "other") as work:
            return work.run().point or 0

    with ThreadPoolExecutor(3) as pool:
        numbers = list(pool.map(shipper, range(3)))
    assert sorted(numbers[:2]) == [1, 2]
    assert numbers[2] == 1
    for number, disk in enumerate(["one", "one", "other"]):
        out = tmp_path / f"out{number}.raw"
        Restoration(RepositoryDestination(bucket.open(writing=False)), disk, out, point=str(numbers[number])).run()
        assert same_bytes(out, flat(images[number], tmp_path / "flat"))
    assert verify(bucket.open(writing=False), share=1.0).ok


def test_an_unchanged_image_sends_nothing(bucket: Bucket, tmp_path: Path) -> None:
    bucket.create()
    files = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 256k"]), Layer(MiB, ["write -P 2 0 64k"])])
    assert bucket.ship(files[-1], each_layer=True).points == (1, 2)
    again = bucket.ship(files[-1])
    assert (again.bytes_read, again.bytes_stored, again.layers_sent, again.point) == (0, 0, 0, 3)


def test_what_is_not_there(bucket: Bucket) -> None:
    with pytest.raises(NotFound, match="no snapchain repository"):
        bucket.open()
    bucket.create()
    with pytest.raises(InvalidInput, match="wrong passphrase"):
        open_repository(bucket.url, passphrase=lambda: "wrong")
    with pytest.raises(NotFound, match="no-such-bucket-here/x/config: there is no such bucket"):
        open_repository("s3://no-such-bucket-here/x", passphrase=lambda: "correct horse")


def test_a_server_that_is_gone_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = S3Server(f"http://127.0.0.1:{free_port()}", "gone", tmp_path / "log")
    for name, value in gone.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=r"^s3://bucket/x"):
        open_repository("s3://bucket/x", passphrase=lambda: "correct horse")
