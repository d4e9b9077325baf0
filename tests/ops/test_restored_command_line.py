"""The command line of a restored guest: a real QEMU starts from it, with the new files and none of the old ones."""

from __future__ import annotations

import shlex
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from snapchain.errors import Corrupt
from snapchain.ops.restore import domain_xml
from snapchain.ops.restore.changed_definition import Changes, NewDisk, NewIdentity
from snapchain.ops.restore.qemu_argv import change
from tests.guest.machine import Monitor
from tests.ops.stacks import qemu_img, write
from tests.servers import DIE_WITH_PARENT
from tests.waiting import wait_until

HEAD = ("qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-m", "32", "-nodefaults", "-display", "none")
DEVICE = "virtio-blk-pci,drive=top,id=vda"


@dataclass(frozen=True)
class Form:
    """How a disk stands in a command line. name: by which it is recorded; words: with {top} and {base}"""

    name: str
    words: tuple[str, ...]
    machine: str = "q35"


TOP_IN_JSON = (
    '{{"driver": "qcow2", "node-name": "top", "discard": "unmap", "file": {{"driver": "file", "filename": "{top}", '
    '"cache": {{"direct": false}}}}}}'
)
NESTED = (
    "driver=throttle,node-name=top,throttle-group=tg,file.driver=qcow2,file.file.driver=file,file.file.filename={top}"
)
FILE = "file.driver=file,file.filename="
FORMS = {
    "drive": Form("vda", ("-drive", "if=none,id=top,file={top},format=qcow2,cache=none", "-device", DEVICE)),
    "drive, named itself": Form("top", ("-drive", "file={top},id=top,if=virtio")),
    "drive without a name": Form("virtio0", ("-drive", "file={top},if=virtio")),
    "ide": Form("ide0-hd0", ("-drive", "file={top},if=ide,index=0"), "pc"),
    "hda": Form("ide0-hd0", ("-hda", "{top}"), "pc"),
    "drive with a chain": Form(
        "vda", ("-drive", "if=none,id=top,file={top},format=qcow2,backing.file.filename={base}", "-device", DEVICE)
    ),
    "drive by nodes": Form(
        "vda",
        ("-drive", "if=none,id=top,driver=qcow2,file.driver=file,file.filename={top}", "-device", DEVICE),
    ),
    "blockdev": Form("vda", ("-blockdev", f"driver=qcow2,node-name=top,{FILE}{{top}}", "-device", DEVICE)),
    "blockdev, driver implied": Form("vda", ("-blockdev", f"qcow2,node-name=top,{FILE}{{top}}", "-device", DEVICE)),
    "json": Form(
        "vda",
        (
            "-blockdev",
            TOP_IN_JSON,
            "-device",
            '{{"driver": "virtio-blk-pci", "drive": "top", "id": "vda"}}',
        ),
    ),
    "nodes apart": Form(
        "vda",
        (
            "-blockdev", "driver=file,node-name=b-file,filename={base}",
            "-blockdev", "driver=qcow2,node-name=b,file=b-file",
            "-blockdev", "driver=file,node-name=t-file,filename={top},discard=unmap",
            "-blockdev", "driver=qcow2,node-name=top,file=t-file,backing=b",
            "-device", DEVICE,
        ),
    ),
    "json, nodes apart": Form(
        "vda",
        (
            "-blockdev", '{{"driver": "file", "node-name": "b-file", "filename": "{base}"}}',
            "-blockdev", '{{"driver": "qcow2", "node-name": "b", "file": "b-file", "backing": null}}',
            "-blockdev", '{{"driver": "file", "node-name": "t-file", "filename": "{top}"}}',
            "-blockdev", '{{"driver": "qcow2", "node-name": "top", "file": "t-file", "backing": "b"}}',
            "-device", DEVICE,
        ),
    ),
    "throttled": Form(
        "vda",
        (
            "-object", "throttle-group,id=tg,x-iops-total=1000",
            "-blockdev", f"driver=qcow2,node-name=fmt,{FILE}{{top}}",
            "-blockdev", "driver=throttle,node-name=top,throttle-group=tg,file=fmt",
            "-device", DEVICE,
        ),
    ),
    "throttled, nested": Form(
        "vda",
        (
            "-object", "throttle-group,id=tg,x-iops-total=1000",
            "-blockdev", NESTED,
            "-device", DEVICE,
        ),
    ),
    "named by its node": Form("top", ("-blockdev", f"driver=qcow2,node-name=top,{FILE}{{top}}",
                                      "-device", "virtio-blk-pci,drive=top")),
    "known by its path": Form("sda", ("-blockdev", f"driver=qcow2,node-name=top,{FILE}{{top}}",
                                      "-device", "virtio-blk-pci,drive=top")),
}  # fmt: skip


@dataclass(frozen=True)
class Old:
    """Where the guest ran: a chain of two files, which is gone when the restored one starts."""

    folder: Path

    @property
    def top(self) -> Path:
        return self.folder / "top.qcow2"

    @property
    def base(self) -> Path:
        return self.folder / "base.qcow2"


@pytest.fixture
def old(tmp_path: Path) -> Old:
    made = Old(tmp_path / "old")
    made.folder.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", made.base, "1M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", made.top)
    write(made.top, "write -P 7 0 64k")
    return made


@contextmanager
def started(script: Path) -> Iterator[Monitor]:
    folder = script.parent
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*DIE_WITH_PARENT, "sh", str(script)], stdout=log, stderr=log)
        try:
            wait_until(lambda: answers(folder / "qmp"), alive=lambda: process.poll() is None)
            monitor = Monitor(folder / "qmp")
            yield monitor
            monitor.close()
        except BaseException as error:
            raise AssertionError((folder / "log").read_text()) from error
        finally:
            process.kill()
            process.wait()


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


@pytest.mark.parametrize("kind", ["qcow2", "raw"])
@pytest.mark.parametrize("form", FORMS)
def test_it_starts_on_the_new_files(old: Old, tmp_path: Path, form: str, kind: str) -> None:
    shape = FORMS[form]
    new = tmp_path / "new, with a comma" / f"vda.{kind}"
    new.parent.mkdir()
    qemu_img("convert", "-O", kind, old.top, new)
    words = [word.format(top=old.top, base=old.base) for word in shape.words]
    argv = [*HEAD, "-qmp", f"unix:{old.folder}/qmp,server=on,wait=off", *words]
    argv[argv.index("q35")] = shape.machine
    changes = Changes(
        disks={shape.name: NewDisk(new, "raw" if kind == "raw" else "qcow2")},
        old_paths={shape.name: str(old.top)},
        directory=new.parent,
    )
    changed = change(argv, changes, subject="web1")
    assert changed.lacking == ()
    assert str(old.folder) not in changed.text
    for path in (old.top, old.base):
        path.unlink()
    script = new.parent / "web1.sh"
    script.write_text(changed.text)
    with started(script) as monitor:
        nodes = monitor.ask("query-named-block-nodes")
        files = {node["file"] for node in nodes if node["drv"] == "file"}
        assert files == {str(new)}
        assert {node["drv"] for node in nodes} - {"throttle"} == {"file", kind}
        (shown,) = [each for each in monitor.ask("query-block") if "inserted" in each]
        place = shown["qdev"] if shown["qdev"].startswith("/") else f"/machine/peripheral/{shown['qdev']}"
        suffix = "" if "virtio-backend" in place or shape.machine == "pc" else "/virtio-backend"
        for command in ("read -P 7 0 64k", "write -P 9 64k 64k"):
            line = f'qemu-io -d {place}{suffix} "{command}"'
            said = monitor.ask("human-monitor-command", **{"command-line": line})
            assert "failed" not in said, said


def test_two_disks_sockets_and_what_is_left_out(tmp_path: Path) -> None:
    new = tmp_path / "new"
    argv = [
        *HEAD, "-name", "web1,process=qemu-web1", "-uuid", "6d8eb8a2-0000-4000-8000-000000000001",
        "-drive", "file=/old/a.qcow2,if=none,id=a", "-device", "virtio-blk-pci,drive=a,id=vda",
        "-drive", "file=/old/b.qcow2,if=none,id=b", "-device", "scsi-hd,drive=b,id=sda",
        "-drive", "file=nbd://host/x,if=none,id=c", "-device", "virtio-blk-pci,drive=c,id=vdc",
        "-drive", "file=/nowhere/cd.iso,media=cdrom,readonly=on,if=none,id=d", "-device", "ide-cd,drive=d,id=cd",
        "-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/CODE.fd",
        "-drive", "if=pflash,format=raw,file=/old/web1_VARS.fd",
        "-device", "virtio-net-pci,netdev=n,mac=52:54:00:12:34:56", "-netdev", "user,id=n",
        "-device", "vfio-pci,host=01:00.0", "-incoming", "defer", "-pidfile", "/run/web1.pid",
        "-chardev", "socket,id=ga,path=/run/web1.ga,server=on,wait=off",
        "-chardev", "socket,id=tpm,path=/run/swtpm.sock", "-serial", "unix:/run/web1.serial,server,nowait",
        "-kernel", "/nowhere/kernel",
    ]  # fmt: skip
    changes = Changes(
        disks={"vda": NewDisk(new / "vda.qcow2", "qcow2"), "sda": NewDisk(new / "sda.raw", "raw"),
               "vdz": NewDisk(new / "vdz.qcow2", "qcow2")},
        left_out={"vdc": "it is no file", "cd": "a CD-ROM"},
        nvram={"web1_VARS.fd": new / "web1.web1_VARS.fd"},
        directory=new,
        identity=NewIdentity("web2", "11111111-2222-4333-8444-555555555555"),
    )  # fmt: skip
    changed = change(argv, changes, subject="web1")
    words = shlex.split(changed.text, comments=True)
    assert words[:2] == ["exec", "qemu-system-x86_64"]
    for wanted in (
        f"if=none,id=a,format=qcow2,file={new}/vda.qcow2",
        f"if=none,id=b,format=raw,file={new}/sda.raw",
        f"if=pflash,format=raw,file={new}/web1.web1_VARS.fd",
        "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/CODE.fd",
        "file=/nowhere/cd.iso,media=cdrom,readonly=on,if=none,id=d",
        f"{new}/web1.pid",
        f"unix:{new}/web1.serial,server,nowait",
        f"backend=socket,id=ga,path={new}/web1.ga,server=on,wait=off",
        "socket,id=tpm,path=/run/swtpm.sock",
        "guest=web2,process=qemu-web1",
        "11111111-2222-4333-8444-555555555555",
    ):
        assert wanted in words, wanted
    for gone in ("nbd://", "-incoming", "vfio", "12:34:56", "/old/"):
        assert gone not in changed.text, gone
    said = "\n".join(changed.lacking)
    for told in ("vdz is not in the command line", "vdc is left out", "vfio-pci", "/nowhere/kernel"):
        assert told in said, told
    assert "cd is left out" not in said


def test_a_clone_shares_nothing_with_the_guest_that_runs(tmp_path: Path) -> None:
    """Its ports would be taken, so it would not boot; and it would empty the logs of that guest."""
    log, port = tmp_path / "web1.log", "127.0.0.1:1"
    log.write_text("of the guest that runs")
    argv = [
        *HEAD, "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off", "-vnc", "127.0.0.1:1", "-gdb", "tcp::1234",
        "-chardev", f"file,id=log,path={log}", "-serial", "chardev:log", "-serial", f"file:{log}",
        "-chardev", "socket,id=con,host=127.0.0.1,port=4444,server=on", "-serial", "chardev:con",
        "-monitor", f"tcp:{port},server,nowait", "-debugcon", f"file:{log}",
    ]  # fmt: skip
    new = tmp_path / "new"
    new.mkdir()
    changed = change(argv, Changes(disks={}, directory=new, without_network=True), subject="web1")
    for gone in (str(log), "127.0.0.1", "4444", "-gdb", "-vnc"):
        assert gone not in changed.text, gone
    script = new / "web1.sh"
    script.write_text(changed.text)
    with started(script) as monitor:
        assert monitor.ask("query-status")["status"] == "running"
    assert log.read_text() == "of the guest that runs"


def test_a_cloned_domain_shares_nothing_with_the_one_that_runs(tmp_path: Path) -> None:
    text = """<domain type='kvm'><name>web1</name><devices>
      <interface type='network'><mac address='52:54:00:00:00:01'/></interface>
      <graphics type='vnc' port='5901' autoport='no' listen='0.0.0.0'/>
      <graphics type='spice' port='5930' tlsPort='5931'/>
      <serial type='file'><source path='/log/web1'/><target port='0'/></serial>
      <console type='file'><source path='/log/web1'/><target type='serial' port='0'/></console>
      <serial type='tcp'><source mode='bind' host='h' service='4444'/><protocol type='telnet'/></serial>
      <serial type='pty'><target port='2'/></serial>
      <vsock model='virtio'><cid auto='no' address='3'/></vsock>
    </devices></domain>"""
    changed = domain_xml.change(text, Changes(disks={}, directory=tmp_path, without_network=True), subject="web1")
    root = ET.fromstring(changed.text)
    assert root.findall("devices/interface") == []
    assert [each.attrib for each in root.iterfind("devices/graphics")] == [
        {"type": "vnc", "autoport": "yes", "listen": "0.0.0.0"},
        {"type": "spice", "autoport": "yes"},
    ]
    assert [each.get("type") for each in root.iterfind("devices/serial")] == ["null", "null", "pty"]
    assert [each.attrib for each in root.iterfind("devices/vsock/cid")] == [{"auto": "yes"}]
    for gone in ("/log/", "4444", "telnet"):
        assert gone not in changed.text


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("qemu", "a\0b"),
        ("qemu", "-blockdev", "{"),
        ("qemu", "-blockdev", "{[1]}"),
        ("qemu", "-blockdev", "a=1,a.b=2"),
        ("qemu", "-device", '{"id": '),
        ("qemu", "-blockdev", '{"a":' * 5000 + "1" + "}" * 5000),
        ("qemu", *["-x"] * 20_000),
    ],
)
def test_what_is_no_command_line(argv: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="command line"):
        change(argv, Changes(disks={"vda": NewDisk(tmp_path / "vda", "raw")}, directory=tmp_path), subject="web1")


@pytest.mark.parametrize("word", ["$(touch x)", "`touch x`", "a\nb", "'; touch x; '", "-name\n", "\\", "# x"])
def test_words_stay_words(word: str, tmp_path: Path) -> None:
    changed = change(["printf", "%s\\0", "-name", word, word], Changes(disks={}, directory=tmp_path), subject="web1")
    script = tmp_path / "web1.sh"
    script.write_text(changed.text)
    said = subprocess.run(["sh", str(script)], cwd=tmp_path, capture_output=True, check=True).stdout
    assert said.split(b"\0")[-2] == word.encode()
    assert [each.name for each in tmp_path.iterdir()] == ["web1.sh"]
