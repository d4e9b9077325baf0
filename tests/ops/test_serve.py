"""serve: every point reads as it restores, by stock clients; beside gc, shipments and merges; which names there are."""

from __future__ import annotations

import json
import os
import queue
import random
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import snapchain
from snapchain.destination.address import parse_point_address
from snapchain.destination.reading import ReadableDestination
from snapchain.errors import Corrupt, InvalidInput, NotFound, Unsupported
from snapchain.model.events import Notice
from snapchain.nbd.block_status import block_status
from snapchain.nbd.reading import BlobReading
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.ops.serve import ServePlan, ServeReport, ServeRequest, Serving
from snapchain.repository import repository as repositories
from snapchain.repository.crypto import NONE
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.format import pack_name
from snapchain.repository.layers import page_location
from tests.cli.conftest import qemu_img, write
from tests.nbd.serving import Client, ReadFailed
from tests.ops.guest_points import Guest, publish
from tests.ops.shipping import ship as ship_stack
from tests.ops.stacks import Layer, build
from tests.repository.synthetic import again, repository
from tests.servers import S3Server
from tests.waiting import HANG, taken

MiB = 1 << 20
LEAF = 64 << 10
DISK = "web1/vda"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository and a replica with three points of a disk, and N.raw, what each of them shows."""
    folder = tmp_path_factory.mktemp("served")
    image = folder / "web1.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(9 * MiB + 512))
    (folder / "noise").write_bytes(bytes(range(256)) * 4096)
    snapchain.create_repository(folder / "repo", encryption="none")
    steps = (
        ["write -P 1 0 3M", f"write -s {folder}/noise 4M 1M", "write -z 1M 64k"],
        ["write -P 4 2M 128k", "discard 4M 128k", "write -P 5 8M 4k"],
        ["write -z 0 1M", "write -P 6 9437184 512"],
    )
    for number, commands in enumerate(steps, 1):
        write(image, *commands)
        qemu_img("convert", "-O", "raw", image, folder / f"{number}.raw")
        for dest in (str(folder / "repo"), f"dir:{folder}/replica"):
            place = snapchain.open_destination(dest, writing=True)
            snapchain.ship(image, place, DISK, labels=[f"label-{number}"])
        if number < len(steps):
            snapchain.snapshot(image)
    return folder


@pytest.fixture(params=["repo", "replica"])
def dest(request: pytest.FixtureRequest, history: Path) -> str:
    return str(history / "repo") if request.param == "repo" else f"dir:{history}/replica"


@contextmanager
def serving(tmp_path: Path, *texts: str, notes: list[str] | None = None, **options: Any) -> Iterator[ServePlan]:
    """Serve until the block ends, which is a client of the first export all the while."""
    addresses = [parse_point_address(text) for text in texts]
    options.setdefault("socket", tmp_path / "s")
    request = ServeRequest(addresses=addresses, once=True, **options)
    places: dict[str, ReadableDestination] = {each.dest: snapchain.open_destination(each.dest) for each in addresses}
    ready: queue.Queue[ServePlan | BaseException] = queue.Queue()
    ended: list[ServeReport] = []

    def on_event(event: object) -> None:
        if notes is not None and isinstance(event, Notice):
            notes.append(event.message)

    def run() -> None:
        try:
            ended.append(Serving(request, places).run(ready.put, on_event=on_event))
        except BaseException as error:  # noqa: BLE001 - raised below
            ready.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    plan = ready.get(timeout=HANG)
    if isinstance(plan, BaseException):
        raise plan
    try:
        assert plan.socket is not None
        with Client(Path(plan.socket)).go(plan.exports[0].export):
            yield plan
    finally:
        thread.join(HANG)
    assert ended


def uris(plan: ServePlan) -> dict[str, str]:
    return {each.export: each.uri for each in plan.exports}


def compare(uri: str, raw: Path) -> None:
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", uri, raw], check=True)


def test_all_points_read_as_they_were_by_several_clients_at_once(dest: str, history: Path, tmp_path: Path) -> None:
    with serving(tmp_path, f"{dest}::{DISK}", all_points=True) as plan, ThreadPoolExecutor(4) as pool:
        found = uris(plan)
        assert list(found) == [DISK, f"{DISK}@1", f"{DISK}@2", f"{DISK}@3"]
        wanted = {DISK: 3, f"{DISK}@1": 1, f"{DISK}@2": 2, f"{DISK}@3": 3}
        list(pool.map(lambda name: compare(found[name], history / f"{wanted[name]}.raw"), found))
        for name, number in wanted.items():
            copy = tmp_path / f"{number}.copy"
            subprocess.run(["nbdcopy", found[name], copy], check=True)
            assert copy.read_bytes() == (history / f"{number}.raw").read_bytes()
        wide = tmp_path / "wide.qcow2"
        qemu_img("convert", "-O", "qcow2", found[f"{DISK}@2"], wide)
        qemu_img("check", "-q", wide)
        qemu_img("compare", "-f", "qcow2", "-F", "raw", wide, history / "2.raw")


def test_the_map_is_that_of_the_chain(history: Path, tmp_path: Path) -> None:
    with serving(tmp_path, f"{history}/repo::{DISK}@2") as plan:
        (uri,) = uris(plan).values()
        told = subprocess.run(["nbdinfo", "--map", "--json", uri], capture_output=True, check=True).stdout
        runs = [(each["offset"], each["length"], each["type"]) for each in json.loads(told)]
        raw = (history / "2.raw").read_bytes()
        assert [run[2] for run in runs if run[0] <= 1 * MiB < run[0] + run[1]] == [2], "written as zeroes"
        assert [run[2] for run in runs if run[0] <= 7 * MiB < run[0] + run[1]] == [3], "never written"
        assert sum(length for _, length, _ in runs) == len(raw)
        for offset, length, kind in runs:
            assert not kind & 2 or not any(raw[offset : offset + length]), "what is said to be zero is zero"
        data = sum(length for _, length, kind in runs if not kind)
        assert data < 5 * MiB
        shown = subprocess.run(["qemu-img", "map", "--output=json", "-f", "raw", uri], capture_output=True, check=True)
        told_by_qemu = json.loads(shown.stdout)
        assert sum(each["length"] for each in told_by_qemu if not each["zero"]) == data


def test_a_point_by_its_label_has_the_name_of_its_number(dest: str, history: Path, tmp_path: Path) -> None:
    with serving(tmp_path, f"{dest}::{DISK}@label-1", f"{dest}::{DISK}") as plan:
        assert [(each.export, each.point) for each in plan.exports] == [(f"{DISK}@1", 1), (DISK, 3)]
        compare(uris(plan)[f"{DISK}@1"], history / "1.raw")


def test_a_guest_is_served_as_the_disks_of_one_moment(tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g")
    snapchain.create_repository(tmp_path / "repo", encryption="none")
    place = snapchain.open_destination(tmp_path / "repo", writing=True)
    for number in (1, 2):
        guest.grow(number)
        guest.ship(place, number)
    with serving(tmp_path, f"{tmp_path}/repo::web1@1") as plan:
        assert list(uris(plan)) == ["web1/vda@1", "web1/vdb@1"]
        for name, uri in uris(plan).items():
            shown = next(path for (_, disk), path in guest.shown.items() if disk == name[5:8])
            compare(uri, shown)
    record = guest.point(place, 3, with_record=False)
    gone = record.disks[1].model_copy(update={"disk": "web1/vdz"})
    publish(place, record.model_copy(update={"disks": (record.disks[0], gone)}), guest.place)
    with pytest.raises(NotFound, match="lacks its disk"), serving(tmp_path, f"{tmp_path}/repo::web1"):
        pass
    with (
        pytest.raises(InvalidInput, match="this is a guest"),
        serving(tmp_path, f"{tmp_path}/repo::web1", all_points=True),
    ):
        pass


def _overwritten(folder: Path) -> bytes:
    """A repository with two points that have no block in common; what the first shows."""
    image = folder / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "4M")
    snapchain.create_repository(folder / "repo", encryption="none")
    for number in (1, 2):
        (folder / "noise").write_bytes(random.Random(number).randbytes(3 * MiB))
        write(image, f"write -s {folder}/noise 0 3M")
        qemu_img("convert", "-O", "raw", image, folder / f"{number}.raw")
        snapchain.ship(image, folder / "repo", DISK)
        snapchain.snapshot(image)
    return (folder / "1.raw").read_bytes()


def _collect(folder: Path) -> None:
    """Drop the first point, and collect what it needed, as far as anybody allows."""
    place = snapchain.open_destination(folder / "repo", writing=True)
    snapchain.merge_points(place, DISK, snapchain.Policy(last=1))
    for _ in range(3):
        snapchain.gc(place)


@pytest.mark.parametrize("has_lease", [True, False])
def test_gc_takes_nothing_away_that_is_served(has_lease: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was read before gc, so nothing is in the cache. Without the lease the bytes are gone: EIO, no zeroes."""
    raw = _overwritten(tmp_path)
    if not has_lease:
        monkeypatch.setattr(repositories.Repository, "reading", lambda *_, **__: nullcontext())
    with serving(tmp_path, f"{tmp_path}/repo::{DISK}@1"):
        _collect(tmp_path)
        with Client(tmp_path / "s").go(f"{DISK}@1") as client:
            if has_lease:
                assert client.read(0, len(raw)) == raw
            else:
                with pytest.raises(ReadFailed, match="error 5"):
                    client.read(0, len(raw))
        with pytest.raises(NotFound, match="1"):
            snapchain.restore(str(tmp_path / "repo"), DISK, tmp_path / "out.raw", point=1)
    before = taken(tmp_path / "repo")
    _collect(tmp_path)
    if has_lease:
        assert sum(taken(tmp_path / "repo")) < sum(before) - 2 * MiB, "now it may go"
    store = LocalStore(tmp_path / "repo")
    assert [info.name for info in store.list("leases/") if info.name.startswith("leases/r-")] == []


def test_a_damaged_pack_is_an_error_of_its_range_and_a_note(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "8M")
    (tmp_path / "noise").write_bytes(os.urandom(4 * MiB))
    write(image, f"write -s {tmp_path}/noise 0 4M")
    qemu_img("convert", "-O", "raw", image, tmp_path / "raw")
    raw = (tmp_path / "raw").read_bytes()
    snapchain.create_repository(tmp_path / "repo", encryption="none")
    snapchain.ship(image, tmp_path / "repo", DISK)
    packs = [path for path in (tmp_path / "repo" / "packs").rglob("*") if path.is_file()]
    pack = max(packs, key=lambda path: path.stat().st_size)
    body = bytearray(pack.read_bytes())
    body[len(body) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(body)
    notes: list[str] = []
    failed: list[tuple[int, int]] = []
    with serving(tmp_path, f"{tmp_path}/repo::{DISK}", notes=notes), Client(tmp_path / "s").go(DISK) as client:
        for offset in range(0, len(raw), 64 << 10):
            try:
                assert client.read(offset, 64 << 10) == raw[offset : offset + (64 << 10)]
            except ReadFailed as error:
                failed.append((offset, error.error))
    first = failed[0][0]
    assert failed == [(first + (number << 16), 5) for number in range(len(failed))]
    assert len(failed) <= 4, "one block of 256 KiB"
    assert len(notes) == len(failed) + 1, "a note of what to do about it, once"
    assert sum("snapchain verify --read-data" in note for note in notes) == 1
    assert f"{DISK}: bytes {first} to " in notes[0]
    assert "packs/" in notes[0]


def test_where_a_part_of_the_map_is_lost_it_is_data_that_cannot_be_read(tmp_path: Path) -> None:
    """It would be a hole otherwise, and clients do not ask for holes. What lies above is read."""
    layers = [Layer(MiB, ["write -P 1 0 128k"]), Layer(MiB, ["write -P 2 64k 128k"])]
    repo = repository(MemoryStore(), suite=NONE, block_size=LEAF)
    ship_stack(build(tmp_path / "c", layers)[-1], repo, each_layer=True)
    layer = again(repo).layer(repo.catalogue(DISK).points[0].layer)
    where = page_location(layer.table[0])
    body = bytearray(repo.store.get(pack_name(where.pack)))
    body[where.offset] ^= 1
    repo.store.put(pack_name(where.pack), bytes(body))
    place = RepositoryDestination(again(repo))
    with place.whole(DISK, damaged=True) as disk:
        assert block_status(disk.extents, 0, MiB).tolist() == [[3 * LEAF, 0], [MiB - 3 * LEAF, 3]]
        buffer = bytearray(2 * LEAF)
        disk.read_into(LEAF, memoryview(buffer))
        assert buffer == b"\2" * len(buffer)
        with pytest.raises(Corrupt, match="the map of that range is damaged"):
            disk.read_into(LEAF - 1, memoryview(buffer))
    with pytest.raises(Corrupt, match="the map of that range is damaged"), place.whole(DISK):
        pass


def test_a_bucket_is_served(
    request: pytest.FixtureRequest, history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: S3Server = request.getfixturevalue("moto")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{server.new_bucket()}/x"
    snapchain.create_repository(url, encryption="none")
    snapchain.ship(history / "3.raw", url, DISK)
    with serving(tmp_path, f"{url}::{DISK}") as plan:
        compare(uris(plan)[DISK], history / "3.raw")


def test_what_clients_read_first_is_fetched_when_a_later_point_is_served(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(history / "repo", tmp_path / "repo", ignore=shutil.ignore_patterns("reads"))
    fetched: list[object] = []
    monkeypatch.setattr(BlobReading, "prefetch", lambda _, reads: fetched.append(reads))

    def read(point: int, *offsets: int, prefetch: bool = True) -> None:
        name = f"{DISK}@{point}"
        with (
            serving(tmp_path, f"{tmp_path}/repo::{name}", prefetch=prefetch),
            Client(tmp_path / "s").go(name) as client,
        ):
            for offset in offsets:
                client.read(offset, 512)

    read(1, 2 * MiB, 4 * MiB, prefetch=False)
    assert not (tmp_path / "repo" / "reads").exists()
    read(1, 2 * MiB, 4 * MiB, 2 * MiB + LEAF)
    read(3, prefetch=False)
    read(3)
    assert fetched == [(), ((32, 1), (64, 1), (33, 1))]


def test_a_server_needs_not_fetch_what_another_one_has_fetched(tmp_path: Path) -> None:
    """Shown by a pack that is damaged in between: its bytes come from the directory that both use."""
    raw = _overwritten(tmp_path)
    address, name = f"{tmp_path}/repo::{DISK}@1", f"{DISK}@1"

    def read(cache_dir: Path) -> bytes:
        with serving(tmp_path, address, cache_dir=cache_dir), Client(tmp_path / "s").go(name) as client:
            return client.read(0, len(raw))

    assert read(tmp_path / "cache") == raw
    for pack in (tmp_path / "repo" / "packs").rglob("*"):
        if pack.is_file() and pack.stat().st_size > MiB:
            body = bytearray(pack.read_bytes())
            body[MiB // 2] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(body)
    with pytest.raises(ReadFailed, match="error 5"):
        read(tmp_path / "other")
    assert read(tmp_path / "cache") == raw


def test_a_replica_is_shipped_to_while_it_is_served_and_merges_leave_its_files(history: Path, tmp_path: Path) -> None:
    shutil.copytree(history / "replica", tmp_path / "replica")
    image = tmp_path / "web1.qcow2"
    dest = f"dir:{tmp_path}/replica"
    with serving(tmp_path, f"{dest}::{DISK}@2") as plan:
        place = snapchain.open_destination(dest, writing=True)
        snapchain.restore(place, DISK, image)
        write(image, "write -P 9 0 64k")
        assert snapchain.ship(image, place, "other").point == 1
        report = snapchain.merge_points(place, DISK, snapchain.Policy(last=1))
        assert (report.points_kept, report.merges, len(report.staying)) == ((3,), (), 2), "its files are in use"
        compare(uris(plan)[f"{DISK}@2"], history / "2.raw")
    assert snapchain.merge_points(place, DISK, snapchain.Policy(last=1)).layers_after == 1


def test_a_replica_on_another_host_is_refused_with_a_way(tmp_path: Path) -> None:
    address = parse_point_address(f"ssh://nobody@host/srv/replica::{DISK}")
    place = snapchain.open_destination(address.dest)

    class Listed(type(place)):  # type: ignore[misc]
        def disks(self, disk: str | None = None) -> Sequence[object]:
            return snapchain.open_destination(f"dir:{tmp_path}/replica").disks(disk)

    place.__class__ = Listed
    image = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "1M")
    snapchain.ship(image, f"dir:{tmp_path}/replica", DISK)
    with pytest.raises(Unsupported, match="on another host") as refused:
        Serving(ServeRequest(addresses=[address]), {address.dest: place})
    assert "ssh -L" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("texts", "options", "error", "words"),
    [
        (["none/vda"], {}, NotFound, "none/vda"),
        ([f"{DISK}@99"], {}, NotFound, "99"),
        ([DISK, DISK], {}, InvalidInput, "named twice"),
        ([f"{DISK}@1"], {"all_points": True}, InvalidInput, "a point is named"),
        ([DISK], {"socket": Path("none/s")}, NotFound, "no such directory"),
        ([DISK], {"listen": "127.0.0.1:0"}, InvalidInput, "both given"),
        ([DISK], {"tls": Path("pki")}, InvalidInput, "--tls is for --listen"),
        ([DISK], {"cache": 1 << 20}, InvalidInput, "at least 16 MiB"),
        ([DISK], {"socket": None, "listen": "0.0.0.0:0"}, InvalidInput, "without TLS"),
        ([DISK], {"socket": None, "listen": "127.0.0.1:0", "tls": Path("/none")}, NotFound, "/none"),
    ],
)
def test_what_cannot_be_served(
    history: Path, tmp_path: Path, texts: list[str], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with (
        pytest.raises(error, match=words),
        serving(tmp_path, *(f"{history}/repo::{text}" for text in texts), **options),
    ):
        pass
    assert not (tmp_path / "s").exists()
