"""Disks that go to another host and back, again and again: nothing is in their way, and what they left goes away."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.cli import main
from snapchain.replica.left_behind import remove_left_behind
from snapchain.replica.store import ReplicaDisk, open_replica
from snapchain.source.notes import Given, LayerNote, Notes
from tests.ops.stacks import Layer, MiB, build, clean, flat, qemu_img, same, write

DISK = "web1/vda"


def disk_at(place: Path) -> ReplicaDisk:
    return open_replica(place).disk(DISK)


def overlay_at(place: Path) -> Path:
    """What the guest of a disk that was handed over writes to."""
    disk = disk_at(place)
    catalogue = disk.read()
    assert catalogue is not None
    assert catalogue.handover is not None
    return disk.directory / catalogue.handover.overlay


def moved(image: Path, place: Path) -> Path:
    assert main(["migrate", str(image), f"dir:{place}::{DISK}", "--offline"]) == 0
    return overlay_at(place)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(tmp_path / "images", [Layer(4 * MiB, ["write -P 1 0 1M"])], names=["web1.qcow2"])[-1]


def left(place: Path) -> list[str]:
    return sorted(path.name for path in overlay_at(place).parent.glob("*.qcow2"))


@pytest.mark.parametrize("merges", [False, True])
def test_a_disk_goes_forth_and_back(image: Path, tmp_path: Path, merges: bool) -> None:
    """Also where a merge has mixed what came from the other host with what was written here, and without a write."""
    for turn in range(5):
        place = tmp_path / "ba"[turn % 2]
        image = moved(image, place)
        if turn == 3:
            image = moved(moved(image, tmp_path / "b"), place)
        write(image, f"write -P {turn + 2} {turn * 512}k 512k")
        if merges:
            assert main(["snapshot", str(image)]) == 0
            write(image, f"write -P {turn + 20} 3M 64k")
            assert main(["merge", str(image)]) == 0
        shown = flat(image, tmp_path / "shown")
        assert clean(image)
    assert same(image, shown)
    for turn in range(5):
        assert shown.read_bytes()[turn * 512 * 1024] == turn + 2


def test_what_was_left_is_removed_once_the_disk_is_back(image: Path, tmp_path: Path) -> None:
    at_b = moved(image, tmp_path / "b")
    write(at_b, "write -P 2 1M 1M")
    at_a = moved(at_b, tmp_path / "a")
    assert remove_left_behind(disk_at(tmp_path / "b")) == []  # the guest is not back
    write(at_a, "write -P 3 2M 1M")
    now = moved(at_a, tmp_path / "b")
    shown = flat(now, tmp_path / "shown")
    gone = remove_left_behind(disk_at(tmp_path / "b"))
    assert {path.name for path in gone} == {"web1.qcow2", "web1.1.qcow2"}
    assert left(tmp_path / "b") == [now.name]
    assert not list(now.parent.glob(".snapchain-layer-*"))
    assert same(now, shown)
    assert remove_left_behind(disk_at(tmp_path / "b")) == []


def changed(path: Path, **fields: object) -> None:
    def change(note: LayerNote) -> LayerNote:
        assert note.given is not None
        return note.model_copy(update={"given": Given.model_validate(note.given.model_dump() | fields)})

    Notes().change(path, change)


@pytest.mark.parametrize("why", ["writable", "taken over", "older", "unconfirmed", "another disk", "no mark", "used"])
def test_what_may_hold_the_only_copy_stays(image: Path, tmp_path: Path, why: str) -> None:
    at_b = moved(image, tmp_path / "b")
    write(at_b, "write -P 2 1M 1M")
    moved(moved(at_b, tmp_path / "a"), tmp_path / "b")
    files = [at_b.with_name(name) for name in ("web1.qcow2", "web1.1.qcow2")]
    for path in files:
        match why:
            case "writable":
                path.chmod(0o600)
            case "taken over":
                changed(path, taken_over="kvm3")
            case "older":
                changed(path, epoch=2)
            case "unconfirmed":
                changed(path, confirmed=False)
            case "another disk":
                changed(path, disk="web1/vdb")
            case "no mark":
                Notes().change(path, lambda note: note.model_copy(update={"given": None}))
            case "used":
                top = max(files, key=lambda each: each.stat().st_mtime_ns)
                qemu_img("create", "-q", "-f", "qcow2", "-b", top, "-F", "qcow2", at_b.with_name("clone.qcow2"))
                break
    assert remove_left_behind(disk_at(tmp_path / "b")) == [] or why == "used"
    if why == "used":
        assert clean(at_b.with_name("clone.qcow2"))
        flat(at_b.with_name("clone.qcow2"), tmp_path / "shown")
    else:
        assert all(path.exists() for path in files)
