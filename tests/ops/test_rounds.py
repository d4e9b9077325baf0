"""An image goes on in every way that is its owner's, and is shipped by turns: never refused, every point right.

Bytes follow the change, not the disk: what is sent of a rewritten image is compared with what is there.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from snapchain.destination.protocol import Destination
from snapchain.destinations import open_destination
from snapchain.errors import Conflict, Diverged
from snapchain.merge import plan as merge_plan, run as merge_run
from snapchain.merge.request import MergeRequest
from snapchain.model.retention import Policy
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship.run import Divergence, Files, ShipReport, ShipRequest, plan, run
from snapchain.repository.opening import create_repository
from snapchain.source import sealing as snapshot
from tests.exhaustive import examples
from tests.ops.shipping import DISK, MiB, same_bytes
from tests.ops.stacks import Layer, build, flat, qemu_img, write

SIZE = 16 * MiB
DATA = 8 * MiB
LEAF = 64 * 1024


class Kind(Protocol):
    def __call__(self, directory: Path, /) -> str: ...


def _repository(directory: Path) -> str:
    create_repository(str(directory / "repo"), passphrase=lambda: None, encryption="none")
    return str(directory / "repo")


def _replica(directory: Path) -> str:
    return f"dir:{directory}/replica"


both = pytest.mark.parametrize("kind", [_repository, _replica], ids=["repository", "replica"])


class Disk:
    """One image, what each point of it showed, and where it goes."""

    def __init__(self, directory: Path, kind: Kind, *, size: int = SIZE) -> None:
        self.directory = directory
        self.noise = directory / "noise"
        self.noise.write_bytes(random.Random(1).randbytes(DATA))
        self.image = build(directory / "c", [Layer(size)])[0]
        write(self.image, f"write -s {self.noise} 0 {DATA}")
        self.url = kind(directory)
        self.shown: dict[int, Path] = {}

    def open(self) -> Destination:
        return open_destination(self.url, passphrase=lambda: None, writing=True)

    def request(self, **options: object) -> ShipRequest:
        return ShipRequest(image=self.image, disk=DISK, format="qcow2", **options)  # type: ignore[arg-type]

    def ship(self, **options: object) -> ShipReport:
        report = run(self.request(**options), self.open())
        assert report.point is not None
        self.shown[report.point] = flat(self.image, self.directory / f"{report.point}.{len(self.url)}.shown")
        return report

    def check(self, *points: int) -> None:
        """These points, or all, restore to what the image showed."""
        for point in points or self.shown:
            out = self.directory / "out.raw"
            Restoration(self.open(), DISK, out, point=str(point)).run()
            assert same_bytes(out, self.shown[point]), point
            out.unlink()


@pytest.fixture(params=[_repository, _replica], ids=["repository", "replica"])
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Disk:
    found = Disk(tmp_path, request.param)
    found.ship()
    return found


def assert_small(report: ShipReport, leaves: int = 1) -> None:
    assert (report.layers_sent, report.carried_bytes <= leaves * LEAF + 20_000) == (1, True), report


def test_written_to_in_place(disk: Disk) -> None:
    """Refused for ever by replicas, once."""
    for number in range(3):
        write(disk.image, f"write -P {number + 1} {number}M 4k")
        assert_small(disk.ship())
        again = disk.ship()
        assert (again.layers_sent, again.bytes_sent < 20_000) == (0, True), "and it is known again"
    disk.check()


def test_written_to_and_sealed(disk: Disk) -> None:
    write(disk.image, "write -P 1 1M 4k")
    snapshot.run(snapshot.plan(disk.image))
    write(disk.image, "write -P 2 2M 4k")
    assert_small(disk.ship(), leaves=2)
    write(disk.image, "write -P 3 10M 4k")
    assert_small(disk.ship(), leaves=2)
    disk.check()


def test_zeroes_hide_what_is_gone(disk: Disk) -> None:
    write(disk.image, "write -z 1M 2M", "discard 4M 2M", "write -z 7M 512")
    report = disk.ship()
    assert_small(report, leaves=1)
    disk.check()


@pytest.mark.parametrize("size", [DATA, 5 * MiB + 512, 24 * MiB, 17 * MiB + 1536])
def test_another_size(disk: Disk, size: int) -> None:
    qemu_img("resize", "-q", *(["--shrink"] if size < SIZE else []), disk.image, str(size))
    write(disk.image, "write -P 1 4M 4k")
    assert_small(disk.ship(), leaves=2)
    qemu_img("resize", "-q", disk.image, "32M")
    write(disk.image, "write -P 1 25M 4k")
    assert_small(disk.ship(), leaves=2)
    disk.check()


def test_merged_after_it_was_written_to(disk: Disk) -> None:
    snapshot.run(snapshot.plan(disk.image))
    write(disk.image, "write -P 1 1M 4k")
    disk.ship()
    write(disk.image, "write -P 2 2M 4k")
    merge_run.run(merge_plan.plan(MergeRequest(image=disk.image, flatten=True, image_format="qcow2")))
    assert_small(disk.ship())
    write(disk.image, "write -P 3 3M 4k")
    assert_small(disk.ship())
    disk.check()


def test_a_merge_by_other_hands(disk: Disk) -> None:
    overlay = disk.image.with_name("overlay.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", disk.image.name, "-F", "qcow2", overlay)
    write(overlay, "write -P 1 1M 4k")
    root, disk.image = disk.image, overlay
    disk.ship()
    write(overlay, "write -P 2 2M 4k")
    qemu_img("commit", "-q", "-d", "-f", "qcow2", overlay)
    disk.image = root
    assert_small(disk.ship())
    disk.check()


def test_a_top_that_is_shipped_while_it_grows_costs_itself(disk: Disk) -> None:
    """After a comparison, too: the root is not read again for every night's top."""
    write(disk.image, "write -P 1 1M 4k")
    disk.ship()
    snapshot.run(snapshot.plan(disk.image))
    for night in range(4):
        write(disk.image, f"write -P {night + 2} {night * 2}M 64k")
        disk.ship()
        write(disk.image, f"write -P {night + 20} {night * 2 + 1}M 64k")
        report = disk.ship()
        assert report.bytes_read <= 8 * LEAF * 2, (night, report)
        snapshot.run(snapshot.plan(disk.image))
    disk.check()


def test_a_plan_of_what_has_to_be_compared_reads_nothing(disk: Disk) -> None:
    write(disk.image, "write -P 1 1M 4k")
    planned = plan(disk.request(), disk.open())
    assert [layer.publishes for layer in planned.layers] == [True]
    assert planned.bytes_to_read == DATA
    report = disk.ship()
    assert report.bytes_read == planned.bytes_to_read


@both
def test_every_layer_as_a_point(tmp_path: Path, kind: Kind) -> None:
    disk = Disk(tmp_path, kind)
    for number in range(2):
        snapshot.run(snapshot.plan(disk.image))
        write(disk.image, f"write -P {number + 1} {number}M 4k")
    report = run(disk.request(files=Files.EACH, each_point=True), disk.open())
    assert (report.layers_sent, report.points, report.point) == (3, (1, 2, 3), 3)
    for number, file in enumerate([disk.image.with_name("disk.1.qcow2"), disk.image.with_name("disk.2.qcow2")], 1):
        disk.shown[number] = flat(file, tmp_path / f"{number}.shown")
    disk.shown[3] = flat(disk.image, tmp_path / "3.shown")
    disk.check()


def test_what_nothing_connects_with_the_disk(tmp_path: Path) -> None:
    disk = Disk(tmp_path, _replica)
    disk.ship()
    other = build(tmp_path / "d", [Layer(SIZE, ["write -P 9 0 1M"])])[0]
    with pytest.raises(Diverged, match="the replica holds another disk under this name"):
        run(ShipRequest(image=other, disk=DISK), disk.open())


def _goes_back(disk: Disk) -> Path:
    """The newest layer there was made of all files of an image and of one above them; this is the lower image."""
    disk.ship()
    snapshot.run(snapshot.plan(disk.image))
    write(disk.image, "write -P 1 1M 4k", "write -z 4M 2M")
    disk.ship()
    write(files_of(disk.image)[0], "write -P 2 2M 4k")
    disk.ship()
    return files_of(disk.image)[0]


def test_a_repository_takes_an_image_that_went_back(tmp_path: Path) -> None:
    disk = Disk(tmp_path, _repository)
    disk.image = _goes_back(disk)
    disk.ship()
    disk.open().merging(DISK, Policy(last=1)).run()
    assert plan(disk.request(), disk.open()).note is None
    disk.check(4)


def test_a_repository_takes_a_part_of_a_merged_layer(tmp_path: Path) -> None:
    disk = Disk(tmp_path, _repository)
    lower = _goes_back(disk)
    disk.open().merging(DISK, Policy(last=1)).run()
    disk.image = lower
    planned = plan(disk.request(), disk.open())
    assert planned.note == f"disk {DISK} is newer than this image: all of it is read again"
    assert_small(disk.ship(), leaves=2 + 2 * MiB // LEAF)
    disk.check(3, 4)


def test_a_replica_that_is_ahead_says_so(tmp_path: Path) -> None:
    """Also where its newest layer came of a comparison."""
    disk = Disk(tmp_path, _replica)
    disk.image = _goes_back(disk)
    with pytest.raises(Diverged, match="the replica is ahead"):
        disk.ship()


def test_what_another_host_wrote(tmp_path: Path) -> None:
    """It has taken the disk over: this host's image went on from what is there, and is refused by the epoch alone."""
    disk = Disk(tmp_path, _replica)
    disk.ship()
    theirs = Path(shutil.copytree(disk.image.parent, tmp_path / "there")) / disk.image.name
    run(ShipRequest(image=theirs, disk=DISK, epoch=2), disk.open())
    write(disk.image, "write -P 1 1M 4k")
    with pytest.raises(Conflict, match="in epoch 1, and here it is in epoch 2"):
        disk.ship()


def test_a_copy_with_new_names_is_known_and_goes_on(disk: Disk, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    shutil.copy(disk.image, copy)
    disk.image = copy
    assert disk.ship().carried_bytes < 20_000
    again = disk.ship()
    assert (again.layers_sent, again.carried_bytes) == (0, 0), "known by its names, or by what was counted"
    if disk.open().traits.branches:
        assert again.bytes_read == 0
    disk.check()


STEPS: dict[str, Callable[[Disk, random.Random], None]] = {}


def step(work: Callable[[Disk, random.Random], None]) -> Callable[[Disk, random.Random], None]:
    STEPS[work.__name__] = work
    return work


@step
def scribble(disk: Disk, draw: random.Random) -> None:
    size = qemu_size(disk.image)
    for _ in range(draw.randrange(1, 4)):
        start = draw.randrange(size) // 512 * 512
        length = min(size - start, draw.choice([512, 4096, 3 * LEAF, 4 * LEAF]))
        verb = draw.choice([f"write -P {draw.randrange(1, 255)}", "write -z", "discard"])
        write(disk.image, f"{verb} {start} {length}")


@step
def seal(disk: Disk, draw: random.Random) -> None:
    _ = draw
    snapshot.run(snapshot.plan(disk.image))


@step
def merge(disk: Disk, draw: random.Random) -> None:
    if len(files_of(disk.image)) > 1:
        flatten = draw.random() < 0.5
        merge_run.run(merge_plan.plan(MergeRequest(image=disk.image, flatten=flatten, image_format="qcow2")))


@step
def merge_some(disk: Disk, draw: random.Random) -> None:
    """Any neighbours, by name."""
    files = files_of(disk.image)
    if len(files) > 2:
        first, last = sorted(draw.sample(range(1, len(files)), 2)) if len(files) > 3 else (1, 2)
        request = MergeRequest(
            image=disk.image, from_layer=str(files[first]), to_layer=str(files[last]), image_format="qcow2"
        )
        merge_run.run(merge_plan.plan(request))


@step
def commit(disk: Disk, draw: random.Random) -> None:
    """By other hands than snapchain's."""
    _ = draw
    files = files_of(disk.image)
    if len(files) > 1:
        qemu_img("commit", "-q", "-d", "-f", "qcow2", disk.image)
        disk.image.unlink()
        disk.image = files[-2].rename(disk.image)


@step
def resize(disk: Disk, draw: random.Random) -> None:
    size = draw.randrange(10 * MiB, 20 * MiB) // 512 * 512
    shrinks = ["--shrink"] if size < qemu_size(disk.image) else []
    qemu_img("resize", "-q", *shrinks, disk.image, str(size))


@step
def merge_there(disk: Disk, draw: random.Random) -> None:
    """Whatever it keeps, what is there still reads as it did, and is known."""
    if disk.shown:
        disk.open().merging(DISK, Policy(last=draw.randrange(1, 4))).run()
        there = {point.point for point in disk.open().disks(DISK)[0].points}
        for point in disk.shown.keys() - there:
            disk.shown.pop(point).unlink()


WEIGHTS = {"scribble": 6, "seal": 6, "merge": 4, "merge_some": 3, "commit": 1, "resize": 2, "merge_there": 2}


def files_of(image: Path) -> list[Path]:
    """Root first."""
    chain = json.loads(qemu_img("info", "--backing-chain", "--output=json", image))
    return [Path(each["filename"]) for each in reversed(chain)]


def qemu_size(image: Path) -> int:
    return int.from_bytes(image.read_bytes()[24:32])


def live(disk: Disk, draw: random.Random) -> None:
    """Until the next shipment."""
    for name in ["scribble", *draw.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=draw.randrange(4))]:
        STEPS[name](disk, draw)


@pytest.mark.sampled
@pytest.mark.parametrize("seed", range(examples(2, times=3)))
@both
def test_ten_rounds(tmp_path: Path, kind: Kind, seed: int) -> None:
    draw = random.Random(seed)
    disk = Disk(tmp_path, kind)
    disk.ship()
    for _ in range(10):
        live(disk, draw)
        report = disk.ship()
        assert report.carried_bytes < 3 * MiB, "by the change, not by the 8 MiB of the disk"
        disk.check(*[report.point or 0])
    disk.check()


@pytest.mark.sampled
@pytest.mark.parametrize("seed", range(examples(1, times=6)))
def test_ten_rounds_by_turns(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a repository, to a replica here, and to one behind ssh: what one of them was sent is no news of another."""
    monkeypatch.setenv("SNAPCHAIN_SSH", str(_ssh(tmp_path)))
    monkeypatch.setenv("SNAPCHAIN_REMOTE", shlex.join([sys.executable, "-m", "snapchain"]))
    draw = random.Random(seed)
    disk = Disk(tmp_path, _repository)
    places = [(disk.url, disk.shown), (_replica(tmp_path), {}), (f"ssh://there{tmp_path}/far", {})]
    for number in range(12):
        disk.url, disk.shown = places[number % 3] if number < 6 else draw.choice(places)
        live(disk, draw)
        report = disk.ship()
        assert number < 3 or report.carried_bytes < 6 * MiB, "by the change, not by the 8 MiB of the disk"
        disk.check(*[report.point or 0])
    for disk.url, disk.shown in places:
        disk.check()
        assert disk.open().verify(DISK, share=1.0).ok


def _ssh(directory: Path) -> Path:
    """A program that runs the last word of its command line by a shell, here."""
    script = directory / "ssh"
    script.write_text('#!/bin/sh\nfor command; do :; done\nexec sh -c "$command"\n')
    script.chmod(0o755)
    return script


def test_a_cut_is_still_what_its_user_wants(tmp_path: Path) -> None:
    disk = Disk(tmp_path, _replica)
    disk.ship()
    write(disk.image, "write -P 1 1M 4k")
    report = disk.ship(divergence=Divergence.CUT_REPLICA)
    assert report.data_bytes == DATA
    disk.shown.pop(1)
    disk.check()


@pytest.mark.parametrize("newer", [False, True], ids=["as shipped", "written to since"])
def test_another_file_under_the_same_path(disk: Disk, tmp_path: Path, *, newer: bool) -> None:
    """By `qemu-img convert`, a move to another filesystem, or a restore: nothing of it has a name that is known."""
    snapshot.run(snapshot.plan(disk.image))
    write(disk.image, "write -P 1 1M 4k")
    disk.ship()
    if newer:
        write(disk.image, "write -P 2 3M 4k")
    packed = tmp_path / "packed.qcow2"
    qemu_img("convert", "-q", "-f", "qcow2", "-O", "qcow2", disk.image, packed)
    packed.rename(disk.image)
    write(disk.image, "write -P 3 2M 4k")
    assert_small(disk.ship(), leaves=2)
    disk.check()


def test_going_on_from_an_older_point(disk: Disk) -> None:
    for number in range(2):
        write(disk.image, f"write -P {number + 1} {number}M 4k")
        disk.ship()
    Restoration(disk.open(), DISK, disk.image, point="1", force=True).run()
    write(disk.image, "write -P 3 2M 4k")
    assert_small(disk.ship(), leaves=3)
    disk.check()


def test_a_copy_that_went_on_elsewhere_is_another_disk(tmp_path: Path) -> None:
    """Both may be written to: nothing tells which of them the disk is."""
    disk = Disk(tmp_path, _replica)
    disk.ship()
    copy = tmp_path / "copy.qcow2"
    shutil.copy(disk.image, copy)
    write(copy, "write -P 1 1M 4k")
    with pytest.raises(Diverged, match="the replica holds another disk under this name"):
        run(ShipRequest(image=copy, disk=DISK), disk.open())


def test_a_merge_of_what_is_there_with_what_is_not(disk: Disk) -> None:
    """The merged file is no layer that the destination lacks: only what is new in it is."""
    for number in range(2):
        snapshot.run(snapshot.plan(disk.image))
        write(disk.image, f"write -P {number + 1} {number}M 4k")
    merge_run.run(
        merge_plan.plan(MergeRequest(image=disk.image, flatten=True, policy=Policy(last=1), image_format="qcow2"))
    )
    write(disk.image, "write -P 3 3M 4k")
    assert disk.ship().carried_bytes < MiB, "by the change, and what a repository records of a merged file"
    assert disk.ship().carried_bytes < 20_000
    disk.check()
