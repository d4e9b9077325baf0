"""A domain of a real libvirtd as a guest: what it says of itself, snapshots, live merges, and what is in the way."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import main
from snapchain.errors import Busy, Conflict, NotFound, ToolFailed, Unavailable, Unsupported
from snapchain.guest import journal
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.agent import open_agent
from snapchain.guest.libvirt_guest import LibvirtGuest
from snapchain.guest.protocol import Job, JobKind, JobProgress, JobStatus, NewOverlay, Outcome, State
from snapchain.host import libvirt, process_channel, processes, virsh
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.processes import Completed
from snapchain.host.virsh import Virsh
from tests.guest.agent_guest import formatted, parts
from tests.guest.libvirt import Domain, disk_xml
from tests.libvirtd import LibvirtHost
from tests.ops.stacks import Layer, MiB, build, flat, qemu_img
from tests.waiting import HANG, wait_until

pytestmark = pytest.mark.root

_NAMES = itertools.count(1)
Start = Callable[..., Domain]


@pytest.fixture
def start(libvirt_host: LibvirtHost, tmp_path: Path) -> Iterator[Start]:
    """Start a domain of a new name on the disks that are given; it is gone at the end."""
    begun: list[Domain] = []

    def one(name: str | None = None, **more: object) -> Domain:
        domain = Domain.started(libvirt_host, tmp_path / "domain", name=name or f"web{next(_NAMES)}", **more)  # type: ignore[arg-type]
        begun.append(domain)
        return domain

    yield one
    for domain in begun:
        domain.remove()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    layers = [Layer(16 * MiB, [f"write -P {n} {n}M 2M"]) for n in (1, 2, 3, 4)]
    names = ["a.qcow2", "b.qcow2", "c.qcow2", "vda.qcow2"]
    return build(tmp_path_factory.mktemp("template") / "images", layers, names=names)


@pytest.fixture
def chain(template: list[Path], tmp_path: Path) -> list[Path]:
    """Four layers that name each other relatively."""
    (tmp_path / "images").mkdir()
    return [Path(shutil.copy(path, tmp_path / "images")) for path in template]


@pytest.fixture
def second(tmp_path: Path) -> Path:
    return build(tmp_path / "images", [Layer(8 * MiB)], names=["vdb.qcow2"])[0]


def overlay(top: Path, disk: str, name: str, size: int = 16 * MiB) -> NewOverlay:
    path = top.with_name(name)
    qemu_img("create", "-q", "-f", "qcow2", "-u", "-b", top.name, "-F", "qcow2", path, str(size))
    return NewOverlay(disk, path, top)


def opened(domain: Domain) -> LibvirtGuest:
    return LibvirtGuest(domain.address)


# --- what it says of itself


def test_a_guest_as_it_is(start: Start, chain: list[Path], second: Path, tmp_path: Path) -> None:
    iso = tmp_path / "a.iso"
    iso.write_bytes(bytes(MiB))
    more = (
        f"<disk type='file' device='cdrom'><source file='{iso}'/><target dev='sda' bus='sata'/><readonly/></disk>"
        "<disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>"
        "<interface type='user'><mac address='52:54:00:00:00:07'/></interface>"
    )
    domain = start("web 1 ü;$(x)", disks={"vda": chain[-1], "vdb": second}, more=more, agent=tmp_path / "agent")
    with open_guest(domain.address) as guest:
        assert isinstance(guest, LibvirtGuest)
        assert (guest.kind, guest.name, guest.streams, guest.state()) == ("libvirt", domain.name, False, State.RUNNING)
        process = guest.process()
        assert process is not None
        assert process[0] == domain.pid
        vda, vdb, sda, sdb = guest.disks()
        assert [layer.path for layer in vda.chain] == chain
        assert [layer.virtual_size for layer in vda.chain] == [16 * MiB] * 4
        status = chain[0].stat()
        assert vda.chain[0].identity == (status.st_dev, status.st_ino)
        assert {layer.image_format for layer in vda.chain} == {"qcow2"}
        nodes = {node["node-name"] for node in domain.ask("query-named-block-nodes")}
        assert {layer.node for layer in (*vda.chain, *vdb.chain)} <= nodes
        assert (vda.obstacle, vda.left_out, vdb.obstacle, vdb.left_out) == (None, None, None, None)
        assert (sda.name, sda.left_out, sdb.left_out, sdb.chain) == ("sda", "CD-ROM", "CD-ROM", ())
        assert guest.agent() is not None
        assert guest.activities() == ()
        domain.write("vda", 0, 65536, 9)
        domain.io("vda", "flush")
        counted = guest.statistics("vda")
        assert counted.reads >= 0
        with pytest.raises(NotFound, match="vdz: the guest has no statistics"):
            guest.statistics("vdz")
        domain.virsh("suspend")
        assert guest.state() is State.PAUSED
        domain.virsh("destroy")
        assert (guest.state(), guest.process(), guest.activities()) == (State.OFF, None, ())
        assert [layer.path for layer in guest.disks()[0].chain] == chain


def test_a_domain_is_found_by_its_name_and_by_nothing_else(start: Start, chain: list[Path], second: Path) -> None:
    first = start(disks={"vda": chain[-1]})
    ident = first.virsh("domid").strip()
    other = start(ident, disks={"vda": second})  # virsh takes this name for the id of the first one
    assert LibvirtGuest(other.address).name == ident
    assert LibvirtGuest(other.address).disks()[0].active.path == second
    by_uuid = GuestAddress(domain=first.virsh("domuuid").strip(), connect=first.host.uri)
    assert LibvirtGuest(by_uuid).name == first.name
    for name in ("nobody", "--all", "web"):
        with pytest.raises(NotFound, match="no such domain"):
            LibvirtGuest(GuestAddress(domain=name, connect=first.host.uri))


def test_the_environment_names_the_daemon(start: Start, chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    domain = start(disks={"vda": chain[-1]})
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", domain.host.uri)
    assert LibvirtGuest(GuestAddress(domain=domain.name)).state() is State.RUNNING
    with pytest.raises(Unsupported, match="another host"):
        LibvirtGuest(GuestAddress(domain=domain.name, connect="qemu+ssh://root@kvm2/system"))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///system?socket=/nowhere/libvirt-sock")
    with pytest.raises(Unavailable, match="not reachable"):
        LibvirtGuest(GuestAddress(domain=domain.name))


def test_several_questions_are_one_call_of_virsh(libvirt_host: LibvirtHost, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Virsh(libvirt_host.uri)
    questions = [
        ["uri"],
        ["nodeinfo"],
        ["list", "--title", "--state-shutoff", "--state-running", "--inactive"],
        ["uri"],
    ]
    apart = [asked.text(*words) for words in questions]
    started: list[Sequence[str]] = []

    def counted(argv: Sequence[str], **more: Any) -> Completed:
        started.append(argv)
        return processes.run(argv, **more)

    monkeypatch.setattr(virsh, "run", counted)
    assert asked.texts(*questions) == apart
    assert len(started) == 1


def test_a_daemon_that_hangs_is_unavailable(start: Start, chain: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    guest = opened(start(disks={"vda": chain[-1]}))
    monkeypatch.setattr(guest, "_virsh", Virsh(guest.uri, seconds=0.5))
    host = guest.address.connect
    assert host is not None
    pid = int((Path(host.partition("socket=")[2]).parent.parent / "libvirtd.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(Unavailable, match="did not answer"):
            guest.state()
    finally:
        os.kill(pid, signal.SIGCONT)


def test_each_kind_of_disk_is_handled_or_left_out_with_a_word(
    start: Start, chain: list[Path], second: Path, tmp_path: Path
) -> None:
    """More kinds: test_domain_xml.py."""
    raw, other = tmp_path / "vdb.raw", tmp_path / "vde.raw"
    raw.write_bytes(bytes(MiB))
    other.write_bytes(bytes(MiB))
    limited = "<iotune><total_iops_sec>100</total_iops_sec></iotune>"
    more = "".join(
        [
            disk_xml("vdb", raw, driver="type='raw'"),
            disk_xml("vdc", second, more=limited),
            disk_xml("vdd", chain[0], more="<readonly/>"),
            disk_xml("vde", other, driver="type='raw'", more="<shareable/>"),
        ]
    )
    found = {disk.name: disk for disk in opened(start(disks={"vda": chain[-1]}, more=more)).disks()}
    assert {name: disk.left_out for name, disk in found.items() if disk.left_out} == {"vdd": "read-only"}
    assert {name for name, disk in found.items() if disk.obstacle} == {"vde"}
    assert "shared with other guests" in str(found["vde"].obstacle)
    assert (found["vdb"].active.image_format, found["vdb"].active.virtual_size) == ("raw", MiB)


def test_a_volume_of_a_pool(start: Start, chain: list[Path], libvirt_host: LibvirtHost) -> None:
    pool = f"<pool type='dir'><name>p</name><target><path>{chain[0].parent}</path></target></pool>"
    xml = chain[0].with_name("pool.xml")
    xml.write_text(pool)
    libvirt_host.virsh("pool-create", xml)
    try:
        disk = (
            "<disk type='volume' device='disk'><driver name='qemu' type='qcow2'/>"
            f"<source pool='p' volume='{chain[-1].name}'/><target dev='vda' bus='virtio'/></disk>"
        )
        domain = start(disks={}, more=disk)
        guest = opened(domain)
        vda = guest.disks()[0]
        assert ([layer.path for layer in vda.chain], vda.obstacle) == (chain, None)
        new = overlay(chain[-1], "vda", "vda.1.qcow2")
        with guest.prepared([new]) as switch:
            switch.run()
        assert guest.disks()[0].active.path == new.path
        assert domain.source("vda", "--inactive") == new.path
        domain.virsh("destroy")
    finally:
        libvirt_host.virsh("pool-destroy", "p")


def test_a_file_that_was_renamed_under_the_guest_is_seen(start: Start, chain: list[Path]) -> None:
    guest = opened(start(disks={"vda": chain[-1]}))
    moved = chain[1].rename(chain[1].with_name("moved.qcow2"))
    assert "was renamed or removed" in str(guest.disks()[0].obstacle)
    chain[1].write_bytes(moved.read_bytes())
    assert "was replaced by another file" in str(guest.disks()[0].obstacle)


def test_a_definition_that_names_the_same_file_in_another_way_is_an_obstacle(
    start: Start, chain: list[Path], tmp_path: Path
) -> None:
    """libvirt would leave that definition as it is, and the next start would lose what was written since."""
    link = tmp_path / "link.qcow2"
    link.symlink_to(chain[-1])
    domain = start(disks={"vda": chain[-1]})
    xml = tmp_path / "new.xml"
    xml.write_text(domain.virsh("dumpxml", "--inactive").replace(f"'{chain[-1]}'", f"'{link}'"))
    domain.host.virsh("define", xml)
    disk = opened(domain).disks()[0]
    assert "names its file in another way" in str(disk.obstacle)
    new = overlay(chain[-1], "vda", "vda.1.qcow2")
    with pytest.raises(Unsupported, match="in another way"), opened(domain).prepared([new]):
        pass


def test_two_disks_on_one_file_are_an_obstacle(start: Start, chain: list[Path], second: Path) -> None:
    """QEMU does not start such a guest, unless its locks are off."""
    disks = {"vda": chain[-1], "vdb": chain[2], "vdc": second}
    vda, vdb, vdc = opened(start(disks=disks, off=True)).disks()
    assert (vda.obstacle, vdc.obstacle) == (None, None)
    assert vdb.obstacle == "Its image is part of the disk vda too."


def test_a_saved_guest_must_be_started_first(start: Start, chain: list[Path]) -> None:
    domain = start(disks={"vda": chain[-1]})
    domain.virsh("managedsave")
    guest = opened(domain)
    assert guest.state() is State.OFF
    assert "memory of the guest is saved" in str(guest.disks()[0].obstacle)


# --- snapshots


@pytest.mark.parametrize("name", ["vda&1, 'two', file=\"x\" \\ $HOME.qcow2", "Prüfung 1,2.qcow2"])
def test_one_of_two_disks_is_switched_and_the_other_stays(
    start: Start, chain: list[Path], second: Path, name: str
) -> None:
    domain = start(disks={"vda": chain[-1], "vdb": second})
    guest = opened(domain)
    new = overlay(chain[-1], "vda", name)
    with guest.prepared([new]) as switch:
        assert switch.outcome() is Outcome.NOT_DONE
        switch.run()
        assert switch.outcome() is Outcome.DONE
    vda, vdb = guest.disks()
    assert [layer.path for layer in vda.chain] == [*chain, new.path]
    assert [layer.path for layer in vdb.chain] == [second]
    assert domain.source("vda") == domain.source("vda", "--inactive") == new.path
    assert domain.source("vdb", "--inactive") == second
    domain.write("vda", 0, 65536, 0x77)
    domain.virsh("destroy")
    domain.virsh("start")
    assert domain.reads("vda", 0, 65536, 0x77)


def test_all_disks_or_none(start: Start, chain: list[Path], second: Path) -> None:
    domain = start(disks={"vda": chain[-1], "vdb": second})
    guest = opened(domain)
    new = [overlay(chain[-1], "vda", "vda.1.qcow2"), overlay(second, "vdb", "vdb.1.qcow2", 8 * MiB)]
    with guest.prepared(new) as switch:
        new[1].path.write_bytes(b"no image any more")
        with pytest.raises(ToolFailed, match="libvirt refused `snapshot-create-as`"):
            switch.run()
        assert switch.outcome() is Outcome.NOT_DONE
    assert [disk.active.path for disk in guest.disks()] == [chain[-1], second]
    new[1].path.unlink()
    new[1] = overlay(second, "vdb", "vdb.1.qcow2", 8 * MiB)
    with guest.prepared(new) as switch:
        switch.run()
    assert [disk.active.path for disk in guest.disks()] == [each.path for each in new]


def test_a_domain_without_a_lasting_definition(start: Start, chain: list[Path]) -> None:
    domain = start(disks={"vda": chain[-1]}, transient=True)
    guest = opened(domain)
    new = overlay(chain[-1], "vda", "vda.1.qcow2")
    with guest.prepared([new]) as switch:
        switch.run()
        assert switch.outcome() is Outcome.DONE
    assert guest.definition(with_secrets=False).inactive is None


def test_an_overlay_for_another_state_of_the_disk_is_refused(start: Start, chain: list[Path]) -> None:
    guest = opened(start(disks={"vda": chain[-1]}))
    short = overlay(chain[-1], "vda", "short.qcow2", 8 * MiB)
    with pytest.raises(Conflict, match="the overlay has 8388608 bytes"), guest.prepared([short]):
        pass
    stale = overlay(chain[2], "vda", "stale.qcow2")
    with pytest.raises(Conflict, match=r"active layer of the disk is .*, not .*"), guest.prepared([stale]):
        pass
    with (
        pytest.raises(Conflict, match="no disk of this name"),
        guest.prepared([NewOverlay("vdz", short.path, chain[-1])]),
    ):
        pass


def test_a_next_start_that_would_write_to_a_sealed_layer_is_reported(start: Start, chain: list[Path]) -> None:
    """Somebody defines the domain anew while the snapshot is made, from XML of the time before."""
    domain = start(disks={"vda": chain[-1]})
    before = chain[0].with_name("before.xml")
    before.write_text(domain.virsh("dumpxml", "--inactive"))
    new = overlay(chain[-1], "vda", "vda.1.qcow2")
    with ExitStack() as stack:
        stack.enter_context(opened(domain).prepared([new])).run()
        domain.host.virsh("define", before)
        with pytest.raises(Conflict, match=r"next start does not name .*vda\.1"):
            stack.close()
    assert "names its file in another way" in str(opened(domain).disks()[0].obstacle)


def test_a_lost_answer_is_judged_by_the_definition(
    start: Start, chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    new = overlay(chain[-1], "vda", "vda.1.qcow2")
    with guest.prepared([new]) as switch:
        domain.host.kill()
        try:
            with pytest.raises(Unavailable, match="not reachable"):
                switch.run()
            with pytest.raises(Unavailable, match="not reachable"):
                switch.outcome()
        finally:
            domain.host.start()
        assert switch.outcome() is Outcome.NOT_DONE
        switch.run()
        domain.host.kill()
        domain.host.start()
        assert switch.outcome() is Outcome.DONE
        domain.kill()
        assert switch.outcome() is Outcome.DONE


def test_a_switch_that_libvirt_has_forgotten_is_no_reason_to_remove_the_overlay(
    start: Start, chain: list[Path]
) -> None:
    """libvirtd may die between QEMU's transaction and the record of it: QEMU writes to a file that no XML names."""
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    new = overlay(chain[-1], "vda", "vda.1.qcow2")
    with guest.prepared([new]) as switch:
        node = {
            "driver": "qcow2",
            "node-name": "x",
            "backing": None,
            "file": {"driver": "file", "filename": str(new.path)},
        }
        domain.ask("blockdev-add", **node)
        domain.ask("blockdev-snapshot", node=guest.disks()[0].active.node, overlay="x")
        with pytest.raises(Conflict, match="libvirt does not know it"):
            switch.outcome()


# --- what others do in it


def test_a_backup_and_a_copy_of_others_are_seen_and_respected(
    start: Start, chain: list[Path], second: Path, tmp_path: Path
) -> None:
    domain = start(disks={"vda": chain[-1], "vdb": second})
    guest = opened(domain)
    new = overlay(chain[-1], "vda", "vda.1.qcow2")
    xml = tmp_path / "backup.xml"
    xml.write_text(
        f"<domainbackup mode='pull'><server transport='unix' socket='{tmp_path}/nbd'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{tmp_path}/scratch'/></disk>"
        "<disk name='vdb' backup='no'/></disks></domainbackup>"
    )
    domain.virsh("backup-begin", "--backupxml", xml)
    (backup,) = guest.activities()
    assert (backup.kind, backup.is_ours, backup.node) == ("backup", False, None)
    with pytest.raises(Busy, match="backup"), guest.prepared([new]):
        pass
    domain.virsh("domjobabort")
    target = overlay(second, "vdb", "copy.qcow2", 8 * MiB).path
    domain.virsh(
        "blockcopy", "--path", "vdb", "--dest", target, "--reuse-external", "--transient-job", "--format", "qcow2"
    )
    (copy,) = guest.activities()
    assert (copy.kind, copy.is_ours, copy.node) == ("mirror", False, guest.disks()[1].active.node)
    with guest.prepared([new]):
        pass  # another disk
    with (
        pytest.raises(Busy, match="another program works on vdb"),
        guest.prepared([overlay(second, "vdb", "vdb.1.qcow2", 8 * MiB)]),
    ):
        pass
    with pytest.raises(Busy, match="another program"):
        merged(guest, JobKind.ACTIVE_COMMIT, "vdb", second, second)


def test_a_job_of_others_is_not_taken_for_ours(start: Start, chain: list[Path]) -> None:
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    domain.virsh("blockcommit", "--path", "vda", "--base", chain[0], "--top", chain[2], "--bandwidth", "1", "--bytes")
    (foreign,) = guest.activities()
    assert (foreign.kind, foreign.is_ours) == ("commit", False)
    assert guest.job("sc-commit-vda-00000000", JobKind.COMMIT, "vda").progress().status is JobStatus.GONE


def test_a_later_job_of_others_is_not_taken_for_ours(start: Start, chain: list[Path]) -> None:
    """The record of ours is still there: its run was killed before it could remove it."""
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    assert ended(merged(guest, JobKind.COMMIT, "vda", chain[1], chain[2])).status is JobStatus.CONCLUDED
    slowly = ("--bandwidth", "1", "--bytes")
    domain.virsh("blockcommit", "--path", "vda", "--base", chain[0], "--top", chain[1], *slowly)
    (same_kind,) = guest.activities()
    assert (same_kind.kind, same_kind.is_ours) == ("commit", False)
    domain.virsh("blockjob", "--path", "vda", "--abort")
    domain.write("vda", 0, 4 * MiB, 9)
    domain.virsh("blockcommit", "--path", "vda", "--active", *slowly)
    (other_kind,) = guest.activities()
    assert (other_kind.kind, other_kind.is_ours) == ("active-commit", False)


# --- live merges


def merged(guest: LibvirtGuest, kind: JobKind, disk: str, lowest: Path, uppermost: Path, *, speed: int = 0) -> Job:
    return guest.start(
        kind,
        disk,
        lowest=lowest,
        uppermost=uppermost,
        backing=lowest.name,
        job_id=f"sc-{kind}-{disk}-0a1b2c3d",
        speed=speed,
    )


def ended(job: Job) -> JobProgress:
    """Wait for its end; READY is an end too."""
    ends = {JobStatus.CONCLUDED, JobStatus.READY, JobStatus.GONE}
    last: list[JobProgress] = []

    def over() -> bool:
        last.append(job.progress())
        return last[-1].status in ends

    wait_until(over)
    return last[-1]


def records() -> list[str]:
    found, faults = journal.find(operation="blockjob")
    assert faults == []
    return [str(each.record.details["job"]) for each in found]


def test_an_intermediate_commit(start: Start, chain: list[Path], tmp_path: Path) -> None:
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    before = flat(chain[2], tmp_path / "before").read_bytes()
    job = merged(guest, JobKind.COMMIT, "vda", chain[0], chain[2], speed=1)
    (ours,) = guest.activities()
    assert (ours.id, ours.is_ours, ours.kind) == (job.id, True, "commit")
    assert job.progress().status is JobStatus.RUNNING
    # A later run of snapchain goes on with it.
    job = LibvirtGuest(domain.address).job(job.id, JobKind.COMMIT, "vda")
    assert job.progress().status is JobStatus.RUNNING
    job.set_speed(0)
    assert ended(job) == JobProgress(JobStatus.CONCLUDED, job.progress().total, job.progress().total)
    job.finalize()
    job.flush()
    assert records() == [job.id]
    job.dismiss()
    assert records() == []
    assert guest.job(job.id, JobKind.COMMIT, "vda").progress().status is JobStatus.GONE
    assert [layer.path for layer in guest.disks()[0].chain] == [chain[0], chain[3]]
    assert flat(chain[0], tmp_path / "after").read_bytes() == before
    assert "backing file: a.qcow2 (" in qemu_img("info", "-U", chain[3])  # relative, as it was


def test_an_active_commit_and_pivot(start: Start, chain: list[Path]) -> None:
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    domain.write("vda", 0, 65536, 0x55)
    job = merged(guest, JobKind.ACTIVE_COMMIT, "vda", chain[1], chain[3])
    assert ended(job).status is JobStatus.READY
    job.complete()
    assert ended(job).status is JobStatus.CONCLUDED
    job.flush()
    job.dismiss()
    assert [layer.path for layer in guest.disks()[0].chain] == chain[:2]
    assert domain.source("vda", "--inactive") == chain[1]
    assert domain.reads("vda", 0, 65536, 0x55)


def test_without_a_look_at_qemus_files_no_commit_is_begun(
    start: Start, chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = opened(start(disks={"vda": chain[-1]}))
    monkeypatch.setattr("snapchain.guest.libvirt_jobs.open_images", lambda _pid: None)
    with pytest.raises(Unsupported, match="may not see which files"):
        merged(guest, JobKind.COMMIT, "vda", chain[0], chain[2])
    assert records() == []


@pytest.mark.parametrize("kind", [JobKind.COMMIT, JobKind.ACTIVE_COMMIT])
def test_a_cancelled_job_leaves_the_chain(kind: JobKind, start: Start, chain: list[Path]) -> None:
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    job = merged(guest, kind, "vda", chain[0], chain[2 if kind is JobKind.COMMIT else 3], speed=1)
    job.cancel()
    found = ended(job)
    assert (found.status, found.error) == (JobStatus.CONCLUDED, "it was cancelled")
    job.flush()
    job.dismiss()
    assert [layer.path for layer in guest.disks()[0].chain] == chain
    job.cancel()
    job.set_speed(5)


def test_no_stream_is_begun(start: Start, chain: list[Path]) -> None:
    """Only the guest could flush its result without QEMU's monitor."""
    guest = opened(start(disks={"vda": chain[-1]}))
    for uppermost in chain[2:]:
        with pytest.raises(Unsupported, match="does not stream through libvirt"):
            merged(guest, JobKind.STREAM, "vda", chain[0], uppermost)
    assert records() == []


def test_a_definition_that_names_merged_files_keeps_them(start: Start, chain: list[Path], tmp_path: Path) -> None:
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    job = merged(guest, JobKind.COMMIT, "vda", chain[0], chain[2])
    assert ended(job).status is JobStatus.CONCLUDED
    xml = tmp_path / "other.xml"
    below = f"<backingStore type='file'><format type='qcow2'/><source file='{chain[1]}'/></backingStore><target "
    xml.write_text(domain.virsh("dumpxml", "--inactive").replace("<target ", below, 1))
    domain.host.virsh("define", xml)
    with pytest.raises(Unavailable, match=r"still names merged files, which stay: .*b\.qcow2"):
        job.flush()


def test_a_result_that_qemu_may_not_have_written_out_keeps_its_inputs(
    start: Start, chain: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = opened(start(disks={"vda": chain[-1]}))
    job = merged(guest, JobKind.COMMIT, "vda", chain[0], chain[2])
    assert ended(job).status is JobStatus.CONCLUDED
    status = chain[0].stat()
    for seen in (None, {(status.st_dev, status.st_ino): True}):
        monkeypatch.setattr("snapchain.guest.libvirt_jobs.open_images", lambda _pid, seen=seen: seen)
        with pytest.raises(Unavailable, match="cannot see that QEMU has written out"):
            job.flush()


def test_jobs_survive_libvirtd_and_not_qemu(start: Start, chain: list[Path]) -> None:
    domain = start(disks={"vda": chain[-1]})
    guest = opened(domain)
    job = merged(guest, JobKind.COMMIT, "vda", chain[0], chain[2], speed=1)
    domain.host.kill()
    try:
        with pytest.raises(Unavailable, match="not reachable"):
            job.progress()
    finally:
        domain.host.start()
    assert job.progress().status is JobStatus.RUNNING
    domain.kill()
    assert job.progress().status is JobStatus.GONE
    assert guest.job(job.id, JobKind.COMMIT, "vda").progress().status is JobStatus.GONE
    assert records() == []
    domain.virsh("start")
    assert [layer.path for layer in guest.disks()[0].chain] == chain
    assert job.progress().status is JobStatus.GONE


def test_a_domain_that_vanishes_meanwhile(start: Start, chain: list[Path]) -> None:
    domain = start(disks={"vda": chain[-1]}, transient=True)
    guest = opened(domain)
    job = merged(guest, JobKind.COMMIT, "vda", chain[0], chain[2], speed=1)
    domain.virsh("destroy")
    with pytest.raises(NotFound, match="no such domain"):
        guest.state()
    assert job.progress().status is JobStatus.GONE


def test_no_monitor_command_of_ours_reaches_a_domain(start: Start, chain: list[Path], second: Path) -> None:
    """A domain whose monitor somebody used is tainted, so libvirt itself is the witness."""
    domain = start(disks={"vda": chain[-1], "vdb": second})
    guest = opened(domain)
    guest.disks()
    guest.activities()
    guest.statistics("vda")
    guest.definition(with_secrets=True)
    with guest.prepared([overlay(chain[-1], "vda", "vda.1.qcow2")]) as switch:
        switch.run()
    job = merged(guest, JobKind.COMMIT, "vda", chain[0], chain[2])
    assert ended(job).status is JobStatus.CONCLUDED
    job.flush()
    job.dismiss()
    assert "custom" not in domain.virsh("dominfo")
    domain.ask("query-status")
    assert "custom monitor" in domain.virsh("dominfo")  # so would ours have been seen


# --- definition and agent


def test_its_definition(start: Start, chain: list[Path], tmp_path: Path) -> None:
    (tmp_path / "VARS.fd").write_bytes(b"variables" * 100)
    domain = start(
        disks={"vda": chain[-1]},
        more="<interface type='user'><mac address='52:54:00:00:00:07'/></interface>"
        "<graphics type='vnc' socket='/tmp/none.sock' passwd='sesame'/>",
    )
    guest = opened(domain)
    found = guest.definition(with_secrets=False)
    assert (found.kind, found.name, found.uuid) == ("libvirt", domain.name, domain.virsh("domuuid").strip())
    assert found.machine is not None
    assert found.machine.startswith("pc-q35-")
    assert found.macs == ("52:54:00:00:00:07",)
    assert found.live is not None
    assert found.inactive is not None
    assert "sesame" not in found.live + found.inactive
    secret = guest.definition(with_secrets=True)
    assert secret.live is not None
    assert "sesame" in secret.live
    domain.virsh("destroy")
    off = guest.definition(with_secrets=False)
    assert (off.live, off.inactive) == (None, domain.virsh("dumpxml", "--inactive").removesuffix("\n"))


def test_an_agent_that_is_not_there(start: Start, chain: list[Path], second: Path, tmp_path: Path) -> None:
    assert opened(start(disks={"vda": second})).agent() is None
    agent = opened(start(disks={"vda": chain[-1]}, agent=tmp_path / "agent")).agent()
    assert agent is not None
    for call in (agent.ping, agent.freeze, agent.thaw, agent.is_frozen):
        with pytest.raises(Unavailable, match="agent did not answer"):
            call(timeout=1.0)


def test_an_image_given_by_path_names_the_domain(start: Start, chain: list[Path]) -> None:
    domain = start("web; 1", disks={"vda": chain[-1]})
    with pytest.raises(Busy) as refused:
        ImageLock(chain[-1], LockMode.READ)
    assert str(refused.value) == f"{chain[-1]}: a running guest has it open: the guest {domain.name} (libvirt)"
    assert str(refused.value.hint).startswith("say --domain 'web; 1' instead of the path")


@pytest.mark.serial
def test_its_agent_freezes_and_thaws_it(
    libvirt_host: LibvirtHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_program(*argv: object) -> str:
        raise AssertionError(f"{argv} was started")

    kernel, initrd = parts()
    boot = f"<kernel>{kernel}</kernel><initrd>{initrd}</initrd><cmdline>console=ttyS0 quiet panic=-1</cmdline>"
    log = tmp_path / "console.log"
    serial = f"<serial type='file'><source path='{log}'/><target port='0'/></serial>"
    domain = Domain.started(
        libvirt_host, tmp_path / "domain", {"vda": formatted(tmp_path / "vda.qcow2")}, name="frozen",
        agent=tmp_path / "agent", os_more=boot, more=serial, memory=128,
    )  # fmt: skip
    try:
        guest = LibvirtGuest(domain.address)
        found = guest.agent()
        assert found is not None
        agent = open_agent(found.address())

        def answers() -> bool:
            try:
                agent.ping(timeout=1.0)
            except Unavailable:
                return False
            return True

        wait_until(answers)
        new = overlay(tmp_path / "vda.qcow2", "vda", "vda.1.qcow2", 64 * MiB)
        assert not agent.is_frozen(timeout=HANG)
        assert agent.freeze(timeout=HANG) == 1
        assert agent.is_frozen(timeout=HANG)
        assert agent.thaw(timeout=HANG) == 1
        with agent.connected(), guest.prepared([new]) as switch:
            agent.ping(timeout=HANG)
            with monkeypatch.context() as frozen:
                # Meanwhile the guest waits, and a program takes longer to start than libvirt to do it.
                frozen.setattr(processes, "find_program", no_program)
                frozen.setattr(process_channel, "find_program", no_program)
                assert agent.freeze(timeout=HANG) == 1
                switch.run()
                assert agent.thaw(timeout=HANG) == 1
        assert not agent.is_frozen(timeout=HANG)
        assert guest.disks()[0].active.path == tmp_path / "vda.1.qcow2"
    finally:
        domain.remove()


def test_snapshots_and_merges_of_a_domain_by_the_command_line(
    start: Start, chain: list[Path], second: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    domain = start(disks={"vda": chain[-1], "vdb": second})
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", domain.host.uri)
    # However long an answer of libvirt counts: it is older than what the merge changed.
    monkeypatch.setattr(libvirt, "_COUNTS_FOR", 1e6)
    domain.write("vda", 0, MiB, 0x61)
    assert main(["snapshot", "--domain", domain.name, "--disk", "vda"]) == 0
    assert [len(disk.chain) for disk in opened(domain).disks()] == [5, 1]
    domain.write("vda", 6 * MiB, MiB, 0x62)
    capsys.readouterr()
    assert main(["merge", "--domain", domain.name, "--disk", "vda", "--flatten", "--json"]) == 0
    said = capsys.readouterr()
    assert '"strategy": "commit"' in said.out
    assert [layer.path for layer in opened(domain).disks()[0].chain] == [chain[0]]
    assert domain.source("vda") == domain.source("vda", "--inactive") == chain[0]
    left = {path.name for path in chain[0].parent.glob("*.qcow2")}
    assert left == {"a.qcow2", "vdb.qcow2"}
    for place, value in ((0, 0x61), (MiB, 1), (2 * MiB, 2), (5 * MiB, 4), (6 * MiB, 0x62)):
        assert domain.reads("vda", place, MiB, value)
    assert records() == []
