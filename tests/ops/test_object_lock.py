"""Object Lock: gc leaves what is locked, relies on nothing of it, and deletes it when its time has come."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from snapchain.destination.records import GcLimits
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.objects.s3_settings import LOCK_DAYS, LOCK_MODE, S3Settings
from snapchain.repository import collecting as gc, packs, sweep
from snapchain.repository.format import pack_name
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.objects.conftest import moto, moto_server  # noqa: F401 - fixtures
from tests.ops.shipping import DISK, MiB, ship
from tests.ops.stacks import Layer, build, flat
from tests.ops.test_crash import sound
from tests.ops.test_traffic import run
from tests.repository.synthetic import again, repository
from tests.servers import S3Server, admin_client

DAYS = 30
LOCK = S3Settings(lock_mode="GOVERNANCE", lock_days=DAYS)


class LockedStore(MemoryStore):
    """A store that locks what S3 would be asked to lock, and that must never be asked to delete it."""

    def __init__(self) -> None:
        self.days = 0.0
        super().__init__(clock=lambda: time.time() + self.days * 86400)

    def locked_until(self, name: str) -> datetime | None:
        now = datetime.fromtimestamp(time.time() + self.days * 86400, UTC)
        written = next((info.modified for info in self.list(name) if info.name == name), None)
        if written is None or not LOCK.of(name, now):
            return None
        until = datetime.fromtimestamp(written, UTC) + timedelta(days=DAYS)
        return until if until > now else None

    def delete(self, name: str) -> None:
        assert self.locked_until(name) is None, f"{name} is locked"
        super().delete(name)


class Shown(list[bytes]):
    """What the files show; too long to be printed."""

    def __repr__(self) -> str:
        return "..."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four files that overwrite half of each other."""
    layers = [
        Layer(2 * MiB, [f"write -P {9 * n + at + 1} {(2 * n + at) * 64}k 64k" for at in range(4)]) for n in range(4)
    ]
    return build(tmp_path_factory.mktemp("locked") / "chain", layers)


@pytest.fixture(scope="module")
def shown(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    directory = tmp_path_factory.mktemp("shown")
    return Shown(flat(path, directory / path.name).read_bytes() for path in files)


@pytest.fixture(autouse=True)
def _small_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packs, "PACK_BYTES", 1000)
    monkeypatch.setattr(sweep, "LEAST_WASTE", 250)


def names(repo: Repository, prefix: str) -> set[str]:
    return {info.name for info in repo.store.list(prefix)}


def full(files: list[Path], store: MemoryStore) -> Repository:
    repo = repository(store, block_size=64 * 1024)
    for path in files:
        ship(path, repo)
    return repo


def keep_last(repo: Repository) -> Repository:
    RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    return again(repo)


def test_what_is_locked_is_left_and_goes_later(files: list[Path], shown: list[bytes]) -> None:
    store = LockedStore()
    repo = keep_last(full(files, store))
    before = names(repo, "packs/") | names(repo, "layers/") | names(repo, "disks/")
    plan = gc.plan(again(repo))
    report = gc.run(again(repo))
    assert before <= names(repo, ""), "nothing that is locked was touched"
    assert (report.packs_deleted, report.packs_moved, report.bytes_moved) == (0, 0, 0)
    assert plan.packs_deleted == plan.packs_moved == 0
    assert report.objects_locked == plan.objects_locked > 0
    assert report.bytes_locked == plan.bytes_locked > 0
    left = None if report.locked_until is None else report.locked_until - datetime.now(UTC)
    assert left is not None
    assert timedelta(days=DAYS - 1) < left <= timedelta(days=DAYS)
    condemned = names(repo, "index/condemned")
    assert condemned
    assert gc.run(again(repo)).objects_locked == report.objects_locked
    assert names(repo, "index/condemned") == condemned, "what stays condemned is not said again by each run"
    sound(again(repo), {4: shown[3]})
    store.days = DAYS + 1
    assert gc.run(again(repo)).objects_locked == 0
    gc.run(again(repo))
    assert not names(repo, "index/condemned")
    assert names(repo, "layers/") == names_of_kept_layers(repo)
    sound(again(repo), {4: shown[3]})


def names_of_kept_layers(repo: Repository) -> set[str]:
    return {f"layers/{layer}" for layer in again(repo).catalogue(DISK).parents}


def test_nobody_relies_on_what_is_to_go_when_its_lock_ends(files: list[Path], shown: list[bytes]) -> None:
    store = LockedStore()
    repo = keep_last(full(files, store))
    gc.run(again(repo))
    old = names(repo, "packs/")
    store.days = DAYS / 2
    for number, path in enumerate(files[:2]):  # what is condemned and still there has these bytes
        ship(path, repo, disk=f"again{number}")
    needed = {info for layer in _layers(repo) for info in layer}
    condemned = again(repo).index().condemned.all_packs
    assert condemned
    assert not {pack_name(pack) for pack in condemned} & needed
    store.days = DAYS + 1
    gc.run(again(repo))
    gc.run(again(repo))
    assert old - names(repo, "packs/"), "they are gone"
    assert verify(again(repo), share=1.0).findings == ()
    sound(again(repo), {4: shown[3]})


def _layers(repo: Repository) -> list[set[str]]:
    from snapchain.repository.mark import named_packs

    opened = again(repo)
    disks = ("again0", "again1")
    return [{pack_name(pack) for pack in named_packs(opened, opened.catalogue(disk).parents)} for disk in disks]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["ship", "keep", "gc", "days"]), min_size=4, max_size=14))
def test_in_any_order_points_stay_and_waste_goes_in_the_end(
    files: list[Path], shown: list[bytes], steps: list[str]
) -> None:
    store = LockedStore()
    repo = full(files[:1], store)
    expected = {1: shown[0]}
    for number, step in enumerate(steps):
        if step == "ship":
            point = ship(files[number % 4], repo).point
            assert point is not None
            expected[point] = shown[number % 4]
        elif step == "keep":
            keep_last(repo)
            expected = {max(expected): expected[max(expected)]}
        elif step == "gc":
            gc.run(again(repo))
        else:
            store.days += DAYS * 0.6
    sound(again(repo), expected)
    store.days += DAYS + 1
    nothing_moves = GcLimits(waste=1.0)
    for _ in range(2):
        gc.run(again(repo), nothing_moves)
    report = gc.run(again(repo), nothing_moves)
    assert (report.objects_locked, report.packs_deleted) == (0, 0)
    sound(again(repo), expected)


# ---- a server


@pytest.fixture
def bucket(
    moto_server: S3Server,  # noqa: F811
    moto: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> str:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(LOCK_MODE, "GOVERNANCE")
    monkeypatch.setenv(LOCK_DAYS, str(DAYS))
    name = f"locked-{threading.get_native_id()}-{time.monotonic_ns()}"
    admin_client(moto_server.endpoint).create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    return name


def test_a_bucket_with_object_lock(
    moto_server: S3Server,  # noqa: F811
    bucket: str,
    files: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    client = admin_client(moto_server.endpoint)
    url = f"s3://{bucket}/r"
    run(capsys, "init", url, "--no-encryption", "--quiet")
    for path in files[:2]:
        run(capsys, "ship", path, f"{url}::web1", "--quiet")
    locked = {}
    for version in client.list_object_versions(Bucket=bucket)["Versions"]:
        head = client.head_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])
        if "ObjectLockRetainUntilDate" in head:
            locked[version["Key"]] = head["ObjectLockRetainUntilDate"]
            assert head["ObjectLockMode"] == "GOVERNANCE"
    kinds = {key.split("/")[1] for key in locked}
    assert kinds == {"packs", "layers", "disks"}
    assert all(".claim." not in key for key in locked)
    assert all(abs(until - datetime.now(UTC) - timedelta(days=DAYS)) < timedelta(hours=1) for until in locked.values())
    run(capsys, "merge", f"{url}::web1", "--keep-last", "1", "--quiet")
    plan = run(capsys, "gc", url, "--dry-run", "--json")["plan"]
    report = run(capsys, "gc", url, "--json")
    assert report["objects_locked"] == plan["objects_locked"] > 0
    markers = {each["Key"] for each in client.list_object_versions(Bucket=bucket).get("DeleteMarkers", [])}
    assert not markers & locked.keys(), "a locked object is not hidden"
    assert "locked" in run(capsys, "gc", url)
    # A collector that does not lock learns of the locks all the same.
    monkeypatch.delenv(LOCK_MODE)
    monkeypatch.delenv(LOCK_DAYS)
    assert run(capsys, "gc", url, "--json")["objects_locked"] == report["objects_locked"]
    for key in locked:
        client.put_object_retention(
            Bucket=bucket,
            Key=key,
            Retention={"Mode": "GOVERNANCE", "RetainUntilDate": datetime.now(UTC) - timedelta(days=1)},
            BypassGovernanceRetention=True,
        )
    for each in client.list_objects_v2(Bucket=bucket, Prefix="r/")["Contents"]:
        if each["Key"].split("/")[1] in kinds and each["Key"] not in locked:
            client.put_object_retention(
                Bucket=bucket,
                Key=each["Key"],
                Retention={"Mode": "GOVERNANCE", "RetainUntilDate": datetime.now(UTC) - timedelta(days=1)},
                BypassGovernanceRetention=True,
            )
    report = run(capsys, "gc", url, "--json")
    assert report["objects_locked"] == 0
    assert report["objects_deleted"] > 0
    assert run(capsys, "verify", url, "--read-data", "--json")["findings"] == []
    run(capsys, "restore", f"{url}::web1", tmp_path / "out.qcow2", "--quiet")


def test_a_legal_hold_has_no_end(moto_server: S3Server, bucket: str) -> None:  # noqa: F811
    from snapchain.objects import open_store
    from snapchain.repository.locked import Locked, last_of

    store = open_store(f"s3://{bucket}/r")
    held, free = pack_name("a" * 32), "keys/1"
    for name in (held, free):
        store.put(name, b"bytes")
    admin_client(moto_server.endpoint).put_object_legal_hold(Bucket=bucket, Key=f"r/{held}", LegalHold={"Status": "ON"})
    found = Locked(store).among([held, free, pack_name("b" * 32)])
    assert list(found) == [held]
    assert last_of(found) is None


@pytest.mark.usefixtures("moto")
def test_a_bucket_without_it_is_asked_once(
    moto_server: S3Server,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from snapchain.objects import open_store
    from snapchain.objects.meter import traffic_of
    from snapchain.repository.locked import Locked

    store = open_store(f"s3://{moto_server.new_bucket()}/r")
    assert Locked(store).among([pack_name(f"{number:032x}") for number in range(20)]) == {}
    traffic = traffic_of(store)
    assert traffic is not None
    assert traffic.requests == 1
