"""One test a promise (DESIGN, section 6): each short, and by the public ways only. The corners are tested elsewhere."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import blake3
import pytest

from snapchain.cli import main
from snapchain.errors import Busy, Conflict, Corrupt, SnapchainError, Unsupported
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.model.content import leaf_hash
from snapchain.model.events import Event, Progress
from snapchain.model.retention import Policy
from snapchain.objects.exclusive import create_exclusively
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship import guest as guest_shipments
from snapchain.ops.ship.guest import GuestShipRequest
from snapchain.repository import collecting as gc, merging
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.merging import compose
from snapchain.repository.opening import create_repository, open_repository
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from snapchain.testing.faults import Crash, FaultStore, crash_points
from tests.guest.fake_agent import FakeAgent
from tests.guest.machine import Machine
from tests.ops.shipping import DISK, MiB, restore, same_bytes, ship, shipment
from tests.ops.stacks import Layer, build, flat, qemu_img, standing, write
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository
from tests.waiting import wait_until


@pytest.fixture
def repo() -> Repository:
    return repository(MemoryStore(), block_size=256 * 1024)


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Three files that overwrite parts of each other."""
    return build(
        tmp_path / "chain",
        [
            Layer(8 * MiB, ["write -P 1 0 2M"]),
            Layer(8 * MiB, ["write -P 2 512k 256k", "write -z 1M 128k"]),
            Layer(8 * MiB, ["write -P 3 600k 64k", "write -P 4 5M 64k"]),
        ],
    )


def test_promise_1_a_shipped_point_restores_exactly_or_the_lost_range_is_named(
    repo: Repository, chain: list[Path], tmp_path: Path
) -> None:
    ship(chain[-1], repo)
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", flat(chain[-1], tmp_path / "flat"))
    for info in list(repo.store.list("packs/")):
        body = repo.store.get(info.name)
        repo.store.put(info.name, body[:20] + bytes([body[20] ^ 1]) + body[21:])
        with pytest.raises(Corrupt, match="altered or belong elsewhere") as raised:
            restore(repo, tmp_path / "lost.raw")
        assert info.name in str(raised.value)
        assert not (tmp_path / "lost.raw").exists()
        repo.store.put(info.name, body)


def test_promise_2_a_crash_at_any_step_leaves_earlier_points_whole_and_a_second_run_finishes(
    repo: Repository, chain: list[Path], tmp_path: Path
) -> None:
    first = ship(chain[0], repo)

    def begin() -> ObjectStore:
        copy = MemoryStore()
        for info in repo.store.list(""):
            copy.put(info.name, repo.store.get(info.name))
        return copy

    wanted = ship(chain[1], again(repo, begin())).content_id
    deaths = 0
    for moment, store in crash_points(begin, lambda store: ship(chain[1], again(repo, store))):
        left = again(repo, store)
        assert verify(left, share=1.0).ok, moment
        assert left.catalogue(DISK).points[0].content_id == first.content_id
        assert ship(chain[1], left).content_id == wanted
        deaths += 1
    assert deaths > 8
    with pytest.raises(Crash):
        ship(chain[1], again(repo, FaultStore(begin(), crash_at=0)))


def test_promise_2_the_point_is_written_last(repo: Repository, chain: list[Path]) -> None:
    store = CountingStore(repo.store)
    ship(chain[-1], repo, store=store)
    order = [each.name.split("/")[0] for each in store.asked if each.operation in {"put", "create"}]
    written = [kind for kind in order if kind != "leases"]
    assert written.index("packs") < written.index("index") < written.index("layers") < written.index("disks")
    assert written[-1] == "disks"


def test_promise_3_a_merge_that_does_not_show_the_same_is_not_committed(
    repo: Repository, chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in chain:
        ship(path, repo)
    before = repo.disk(DISK).existing()
    kept = before[0].points[-1].content_id
    with monkeypatch.context() as patch:
        patch.setattr(merging, "compose", lambda layers, *window, root: compose(layers[:1], *window, root=root))
        with pytest.raises(Corrupt, match="nothing was changed"):
            RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    assert repo.disk(DISK).existing() == before
    RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    assert repo.catalogue(DISK).points[-1].content_id == kept
    assert verify(again(repo), share=1.0).ok


def test_promise_4_the_content_id_is_of_the_bytes_and_the_size(
    repo: Repository, chain: list[Path], tmp_path: Path
) -> None:
    """Layered, flat, compressed, in other clusters, with stored zeroes: one id. One byte more, or another: another."""
    wanted = ship(chain[-1], repo, disk="chain").content_id
    raw = flat(chain[-1], tmp_path / "flat.raw")
    for number, options in enumerate(
        [["-O", "raw"], ["-O", "raw", "-S", "0"], ["-O", "qcow2", "-c"], ["-O", "qcow2", "-o", "cluster_size=4k"]]
    ):
        copy = tmp_path / f"copy{number}.{options[1]}"
        qemu_img("convert", "-f", "raw", *options, raw, copy)
        assert ship(copy, repo, disk=f"copy{number}").content_id == wanted
    qemu_img("resize", "-q", "-f", "raw", raw, "+512")
    assert ship(raw, repo, disk="grown").content_id != wanted
    qemu_img("resize", "-q", "--shrink", "-f", "raw", raw, "8M")
    assert ship(raw, repo, disk="back").content_id == wanted
    write(raw, "write -P 9 3M 512", image_format="raw")
    assert ship(raw, repo, disk="other").content_id != wanted


def test_promise_5_two_shippers_lose_no_point(repo: Repository, tmp_path: Path) -> None:
    images = build(tmp_path / "a", [Layer(MiB, ["write -P 1 0 64k"])]) + build(
        tmp_path / "b", [Layer(MiB, ["write -P 2 0 64k"])]
    )
    start = threading.Barrier(2)

    def shipper(image: Path) -> list[int]:
        found: list[int] = []
        for _ in range(5):
            with shipment(image, again(repo), DISK) as work:
                if not found:
                    start.wait()
                found.append(work.run().point or 0)
        return found

    with ThreadPoolExecutor(2) as pool:
        numbers = [number for found in pool.map(shipper, images) for number in found]
    assert sorted(numbers) == list(range(1, 11))
    assert [point.point for point in repo.catalogue(DISK).points] == list(range(1, 11))
    assert verify(again(repo), share=1.0).ok


def test_promise_5_a_merge_during_a_shipment_loses_no_point(repo: Repository, chain: list[Path]) -> None:
    for path in chain[:2]:
        ship(path, repo)
    merged: list[object] = []

    def merge_meanwhile(event: Event) -> None:
        """When the shipment has chosen what it builds on, and has not published yet."""
        if isinstance(event, Progress) and not merged:
            merged.append(RepositoryMerge(again(repo), DISK, Policy(last=1)).run())

    with (
        shipment(chain[2], again(repo), DISK, on_event=merge_meanwhile) as work,
        pytest.raises(Conflict, match="merged away meanwhile"),
    ):
        work.run()
    assert merged
    assert ship(chain[2], repo).point == 3
    assert [point.point for point in repo.catalogue(DISK).points] == [2, 3]


def test_promise_5_where_a_store_ignores_conditions_writers_are_kept_apart_by_claims() -> None:
    store = MemoryStore()
    start = threading.Barrier(3)

    def writer(number: int) -> bool:
        start.wait()
        return create_exclusively(store, "disks/a/1", b"%d" % number, conditional=False)

    with ThreadPoolExecutor(3) as pool:
        won = list(pool.map(writer, range(3)))
    assert won.count(True) == 1
    assert store.get("disks/a/1") == b"%d" % won.index(True)


def test_promise_6_nothing_outside_what_was_named_is_opened(repo: Repository, tmp_path: Path) -> None:
    secret = tmp_path / "secret" / "shadow"
    secret.parent.mkdir()
    qemu_img("create", "-q", "-f", "raw", secret, "64k")
    (tmp_path / "vm").mkdir()
    hostile = tmp_path / "vm" / "hostile.qcow2"
    for backing in (str(secret), "../secret/shadow"):
        qemu_img("create", "-q", "-f", "qcow2", "-b", backing, "-F", "raw", hostile)
        with pytest.raises(Unsupported, match="outside the directories that you named") as raised:
            ship(hostile, repo)
        assert raised.value.hint is not None
        assert "--image-dir" in raised.value.hint
    for backing in ('json:{"driver":"file","filename":"/etc/shadow"}', "nbd://127.0.0.1/x"):
        qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "raw", hostile, "64k")
        with pytest.raises(Unsupported, match=r"hostile\.qcow2"):
            ship(hostile, repo)
    assert list(repo.store.list("packs/")) == []


def test_promise_7_nothing_that_somebody_writes_to_is_shipped(repo: Repository, chain: list[Path]) -> None:
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(chain[-1])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write("length\n")
        guest.stdin.flush()
        guest.stdout.readline()
        before = standing(chain[-1])
        with pytest.raises(Busy, match=r"qemu-io .* has it open"):
            ship(chain[-1], repo)
        guest.kill()
    assert standing(chain[-1]) == before
    assert repo.disk(DISK).read() is None


def test_promise_7_a_running_guest_is_touched_only_through_its_monitor(
    repo: Repository, chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Machine(tmp_path / "run", disks={"vda": chain[-1]}) as machine:
        machine.write("vda", 3 * MiB, 64 * 1024, 9)
        before = standing(chain[-1])
        with pytest.raises(Busy, match="the guest web1") as refused:
            ship(chain[-1], repo)
        assert f"--qmp {machine.qmp}" in str(refused.value.hint)
        assert (standing(chain[-1]), machine.status()) == (before, "running")
        with open_guest(GuestAddress(qmp=machine.qmp)) as guest:
            guest_shipments.run(guest, GuestShipRequest(), RepositoryDestination(again(repo)))
        assert machine.status() == "running"
    restore(repo, tmp_path / "out.raw", disk="web1/vda")
    assert same_bytes(tmp_path / "out.raw", flat(chain[-1], tmp_path / "flat"))


MARK = b"the secret of the guest, which is on its disk in plain text; "


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """A repository in a directory with the given defaults, and the image that was shipped."""
    directory = tmp_path_factory.mktemp("encrypted")
    image = directory / "secret-image.raw"
    image.write_bytes((MARK * 40_000)[: 2 * MiB])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(directory / "state"))
        create_repository(str(directory / "repo"), passphrase=lambda: "correct horse")
        opened = open_repository(str(directory / "repo"), passphrase=lambda: "correct horse", writing=True)
        with shipment(image, opened, "secret-disk/vda", labels=["secret-label"]) as work:
            work.run()
        yield directory / "repo", image


def test_promise_8_the_store_sees_no_plaintext_no_hash_of_it_and_no_name(encrypted: tuple[Path, Path]) -> None:
    place, image = encrypted
    content = image.read_bytes()
    leaf = content[: 64 * 1024]
    hidden = [
        MARK[:16],
        b"secret",
        b"vda",
        leaf_hash(leaf),
        blake3.blake3(content[: 256 * 1024]).digest(),
        blake3.blake3(b"".join(leaf_hash(content[at : at + 65536]) for at in range(0, 262144, 65536))).digest(),
        blake3.blake3(b"secret-disk/vda").digest()[:16],
        b"correct horse",
    ]
    with shipment(image, open_repository(str(place), passphrase=lambda: "correct horse"), "secret-disk/vda") as work:
        assert work.plan().layers_present == 1
    seen = 0
    for path in place.rglob("*"):
        shown = str(path.relative_to(place)).encode() + (path.read_bytes() if path.is_file() else b"")
        for text in hidden:
            assert text not in shown, path
            assert text.hex().encode() not in shown, path
        seen += path.is_file()
    assert seen >= 7


def test_promise_8_every_altered_byte_is_noticed(encrypted: tuple[Path, Path], tmp_path: Path) -> None:
    place, image = encrypted
    opened = open_repository(str(place), passphrase=lambda: "correct horse")
    assert verify(opened, share=1.0).ok
    for path in sorted(place.rglob("*")):
        if not path.is_file() or path.name in {"witness", ".reserve"}:
            continue
        body = path.read_bytes()
        for at in sorted({0, 7, 12, 20, len(body) // 3, len(body) // 2, len(body) - 9, len(body) - 1}):
            path.write_bytes(body[:at] + bytes([body[at] ^ 4]) + body[at + 1 :])
            assert not _believed(place), (path, at)
            for record in place.glob("index/damaged-*"):  # of a pack that is known to be damaged only its blobs count
                record.unlink()
        path.write_bytes(body)
    assert _believed(place)
    restore(opened, tmp_path / "out.raw", disk="secret-disk/vda")
    assert same_bytes(tmp_path / "out.raw", image)


def _believed(place: Path) -> bool:
    try:
        return verify(open_repository(str(place), passphrase=lambda: "correct horse"), share=1.0).ok
    except SnapchainError:
        return False


def test_promise_9_a_restore_needs_the_repository_the_passphrase_and_nothing_else(
    encrypted: tuple[Path, Path], tmp_path: Path
) -> None:
    """Moved elsewhere, without the index, on a machine that never saw it, and without QEMU's tools."""
    place, image = encrypted
    moved = tmp_path / "moved"
    for path in place.rglob("*"):
        if path.is_file() and path.relative_to(place).parts[0] not in {"index", "witness", "leases", "tmp"}:
            target = moved / path.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")
        patch.setenv("HOME", str(tmp_path))
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        opened = open_repository(str(moved), passphrase=lambda: "correct horse")
        for name in ("out.raw", "out.qcow2"):
            Restoration(RepositoryDestination(opened), "secret-disk/vda", tmp_path / name).run()
    assert same_bytes(tmp_path / "out.raw", image)
    assert same_bytes(flat(tmp_path / "out.qcow2", tmp_path / "flat"), image)


@pytest.fixture
def large(tmp_path: Path, repo: Repository) -> Path:
    """A disk of 1 TiB with 96 MiB on it, shipped twenty times with a little more; the newest file."""
    (root,) = build(tmp_path / "large", [Layer(1 << 40)])
    write(root, "write -P 1 0 32M", "write -P 2 500G 32M", "write -P 3 1023G 32M")
    ship(root, repo)
    below = root
    for number in range(20):
        path = root.with_name(f"{number}.qcow2")
        qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", path)
        write(path, f"write -P {number + 10} {number * 30}G 64k")
        ship(path, repo)
        below = path
    return below


def test_promise_10_shipping_costs_what_changed(repo: Repository, large: Path) -> None:
    """Not the disk (1 TiB), not what is on it (96 MiB), not the history (21 points) but for its small records."""
    top = large.with_name("top.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", large.name, "-F", "qcow2", top)
    write(top, "write -P 200 500G 64k", "write -P 201 700G 64k")
    store = CountingStore(repo.store)
    report = ship(top, repo, store=store)
    assert report.bytes_read == 128 * 1024
    assert report.layers_present == 21
    assert len(store.of("list", "packs/")) == 1, "one page, which shows packs that are lost"
    for prefix in ("layers/", "keys/"):
        assert store.of("list", prefix) == []
    assert len(store.of("put", "packs/")) == 2
    assert len(store.of("put", "index/")) == len(store.of("put", "layers/")) == len(store.of("create")) == 1
    assert store.bytes_of("put") + store.bytes_of("create") < 40_000
    assert store.bytes_of("get", "packs/") < 40_000, "pages that the change touches, no data"
    assert len(store.asked) < 100


def test_promise_10_merging_and_restoring_list_nothing_and_move_what_they_need(
    repo: Repository, large: Path, tmp_path: Path
) -> None:
    store = CountingStore(repo.store)
    RepositoryMerge(again(repo, store), DISK, Policy(last=3)).run()
    assert store.of("list", "packs/") == store.of("list", "layers/") == []
    assert store.bytes_of("get", "packs/") < 100_000
    assert store.bytes_of("put") < 100_000
    store = CountingStore(repo.store)
    Restoration(RepositoryDestination(again(repo, store)), DISK, tmp_path / "out.qcow2").run()
    assert {each.name for each in store.asked if each.operation.startswith("list")} <= {
        f"disks/{repo.keys.disk_key(DISK)}/",
        "leases/",
    }
    assert (tmp_path / "out.qcow2").stat().st_size < 110 * MiB
    qemu_img("compare", "-s", "-f", "qcow2", "-F", "qcow2", tmp_path / "out.qcow2", large)


def test_promise_10_collecting_frees_what_no_point_needs(repo: Repository, chain: list[Path]) -> None:
    """gc alone may list everything."""
    for path in chain:
        ship(path, repo)
    RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
    before = sum(info.size for info in repo.store.list(""))
    report = gc.run(again(repo))
    after = sum(info.size for info in repo.store.list(""))
    assert before - after == report.bytes_freed > 0
    assert verify(again(repo), share=1.0).ok


def test_promise_11_a_guest_is_thawed_and_goes_on_when_snapchain_is_killed(
    chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    with Machine(tmp_path / "run", disks={"vda": chain[-1]}) as machine, FakeAgent(tmp_path / "agent") as agent:
        named = ["--qmp", str(machine.qmp), "--agent", str(agent.path)]
        agent.lose = {"guest-fsfreeze-freeze"}  # it is frozen, and snapchain waits
        words = [sys.executable, "-m", "snapchain", "snapshot", *named, "--quiesce", "require"]
        with subprocess.Popen(words, stderr=subprocess.DEVNULL) as killed:
            wait_until(lambda: agent.frozen, alive=lambda: killed.poll() is None)
            killed.kill()
        wait_until(lambda: not agent.frozen)
        agent.lose = set()
        assert main(["doctor", *named]) == 0
        assert (machine.status(), machine.ask("query-jobs")) == ("running", [])
        assert main(["snapshot", *named, "--quiesce", "require"]) == 0
        machine.write("vda", 0, 64 * 1024, 8)
        assert {"STOP", "BLOCK_IO_ERROR"}.isdisjoint(event["event"] for event in machine.monitor.events)
