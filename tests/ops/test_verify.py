"""verify: whatever is altered, cut or gone is found, and the points that it affects are named, and only those."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapchain.destination.records import VerifyReport
from snapchain.errors import Corrupt, InvalidInput, NotFound
from snapchain.model.events import Event, Progress
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.ops.inspect import inspect_point
from snapchain.ops.restore.run import Restoration
from snapchain.repository import collecting as gc, index as indexes
from snapchain.repository.catalogue import Point
from snapchain.repository.crypto import AES
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.format import is_damage, layer_name, pack_name
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.ops.shipping import DISK, MiB, restore, same_bytes, ship
from tests.ops.stacks import Layer, build, flat, names, write
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository


def store_of(repo: Repository) -> MemoryStore:
    assert isinstance(repo.store, MemoryStore)
    return repo.store


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Repository, list[Path]]:
    """Three points on three layers, and another disk; a pack for each layer's data."""
    directory = tmp_path_factory.mktemp("verify")
    repo = repository(MemoryStore(), suite=AES, block_size=64 * 1024)
    draw = random.Random(1)
    files = build(
        directory / "chain",
        [
            Layer(2 * MiB, [f"write -P {draw.randrange(1, 255)} {n * 64}k 64k" for n in range(6)]),
            Layer(2 * MiB, ["write -P 200 0 64k", "write -z 64k 64k"]),
            Layer(2 * MiB, ["write -P 201 1M 64k"]),
        ],
    )
    for path in files:
        ship(path, repo)
    (other,) = build(directory / "other", [Layer(MiB, ["write -P 99 0 64k"])])
    ship(other, repo, disk="other")
    return repo, [flat(path, directory / f"{path.name}.flat") for path in files]


@pytest.fixture
def repo(shipped: tuple[Repository, list[Path]]) -> Repository:
    """A copy to damage."""
    store = MemoryStore()
    for info in shipped[0].store.list(""):
        store.put(info.name, shipped[0].store.get(info.name))
    return again(shipped[0], store)


def checked(repo: Repository, *, share: float = 1.0, disk: str | None = None) -> VerifyReport:
    return verify(again(repo), share=share, disk=disk)


def affected(report: VerifyReport, disk: str = DISK) -> set[int]:
    return {point for finding in report.findings if finding.disk == disk for point in finding.points}


def test_a_sound_repository(repo: Repository) -> None:
    report = checked(repo)
    assert report.ok
    assert report.findings == ()
    assert (report.disks, report.points, report.layers) == (2, 4, 4)
    assert report.checked_bytes == 9 * 64 * 1024
    records = checked(repo, share=0)
    assert records.ok
    assert (records.checked_bytes, records.data_read) == (0, False)


def test_records_are_checked_without_reading_data(repo: Repository) -> None:
    store = CountingStore(repo.store)
    assert verify(again(repo, store)).ok
    data = {
        pack_name(pack)
        for catalogue in repo.catalogues()
        for layer in catalogue.parents
        for page in repo.layer(layer).pages(0, 2 * MiB)
        for pack in page.packs
    }
    assert not data.intersection(each.name for each in store.of("get"))
    written = [*store.of("put"), *store.of("create"), *store.of("delete")]
    assert all(each.name.startswith("leases/r-") for each in written)


def test_a_pack_whose_blobs_a_merge_has_dropped_may_be_gone(tmp_path: Path) -> None:
    repo = repository(MemoryStore(), block_size=64 * 1024)
    layers = [Layer(2 * MiB, ["write -P 7 0 256k"]), Layer(2 * MiB, ["write -P 8 0 256k"])]
    for path in build(tmp_path / "chain", layers):
        ship(path, repo)
    RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    assert gc.run(again(repo)).packs_deleted > 0
    assert checked(repo).findings == ()


def test_progress_and_share(repo: Repository) -> None:
    said: list[Event] = []
    verify(again(repo), share=1.0, on_event=said.append)
    progress = [each for each in said if isinstance(each, Progress)]
    assert progress[-1].done == progress[-1].total
    for share in (-0.1, 1.1):
        with pytest.raises(InvalidInput, match="of the data"):
            verify(repo, share=share)
    with pytest.raises(NotFound, match="there is no disk 'none'"):
        verify(repo, disk="none")


# ---- every object, every way

FLIPS = ("first", "head", "middle", "last")


def positions(size: int) -> dict[str, int]:
    return {"first": 0, "head": min(12, size - 1), "middle": size // 2, "last": size - 1}


@pytest.mark.parametrize("how", ["delete", "cut", "empty", "grown", *FLIPS])
def test_every_object_that_is_damaged_is_found(repo: Repository, how: str) -> None:
    """One object at a time, all of them; whatever verify finds sound restores, whatever it names does not."""
    store = store_of(repo)
    for info in list(store.list("")):
        body = store.get(info.name)
        if how == "delete":
            store.delete(info.name)
        else:
            store.put(info.name, altered(body, how))
        report = checked(repo)
        if how == "delete" and info.name.startswith(("index/", "disks/")):
            # A store can show an old state (docs/format.md, section 12), or one without an index, which costs uploads.
            assert report.ok
        else:
            assert not report.ok, info.name
            assert all(finding.kind in {"corrupt", "unsupported"} for finding in report.findings)
        store.put(info.name, body)
    assert checked(repo).ok


def altered(body: bytes, how: str) -> bytes:
    if how == "cut":
        return body[:-1]
    if how == "empty":
        return b""
    if how == "grown":
        return body + b"\0"
    at = positions(len(body))[how]
    return body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]


def damages() -> Iterator[tuple[str, Callable[[Repository], str], set[int]]]:
    """(name, what it does, points of web1/vda that it affects)."""

    def layer(number: int) -> Callable[[Repository], str]:
        return lambda repo: layer_name(repo.catalogue(DISK).points[number - 1].layer)

    def data(number: int) -> Callable[[Repository], str]:
        def name(repo: Repository) -> str:
            top = again(repo).layer(repo.catalogue(DISK).points[number - 1].layer)
            (page,) = top.pages(0, 2 * MiB)
            return pack_name(page.packs[0])

        return name

    def page(number: int) -> Callable[[Repository], str]:
        def name(repo: Repository) -> str:
            top = repo.layer(repo.catalogue(DISK).points[number - 1].layer)
            return pack_name(bytes(top.table[0]["pack"]).hex())

        return name

    for number, points in ((1, {1, 2, 3}), (2, {2, 3}), (3, {3})):
        yield f"record {number}", layer(number), points
        yield f"data {number}", data(number), points
        yield f"page {number}", page(number), points


@pytest.mark.parametrize(("find", "points"), [pytest.param(find, points, id=name) for name, find, points in damages()])
@pytest.mark.parametrize("how", ["delete", "cut", "flip"])
def test_the_points_that_damage_affects_are_named_and_the_others_restore(
    repo: Repository,
    shipped: tuple[Repository, list[Path]],
    tmp_path: Path,
    find: Callable[[Repository], str],
    points: set[int],
    how: str,
) -> None:
    store = store_of(repo)
    name = find(repo)
    body = store.get(name)
    store.delete(name)
    if how == "cut":
        store.put(name, body[:24])
    if how == "flip":
        store.put(name, body[:40] + bytes([body[40] ^ 1]) + body[41:])
    report = checked(repo)
    assert affected(report) == points
    assert affected(report, "other") == set()
    for point, shown in enumerate(shipped[1], start=1):
        out = tmp_path / f"{point}.raw"
        try:
            restore(again(repo), out, point)
        except Corrupt:
            assert point in points
            assert not out.exists()
        else:
            assert same_bytes(out, shown)
            assert point not in points or how != "delete" or "data" not in name
    assert verify(again(repo), disk="other", share=1.0).ok


def test_records_alone_find_what_is_gone_or_short(repo: Repository) -> None:
    """Without reading data: a missing pack, a pack that ends before a blob."""
    store = store_of(repo)
    for _, find, points in damages():
        name = find(repo)
        body = store.get(name)
        for left in (None, body[:20]):
            store.delete(name)
            if left is not None:
                store.put(name, left)
            assert affected(checked(repo, share=0)) == points
        store.put(name, body)
    assert checked(repo, share=0).ok


def test_a_damaged_catalogue_is_a_finding(repo: Repository) -> None:
    store = store_of(repo)
    newest = max(info.name for info in store.list(f"disks/{repo.keys.disk_key(DISK)}/"))
    store.put(newest, altered(store.get(newest), "middle"))
    for disk in (None, DISK):
        report = checked(repo, disk=disk)
        assert not report.ok
        assert [finding.subject for finding in report.findings] == [newest]
    assert checked(repo, disk="other").ok


def test_an_older_catalogue_of_another_history_is_a_finding(repo: Repository) -> None:
    """Sealed and sound, but not what its successor was made from."""
    store = store_of(repo)
    twin = again(repo, MemoryStore())
    made = twin.disk(DISK).advance(None, time=repo.config.created)
    forged, name = twin.store.get(f"disks/{repo.keys.disk_key(DISK)}/{1:020d}"), made[0].generation
    store.put(f"disks/{repo.keys.disk_key(DISK)}/{name:020d}", forged)
    report = checked(repo)
    assert ["follow" in finding.message for finding in report.findings] == [True]


CONTRADICTIONS: dict[str, Callable[[Point, Point], dict[str, object]]] = {
    "another layer": lambda _, other: {"layer": other.layer},
    "another content id": lambda _, other: {"content_id": other.content_id},
    "another size": lambda point, _: {"size": point.size + 512},
}


@pytest.mark.parametrize("how", CONTRADICTIONS)
def test_points_that_contradict_their_layers(repo: Repository, tmp_path: Path, how: str) -> None:
    disk = repo.disk(DISK)
    current = disk.existing()
    one, two, three = current[0].points
    wrong = two.model_copy(update=CONTRADICTIONS[how](two, three))
    disk.advance(current, time=repo.config.created, points=(one, wrong, three))
    report = checked(repo)
    assert affected(report) == {2}
    assert "disagree" in report.findings[0].message
    place = tmp_path / "place"
    place.mkdir()
    readers: list[Callable[[], object]] = [
        lambda: restore(again(repo), place / "x.raw", 2),
        lambda: restore(again(repo), place / "x.qcow2", 2),
        lambda: restore(again(repo), place / "x.qcow2", 2, chain=True),
        lambda: Restoration(RepositoryDestination(again(repo)), DISK, place / "x.raw", point="2").plan(),
        lambda: inspect_point(RepositoryDestination(again(repo)), DISK, point="2"),
        lambda: RepositoryDestination(again(repo)).leaves(DISK, "2").__enter__(),
    ]
    for reader in readers:
        with pytest.raises(Corrupt, match="the point and its layer disagree about the content id") as raised:
            reader()
        assert raised.value.subject == f"{DISK}@2"
        assert names(place) == []
    for point in (one, three):
        report_of = restore(again(repo), place / f"{point.point}.raw", point.point)
        assert report_of.content_id == point.content_id


@pytest.mark.parametrize("how", ["loop", "gone", "orphan"])
def test_broken_chains_are_findings_and_no_crash(repo: Repository, how: str) -> None:
    disk = repo.disk(DISK)
    current = disk.existing()
    one, two, three = (point.layer for point in current[0].points)
    parents: dict[str, str | None] = {
        "loop": {one: three, two: one, three: two},
        "gone": {two: one, three: two},
        "orphan": {one: None, two: one, three: two, "ab" * 16: "cd" * 16},
    }[how]  # type: ignore[assignment]
    disk.advance(current, time=repo.config.created, parents=parents)
    report = checked(repo)
    assert not report.ok
    assert affected(report) == (set() if how == "orphan" else {1, 2, 3})


def test_a_record_whose_leaves_are_not_those_of_its_content_id(repo: Repository, tmp_path: Path) -> None:
    """A layer put on another chain than the one it was made for: every record is sound by itself."""
    disk = repo.disk(DISK)
    current = disk.existing()
    one, two, three = (point.layer for point in current[0].points)
    disk.advance(current, time=repo.config.created, parents={one: None, two: one, three: one})
    report = checked(repo, share=0)
    assert affected(report) == {3}
    with pytest.raises(Corrupt, match="has not the content id that was recorded"):
        restore(again(repo), tmp_path / "out.raw", 3)


def test_a_blob_that_only_an_index_names_is_read_too(repo: Repository) -> None:
    """The next shipment would rely on it: points are merged away, their data is still there."""
    RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    assert checked(repo).ok
    store = store_of(repo)
    found = again(repo).layer(repo.catalogue(DISK).points[-1].layer).pages(0, 2 * MiB)
    named = {(pack_name(page.packs[int(row["pack"])]), int(row["offset"])) for page in found for row in page.runs}
    unnamed = 0
    for info in list(store.list("index/")):
        packs, _, rows = indexes.parse(repo.keys, info.name, store.get(info.name))
        for row in rows:
            place = pack_name(list(packs)[int(row["pack"])]), int(row["offset"])
            if place in named or int(row["raw"]) != 64 * 1024:
                continue
            unnamed += 1
            body = bytearray(store.get(place[0]))
            body[place[1]] ^= 1
            store.put(place[0], bytes(body))
            report = checked(repo)
            assert not report.ok
            # Known by now, so that nothing relies on it any more but another disk's point.
            assert {each.disk for each in checked(repo).findings} <= {"other"}
            body[place[1]] ^= 1
            store.put(place[0], bytes(body))
            for name in [each.name for each in store.list("index/") if is_damage(each.name)]:
                store.delete(name)
    assert unnamed > 1


def test_what_is_shipped_meanwhile_is_no_finding(repo: Repository, tmp_path: Path) -> None:
    (image,) = build(tmp_path / "c", [Layer(MiB, ["write -P 123 0 64k"])])

    class Meanwhile(CountingStore):
        def list(self, prefix: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
            found = list(super().list(prefix))
            if prefix in {"packs/", "index/"}:
                ship(image, repo, disk="new")
                write(image, f"write -P {len(self.asked) % 250 + 1} 0 64k")
            return iter(found)

    report = verify(again(repo, Meanwhile(repo.store)), share=1.0)
    assert report.findings == ()
