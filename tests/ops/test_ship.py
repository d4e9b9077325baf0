"""ship: every point restores to what the image showed, what is there is not read, what changes meanwhile is refused."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound
from snapchain.model.events import Event, Notice, Progress
from snapchain.model.points import check_label
from snapchain.model.retention import Policy
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data, StoreWrapper
from snapchain.objects.throttle import ThrottledStore
from snapchain.repository import collecting as gc, packer, packs
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from tests.ops.shipping import DISK, MiB, Stack, local, random_stack, restore, same_bytes, ship, shipment
from tests.ops.stacks import Layer, build, clean, flat, qemu_img, same, write
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, content_id_of, repository


@pytest.fixture
def repo() -> Repository:
    return repository(MemoryStore(), block_size=256 * 1024)


# ---- the whole way, on random stacks


@pytest.mark.parametrize("seed", range(14))
def test_every_point_of_a_growing_stack_restores(tmp_path: Path, repo: Repository, seed: int) -> None:
    """Shipped after each layer; then every point flat in both formats, and the whole chain file by file."""
    stack = random_stack(tmp_path / "stack", seed, grown=lambda path: assert_new_point(repo, path))
    for number, shown in enumerate(stack.shown):
        assert_restores(repo, tmp_path, number + 1, shown)
    assert_chain_restores(repo, tmp_path / "chain", stack)


@pytest.mark.parametrize("seed", range(20, 26))
def test_every_layer_of_a_stack_shipped_at_once_restores(tmp_path: Path, repo: Repository, seed: int) -> None:
    """--each-layer: every file becomes a layer and a point."""
    stack = random_stack(tmp_path / "stack", seed, layers=5)
    report = ship(stack.files[-1], repo, each_layer=True)
    assert report.points == (1, 2, 3, 4, 5)
    for number, shown in enumerate(stack.shown):
        assert_restores(repo, tmp_path, number + 1, shown)


@pytest.mark.parametrize("seed", range(40, 46))
def test_pending_overlays_are_composed_and_the_top_restores(tmp_path: Path, repo: Repository, seed: int) -> None:
    """The root is a layer of its own; the sealed overlays become one, with the top or beside it."""
    stack = random_stack(tmp_path / "stack", seed, layers=5)
    report = ship(stack.files[-1], repo)
    assert report.points == (1,)
    assert report.layers_sent <= 3
    assert_restores(repo, tmp_path, 1, stack.shown[-1])
    assert report.content_id == content_id_of(stack.shown[-1].read_bytes())


def assert_new_point(repo: Repository, image: Path) -> None:
    before = len(repo.disk(DISK).read()[0].points) if repo.disk(DISK).read() else 0  # type: ignore[index]
    report = ship(image, repo)
    assert report.point == before + 1
    assert report.layers_sent <= 1


def assert_restores(repo: Repository, tmp_path: Path, point: int, shown: Path) -> None:
    wanted = repo.catalogue(DISK).points[point - 1].content_id
    assert wanted == content_id_of(shown.read_bytes())
    raw = tmp_path / f"{point}.raw"
    assert restore(repo, raw, point).content_id == wanted
    assert same_bytes(raw, shown)
    out = tmp_path / f"{point}.qcow2"
    restore(repo, out, point)
    assert same(out, shown)
    assert clean(out)


def assert_chain_restores(repo: Repository, directory: Path, stack: Stack) -> None:
    """Each file of the chain shows what some layer of the original showed, the last one what the top shows."""
    directory.mkdir()
    report = restore(repo, directory / "top.qcow2", chain=True)
    shown = [path.read_bytes() for path in stack.shown]
    at = 0
    for name in report.files:
        path = Path(name)
        image_format = "raw" if path.suffix == ".raw" or (len(report.files) == 1 and _is_raw(path)) else "qcow2"
        assert image_format == "raw" or clean(path)
        found = flat(path, directory / "flat", image_format).read_bytes()
        assert found in shown[at:], name
        at = shown.index(found, at)
    assert found == shown[-1]


def _is_raw(path: Path) -> bool:
    return path.read_bytes()[:4] != b"QFI\xfb"


# ---- images that are no chain


def test_a_raw_disk(tmp_path: Path, repo: Repository) -> None:
    image = tmp_path / "disk.img"
    qemu_img("create", "-q", "-f", "raw", image, "3M")
    write(image, "write -P 7 64k 1M", "write -P 9 3145216 512", image_format="raw")
    report = ship(image, repo)
    assert (report.layers_sent, report.virtual_size) == (1, 3 * MiB)
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", image)
    restore(repo, tmp_path / "out.qcow2")
    assert same(tmp_path / "out.qcow2", image)
    assert (tmp_path / "out.raw").stat().st_blocks * 512 < 2 * MiB, "holes stay holes"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    """A loop device of 4 MiB, dirty all over."""
    image = tmp_path / "device.img"
    image.write_bytes(b"\xdd" * 4 * MiB)
    attached = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if attached.returncode:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    name = attached.stdout.strip()
    yield Path(name)
    subprocess.run(["losetup", "-d", name], check=True)


@pytest.mark.root
def test_a_block_device_there_and_back(tmp_path: Path, repo: Repository, device: Path) -> None:
    """As a source, and as a target that was full of other bytes; always read again, since its node tells nothing."""
    write(device, "write -P 5 1M 64k", "write -z 2M 1M", image_format="raw")
    first = ship(device, repo)
    before = device.read_bytes()
    assert first.bytes_read > 0
    write(device, "write -P 6 0 512", image_format="raw")
    second = ship(device, repo)
    assert second.content_id != first.content_id
    assert second.bytes_stored < MiB // 2, "only what changed"
    write(device, "write -P 221 0 4M", image_format="raw")
    with pytest.raises(Conflict, match="the device is not empty: there is data at byte 0") as refused:
        restore(repo, device, 1)
    assert refused.value.subject == str(device)
    restore(repo, device, 1, force=True)
    assert device.read_bytes() == before
    small = tmp_path / "small.raw"
    qemu_img("create", "-q", "-f", "raw", small, "1M")
    write(small, "write -P 1 512k 512", image_format="raw")
    ship(small, repo, disk="small")
    write(device, "write -P 221 0 4M", image_format="raw")
    restore(repo, device, disk="small", force=True)
    assert device.read_bytes() == small.read_bytes() + b"\xdd" * 3 * MiB, "what lies beyond the disk is left alone"
    large = tmp_path / "large.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", large, "5M")
    ship(large, repo, disk="large")
    with pytest.raises(InvalidInput, match="the device has 4194304 bytes, the disk 5242880"):
        restore(repo, device, disk="large", force=True)
    with pytest.raises(InvalidInput, match="flat raw disk"):
        restore(repo, device, chain=True)


@pytest.mark.parametrize("size", [512, 1024, 65536, 65536 + 512, 0])
def test_tiny_and_empty_disks(tmp_path: Path, repo: Repository, size: int) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(size))
    if size:
        write(image, f"write -P 3 {size - 512} 512")
    ship(image, repo)
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", flat(image, tmp_path / "flat"))
    restore(repo, tmp_path / "out.qcow2")
    assert clean(tmp_path / "out.qcow2")


# ---- what is there already


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Three files: 8 MiB of data, then 128 KiB, then 64 KiB."""
    return build(
        tmp_path / "chain",
        [
            Layer(16 * MiB, ["write -P 1 0 8M"]),
            Layer(16 * MiB, ["write -P 2 1M 128k"]),
            Layer(16 * MiB, ["write -P 3 2M 64k"]),
        ],
    )


def test_an_unchanged_image_is_not_read_and_gets_a_new_point(repo: Repository, chain: list[Path]) -> None:
    ship(chain[-1], repo)
    store = CountingStore(repo.store)
    again_shipped = ship(chain[-1], repo, store=store)
    assert (again_shipped.bytes_read, again_shipped.bytes_stored, again_shipped.layers_sent) == (0, 0, 0)
    assert (again_shipped.point, again_shipped.unchanged) == (2, True)
    assert store.of("put", "packs/") == store.of("get", "packs/") == []
    points = repo.catalogue(DISK).points
    assert points[0].layer == points[1].layer


def test_sealed_layers_are_recognised_without_being_read(repo: Repository, chain: list[Path]) -> None:
    ship(chain[1], repo, each_layer=True)
    report = ship(chain[2], repo)
    assert report.layers_present == 2
    assert report.bytes_read == 64 * 1024
    assert report.layers_sent == 1


def test_of_a_changed_top_only_changed_blocks_are_stored(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    write(chain[-1], *(f"write -P {n + 10} {4 + n}M 512k" for n in range(4)))
    ship(chain[-1], repo)
    write(chain[-1], "write -P 200 5M 4k")
    report = ship(chain[-1], repo)
    assert (report.layers_present, report.unchanged) == (2, False)
    assert report.bytes_read == 2 * MiB + 64 * 1024, "the top is read whole, and nothing else"
    assert report.bytes_stored < 64 * 1024, "one block of zstd-friendly data, and records"
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", flat(chain[-1], tmp_path / "flat"))


def test_nightly_snapshots_cost_what_the_day_wrote(repo: Repository, tmp_path: Path) -> None:
    """Write, seal, ship with the fresh top: no night reads what an earlier one read."""
    files = build(tmp_path / "c", [Layer(16 * MiB, ["write -P 1 0 4M"])])
    ship(files[0], repo)
    for day in range(1, 6):
        sealed = files[-1].with_name(f"day{day}.qcow2")
        top = files[-1].with_name(f"top{day}.qcow2")
        for path, below in ((sealed, files[-1]), (top, sealed)):
            qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", path)
            if path is sealed:
                write(sealed, f"write -P {day + 1} {day}M 128k")
        report = ship(top, repo)
        assert report.bytes_read == 128 * 1024, day
        files.append(sealed)
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", flat(files[-1], tmp_path / "flat"))


def test_a_top_that_goes_on_changing_costs_itself(repo: Repository, tmp_path: Path) -> None:
    """Sealed at noon, shipped at midnight: half of each day's writes are in a top that changes after it was shipped."""
    files = build(tmp_path / "c", [Layer(16 * MiB, ["write -P 1 0 4M"])])
    ship(files[0], repo)
    for day in range(1, 6):
        path = files[-1].with_name(f"day{day}.qcow2")
        if day > 1:
            write(files[-1], f"write -P {day + 100} {day * 2}M 128k")
        qemu_img("create", "-q", "-f", "qcow2", "-b", files[-1].name, "-F", "qcow2", path)
        write(path, f"write -P {day + 1} {day * 2 + 1}M 128k")
        files.append(path)
        report = ship(path, repo)
        assert report.bytes_read <= 384 * 1024, "yesterday's top, which grew until noon, and today's"
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", flat(files[-1], tmp_path / "flat"))


def test_overwritten_data_of_pending_overlays_is_neither_read_nor_stored(repo: Repository, tmp_path: Path) -> None:
    layers = [Layer(8 * MiB, ["write -P 1 0 64k"])] + [Layer(8 * MiB, [f"write -P {n} 1M 2M"]) for n in range(2, 8)]
    files = build(tmp_path / "c", layers)
    ship(files[0], repo)
    report = ship(files[-1], repo)
    assert (report.layers_sent, report.bytes_read) == (1, 2 * MiB)
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", flat(files[-1], tmp_path / "flat"))


def test_an_untouched_overlay_is_a_point_without_a_layer(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    ship(chain[-1], repo)
    fresh = chain[-1].with_name("fresh.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", chain[-1].name, "-F", "qcow2", fresh)
    report = ship(fresh, repo)
    assert (report.point, report.layers_sent, report.bytes_read) == (2, 0, 0)
    write(fresh, "write -P 77 0 64k")
    later = ship(fresh, repo)
    assert (later.point, later.layers_sent, later.bytes_read) == (3, 1, 64 * 1024)
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", flat(fresh, tmp_path / "flat"))


def test_an_image_that_was_rebased_or_replaced_is_read_again(repo: Repository, chain: list[Path]) -> None:
    ship(chain[-1], repo)
    copy = chain[0].with_suffix(".copy")
    copy.write_bytes(chain[0].read_bytes())
    copy.replace(chain[0])
    said: list[Event] = []
    with shipment(chain[-1], again(repo), DISK) as work:
        report = work.run(on_event=said.append)
    assert report.layers_present == 0
    assert any(isinstance(each, Notice) and "all of it is read again" in each.message for each in said)
    assert report.bytes_stored < 100_000, "and found to be there"


def test_an_image_that_merged_locally_ships_right(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    """The middle is committed into the root: the root's file changed, so nothing of it is believed."""
    ship(chain[-1], repo, each_layer=True)
    shown = flat(chain[-1], tmp_path / "flat")
    qemu_img("commit", "-q", "-f", "qcow2", "-d", chain[1])
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", chain[0].name, "-F", "qcow2", chain[-1])
    report = ship(chain[-1], repo)
    assert report.layers_present == 0
    restore(repo, tmp_path / "out.raw", report.point)
    assert same_bytes(tmp_path / "out.raw", shown)


def test_a_point_of_an_older_layer_branches(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    """The disk went back to its root and on from there: both ways stay restorable."""
    ship(chain[-1], repo)
    other = chain[0].with_name("other.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", chain[0].name, "-F", "qcow2", other)
    write(other, "write -P 99 3M 64k")
    report = ship(other, repo)
    assert (report.layers_present, report.bytes_read) == (1, 64 * 1024)
    for point, image in ((1, chain[-1]), (2, other)):
        restore(repo, tmp_path / f"{point}.raw", point)
        assert same_bytes(tmp_path / f"{point}.raw", flat(image, tmp_path / "flat"))


# ---- plans


def test_a_plan_writes_nothing_and_says_what_run_will_do(repo: Repository, chain: list[Path]) -> None:
    store = CountingStore(repo.store)
    with shipment(chain[-1], again(repo, store), DISK, labels=["x"]) as work:
        plan = work.plan()
    assert store.of("put") == store.of("create") == store.of("delete") == []
    assert [layer.publishes for layer in plan.layers] == [False, False, True]
    assert [len(layer.files) for layer in plan.layers] == [1, 1, 1]
    assert plan.bytes_to_read == 8 * MiB + 192 * 1024
    report = ship(chain[-1], repo)
    assert report.bytes_read == plan.bytes_to_read
    assert report.layers_sent == len(plan.layers)


def test_progress_ends_at_the_planned_total(repo: Repository, chain: list[Path]) -> None:
    said: list[Event] = []
    with shipment(chain[-1], repo, DISK) as work:
        work.run(on_event=said.append)
    progress = [each for each in said if isinstance(each, Progress)]
    assert progress[0].done == 0
    assert [each.done for each in progress] == sorted(each.done for each in progress)
    assert progress[-1].done == progress[-1].total == 8 * MiB + 192 * 1024


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """An image of 12 MiB of which no block is like another."""
    (tmp_path / "noise").write_bytes(os.urandom(12 * MiB))
    return build(tmp_path / "noisy", [Layer(12 * MiB, [f"write -s {tmp_path / 'noise'} 0 12M"])])[-1]


def test_progress_counts_what_has_arrived_not_what_was_read(
    repo: Repository, noisy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two packs: until both are in the store not all has arrived, although all was read."""
    monkeypatch.setattr(packs, "PACK_BYTES", 8 * MiB)
    shown: list[int] = []
    before: list[tuple[int, int]] = []

    class Watched(StoreWrapper):
        def put(self, name: str, data: Data) -> None:
            with held:
                before.append((shown[-1] if shown else 0, len(durable)))
            self.inner.put(name, data)
            if name.startswith("packs/"):
                with held:
                    durable.append(name)

    held, durable = threading.Lock(), list[str]()
    with shipment(noisy, again(repo, Watched(repo.store)), DISK) as work:
        total = work.plan().bytes_to_read
        work.run(on_event=lambda event: shown.append(event.done) if isinstance(event, Progress) else None)
    assert (shown[0], shown[-1]) == (0, total)
    assert shown == sorted(shown)
    assert all(done == 0 for done, packs_there in before if not packs_there), "nothing was there yet"
    assert all(done < total for done, packs_there in before if packs_there < 2), "half of it was still to be sent"


def test_a_slow_link_shows_a_bar_that_is_not_full(noisy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rate holds back has not arrived: when the bar is full, nothing is waited for any more."""
    monkeypatch.setattr(packer, "UPLOADS", 1)
    now, full_at = 0.0, -1.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    def on_event(event: Event) -> None:
        nonlocal full_at
        if isinstance(event, Progress) and event.done == event.total and full_at < 0:
            full_at = now

    whole = repository(MemoryStore(), block_size=256 * 1024)
    slow = ThrottledStore(whole.store, upload=10_000, clock=lambda: now, sleep=sleep)
    with shipment(noisy, again(whole, slow), DISK) as work:
        work.run(on_event=on_event)
    assert now > 1000
    assert full_at > 0.9 * now, "only records and an index are left"


# ---- who else is at work


def test_an_image_written_to_meanwhile_is_refused(repo: Repository, chain: list[Path]) -> None:
    """By somebody who does not care for locks. No point and no layer is published."""

    def meddle(event: Event) -> None:
        if isinstance(event, Progress) and event.done:
            with chain[0].open("r+b") as file:
                file.seek(1 << 20)
                file.write(b"!")

    with shipment(chain[-1], repo, DISK) as work, pytest.raises(Conflict, match="written to while"):
        work.run(on_event=meddle)
    assert repo.disk(DISK).read() is None
    assert list(repo.store.list("layers/")) == []
    assert list(repo.store.list("leases/")) == []


@pytest.mark.parametrize("held", [0, 2])
def test_an_image_that_a_guest_may_write_is_busy(repo: Repository, chain: list[Path], held: int) -> None:
    with _qemu_holding(chain[held]), pytest.raises(Busy, match="qemu-io") as raised:
        ship(chain[-1], repo)
    assert str(chain[held]) in str(raised.value)
    ship(chain[-1], repo)


def test_while_an_image_is_shipped_no_guest_can_start_on_it(repo: Repository, chain: list[Path]) -> None:
    with shipment(chain[-1], repo, DISK):
        for path in chain:
            done = subprocess.run(["qemu-io", "-f", "qcow2", "-c", "quit", path], check=False, capture_output=True)
            assert b"lock" in done.stderr
            assert done.returncode != 0
    write(chain[-1], "write -P 1 0 512")


class _qemu_holding:  # noqa: N801
    """qemu-io with the image open for writing."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._child = subprocess.Popen(
            ["qemu-io", "-f", "qcow2", str(self._path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write(b"length\n")
        self._child.stdin.flush()
        while b"iB" not in self._child.stdout.read(1) + self._child.stdout.readline():
            time.sleep(0.01)

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.communicate()


def test_two_shippers_of_one_disk_both_get_their_point(repo: Repository, tmp_path: Path) -> None:
    """And of different disks at the same time; no point is lost."""
    images = []
    for number in range(4):
        image = tmp_path / f"{number}.raw"
        qemu_img("create", "-q", "-f", "raw", image, "2M")
        write(image, f"write -P {number + 1} {number}00k 512k", image_format="raw")
        images.append(image)
    start = threading.Barrier(4)

    def shipper(number: int) -> int:
        with shipment(images[number], again(repo), "one" if number < 2 else f"disk{number}") as work:
            start.wait()
            return work.run().point or 0

    with ThreadPoolExecutor(4) as pool:
        numbers = list(pool.map(shipper, range(4)))
    assert sorted(numbers[:2]) == [1, 2]
    assert numbers[2:] == [1, 1]
    for number, disk in enumerate(["one", "one", "disk2", "disk3"]):
        restore(repo, tmp_path / f"out{number}.raw", numbers[number], disk=disk)
        assert same_bytes(tmp_path / f"out{number}.raw", images[number])


def test_layers_merged_away_meanwhile_are_a_conflict(repo: Repository, chain: list[Path]) -> None:
    ship(chain[0], repo)
    ship(chain[1], repo)
    merged = False

    def merge(event: Event) -> None:
        nonlocal merged
        if isinstance(event, Progress) and not merged:
            merged = True
            RepositoryMerge(again(repo), DISK, Policy(last=1)).run()

    with shipment(chain[2], again(repo), DISK) as work, pytest.raises(Conflict, match="merged away meanwhile"):
        work.run(on_event=merge)
    report = ship(chain[2], repo)
    assert (report.layers_present, report.bytes_read) == (2, 64 * 1024), "the merged layer is known by its sources"


def test_layers_collected_after_a_plan_are_no_damage(repo: Repository, tmp_path: Path) -> None:
    """Merged away, and then deleted with their packs, before this shipment had its lease."""
    layers = [[f"write -P {n + 1} {n}M 512k" for n in range(8)], ["write -P 200 1M 6M"], ["write -P 3 2M 64k"]]
    files = build(tmp_path / "c", [Layer(16 * MiB, commands) for commands in layers])
    ship(files[0], repo)
    ship(files[1], repo)
    with shipment(files[2], again(repo), DISK) as work:
        RepositoryMerge(again(repo), DISK, Policy(last=1)).run()
        assert gc.run(again(repo)).packs_deleted > 0
        assert work.plan().layers_present == 2
        assert work.run().point == 3
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", flat(files[2], tmp_path / "flat"))


# ---- labels and names


def test_labels_are_kept(repo: Repository, chain: list[Path]) -> None:
    ship(chain[-1], repo, labels=["before update", "Übung"])
    assert repo.catalogue(DISK).points[0].labels == ("before update", "Übung")


@pytest.mark.parametrize("label", ["", " a", "a ", "latest", "7", "7a", "a@b", "a::b", "a\nb", "x" * 101])
def test_labels_that_would_be_taken_for_something_else(label: str) -> None:
    with pytest.raises(InvalidInput, match="cannot be a label"):
        check_label(label)


def test_nothing_is_opened_for_a_bad_request(repo: Repository, tmp_path: Path) -> None:
    for image, disk, labels, error, words in [
        (tmp_path / "none.qcow2", DISK, (), NotFound, "none.qcow2: no such file"),
        (tmp_path, DISK, (), InvalidInput, "a directory, not a regular file"),
        (tmp_path / "none.qcow2", DISK, ("7",), InvalidInput, "cannot be a label"),
    ]:
        with pytest.raises(error, match=words):
            ship(image, repo, disk=disk, labels=labels)
    assert list(repo.store.list("")) == []


def test_a_file_with_a_time_of_another_age_ships(repo: Repository, tmp_path: Path) -> None:
    """Sealed layers get the time of their file, whatever it says."""
    stack = build(tmp_path / "s", [Layer(MiB, ["write -P 1 0 64k"]), Layer(MiB, ["write -P 2 0 64k"])])
    os.utime(stack[0], ns=(-(10**18), -(10**18)))
    assert ship(stack[-1], repo, each_layer=True).points == (1, 2)


def test_a_local_repository_ships_as_the_memory_one(tmp_path: Path) -> None:
    opened = local(tmp_path / "repo")
    stack = random_stack(tmp_path / "stack", 99)
    ship(stack.files[-1], opened)
    restore(opened, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", stack.shown[-1])
    assert {path.name for path in (tmp_path / "repo").iterdir()} <= {
        "packs",
        "index",
        "layers",
        "disks",
        "leases",
        "tmp",
        ".reserve",
    }
