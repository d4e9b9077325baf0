"""Offline snapshots: the same path, the same content, at every instant."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, Unavailable, Unsupported
from snapchain.host import files
from snapchain.image import scan
from snapchain.image.qcow2 import write as overlay_module
from snapchain.model.events import Event, Notice
from snapchain.source import sealing as snapshot
from snapchain.testing import qemu_img
from snapchain.testing.qemu_img import Qcow2Options
from tests.ops.killing import killed_at_every_step
from tests.ops.stacks import names, standing
from tests.servers import qemu_nbd

MiB = 1 << 20


def write(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    given = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", image_format, *given, path], check=True, capture_output=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vm" / "disk.qcow2"
    path.parent.mkdir()
    qemu_img.create(path, 4 * MiB, options=Qcow2Options(cluster_size=32768))
    write(path, "write -P 1 0 1M", "write -P 2 3M 4k")
    return path


@pytest.fixture
def before(image: Path, tmp_path: Path) -> Path:
    """What the image read at first, flat."""
    flat = tmp_path / "before.raw"
    qemu_img.convert(image, flat, formats=("qcow2", "raw"))
    return flat


def same(image: Path, flat: Path) -> bool:
    return qemu_img.compare(image, flat, formats=("qcow2", "raw")) is None


def take(image: Path, **options: object) -> snapshot.SnapshotReport:
    return snapshot.run(snapshot.plan(image, **options))  # type: ignore[arg-type]


def test_seals_the_top_under_its_path(image: Path, before: Path) -> None:
    inode = image.stat().st_ino
    report = take(image)
    sealed = image.with_name("disk.1.qcow2")
    assert (report.image, report.overlay, report.sealed) == (image, image, sealed)
    assert (report.virtual_size, report.cluster_size, report.layers) == (4 * MiB, 32768, 2)
    assert sealed.stat().st_ino == inode
    assert names(image.parent) == ["disk.1.qcow2", "disk.qcow2"]
    said = qemu_img.info(image, "qcow2")
    assert (said.backing_filename, said.backing_filename_format) == ("disk.1.qcow2", "qcow2")
    assert qemu_img.check(image).clean
    assert same(image, before)
    write(image, "write -P 9 2M 64k")
    assert same(sealed, before)
    assert not same(image, before)


def test_again_and_again(image: Path, before: Path) -> None:
    for number in range(1, 12):
        assert take(image).sealed.name == f"disk.{number}.qcow2"
    with scan(image) as chain:
        assert [file.path.name for file in chain.files] == [*(f"disk.{n}.qcow2" for n in range(1, 12)), "disk.qcow2"]
    assert same(image, before)


def test_planning_changes_nothing(image: Path) -> None:
    before = standing(image)
    planned = snapshot.plan(image)
    assert planned.model_dump(mode="json")["sealed"] == str(image.with_name("disk.1.qcow2"))
    assert standing(image) == before
    assert names(image.parent) == ["disk.qcow2"]


@pytest.mark.parametrize("options", [["-r"], []])
def test_refused_while_somebody_has_it_open(image: Path, options: list[str]) -> None:
    command = ["qemu-io", *options, "-f", "qcow2", str(image)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        user.stdout.readline()
        with pytest.raises(Busy, match=rf"qemu-io \(pid {user.pid}\)"):
            take(image)
        user.terminate()
    assert names(image.parent) == ["disk.qcow2"]
    take(image)


def test_refused_while_a_server_has_it_open(image: Path) -> None:
    with qemu_nbd(image) as user, pytest.raises(Busy, match=rf"qemu-nbd \(pid {user.pid}\)"):
        take(image)
    assert names(image.parent) == ["disk.qcow2"]
    take(image)


def test_nobody_can_open_it_meanwhile(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link
    seen: list[int] = []

    def link(*arguments: object, **named: object) -> None:
        seen.append(subprocess.run(["qemu-io", "-f", "qcow2", "-c", "length", image], check=False).returncode)
        real(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", link)
    take(image)
    assert seen == [1]


def test_killed_at_every_step(image: Path, before: Path) -> None:
    directory = image.parent
    pristine = directory.with_name("pristine")
    shutil.copytree(directory, pristine)
    deaths = 0
    for where in killed_at_every_step(lambda: take(image)):
        deaths += 1
        assert same(image, before), where
        assert qemu_img.check(image).clean, where
        layers = take(image).layers
        left = names(directory)
        assert left == [*(f"disk.{number}.qcow2" for number in range(1, layers)), "disk.qcow2"], where
        assert same(image, before), where
        write(image, "write -P 7 1M 4k")
        assert same(image.with_name("disk.1.qcow2"), before), where
        shutil.rmtree(directory)
        shutil.copytree(pristine, directory)
    assert deaths >= 7


@pytest.mark.parametrize("call", ["link", "rename", "fsync", "fchmod"])
def test_a_failing_call_leaves_the_image(call: str, image: Path, before: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_named: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(Unavailable, match="no space"):
            take(image)
    assert same(image, before)
    assert names(image.parent) == ["disk.qcow2"]
    assert take(image).layers == 2
    assert names(image.parent) == ["disk.1.qcow2", "disk.qcow2"]


def on_another_file(overlay: Path) -> None:
    other = overlay.with_name("other.qcow2")
    qemu_img.create(other, 4 * MiB, options=Qcow2Options())
    rebase(overlay, other.name)


def with_data(overlay: Path) -> None:
    rebase(overlay, "")
    write(overlay, "write -P 5 0 4k")
    rebase(overlay, "disk.1.qcow2")


def rebase(overlay: Path, backing: str) -> None:
    """The link alone."""
    subprocess.run(["qemu-img", "rebase", "-u", "-q", "-f", "qcow2", "-b", backing, "-F", "qcow2", overlay], check=True)


@pytest.mark.parametrize("wrong", [on_another_file, with_data], ids=lambda wrong: wrong.__name__)
def test_a_wrong_overlay_does_not_take_the_place_of_the_image(
    wrong: Callable[[Path], None], image: Path, before: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = overlay_module.write_overlay

    def write_overlay(fd: int, *arguments: Any, **named: Any) -> None:
        real(fd, *arguments, **named)
        monkeypatch.undo()
        wrong(Path(f"/proc/self/fd/{fd}").readlink())

    monkeypatch.setattr(snapshot, "write_overlay", write_overlay)
    with pytest.raises(Conflict, match="the new overlay does not have the sealed file as its backing file") as caught:
        take(image)
    assert caught.value.subject == str(image)
    assert same(image, before)
    assert take(image).layers == 2
    assert same(image, before)


@pytest.mark.root
@pytest.mark.parametrize("label", [(), ("x",)], ids=["plain", "labelled"])
def test_a_full_disk_is_one_clear_error(label: tuple[str, ...], image: Path, tmp_path: Path) -> None:
    """As every other full disk, qemu-img's words not among it, and nothing left behind."""
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", full], check=True)
    try:
        there = full / image.name
        shutil.copy(image, there)
        with suppress(OSError), (full / "fill").open("wb", buffering=0) as fill:
            while fill.write(bytes(4096)):
                pass
        with pytest.raises(Unavailable, match="no space left on device") as caught:
            take(there, labels=label)
        assert (caught.value.subject, caught.value.exit_code) == (str(full), 7)
        assert "free some space" in str(caught.value.hint)
        assert names(full) == [image.name, "fill"]
    finally:
        subprocess.run(["umount", full], check=True)


def test_standing_is_kept(image: Path) -> None:
    image.chmod(0o640)
    os.setxattr(image, "user.note", b"x")
    if os.geteuid() == 0:
        os.chown(image, 64055, 994)
    take(image)
    sealed = image.with_name("disk.1.qcow2").stat()
    assert (image.stat().st_mode, image.stat().st_uid, image.stat().st_gid) == (
        sealed.st_mode,
        sealed.st_uid,
        sealed.st_gid,
    )
    assert os.getxattr(image, "user.note") == b"x"


def test_options_of_the_sealed_file_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    qemu_img.create(path, MiB + 512, options=Qcow2Options(cluster_size=16384, extended_l2=True))
    take(path)
    with scan(path) as chain:
        top = chain.files[-1]
        assert top.header is not None
        assert (top.size, top.cluster_size, top.header.extended_l2) == (MiB + 512, 16384, True)


def test_an_own_name(image: Path, before: Path) -> None:
    assert take(image, sealed_name="monday.qcow2").sealed == image.with_name("monday.qcow2")
    assert same(image, before)
    with pytest.raises(Conflict, match=r"monday.qcow2: it exists already"):
        snapshot.plan(image, sealed_name="monday.qcow2")
    for bad in ("../x.qcow2", "disk.qcow2", "sub/x.qcow2", ""):
        with pytest.raises(InvalidInput, match="must be another one in the same directory"):
            snapshot.plan(image, sealed_name=bad)


def test_names_with_colons(tmp_path: Path) -> None:
    path = tmp_path / "nbd:x,y.qcow2"
    qemu_img.create(path, MiB, options=Qcow2Options())
    write(path.absolute(), "write -P 3 0 64k")
    flat = tmp_path / "flat"
    qemu_img.convert(path, flat, formats=("qcow2", "raw"))
    take(path)
    assert same(path, flat)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"\1" * 1_000_001)
    return path


@pytest.mark.parametrize("name", ["new\nline.qcow2", "tab\t.qcow2", "delete\x7f.qcow2"])
def test_control_characters_in_a_name_are_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    """The overlay would record a name that snapchain does not follow; no temporary name is told."""
    image = tmp_path / name
    qemu_img.create(tmp_path / "plain.qcow2", MiB, options=Qcow2Options())
    (tmp_path / "plain.qcow2").rename(image)
    with pytest.raises(Unsupported, match="name with control characters") as raised:
        snapshot.plan(image)
    assert raised.value.subject == str(image)
    assert names(tmp_path) == [name]


def test_raw_needs_a_new_path(raw: Path) -> None:
    with pytest.raises(Unsupported, match="raw") as caught:
        snapshot.plan(raw)
    assert "--overlay" in (caught.value.hint or "")
    before = standing(raw)
    report = take(raw, overlay=Path("new.qcow2"))
    assert (report.sealed, report.overlay) == (raw, raw.with_name("new.qcow2"))
    assert report.virtual_size == 1_000_448
    assert standing(raw) == before
    said = qemu_img.info(report.overlay, "qcow2")
    assert (said.backing_filename, said.backing_filename_format) == ("disk.raw", "raw")
    with pytest.raises(Conflict, match=r"new.qcow2: it exists already"):
        snapshot.plan(raw, overlay=Path("new.qcow2"))
    with pytest.raises(NotFound, match="no such directory"):
        snapshot.plan(raw, overlay=Path("no/where.qcow2"))
    assert names(raw.parent) == ["disk.raw", "new.qcow2"]


def test_an_overlay_elsewhere_names_the_whole_path(image: Path, before: Path, tmp_path: Path) -> None:
    (tmp_path / "fast").mkdir()
    report = take(image, overlay=tmp_path / "fast" / "top.qcow2")
    assert qemu_img.info(report.overlay, "qcow2").backing_filename == str(image)
    assert same(report.overlay, before)


def test_a_raw_top_named_raw_is_not_probed(image: Path) -> None:
    with pytest.raises(Unsupported, match="cannot be replaced by an overlay"):
        snapshot.plan(image, image_format="raw")


def test_through_a_symbolic_link(image: Path, before: Path, tmp_path: Path) -> None:
    link = tmp_path / "vda.qcow2"
    link.symlink_to(image)
    report = take(link)
    assert link.is_symlink()
    assert report.image == link
    assert report.overlay == image
    # QEMU resolves a relative backing name from the link's directory: only an absolute one holds from both.
    assert same(link, before)
    assert same(image, before)


def test_hard_links_are_refused(image: Path, tmp_path: Path) -> None:
    os.link(image, tmp_path / "other.qcow2")
    with pytest.raises(Unsupported, match="hard link"):
        snapshot.plan(image)


def test_bitmaps_are_said_to_stay(image: Path) -> None:
    subprocess.run(["qemu-img", "bitmap", "-f", "qcow2", "--add", image, "daily"], check=True)
    events: list[Event] = []
    snapshot.run(snapshot.plan(image), on_event=events.append)
    assert any(isinstance(event, Notice) and "daily" in event.message for event in events)


def test_what_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"none.qcow2: no such file"):
        snapshot.plan(tmp_path / "none.qcow2")
    with pytest.raises(InvalidInput, match="neither a regular file nor a block device"):
        snapshot.plan(tmp_path)


def test_a_group_that_the_guest_may_need_and_the_caller_cannot_give(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is changed, and nothing is left."""
    before = names(image.parent), image.read_bytes(), standing(image)

    def refuse(_source: int, _target: int, *, subject: Path, **_named: object) -> None:
        raise InvalidInput("cannot get the group of the old one, kvm", subject=subject)

    monkeypatch.setattr(files, "copy_standing", refuse)
    with pytest.raises(InvalidInput, match="cannot get the group of the old one, kvm"):
        snapshot.run(snapshot.plan(image))
    assert (names(image.parent), image.read_bytes(), standing(image)) == before


def test_a_group_that_nobody_needs_is_a_note(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    monkeypatch.setattr(files, "copy_standing", lambda *_given, **_named: "its group is now users, not kvm")
    snapshot.run(snapshot.plan(image), on_event=events.append)
    assert [each for each in events if isinstance(each, Notice)] == [
        Notice(f"{image}: its group is now users, not kvm", about=str(image))
    ]
