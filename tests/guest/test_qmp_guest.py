"""A bare QEMU as a guest: every kind of disk, every trap that has cost somebody data, with a real QEMU."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.protocol import Guest, GuestDisk, JobKind, JobStatus, NewOverlay, Outcome, State
from snapchain.guest.qemu_files import QemuFiles, drive_options
from snapchain.guest.qmp import Monitor, Refused
from snapchain.guest.qmp_definition import _tpm
from snapchain.guest.qmp_guest import QmpGuest
from tests.exhaustive import some
from tests.guest.machine import QEMU, Machine
from tests.guest.spy import DROP, KILL, LOSE, Fault, Place, Spy, every
from tests.servers import DIE_WITH_PARENT, greets
from tests.waiting import wait_until

MiB = 1 << 20


def image(path: Path, backing: Path | None = None, *, size: int = 8 * MiB, name: str | None = None) -> Path:
    """A qcow2 file; name: what is recorded instead of the path of `backing`."""
    words = ["-u", "-b", name or str(backing), "-F", "qcow2"] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words, path, str(size)], check=True)
    return path


def raw(path: Path, size: int = 8 * MiB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@contextmanager
def opened(path: Path) -> Iterator[QmpGuest]:
    with open_guest(GuestAddress(qmp=path)) as guest:
        assert isinstance(guest, QmpGuest)
        yield guest


def by_name(guest: Guest) -> dict[str, GuestDisk]:
    return {disk.name: disk for disk in guest.disks()}


def paths(disk: GuestDisk) -> list[str]:
    return [layer.path.name if layer.path else "-" for layer in disk.chain]


def nodes_of_ours(machine: Machine) -> list[str]:
    return [each["node-name"] for each in machine.ask("query-named-block-nodes") if each["node-name"].startswith("sc-")]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return image(tmp_path / "top.qcow2", image(tmp_path / "base.qcow2"), name="base.qcow2")


@pytest.fixture
def machine(tmp_path: Path, chain: Path) -> Iterator[Machine]:
    with Machine(tmp_path / "m", disks={"vda": chain}) as found:
        yield found


@pytest.fixture
def guest(machine: Machine) -> Iterator[QmpGuest]:
    with opened(machine.qmp) as found:
        yield found


# --- Every kind of disk.


def test_every_kind_of_disk_is_handled_or_left_out_with_a_word(tmp_path: Path) -> None:
    base = image(tmp_path / "base.qcow2")
    for name in ("a", "b", "c"):
        image(tmp_path / f"{name}.qcow2", base)
    for name in ("cd", "ro", "shared", "q1", "q2", "odd"):
        image(tmp_path / f"{name}.qcow2")
    raw(tmp_path / "flat.raw")
    flash = raw(tmp_path / "vars.raw", 4 * MiB)
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", tmp_path / "split.qcow2", "8M"],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    subprocess.run(["qemu-img", "create", "-q", "-f", "vmdk", tmp_path / "foreign.vmdk", "8M"], check=True)

    def disk(name: str, *blockdevs: str) -> list[str]:
        words = [word for each in blockdevs for word in ("-blockdev", each)]
        return [*words, "-device", f"virtio-blk-pci,drive={name}-root,id={name}"]

    def file(name: str) -> str:
        return f"file.driver=file,file.filename={tmp_path / name}"

    argv = [
        "-object", "throttle-group,id=tg,x-bps-total=1000000000",
        "-drive", f"file={tmp_path}/a.qcow2,if=none,id=old,format=qcow2", "-device", "virtio-blk-pci,drive=old",
        "-drive", "file=b.qcow2,if=virtio,format=qcow2",
        *disk("thr", f"driver=qcow2,node-name=thr-f,{file('c.qcow2')}",
              "driver=throttle,node-name=thr-t,file=thr-f,throttle-group=tg",
              "driver=copy-on-read,node-name=thr-root,file=thr-t"),
        *disk("flat", f"driver=raw,node-name=flat-root,{file('flat.raw')}"),
        *disk("bare", f"driver=file,node-name=bare-root,filename={raw(tmp_path / 'bare.raw')}"),
        *disk("part", f"driver=raw,node-name=part-root,offset=65536,size=65536,{file('flat.raw')},file.locking=off"),
        *disk("rdonly", f"driver=qcow2,node-name=rdonly-root,read-only=on,{file('ro.qcow2')}"),
        *disk("split", f"driver=qcow2,node-name=split-root,{file('split.qcow2')}"),
        *disk("foreign", f"driver=vmdk,node-name=foreign-root,{file('foreign.vmdk')}"),
        *disk("null", "driver=null-co,node-name=null-root,size=8388608"),
        *disk("quo", f"driver=qcow2,node-name=quo-1,{file('q1.qcow2')}",
              f"driver=qcow2,node-name=quo-2,{file('q2.qcow2')}",
              "driver=quorum,node-name=quo-root,children.0=quo-1,children.1=quo-2,vote-threshold=1"),
        "-blockdev", f"driver=qcow2,node-name=shared,{file('shared.qcow2')}",
        "-device", "virtio-blk-pci,drive=shared,id=one,share-rw=on",
        "-device", "virtio-blk-pci,drive=shared,id=two,share-rw=on",
        "-blockdev", f"driver=qcow2,node-name=cdnode,read-only=on,{file('cd.qcow2')}",
        "-device", "ide-cd,drive=cdnode,id=cd,bus=ide.0", "-device", "ide-cd,id=nothing,bus=ide.1",
        "-drive", f"if=pflash,format=raw,file={flash}",
        "-drive", f"file={tmp_path}/odd.qcow2,if=none,id=loose,format=qcow2",
    ]  # fmt: skip
    here = Path.cwd()
    os.chdir(tmp_path)  # b.qcow2 is a relative name
    try:
        with Machine(tmp_path / "m", argv=argv) as machine:
            os.chdir(here)
            with opened(machine.qmp) as guest:
                disks = by_name(guest)
                looks = {name: disk.left_out or disk.obstacle for name, disk in disks.items()}
                assert {name for name, why in looks.items() if why is None} == {
                    "old", "virtio0", "thr", "flat", "bare"
                }, looks  # fmt: skip
                assert {name: disk.left_out for name, disk in disks.items() if disk.left_out} == {
                    "cd": "CD-ROM", "nothing": "empty", "pflash0": "firmware", "rdonly": "read-only",
                    "loose": "unattached",
                }  # fmt: skip
                assert "a part of another image" in str(looks["part"])
                assert "has an external data file" in str(looks["split"])
                assert "active layer is vmdk; snapchain handles qcow2 and raw" in str(looks["foreign"])
                assert "active layer is null-co" in str(looks["null"])
                assert "active layer is quorum" in str(looks["quo"])
                assert "also used by two" in str(looks["one"])
                assert "also used by one" in str(looks["two"])
                assert paths(disks["virtio0"]) == ["base.qcow2", "b.qcow2"]
                assert disks["virtio0"].active.path == tmp_path / "b.qcow2"
                assert disks["thr"].root == "thr-root"
                assert disks["thr"].filters == ("thr-root", "thr-t")
                assert disks["thr"].active.node == "thr-f"
                assert disks["flat"].active.image_format == disks["bare"].active.image_format == "raw"
                bases = {disks[name].chain[0].node for name in ("old", "virtio0", "thr")}
                assert len(bases) == 3, "each disk has a node of its own for the base that they share"
                assert guest.definition(with_secrets=False).media == (str(tmp_path / "cd.qcow2"),)
    finally:
        os.chdir(here)


def test_a_chain_on_a_network_and_one_on_a_block_device(tmp_path: Path) -> None:
    base = image(tmp_path / "base.qcow2")
    serving = subprocess.Popen(
        [*DIE_WITH_PARENT, "qemu-nbd", "-r", "-t", "-f", "qcow2", "-k", tmp_path / "nbd", "-x", "e", base]
    )
    loop = subprocess.run(["losetup", "-f", "--show", raw(tmp_path / "dev.raw")],
                          capture_output=True, text=True, check=False)  # fmt: skip
    try:
        wait_until(lambda: greets(tmp_path / "nbd"), alive=lambda: serving.poll() is None)
        url = f"nbd+unix:///e?socket={tmp_path / 'nbd'}"
        remote = tmp_path / "remote.qcow2"
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", url, "-F", "raw", remote, "8M"], check=True
        )
        disks = {"vda": [f"driver=qcow2,node-name=a,file.driver=file,file.filename={remote}"]}
        if loop.returncode == 0:
            device = loop.stdout.strip()
            disks["vdb"] = [f"driver=raw,node-name=b,file.driver=host_device,file.filename={device}"]
        with Machine(tmp_path / "m", blockdevs=disks) as machine, opened(machine.qmp) as guest:
            found = by_name(guest)
            assert "a layer below is at nbd+unix" in str(found["vda"].obstacle)
            assert found["vda"].chain[0].path is None
            if loop.returncode == 0:
                assert f"on the block device {device}; an overlay needs a directory" in str(found["vdb"].obstacle)
                assert found["vdb"].active.is_block_device
    finally:
        serving.kill()
        serving.wait()
        if loop.returncode == 0:
            subprocess.run(["losetup", "-d", loop.stdout.strip()], check=True)


def test_a_file_that_was_moved_replaced_or_deleted(machine: Machine, guest: QmpGuest, chain: Path) -> None:
    assert guest.disks()[0].obstacle is None
    chain.rename(chain.with_name("elsewhere.qcow2"))
    assert "it is no longer at this path; QEMU still has it open" in str(guest.disks()[0].obstacle)
    image(chain, chain.with_name("base.qcow2"))
    assert "another file has this path now; QEMU has the one open" in str(guest.disks()[0].obstacle)
    chain.with_name("elsewhere.qcow2").replace(chain)
    assert guest.disks()[0].obstacle is None
    chain.unlink()
    assert "it was deleted; QEMU still has it open" in str(guest.disks()[0].obstacle)
    with (
        pytest.raises(Unsupported, match="it was deleted") as caught,
        guest.prepared([NewOverlay("vda", chain, chain)]),
    ):
        pass
    assert caught.value.subject == "web1/vda"


def test_a_header_that_names_another_backing_file_than_qemu_has(tmp_path: Path, chain: Path) -> None:
    """What is sealed would be read by its header, and differ from what the guest saw."""
    other = image(tmp_path / "other.qcow2")
    options = [
        f"driver=qcow2,node-name=o,file.driver=file,file.filename={other}",
        f"driver=qcow2,node-name=t,backing=o,file.driver=file,file.filename={chain}",
    ]
    with Machine(tmp_path / "m", blockdevs={"vda": options}) as machine, opened(machine.qmp) as guest:
        assert "names base.qcow2" in str(guest.disks()[0].obstacle) or "names" in str(guest.disks()[0].obstacle)
        assert "but QEMU has" in str(guest.disks()[0].obstacle)


# --- What a guest is.


def test_state_process_and_name(machine: Machine, guest: QmpGuest) -> None:
    assert guest.state() is State.RUNNING
    machine.ask("stop")
    assert guest.state() is State.PAUSED
    machine.ask("cont")
    found = guest.process()
    assert found is not None
    assert found[0] == machine.process.pid
    assert guest.name == "web1"
    assert guest.option == f"--qmp {machine.qmp}"


def test_the_process_is_found_behind_a_proxy(machine: Machine, tmp_path: Path) -> None:
    with Spy(tmp_path / "spy", machine.qmp) as spy, opened(spy.path) as guest:
        found = guest.process()
        assert found is not None
        assert found[0] == machine.process.pid


def test_a_guest_that_waits_for_a_migration_is_left_alone(tmp_path: Path, chain: Path) -> None:
    argv = ["-incoming", "defer"]
    with Machine(tmp_path / "m", disks={"vda": chain}, argv=argv) as machine, opened(machine.qmp) as guest:
        assert guest.state() is State.INCOMING
        new = image(tmp_path / "n.qcow2", chain)
        with pytest.raises(Busy, match="waits for a migration"), guest.prepared([NewOverlay("vda", new, chain)]):
            pass


def test_a_guest_that_was_migrated_away_is_left_alone(tmp_path: Path, machine: Machine, guest: QmpGuest) -> None:
    machine.ask("migrate", uri=f"exec:cat > {tmp_path / 'state'}")
    wait_until(lambda: machine.ask("query-migrate").get("status") == "completed")
    assert guest.state() is State.INCOMING
    with pytest.raises(Busy, match="was migrated away"):
        guest.start(
            JobKind.COMMIT, "vda", lowest=tmp_path / "base.qcow2", uppermost=tmp_path / "top.qcow2", backing=None,
            job_id="sc-x", speed=0,
        )  # fmt: skip


def test_a_guest_without_a_name_has_its_sockets(tmp_path: Path, chain: Path) -> None:
    with Machine(tmp_path / "m", disks={"vda": chain}, name=None) as machine:
        with opened(machine.qmp) as guest:
            assert guest.name == "qmp"
        with open_guest(GuestAddress(qmp=machine.qmp, name="db7")) as named:
            assert named.name == "db7"


@pytest.mark.parametrize("node", ["libvirt-1-format", "mine"])
def test_a_guest_of_libvirts_is_refused(tmp_path: Path, chain: Path, node: str) -> None:
    monitor = (
        ["-chardev", f"socket,id=charmonitor,path={tmp_path / 'own'},server=on,wait=off"] if node == "mine" else []
    )
    options = {"vda": [f"driver=qcow2,node-name={node},file.driver=file,file.filename={chain}"]}
    with (
        Machine(tmp_path / "m", blockdevs=options, argv=monitor) as machine,
        pytest.raises(InvalidInput, match="libvirt manages this guest") as caught,
    ):
        QmpGuest(GuestAddress(qmp=machine.qmp))
    assert caught.value.hint == "name it instead: --domain web1"


def test_the_agents_socket_is_found(tmp_path: Path, chain: Path) -> None:
    argv = [
        "-device", "virtio-serial", "-chardev", f"socket,path={tmp_path / 'qga.sock'},server=on,wait=off,id=qga0",
        "-device", "virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
    ]  # fmt: skip
    with Machine(tmp_path / "m", disks={"vda": chain}, argv=argv) as machine:
        with opened(machine.qmp) as guest:
            agent = guest.agent()
            assert agent is not None
            assert agent.address() == {"kind": "socket", "path": str(tmp_path / "qga.sock")}
            with socket.socket(socket.AF_UNIX) as busy:
                busy.connect(str(tmp_path / "qga.sock"))
                again = guest.agent()
                assert again is not None
                assert again.address()["path"] == str(tmp_path / "qga.sock")
        with open_guest(GuestAddress(qmp=machine.qmp, agent=tmp_path / "other")) as other:
            named = other.agent()
            assert named is not None
            assert named.address()["path"] == str(tmp_path / "other")


def test_no_agent_is_configured(guest: QmpGuest) -> None:
    assert guest.agent() is None


def test_what_defines_it(tmp_path: Path, chain: Path) -> None:
    flash = raw(tmp_path / "vars.fd", 4 * MiB)
    argv = [
        "-uuid", "6f0b3a5c-0000-4000-8000-000000000001", "-netdev", "user,id=n", "-device",
        "virtio-net-pci,netdev=n,mac=52:54:00:AB:CD:EF,id=net0", "-netdev", "user,id=n2", "-device",
        "rtl8139,netdev=n2,mac=52:54:00:00:00:02", "-drive", f"if=pflash,format=raw,file={flash}",
    ]  # fmt: skip
    with Machine(tmp_path / "m", disks={"vda": chain}, argv=argv) as machine, opened(machine.qmp) as guest:
        found = guest.definition(with_secrets=True)
        assert found.kind == "qmp"
        assert found.name == "web1"
        assert found.uuid == "6f0b3a5c-0000-4000-8000-000000000001"
        assert str(found.machine).startswith("pc-q35-")
        assert sorted(found.macs) == ["52:54:00:00:00:02", "52:54:00:ab:cd:ef"]
        assert found.argv is not None
        assert found.argv[-len(argv) :] == tuple(argv)
        assert [(each.role, each.name, len(each.data), each.secret) for each in found.files] == [
            ("nvram", "vars.fd", 4 * MiB, False)
        ]
        assert found.unreadable == ()
        flash.rename(flash.with_name("gone.fd"))
        assert "no longer at this path" in guest.definition(with_secrets=True).unreadable[0]


class TpmMonitor:
    """What QEMU tells of an emulated TPM; swtpm is no package that tests install."""

    def __init__(self, control: Path) -> None:
        self.control = control

    def has(self, command: str) -> bool:
        return command == "query-tpm"

    def rows(self, command: str) -> list[dict[str, Any]]:
        known: dict[str, list[dict[str, Any]]] = {
            "query-tpm": [{"id": "t", "options": {"type": "emulator", "data": {"chardev": "tpm0"}}}],
            "query-chardev": [{"label": "tpm0", "filename": f"unix:{self.control}"}],
        }
        return known[command]


def test_the_state_of_a_tpm_is_a_secret(tmp_path: Path) -> None:
    state = tmp_path / "tpm"
    state.mkdir()
    (state / "tpm2-00.permall").write_bytes(b"secret")
    (state / "link").symlink_to("/etc/passwd")
    monitor: Any = TpmMonitor(tmp_path / "swtpm.sock")
    words = ["socket", "--ctrl", f"type=unixio,path={tmp_path / 'swtpm.sock'}", "--tpmstate", "dir=tpm,mode=0600"]
    swtpm = subprocess.Popen(
        ["/usr/bin/swtpm", "-c", "import ctypes, time; ctypes.CDLL(None).prctl(1, 9); time.sleep(1000)", *words],
        executable=sys.executable,
        cwd=tmp_path,
    )
    unreadable: list[str] = []
    try:
        # exec closes the pipe on which Popen waits a moment before the kernel shows the new command line
        wait_until(Path(f"/proc/{swtpm.pid}/cmdline").read_bytes)
        found = list(_tpm(monitor, QemuFiles(swtpm.pid), unreadable, with_secrets=True))
        assert [(each.role, each.name, each.data, each.secret) for each in found] == [
            ("tpm", "tpm2-00.permall", b"secret", True)
        ]
        assert unreadable == []
        assert list(_tpm(monitor, QemuFiles(swtpm.pid), unreadable, with_secrets=False)) == []
        assert "only an encrypted repository takes it" in unreadable[0]
    finally:
        swtpm.kill()
        swtpm.wait()
    assert list(_tpm(monitor, QemuFiles(None), unreadable, with_secrets=True)) == []
    assert "no swtpm of this host was found" in unreadable[1]


def test_statistics_count_what_the_guest_does(guest: QmpGuest) -> None:
    """The firmware reads the first sector of each disk; `qemu-io` passes by the device, which counts."""
    wait_until(lambda: guest.statistics("vda").reads > 0)
    found = guest.statistics("vda")
    assert found.read_ns > 0
    with pytest.raises(NotFound, match="the guest has no disk") as caught:
        guest.statistics("vdz")
    assert caught.value.hint == "its disks are: vda"


# --- What others do in it.


def test_jobs_exports_and_backups_of_others_are_seen(
    tmp_path: Path, machine: Machine, guest: QmpGuest, chain: Path
) -> None:
    machine.write("vda", 0, MiB, 1)
    machine.ask("blockdev-add", **{"driver": "qcow2", "node-name": "target",
                "file": {"driver": "file", "filename": str(image(tmp_path / "target.qcow2"))}})  # fmt: skip
    machine.ask("blockdev-mirror", **{"job-id": "copy", "device": "vda-top", "target": "target", "sync": "full"})
    machine.ask("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
    base = guest.disks()[0].chain[0].node
    machine.ask("block-export-add", **{"type": "nbd", "id": "ex", "node-name": base, "name": "x"})
    found = {each.id: each for each in guest.activities()}
    assert (found["copy"].kind, found["copy"].is_ours, found["copy"].node) == ("mirror", False, "vda-top")
    assert (found["ex"].kind, found["ex"].is_ours, found["ex"].node) == ("export", False, base)
    assert "mirror" in found["copy"].says
    assert "of another program" in found["copy"].says
    new = image(tmp_path / "n.qcow2", chain)
    wanted = [NewOverlay("vda", new, chain)]
    says = r"block job copy \(mirror, \w+\), of another program"
    with pytest.raises(Busy, match=says) as caught, guest.prepared(wanted):
        pass
    assert caught.value.subject == "web1/vda"
    machine.ask("block-job-cancel", device="copy")
    wait_until(lambda: not machine.ask("query-jobs"))
    with guest.prepared(wanted) as switch:
        switch.run()  # an export of a sealed layer is in nobody's way
    assert paths(guest.disks()[0]) == ["base.qcow2", "top.qcow2", "n.qcow2"]


def test_a_fleecing_backup_is_seen(tmp_path: Path, machine: Machine, guest: QmpGuest) -> None:
    scratch = image(tmp_path / "scratch.qcow2")
    machine.ask("blockdev-add", **{"driver": "qcow2", "node-name": "scratch",
                "file": {"driver": "file", "filename": str(scratch)}})  # fmt: skip
    machine.ask("blockdev-add", **{"driver": "copy-before-write", "node-name": "cbw", "file": "vda-top",
                "target": "scratch"})  # fmt: skip
    machine.ask("qom-set", path="/machine/peripheral/vda", property="drive", value="cbw")
    disk = guest.disks()[0]
    assert (disk.root, disk.filters, disk.active.node) == ("cbw", ("cbw",), "vda-top")
    assert [(each.id, each.kind, each.is_ours, each.node) for each in guest.activities()] == [
        ("cbw", "backup", False, "vda-top")
    ]


def test_disks_can_be_asked_in_every_state_of_a_job(tmp_path: Path, machine: Machine, guest: QmpGuest) -> None:
    """Beside a stream without the list of nodes, which may kill QEMU 7.2."""
    machine.write("vda", 0, 65536, 1)
    job = guest.start(
        JobKind.STREAM, "vda", lowest=tmp_path / "base.qcow2", uppermost=tmp_path / "top.qcow2", backing=None,
        job_id="sc-stream", speed=0,
    )  # fmt: skip
    seen = []
    while (status := job.progress().status) is not JobStatus.GONE:
        seen.append(status)
        assert guest.disks()[0].active.path == tmp_path / "top.qcow2"
        assert [each.id for each in guest.activities()] == ["sc-stream"]
        if status is JobStatus.PENDING:
            job.flush()
            job.finalize()
        elif status is JobStatus.CONCLUDED:
            guest.job("sc-stream", JobKind.STREAM, "vda").flush()
            job.dismiss()
        else:
            job.wait(60)
    assert seen[-2:] == [JobStatus.PENDING, JobStatus.CONCLUDED]
    assert paths(guest.disks()[0]) == ["top.qcow2"]
    assert machine.status() == "running"


def test_a_migration_is_seen(machine: Machine, guest: QmpGuest, tmp_path: Path, chain: Path) -> None:
    assert guest.activities() == []
    machine.ask("migrate", uri=f"exec:exec {' '.join(DIE_WITH_PARENT)} sleep 1000")
    wait_until(guest.activities)
    assert [(each.kind, each.is_ours, each.node) for each in guest.activities()] == [("migration", False, None)]
    new = NewOverlay("vda", image(tmp_path / "n.qcow2", chain), chain)
    with pytest.raises(Busy, match=r"migration \(\w+\)"), guest.prepared([new]):
        pass
    machine.ask("migrate_cancel")


def test_a_job_goes_on_while_the_link_is_cut(tmp_path: Path, machine: Machine, chain: Path) -> None:
    machine.write("vda", 0, MiB, 1)
    base = chain.with_name("base.qcow2")
    with Spy(tmp_path / "spy", machine.qmp) as spy, opened(spy.path) as guest:
        job = guest.start(JobKind.STREAM, "vda", lowest=base, uppermost=chain, backing=None, job_id="sc-s", speed=0)
        seen = []
        while (status := job.progress().status) is not JobStatus.GONE:
            seen.append(status)
            spy.drop()
            if status is JobStatus.PENDING:
                job.flush()  # it looks only, so it connects again
            spy.drop()
            wait_until(lambda: not guest.monitor._is_up(guest.monitor._client))
            if status is JobStatus.PENDING:
                job.finalize()
            elif status is JobStatus.CONCLUDED:
                job.dismiss()
            job.wait(1)
        assert seen[-1] is JobStatus.CONCLUDED
        assert paths(guest.disks()[0]) == ["top.qcow2"]
        spy.check()


def test_a_replaced_file_is_not_merged(machine: Machine, guest: QmpGuest, chain: Path) -> None:
    base = chain.with_name("base.qcow2")
    base.rename(base.with_name("moved.qcow2"))
    image(base)
    with pytest.raises(Conflict, match="another file has this path now") as caught:
        guest.start(JobKind.STREAM, "vda", lowest=base, uppermost=chain, backing=None, job_id="sc-s", speed=0)
    assert caught.value.subject == str(base)
    assert machine.ask("query-jobs") == []


def test_jobs_that_cannot_be(machine: Machine, guest: QmpGuest, chain: Path) -> None:
    base = chain.with_name("base.qcow2")

    def start(kind: JobKind, lowest: Path, uppermost: Path, name: str = "sc-1") -> None:
        guest.start(kind, "vda", lowest=lowest, uppermost=uppermost, backing=None, job_id=name, speed=0)

    with pytest.raises(InvalidInput, match="the lowest layer is not below the uppermost"):
        start(JobKind.STREAM, chain, base)
    with pytest.raises(InvalidInput, match="an active commit is one of the layer that the guest writes to"):
        start(JobKind.COMMIT, base, chain)
    with pytest.raises(Conflict, match="the file is no layer of the disk any more"):
        start(JobKind.STREAM, chain.with_name("other"), chain)
    with pytest.raises(Refused, match="QEMU refused block-stream: Invalid job ID"):
        start(JobKind.STREAM, base, chain, "1/x")
    assert machine.ask("query-jobs") == []


def test_a_stream_that_was_cancelled_is_dismissed_before_the_graph_is_walked(
    tmp_path: Path, machine: Machine, chain: Path
) -> None:
    base = chain.with_name("base.qcow2")
    with Spy(tmp_path / "spy", machine.qmp) as spy:
        with opened(spy.path) as guest:
            job = guest.start(JobKind.STREAM, "vda", lowest=base, uppermost=chain, backing=None, job_id="sc-s", speed=1)
            job.cancel()
            wait_until(lambda: job.progress().status is JobStatus.CONCLUDED)
        with opened(spy.path) as guest:  # another run of snapchain
            assert guest.disks()[0].obstacle is None
            found = guest.job("sc-s", JobKind.STREAM, "vda")
            assert found.progress().status is JobStatus.CONCLUDED
            found.dismiss()
            found.dismiss()
            assert found.progress().status is JobStatus.GONE
            assert guest.activities() == []
        spy.check()
    assert machine.status() == "running"


# --- Snapshots.


def overlays(tmp_path: Path, *disks: tuple[str, Path]) -> list[NewOverlay]:
    return [NewOverlay(name, image(tmp_path / f"{name}.new.qcow2", active), active) for name, active in disks]


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Machine]:
    a, b = image(tmp_path / "a.qcow2"), image(tmp_path / "b.qcow2")
    with Machine(tmp_path / "m", disks={"vda": a, "vdb": b}) as found:
        yield found


def test_all_disks_are_switched_at_once(tmp_path: Path, two: Machine) -> None:
    two.write("vda", 0, 65536, 1)
    new = overlays(tmp_path, ("vda", tmp_path / "a.qcow2"), ("vdb", tmp_path / "b.qcow2"))
    with opened(two.qmp) as guest:
        with guest.prepared(new) as switch:
            assert len(nodes_of_ours(two)) == 2
            assert switch.outcome() is Outcome.NOT_DONE
            switch.run()
            assert switch.outcome() is Outcome.DONE
        assert [paths(disk) for disk in guest.disks()] == [["a.qcow2", "vda.new.qcow2"], ["b.qcow2", "vdb.new.qcow2"]]
        assert all(disk.obstacle is None for disk in guest.disks())
    two.write("vda", 0, 65536, 2)
    assert two.reads("vda", 0, 65536, 2)
    two.quit()
    subprocess.run(["qemu-io", "-r", "-c", "read -P 1 0 64k", tmp_path / "a.qcow2"], check=True)
    subprocess.run(["qemu-img", "check", "-q", tmp_path / "vda.new.qcow2"], check=True)


def test_a_chain_so_long_that_qemu_cuts_its_names(tmp_path: Path) -> None:
    """Each snapshot nests the whole chain in the name that QEMU makes of it, and has 4095 bytes for it."""
    names = [f"{'long' * 50}-{number}.qcow2" for number in range(14)]
    top = image(tmp_path / names[0])
    with Machine(tmp_path / "m", disks={"vda": top}) as machine, opened(machine.qmp) as guest:
        for name in names[1:]:
            new = image(tmp_path / name, top, name=top.name)
            with guest.prepared([NewOverlay("vda", new, top)]) as switch:
                switch.run()
            top = new
        assert machine.ask("query-block")[0]["inserted"]["file"].endswith("...")
        disk = guest.disks()[0]
        assert disk.obstacle is None
        assert paths(disk) == names
        lowest = disk.chain[0].path
        assert lowest is not None
        job = guest.start(JobKind.STREAM, "vda", lowest=lowest, uppermost=top, backing=None, job_id="sc-s", speed=1)
        assert paths(guest.disks()[0])[:-1] == paths(disk)[:-1], "beside a stream the headers name the lower ones"
        assert "beside a stream job; wait until that has ended" in str(guest.disks()[0].obstacle)
        job.cancel()


def test_what_is_not_switched_to_is_closed(tmp_path: Path, two: Machine) -> None:
    new = overlays(tmp_path, ("vda", tmp_path / "a.qcow2"), ("vdb", tmp_path / "b.qcow2"))
    with opened(two.qmp) as guest:
        with guest.prepared(new):
            pass
        assert nodes_of_ours(two) == []
        with pytest.raises(ZeroDivisionError), guest.prepared(new):
            _ = 1 / 0
        assert nodes_of_ours(two) == []
        new[1].path.unlink()
        with pytest.raises(NotFound, match=r"vdb\.new\.qcow2"), guest.prepared(new):
            pass
        assert nodes_of_ours(two) == []


def test_a_transaction_that_fails_changes_nothing(tmp_path: Path, two: Machine) -> None:
    new = overlays(tmp_path, ("vda", tmp_path / "a.qcow2"), ("vdb", tmp_path / "b.qcow2"))
    with opened(two.qmp) as guest:
        with guest.prepared(new) as switch:
            # Somebody opens a mirror of the second disk between our look and our switch.
            target = image(tmp_path / "t.qcow2")
            two.ask("blockdev-add", **{"driver": "qcow2", "node-name": "t",
                    "file": {"driver": "file", "filename": str(target)}})  # fmt: skip
            two.ask("blockdev-mirror", **{"job-id": "m", "device": "vdb-top", "target": "t", "sync": "full"})
            with pytest.raises(Busy, match=r"QEMU refused transaction: .*busy.*mirror"):
                switch.run()
            assert switch.outcome() is Outcome.NOT_DONE
        assert [paths(disk) for disk in guest.disks()] == [["a.qcow2"], ["b.qcow2"]]
        assert nodes_of_ours(two) == []


def test_the_layer_below_a_filter_is_sealed_and_an_active_commit_keeps_the_filter(tmp_path: Path) -> None:
    """A snapshot of the filter would write `json:` with the filter into the overlay: unbootable elsewhere."""
    top = image(tmp_path / "top.qcow2")
    options = [
        f"driver=qcow2,node-name=fmt,file.driver=file,file.filename={top}",
        "driver=throttle,node-name=thr,file=fmt,throttle-group=tg",
    ]
    argv = ["-object", "throttle-group,id=tg,x-bps-total=1000000000"]
    # `argv` comes last on QEMU's command line, and the group must exist before its filter.
    with Machine(tmp_path / "m", argv=[*argv, *(w for o in options for w in ("-blockdev", o)),
                 "-device", "virtio-blk-pci,drive=thr,id=vda"]) as machine:  # fmt: skip
        with opened(machine.qmp) as guest:
            new = overlays(tmp_path, ("vda", top))
            with guest.prepared(new) as switch:
                switch.run()
            disk = guest.disks()[0]
            assert (disk.root, paths(disk)) == ("thr", ["top.qcow2", "vda.new.qcow2"])
            machine.write("vda", 0, 65536, 5)
            job = guest.start(
                JobKind.ACTIVE_COMMIT, "vda", lowest=top, uppermost=new[0].path, backing=None, job_id="sc-a", speed=0
            )
            while (status := job.progress().status) is not JobStatus.GONE:
                if status is JobStatus.READY:
                    job.complete()
                if status is JobStatus.CONCLUDED:
                    job.dismiss()
                else:
                    job.wait(1)
            disk = guest.disks()[0]
            assert (disk.root, disk.filters, paths(disk)) == ("thr", ("thr",), ["top.qcow2"])
            assert nodes_of_ours(machine) == [], "QEMU would keep the old overlay open and locked"
        assert machine.reads("vda", 0, 65536, 5)


Spoil = Callable[[Path, Path], NewOverlay]


def smaller(new: Path, active: Path) -> NewOverlay:
    return NewOverlay("vda", image(new, active, size=4 * MiB), active)


def larger(new: Path, active: Path) -> NewOverlay:
    return NewOverlay("vda", image(new, active, size=16 * MiB), active)


def filled(new: Path, active: Path) -> NewOverlay:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", new, "8M"], check=True)
    subprocess.run(["qemu-io", "-c", "write 0 64k", new], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["qemu-img", "rebase", "-u", "-b", active, "-F", "qcow2", new], check=True)
    return NewOverlay("vda", new, active)


def elsewhere(new: Path, active: Path) -> NewOverlay:
    return NewOverlay("vda", image(new, image(active.with_name("other.qcow2"))), active)


def rootless(new: Path, active: Path) -> NewOverlay:
    return NewOverlay("vda", image(new), active)


def of_another_format(new: Path, active: Path) -> NewOverlay:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", active, "-F", "raw", new, "8M"], check=True)
    return NewOverlay("vda", new, active)


def of_an_old_chain(new: Path, active: Path) -> NewOverlay:
    base = active.with_name("base.qcow2")
    return NewOverlay("vda", image(new, base), base)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (smaller, "the overlay has 4194304 bytes, and the disk 8388608"),
        (larger, "the overlay has 16777216 bytes, and the disk 8388608"),
        (filled, "the overlay is not empty"),
        (elsewhere, "the overlay is based on .*other.qcow2"),
        (rootless, "the overlay names no backing file"),
        (of_another_format, r"the overlay is based on .* \(raw\), not on"),
        (of_an_old_chain, r"the active layer of vda is .*top\.qcow2, not .*base\.qcow2"),
    ],
)
def test_an_overlay_that_does_not_fit(
    tmp_path: Path, machine: Machine, guest: QmpGuest, chain: Path, spoil: Spoil, words: str
) -> None:
    """QEMU takes each of them without a word."""
    new = spoil(tmp_path / "new.qcow2", chain)
    with pytest.raises(Conflict, match=words) as caught, guest.prepared([new]):
        pass
    assert caught.value.subject == str(new.path)
    assert nodes_of_ours(machine) == []


def test_an_overlay_is_opened_as_the_layer_that_it_covers(tmp_path: Path) -> None:
    top = image(tmp_path / "top.qcow2")
    argv = ["-drive", f"file={top},if=none,id=d,format=qcow2,cache=none,aio=native,discard=on,detect-zeroes=unmap",
            "-device", "virtio-blk-pci,drive=d,id=vda"]  # fmt: skip
    with Machine(tmp_path / "m", argv=argv) as machine:
        before = machine.ask("query-block")[0]["inserted"]
        with Spy(tmp_path / "spy", machine.qmp) as spy, opened(spy.path) as guest:
            with guest.prepared(overlays(tmp_path, ("vda", top))) as switch:
                switch.run()
            added = next(each.arguments for each in spy.commands if each.name == "blockdev-add")
        assert added["backing"] is None
        assert (added["discard"], added["detect-zeroes"], added["file"]["aio"]) == ("unmap", "unmap", "native")
        after = machine.ask("query-block")[0]["inserted"]
        assert before["cache"]["direct"] is True
        assert after["cache"]["direct"] is True  # (`writeback` is the device's, and the firmware changes it)
        assert (after["cache"]["no-flush"], after["detect_zeroes"]) == (False, "unmap")


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["-drive", "file=/a,,b,aio=io_uring,discard=on"], {"aio": "io_uring", "discard": "unmap"}),
        (["-drive", "file=/a,,b,if=none"], {"discard": "ignore"}),
        (["-blockdev", '{"driver":"qcow2","node-name":"n","discard":"unmap","file":{"aio":"native"}}'],
         {"aio": "native", "discard": "unmap"}),
        (["-blockdev", "driver=file,node-name=f,filename=/a,,b,aio=native",
          "-blockdev", "driver=qcow2,node-name=n,file=f"],
         {"aio": "native", "discard": "ignore"}),
        (["-drive", "file=/other,aio=native"], {}),
        (["-blockdev", "{broken"], {}),
        ([], {}),
    ],
)  # fmt: skip
def test_options_of_the_command_line(argv: Sequence[str], found: dict[str, str]) -> None:
    assert drive_options(tuple(argv), {"/a,b", "n"}) == found


def test_qemu_may_not_open_the_overlay(tmp_path: Path) -> None:
    folder = tmp_path / "guest"
    folder.mkdir()
    top = image(folder / "top.qcow2")
    for each in (folder, top):
        os.chown(each, 65534, 65534)
    for each in (tmp_path, *tmp_path.parents):  # pytest's own are closed to others
        mode = stat.S_IMODE(each.stat().st_mode)
        if not mode & stat.S_IXOTH:
            each.chmod(mode | stat.S_IXOTH)
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--pdeathsig", "KILL", *QEMU)
    with Machine(folder, disks={"vda": top}, qemu=nobody) as machine, opened(machine.qmp) as guest:
        new = overlays(folder, ("vda", top))
        new[0].path.chmod(0o600)
        says = r"QEMU cannot open the new overlay: .*Permission denied"
        with pytest.raises(Unavailable, match=says) as caught, guest.prepared(new):
            pass
        assert "owner and mode" in str(caught.value.hint)


# --- Death and cut links, at each command.


def snapshot(guest: QmpGuest, new: Sequence[NewOverlay]) -> Outcome:
    """As `guest.snapshot` does it: a lost answer is judged by the graph."""
    with guest.prepared(new) as switch:
        try:
            switch.run()
        except Unavailable:
            return switch.outcome()
        return Outcome.DONE


def commands_of_a_snapshot(tmp_path: Path) -> Sequence[Any]:
    folder = tmp_path / "count"
    folder.mkdir()
    with Machine(folder, disks={"vda": image(folder / "a.qcow2")}) as machine:
        with Spy(folder / "spy", machine.qmp) as spy, opened(spy.path) as guest:
            snapshot(guest, overlays(folder, ("vda", folder / "a.qcow2")))
        return spy.commands


def check_clean(machine: Machine, folder: Path, active: Path) -> None:
    """The guest goes on, and the next snapshot ends with a chain that is as it looks."""
    assert machine.status() == "running"
    machine.write("vda", 0, 65536, 9)
    with opened(machine.qmp) as guest:
        disk = guest.disks()[0]
        assert disk.obstacle is None
        assert disk.active.path is not None
        again = NewOverlay("vda", image(folder / "again.qcow2", disk.active.path), disk.active.path)
        assert snapshot(guest, [again]) is Outcome.DONE
        assert set(nodes_of_ours(machine)) <= {layer.node for layer in guest.disks()[0].chain}, "nothing is left open"
    assert machine.reads("vda", 0, 65536, 9)
    assert machine.reads("vda", 65536, 65536, 3)


@pytest.mark.sampled
def test_a_cut_link_at_each_command_of_a_snapshot(tmp_path: Path) -> None:
    """All or nothing, by the graph; and what a lost answer said is never guessed."""
    faults = list(every(commands_of_a_snapshot(tmp_path), (DROP,)))
    changing = [each for each in faults if each.name.split()[-1] in {"blockdev-add", "transaction"}]
    rest = [each for each in faults if each not in changing]
    for number, fault in enumerate([*changing, *some(rest, each=20)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        active = image(folder / "a.qcow2")
        with Machine(folder, disks={"vda": active}) as machine:
            machine.write("vda", 65536, 65536, 3)
            new = overlays(folder, ("vda", active))
            outcome = Outcome.NOT_DONE
            with Spy(folder / "spy", machine.qmp, fault) as spy:
                with suppress(SnapchainError), opened(spy.path) as guest:
                    outcome = snapshot(guest, new)
                assert spy.happened, fault
                spy.check()
            with opened(machine.qmp) as guest:
                names = paths(guest.disks()[0])
            expected = ["a.qcow2", "vda.new.qcow2"] if outcome is Outcome.DONE else ["a.qcow2"]
            assert names == expected, fault
            check_clean(machine, folder, active)


def run_snapshot(socket_path: str, new: str, active: str) -> None:
    """In a process of its own, to be killed."""
    with opened(Path(socket_path)) as guest:
        snapshot(guest, [NewOverlay("vda", Path(new), Path(active))])


@pytest.mark.parametrize(
    ("name", "place"),
    [
        pytest.param("blockdev-add", Place.BEFORE, marks=pytest.mark.soak),
        ("blockdev-add", Place.SENT),
        pytest.param("transaction", Place.BEFORE, marks=pytest.mark.soak),
        ("transaction", Place.SENT),
    ],
)
def test_a_kill_at_what_changes_the_guest(tmp_path: Path, name: str, place: Place) -> None:
    """What a dead snapchain opened in QEMU is closed by the next snapshot."""
    active = image(tmp_path / "a.qcow2")
    with Machine(tmp_path / "m", disks={"vda": active}) as machine:
        machine.write("vda", 65536, 65536, 3)
        new = overlays(tmp_path, ("vda", active))[0]
        counts = name.__eq__
        with Spy(tmp_path / "spy", machine.qmp, Fault(0, place, KILL), counts=counts) as spy:
            code = "import sys; from tests.guest.test_qmp_guest import run_snapshot; run_snapshot(*sys.argv[1:])"
            done = subprocess.run([sys.executable, "-c", code, spy.path, new.path, active], check=False)
            assert done.returncode == -9
            spy.check()
        is_done = name == "transaction" and place is not Place.BEFORE
        with opened(machine.qmp) as guest:
            assert len(guest.disks()[0].chain) == (2 if is_done else 1)
        left = len(nodes_of_ours(machine))
        assert left == (0 if (name, place) == ("blockdev-add", Place.BEFORE) else 1)
        check_clean(machine, tmp_path, active)
        if not is_done:
            assert new.path.name not in {Path(each["file"]).name for each in machine.ask("query-named-block-nodes")}


def test_a_lost_answer_has_a_deadline_and_the_graph_decides(tmp_path: Path) -> None:
    active = image(tmp_path / "a.qcow2")
    with Machine(tmp_path / "m", disks={"vda": active}) as machine:
        lost = Fault(0, Place.SENT, LOSE)
        with Spy(tmp_path / "spy", machine.qmp, lost, counts="transaction".__eq__) as spy:
            guest = QmpGuest(GuestAddress(qmp=spy.path), monitor=Monitor(spy.path, command_seconds=3))
            with guest.prepared(overlays(tmp_path, ("vda", active))) as switch:
                with pytest.raises(Unavailable, match="did not answer transaction within 3 seconds"):
                    switch.run()
                assert switch.outcome() is Outcome.DONE
            assert paths(guest.disks()[0]) == ["a.qcow2", "vda.new.qcow2"]
            guest.close()


def test_another_snapchain_that_lives_keeps_what_it_opened(tmp_path: Path, two: Machine) -> None:
    """Its node carries its process; ours is told apart."""
    child = subprocess.Popen([*DIE_WITH_PARENT, "sleep", "1000"])
    try:
        node = f"sc-{child.pid:x}-0123456789ab"
        two.ask("blockdev-add", **{"driver": "qcow2", "node-name": node, "backing": None,
                "file": {"driver": "file", "filename": str(image(tmp_path / "n.qcow2"))}})  # fmt: skip
        two.ask("blockdev-add", **{"driver": "qcow2", "node-name": "sc-scratch", "backing": None,
                "file": {"driver": "file", "filename": str(image(tmp_path / "s.qcow2"))}})  # fmt: skip
        with opened(two.qmp) as guest:
            guest.overlays.close_orphans()
            assert sorted(nodes_of_ours(two)) == sorted([node, "sc-scratch"])
            child.kill()
            child.wait()
            guest.overlays.close_orphans()
            assert nodes_of_ours(two) == ["sc-scratch"]
            guest.release([tmp_path / "s.qcow2"])
            assert nodes_of_ours(two) == []
    finally:
        child.kill()
        child.wait()


def test_a_qemu_that_knows_no_flat_list_is_asked_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    real = Monitor.rows

    def older(monitor: Monitor, command: str, arguments: Any = None) -> Any:
        if command == "query-named-block-nodes":
            asked.append(arguments)
            if arguments is not None:
                raise Refused(command, "GenericError", "Parameter 'flat' is unexpected", subject="qmp")
        return real(monitor, command, arguments)

    monkeypatch.setattr(Monitor, "rows", older)
    with (
        Machine(tmp_path / "m", disks={"vda": image(tmp_path / "vda.qcow2")}) as machine,
        open_guest(GuestAddress(qmp=machine.qmp)) as guest,
    ):
        assert [disk.name for disk in guest.disks()] == ["vda"]
    assert asked == [{"flat": True}, None]
