"""Which guest a QEMU process is, by its command line; and the error that names it, with real processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapchain.errors import Busy
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.qemu_processes import QemuArguments, is_qemu, open_images, parse, qemu_process, qemu_processes
from tests.guest.machine import Machine
from tests.ops.stacks import Layer, build

QEMU = "qemu-system-x86_64"
LIBVIRT_OBJECT = (
    '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-web1/master-key.aes"}'
)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], QemuArguments()),
        (["-name", "web1"], QemuArguments("web1")),
        (["--name", "guest=web,,1,debug-threads=on"], QemuArguments("web,1")),
        (["-name", "web1,process=qemu"], QemuArguments("web1")),
        (["-uuid", "ABCD-1", "-incoming", "defer"], QemuArguments(uuid="abcd-1")),
        (["-qmp", "unix:/run/a,,b.qmp,server=on,wait=off"], QemuArguments(qmp=("/run/a,b.qmp",))),
        (["-qmp", "unix:/run/old.qmp,server,nowait"], QemuArguments(qmp=("/run/old.qmp",))),
        (["-qmp", "unix:/run/client.qmp"], QemuArguments()),
        (["-qmp", "tcp:127.0.0.1:4444,server=on"], QemuArguments()),
        (["-monitor", "unix:/run/hmp,server=on"], QemuArguments()),
        (
            ["-chardev", "socket,id=q,path=/run/q,server=on,wait=off", "-mon", "chardev=q,mode=control"],
            QemuArguments(qmp=("/run/q",)),
        ),
        (["-chardev", "socket,id=q,path=/run/q,server=on", "-mon", "chardev=q,mode=readline"], QemuArguments()),
        (["-chardev", "socket,id=q,path=/run/q,server=on", "-qmp", "chardev:q"], QemuArguments(qmp=("/run/q",))),
        (["-mon", "chardev=q,mode=control"], QemuArguments()),
        (
            [
                "-chardev", "socket,path=/run/ga,server=on,wait=off,id=qga0",
                "-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
            ],
            QemuArguments(agent="/run/ga"),
        ),
        (
            [
                "-chardev", "socket,id=c0,path=/run/ga,server=on",
                "-device", '{"driver":"virtserialport","chardev":"c0","name":"org.qemu.guest_agent.0"}',
            ],
            QemuArguments(agent="/run/ga"),
        ),
        (
            [
                "-name", "guest=web1,debug-threads=on", "-object", LIBVIRT_OBJECT, "-uuid", "u",
                "-chardev", "socket,id=m,fd=27,server=on,wait=off", "-mon", "chardev=m,mode=control",
            ],
            QemuArguments("web1", "u", is_libvirt=True),
        ),
        (["-device", "{not json", "-name"], QemuArguments()),
    ],
)  # fmt: skip
def test_a_command_line_is_understood(words: list[str], found: QemuArguments) -> None:
    assert parse([QEMU, *words]) == found


def test_what_is_qemu() -> None:
    assert is_qemu(["/usr/bin/qemu-system-x86_64"])
    assert is_qemu(["/usr/libexec/qemu-kvm"])
    assert is_qemu(["kvm"])
    for argv in ([], [""], ["qemu-img"], ["/usr/bin/qemu-nbd"], ["vim", "qemu-system-x86_64"]):
        assert not is_qemu(argv)


def test_a_process_and_the_files_that_it_has_open(tmp_path: Path) -> None:
    base, top = build(tmp_path / "images", [Layer(), Layer()])
    with Machine(tmp_path / "m", disks={"vda": top}, name="shop") as machine:
        process = qemu_process(machine.process.pid)
        assert process in qemu_processes()
        assert process is not None
        assert (process.arguments.name, process.qmp[0]) == ("shop", machine.qmp)
        opened = open_images(machine.process.pid)
        assert opened is not None
        found = {path: opened.get((path.stat().st_dev, path.stat().st_ino)) for path in (base, top, tmp_path)}
        assert found == {base: False, top: True, tmp_path: None}
    assert qemu_process(machine.process.pid) is None
    assert open_images(machine.process.pid) is None
    assert qemu_process(os.getpid()) is None


def test_the_error_names_the_guest_and_the_option(tmp_path: Path) -> None:
    base, top = build(tmp_path / "images", [Layer(), Layer()])
    with Machine(tmp_path / "m 1", disks={"vda": top}, name="shop") as machine:
        for path, mode in ((top, LockMode.READ), (base, LockMode.WRITE)):
            with pytest.raises(Busy) as refused:
                ImageLock(path, mode)
            pid = machine.process.pid
            assert str(refused.value) == f"{path}: a running guest has it open: QEMU (pid {pid}), the guest shop"
            assert str(refused.value.hint).startswith(f"say --qmp '{machine.qmp}' instead of the path")


def test_a_guest_without_a_qmp_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (top,) = build(tmp_path / "images", [Layer()])
    with Machine(tmp_path / "m", disks={"vda": top}, name=None):
        monkeypatch.setattr("snapchain.host.qemu_processes._listens", lambda _value: False)
        with pytest.raises(Busy) as refused:
            ImageLock(top, LockMode.READ)
        assert "-qmp unix:PATH,server=on,wait=off" in str(refused.value.hint)
