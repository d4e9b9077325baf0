"""restore of a guest: all disks and then a definition, from each kind of destination, and whatever a record holds."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import stat
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from snapchain.destination.guest_record import RecordedDisk
from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, Unavailable
from snapchain.model.events import Event, Progress
from snapchain.ops.guest_points_merge import guest_at
from snapchain.ops.restore.guest import GuestRestoration, GuestRestoreReport, GuestRestoreRequest
from snapchain.ops.restore.guest_definition import GuestDefinition
from snapchain.ops.restore.run import Restoration
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.testing.history import identical
from tests.ops.guest_points import BEGIN, DOMAIN, GUEST, Guest, Open, instant, opened, publish, publish_bytes
from tests.ops.killing import killed_at_every_step


@pytest.fixture(params=["directory", "replica", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened(request.param, request, tmp_path)


@pytest.fixture
def simple(tmp_path: Path) -> Open:
    return lambda: ReplicaDestination(DirectoryEndpoint(tmp_path / "replica"))


def restored(place: Open, directory: Path, **asked: Any) -> GuestRestoreReport:
    destination = place()
    request = GuestRestoreRequest(directory=directory, **asked)
    return GuestRestoration(destination, guest_at(destination, GUEST), request).run()


def test_all_disks_and_a_definition(place: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g")
    for number in (1, 2):
        guest.point(place(), number, labels=[f"n{number}"])
    for asked, number in (("n1", 1), ("latest", 2), (None, 2), ("2", 2), ((BEGIN.replace(day=2)).isoformat(), 1)):
        out = tmp_path / f"out-{asked}"
        report = restored(place, out, point=asked)
        assert (report.guest_point, report.instant) == (number, instant(number))
        for name in guest.names:
            assert identical(out / f"{name}.qcow2", guest.shown[instant(number), name])
        assert sorted(each.name for each in out.iterdir()) == [
            "vda.qcow2", "vdb.qcow2", "web1.live.xml", "web1.recorded.xml", "web1.xml",
        ]  # fmt: skip
        devices = ET.parse(out / "web1.xml").getroot().find("devices")
        assert devices is not None
        for disk, name in zip(devices.findall("disk"), guest.names, strict=True):
            source, driver = disk.find("source"), disk.find("driver")
            assert source is not None
            assert driver is not None
            assert (disk.get("type"), source.attrib) == ("file", {"file": str(out / f"{name}.qcow2")})
            assert driver.get("type") == "qcow2"
            assert disk.find("backingStore") is None
        assert "<qemu:arg value=" in (out / "web1.xml").read_text()
        assert stat.S_IMODE((out / "web1.xml").stat().st_mode) == 0o600


def test_a_directory_whose_name_is_no_utf_8(simple: Open, tmp_path: Path) -> None:
    argv = ("qemu-system-x86_64", "-drive", "id=vda,file=/old/a.qcow2")
    Guest(tmp_path / "g", names=("vda",)).point(simple(), 1, kind="qmp", inactive=None, live=None, argv=argv)
    out = Path(os.fsdecode(bytes(tmp_path) + b"/o\xffut"))
    restored(simple, out)
    assert b"/o\xffut/vda.qcow2" in (out / "web1.sh").read_bytes()


@pytest.mark.parametrize("asked", [{"format": "raw"}, {"whole_chain": True}])
def test_other_forms(simple: Open, tmp_path: Path, asked: dict[str, Any]) -> None:
    guest = Guest(tmp_path / "g")
    guest.point(simple(), 1)
    out = tmp_path / "out"
    plan = GuestRestoration(simple(), guest_at(simple(), GUEST), GuestRestoreRequest(directory=out, **asked)).plan()
    assert not out.exists()
    report = restored(simple, out, **asked)
    assert [each.output for each in plan.disks] == [each.output for each in report.disks]
    assert plan.files == report.files
    suffix = asked.get("format", "qcow2")
    for name in guest.names:
        assert identical(out / f"{name}.{suffix}", guest.shown[instant(1), name])
    assert f'type="{suffix}"' in (out / "web1.xml").read_text()


def test_progress_never_falls(simple: Open, tmp_path: Path) -> None:
    Guest(tmp_path / "g").point(simple(), 1)
    events: list[Event] = []
    request = GuestRestoreRequest(directory=tmp_path / "out")
    report = GuestRestoration(simple(), guest_at(simple(), GUEST), request, on_event=events.append).run()
    done = [each.done for each in events if isinstance(each, Progress)]
    assert done == sorted(done)
    assert done[-1] == report.bytes_written


def test_what_is_cut_off_is_continued(simple: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No definition before all disks; then the first disk is not written again."""
    guest = Guest(tmp_path / "g", names=("vda", "vdb", "vdc"))
    guest.point(simple(), 1)
    out = tmp_path / "out"
    real = Restoration.run
    calls: list[str] = []

    def failing(self: Any, **more: Any) -> Any:
        calls.append(self._disk)
        if len(calls) == 2:
            raise Unavailable("the link broke")
        return real(self, **more)

    monkeypatch.setattr(Restoration, "run", failing)
    with pytest.raises(Unavailable, match="the link broke"):
        restored(simple, out)
    assert sorted(each.name for each in out.iterdir()) == [".web1.snapchain-restore", "vda.qcow2"]
    report = restored(simple, out)
    assert calls == ["web1/vda", "web1/vdb", "web1/vdb", "web1/vdc"]
    assert report.disks[0].bytes_written == 0
    assert (out / "web1.xml").exists()
    assert not (out / ".web1.snapchain-restore").exists()
    for name in guest.names:
        assert identical(out / f"{name}.qcow2", guest.shown[instant(1), name])


@pytest.mark.sampled
@pytest.mark.parametrize("whole_chain", [False, True])
def test_killed_at_every_step(simple: Open, tmp_path: Path, whole_chain: bool) -> None:
    """What has its name is whole, the definition comes last, and the next run completes it, and leaves no note."""
    guest, out = Guest(tmp_path / "g"), tmp_path / "out"
    guest.point(simple(), 1)
    guest.point(simple(), 2)
    disks = {out / f"{name}.qcow2": guest.shown[instant(2), name] for name in guest.names}
    where = "alive"

    def whole() -> set[Path]:
        found = {path for path in disks if path.exists()}
        for path in found:
            assert identical(path, disks[path]), where
        return found

    def restore() -> None:
        restored(simple, out, whole_chain=whole_chain)

    restore()
    names = {each.name for each in out.iterdir()}
    assert not {name for name in names if name.startswith(".")}
    shutil.rmtree(out)
    deaths = set()
    for where in killed_at_every_step(restore, each=13):
        before = whole()
        deaths.add(len(before))
        if (out / "web1.xml").exists():
            assert before == set(disks), where
        if before and not (out / ".web1.snapchain-restore").exists():  # it was done
            with pytest.raises(Conflict, match="replaces no file"):
                restore()
        else:
            restore()
        assert whole() == set(disks), where
        assert {each.name for each in out.iterdir()} == names, where
        ET.parse(out / "web1.xml")
        shutil.rmtree(out)
    assert {0, 2} <= deaths


@pytest.mark.parametrize("changed", [False, True])
def test_a_kill_while_the_definition_is_written(
    simple: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """The next run writes it; but a disk that a guest has written to since is no output of this restore any more."""
    Guest(tmp_path / "g").point(simple(), 1)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(GuestDefinition, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            restored(simple, out)
    (out / "web1.live.xml").write_text("half")
    if changed:
        with (out / "vda.qcow2").open("ab") as file:
            file.write(b"x")
        with pytest.raises(Conflict, match="replaces no file"):
            restored(simple, out)
        return
    assert restored(simple, out).bytes_written == 0
    assert (out / "web1.live.xml").read_text() != "half"


@pytest.mark.parametrize("name", ["vda.qcow2", "vdb.qcow2", "web1.xml", "web1.live.xml"])
def test_nothing_is_replaced(simple: Open, tmp_path: Path, name: str) -> None:
    Guest(tmp_path / "g").point(simple(), 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Conflict, match="replaces no file"):
        restored(simple, out)
    assert [each.name for each in out.iterdir()] == [name]
    assert not (tmp_path / "elsewhere").exists()


def test_a_note_of_somebody_else_counts_for_nothing(simple: Open, tmp_path: Path) -> None:
    Guest(tmp_path / "g").point(simple(), 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "vda.qcow2").write_bytes(b"mine")
    found = (out / "vda.qcow2").stat()
    finished = {
        "device": found.st_dev, "inode": found.st_ino, "size": found.st_size, "mtime_ns": found.st_mtime_ns,
    }  # fmt: skip
    note = {"version": 1, "instant": instant(1), "disks": {"vda.qcow2": finished}, "mark": "0" * 64}
    (out / ".web1.snapchain-restore").write_text(json.dumps(note))
    (out / ".web1.snapchain-restore").chmod(0o666)
    with pytest.raises(Conflict, match="replaces no file"):
        restored(simple, out)


def test_firmware_and_tpm(simple: Open, tmp_path: Path) -> None:
    xml_with_nvram = guest_points_xml("<nvram template='/t.fd'>/var/lib/web1_VARS.fd</nvram>")
    files = (
        {"role": "nvram", "name": "web1_VARS.fd", "data": base64.b64encode(b"variables")},
        {"role": "tpm", "name": "tpm2/tpm2-00.permall", "data": base64.b64encode(b"state")},
    )
    Guest(tmp_path / "g").point(simple(), 1, inactive=xml_with_nvram, files=files)
    out = tmp_path / "out"
    restored(simple, out)
    for path, content in (("web1.web1_VARS.fd", b"variables"), ("web1.tpm/tpm2/tpm2-00.permall", b"state")):
        assert (out / path).read_bytes() == content
        assert stat.S_IMODE((out / path).stat().st_mode) == 0o600
    assert stat.S_IMODE((out / "web1.tpm").stat().st_mode) == 0o700
    assert f'<nvram template="/t.fd">{out}/web1.web1_VARS.fd</nvram>' in (out / "web1.xml").read_text()


def guest_points_xml(more: str) -> str:
    return DOMAIN.replace("hvm</type>", f"hvm</type>{more}")


HOSTILE_NAMES = ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a/b", "x" * 5000, "\x00", "vda.qcow2", "-drive"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_of_a_hostile_record_stay_in_the_directory(simple: Open, tmp_path: Path, name: str) -> None:
    guest = Guest(tmp_path / "g", names=("vda",))
    guest.point(simple(), 1, with_record=False)
    (disk,) = [each for each in simple().disks() if each.name == "web1/vda"]
    point = disk.points[-1]
    recorded = [
        RecordedDisk(
            name=each, disk="web1/vda", path=each, virtual_size=point.virtual_size, content_id=point.content_id
        )
        for each in (name, "vda", name)
    ]
    files = [{"role": role, "name": name, "data": base64.b64encode(b"x")} for role in ("nvram", "tpm", "nvram")]
    publish(simple(), guest.record(1, recorded, BEGIN, files=tuple(files)), tmp_path)
    out = tmp_path / "deep" / "er" / "out"
    before = tree(tmp_path)
    report = restored(simple, out)
    assert len({each.output for each in report.disks}) == 3
    assert all(Path(each).is_relative_to(out) for each in report.files)
    assert {each for each in tree(tmp_path) - before if not each.is_relative_to(tmp_path / "deep")} == set()


def tree(root: Path) -> set[Path]:
    return {each for each in root.rglob("*") if "replica" not in each.parts}


BILLION = "<!DOCTYPE a [<!ENTITY b 'x'>]>" + "<domain><name>&b;</name></domain>"
HOSTILE_XML = {
    "entities": BILLION,
    "a file": "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain><name>&x;</name></domain>",
    "deep": "<domain>" + "<a>" * 5000 + "</a>" * 5000 + "</domain>",
    "wide": "<domain>" + "<a/>" * 200_000 + "</domain>",
    "long": "<domain><name>" + "x" * (5 << 20) + "</name></domain>",
    "no domain": "<network/>",
    "cut off": "<domain><name>",
}


@pytest.mark.parametrize("name", HOSTILE_XML)
def test_hostile_xml(simple: Open, tmp_path: Path, name: str) -> None:
    Guest(tmp_path / "g", names=("vda",)).point(simple(), 1, inactive=HOSTILE_XML[name])
    with pytest.raises(Corrupt, match="XML"):
        restored(simple, tmp_path / "out")
    assert not (tmp_path / "out").exists(), "it is refused before anything is written"


RECORDS: dict[str, bytes] = {
    "no JSON": b"\x01" * 512,
    "zeroes": bytes(512),
    "a list": b"[]".ljust(512),
    "deep": (b"[" * 100_000).ljust(100_352),
    "another": b'{"version": 7}'.ljust(512),
}


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_no_record(simple: Open, tmp_path: Path, name: str) -> None:
    Guest(tmp_path / "g", names=("vda",)).point(simple(), 1, with_record=False)
    publish_bytes(simple(), RECORDS[name], tmp_path, instant(1), BEGIN)
    with pytest.raises(Corrupt, match="it is no record of a guest"):
        restored(simple, tmp_path / "out")


def test_a_record_that_is_too_large(simple: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("snapchain.ops.guest_records.LARGEST", 1 << 10)
    Guest(tmp_path / "g", names=("vda",)).point(simple(), 1, with_record=False)
    publish_bytes(simple(), b" " * (2 << 20), tmp_path, instant(1), BEGIN)
    with pytest.raises(Corrupt, match="more than"):
        restored(simple, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"disk": "web1/vdz"}, "lacks its disk"),
        ({"disk": "other/vda"}, "lacks its disk"),
        ({"disk": "../vda"}, "lacks its disk"),
        ({"content_id": "0" * 64}, "another content"),
    ],
)
def test_a_record_that_its_points_contradict(simple: Open, tmp_path: Path, change: dict[str, str], says: str) -> None:
    guest = Guest(tmp_path / "g", names=("vda",))
    record = guest.point(simple(), 1, with_record=False)
    wrong = record.disks[0].model_copy(update=change)
    publish(simple(), record.model_copy(update={"disks": (wrong,)}), tmp_path)
    with pytest.raises((Corrupt, NotFound), match=says):
        restored(simple, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_record_of_another_instant(simple: Open, tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g", names=("vda",))
    record = guest.point(simple(), 1, with_record=False)
    forged = record.model_copy(update={"instant": instant(9)})
    publish_bytes(simple(), forged.encode(), tmp_path, instant(1), BEGIN)
    with pytest.raises(Corrupt, match="another guest point"):
        restored(simple, tmp_path / "out")


def test_what_cannot_come_back_is_said(simple: Open, tmp_path: Path) -> None:
    extra = """
    <disk type='network' device='disk'><source protocol='rbd' name='pool/x'/><target dev='vdc'/></disk>
    <disk type='file' device='cdrom'><source file='/nowhere/cd.iso'/><target dev='sda'/><readonly/></disk>
    <hostdev mode='subsystem' type='pci'><source><address domain='0x0' bus='0x1' slot='0x2' function='0x0'/></source>
    </hostdev></devices>"""
    Guest(tmp_path / "g").point(
        simple(),
        1,
        inactive=DOMAIN.replace("</devices>", extra),
        left_out=(("vdc", "its layers are not files of this host"),),
        immovable=("the GPU 0000:01:02.0",),
        unreadable=("the state of its TPM: permission denied",),
    )
    report = restored(simple, tmp_path / "out")
    text = (tmp_path / "out" / "web1.xml").read_text()
    assert "hostdev" not in text
    assert "rbd" not in text
    assert "/nowhere/cd.iso" in text, "media are kept"
    said = "\n".join(report.lacking)
    for words in ("vdc is left out", "not files of this host", "medium in sda is missing", "GPU", "TPM", "hostdev"):
        assert words in said, words


def test_a_clone(simple: Open, tmp_path: Path) -> None:
    Guest(tmp_path / "g").point(simple(), 1)
    restored(simple, tmp_path / "out", new_name="web2")
    text = (tmp_path / "out" / "web2.xml").read_text()
    assert "<name>web2</name>" in text
    assert "6d8eb8a2" not in text
    assert "52:54:00:00:00:01" not in text
    for bad in ("", "a/b", "a\nb"):
        with pytest.raises(InvalidInput, match="cannot name a guest"):
            restored(simple, tmp_path / "other", new_name=bad)


def test_a_guest_that_qemu_ran_alone(simple: Open, tmp_path: Path) -> None:
    node = "driver=qcow2,node-name=vdb-top,file.driver=file,file.filename=/old/b.qcow2"
    argv = (
        "qemu-system-x86_64", "-name", "web1",
        "-drive", "id=vda,if=none,file=/old/a.qcow2", "-device", "virtio-blk-pci,drive=vda",
        "-blockdev", node, "-device", "virtio-blk-pci,drive=vdb-top,id=vdb",
    )  # fmt: skip
    Guest(tmp_path / "g").point(simple(), 1, kind="qmp", inactive=None, live=None, argv=argv)
    out = tmp_path / "out"
    report = restored(simple, out)
    assert report.definition == str(out / "web1.sh")
    words = shlex.split((out / "web1.sh").read_text(), comments=True)
    assert words[:2] == ["exec", "qemu-system-x86_64"]
    assert f"id=vda,if=none,format=qcow2,file={out}/vda.qcow2" in words
    assert not [word for word in words if "/old/" in word]
    with pytest.raises(InvalidInput, match="not managed by libvirt"):
        restored(simple, tmp_path / "other", defines=True)
