"""`snapchain merge --qmp`: several disks, guests that are off, speed, interrupts, full disks, and ship after it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from snapchain.cli import main
from snapchain.errors import Busy, Conflict, NotFound, Unavailable
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.protocol import DiskStatistics, Guest, Job, JobKind, JobStatus
from snapchain.merge import pace as pace_module, plan as at_rest, run as run_at_rest
from snapchain.merge.journal import unsettled
from snapchain.merge.live import plan
from snapchain.merge.live_run import run
from snapchain.merge.pace import Pace
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from snapchain.objects.memory import MemoryStore
from snapchain.ops import doctor, guest_chain_merge
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.protocol import Scope
from tests.guest.live_chain import MIB, Chain, K, fill, layer, names, patterns_hold, running, same, sound
from tests.guest.machine import Machine
from tests.ops.shipping import restore, ship
from tests.repository.synthetic import repository
from tests.waiting import HANG, wait_until


def snapchain(*words: object) -> list[str]:
    return [sys.executable, "-m", "snapchain", *map(str, words)]


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, which takes a tenth of the time of a new one."""

    def run_it(*words: object) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        status = main([str(word) for word in words])
        said = capsys.readouterr()
        return subprocess.CompletedProcess([], status, said.out, said.err)

    return run_it


def journals(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".snapchain-merge-")]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "images")


def test_all_disks_of_a_guest(command: Command, tmp_path: Path, chain: Chain) -> None:
    other = Chain(tmp_path / "other", count=3)
    with Machine(tmp_path / "m", disks={"vda": chain.active, "vdb": other.active}) as machine:
        shown = command("merge", "--qmp", machine.qmp, "--dry-run", "--json")
        assert shown.returncode == 0, shown.stderr
        assert [each["disk"] for each in json.loads(shown.stdout)["plan"]["disks"]] == ["vda", "vdb"]
        one = command("merge", "--qmp", machine.qmp, "--disk", "vdb", "--limit-rate", "100M", "--json")
        assert one.returncode == 0, one.stderr
        report = json.loads(one.stdout)
        assert [each["disk"] for each in report["disks"]] == ["vdb"]
        assert {"layers_before", "layers_after", "bytes_moved", "bytes_freed", "strategy"} <= set(report["disks"][0])
        assert (report["layers_before"], report["layers_after"]) == (3, 2)
        assert names(chain.active) == [f"{number}.qcow2" for number in range(5)]
        rest = command("merge", "--qmp", machine.qmp, "--max-layers", 3)
        assert rest.returncode == 0, rest.stderr
        assert len(names(chain.active)) == 3
        assert len(names(other.active)) == 2
        assert patterns_hold(machine, chain)
        assert patterns_hold(machine, other, "vdb")
        unknown = command("merge", "--qmp", machine.qmp, "--disk", "vdz")
        assert unknown.returncode == NotFound.exit_code


def test_a_file_of_the_chain_that_was_moved(command: Command, tmp_path: Path, chain: Chain) -> None:
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        chain.files[0].rename(tmp_path / "moved.qcow2")
        said = command("merge", "--qmp", machine.qmp)
    assert said.returncode == NotFound.exit_code
    assert "was a file of the chain renamed or replaced while the guest ran?" in said.stderr


def test_the_options_of_guests_need_one(command: Command, tmp_path: Path, chain: Chain) -> None:
    for words in (("--idle",), ("--disk", "vda"), ("--limit-rate", "1M")):
        assert command("merge", chain.active, *words).returncode == 2
    assert command("merge").returncode == 2
    assert command("merge", chain.active, "--qmp", tmp_path / "nothing").returncode == 2


def test_ctrl_c_leaves_the_chain_as_it_was(command: Command, tmp_path: Path, chain: Chain) -> None:
    for path in chain.files[1:4]:
        fill(path, (MIB, 2 * MIB, 60 + int(path.stem)))
    chain.remember()
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        for strategy in ("absorb", "commit"):
            words = ("--from", "1.qcow2", "--to", "3.qcow2", "--strategy", strategy, "--limit-rate", "4k")
            process = subprocess.Popen(snapchain("merge", "--qmp", machine.qmp, *words), stderr=subprocess.PIPE)
            wait_until(lambda: any(job["status"] == "running" for job in machine.ask("query-jobs")))
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=HANG)
            assert process.returncode == 130
            assert machine.ask("query-jobs") == []
            assert names(chain.active) == [f"{number}.qcow2" for number in range(5)]
            assert machine.reads("vda", 0, 64 * K, 1)
            chain.check_view(chain.files[3], "3.qcow2")
            # After a commit that was begun, files between its ends are invalid: the record tells.
            assert bool(journals(chain.folder)) is (strategy == "commit")
        again = command("merge", "--qmp", machine.qmp, "--from", "1.qcow2", "--to", "3.qcow2", "--json")
        assert again.returncode in (0, 3), again.stderr
        assert names(chain.active) == ["0.qcow2", "1.qcow2", "4.qcow2"]
        chain.check_view(chain.files[1], "3.qcow2")
        assert not journals(chain.folder)
        machine.quit()
    chain.check_view(chain.active, "4.qcow2")


@pytest.mark.root
@pytest.mark.parametrize("strategy", [Strategy.COMMIT, Strategy.ABSORB])
def test_a_full_disk(tmp_path: Path, strategy: Strategy) -> None:
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", full], check=True)
    try:
        chain = Chain(full / "images", count=2, size=16 * MIB)
        files: list[Path] = []
        for number in range(4):
            path = layer(chain.folder / f"f{number}.qcow2", files[-1] if files else None, 16 * MIB)
            fill(path, (number * 2 * MIB, 2 * MIB, 40 + number))
            files.append(path)
        chain.files = files
        ballast = full / "ballast"
        with running(tmp_path / "m", chain) as (machine, guest):
            request = MergeRequest(image=files[-1], from_layer=str(files[1]), to_layer=str(files[2]), strategy=strategy)
            planned = plan(guest, "vda", request)
            free = shutil.disk_usage(full).free
            ballast.write_bytes(bytes(free - 64 * K))
            with pytest.raises(Unavailable, match="free"):
                plan(guest, "vda", request).check_room()
            object.__setattr__(planned, "free_bytes", 1 << 40)
            with pytest.raises(Unavailable) as caught:
                run(guest, planned)
            assert "space" in str(caught.value).lower()
            assert caught.value.hint is not None
            assert machine.ask("query-jobs") == []
            assert machine.status() == "running"
            for number in range(4):
                assert machine.reads("vda", number * 2 * MIB, 2 * MIB, 40 + number)
            assert len(names(files[-1])) == 4
            ballast.unlink()
            run(guest, plan(guest, "vda", MergeRequest(image=files[-1], max_layers=3)))
            assert len(names(files[-1])) == 3
            assert not journals(chain.folder)
            for number in range(4):
                assert machine.reads("vda", number * 2 * MIB, 2 * MIB, 40 + number)
            machine.quit()
        sound(files[-1])
    finally:
        subprocess.run(["umount", "-l", full], check=True)


def killed_commit(machine: Machine) -> None:
    """A commit whose snapchain is killed while it runs."""
    words = ("--from", "1.qcow2", "--to", "3.qcow2", "--strategy", "commit", "--limit-rate", "4k")
    process = subprocess.Popen(snapchain("merge", "--qmp", machine.qmp, *words), stderr=subprocess.DEVNULL)
    wait_until(lambda: any(job["status"] == "running" for job in machine.ask("query-jobs")))
    process.kill()
    process.wait()


@pytest.mark.parametrize("named_by", ["directory", "guest"])
def test_the_doctor_goes_on_with_a_job(command: Command, tmp_path: Path, chain: Chain, named_by: str) -> None:
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        killed_commit(machine)
        [job] = machine.ask("query-jobs")
        machine.ask("block-job-set-speed", device=job["id"], speed=0)
        healed = command("doctor", *([chain.folder] if named_by == "directory" else ["--qmp", machine.qmp]), "--json")
        assert healed.returncode == 0, healed.stdout + healed.stderr
        assert machine.ask("query-jobs") == []
        assert names(chain.active) == ["0.qcow2", "1.qcow2", "4.qcow2"]
        assert patterns_hold(machine, chain)
        assert not journals(chain.folder)


def test_a_guest_that_is_not_there_is_not_called_well(command: Command, tmp_path: Path) -> None:
    said = command("doctor", "--qmp", tmp_path / "none")
    assert said.returncode == NotFound.exit_code
    assert "no such socket" in said.stderr


def test_a_merge_at_rest_respects_a_commit_that_was_killed(command: Command, tmp_path: Path, chain: Chain) -> None:
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        killed_commit(machine)
        # While the guest runs nobody touches it.
        assert command("merge", chain.active).returncode == Busy.exit_code
        machine.kill()
    assert len(journals(chain.folder)) == 1
    chain.check_view(chain.active, "4.qcow2")
    with pytest.raises(Conflict, match="comes first"):
        run_at_rest.run(at_rest.plan(MergeRequest(image=chain.active, from_layer="2.qcow2", to_layer="3.qcow2")))
    found = doctor.plan([chain.folder])
    assert "live merge (commit) of web1/vda" in found.findings[0].says
    report = run_at_rest.run(at_rest.plan(MergeRequest(image=chain.active)))
    assert report.layers_after == 2
    assert not journals(chain.folder)
    chain.check_view(chain.active, "4.qcow2")
    sound(chain.active)


def test_a_switch_that_nobody_saw_is_not_guessed(tmp_path: Path, chain: Chain) -> None:
    """Killed around the pivot, and the guest has written to the lowest layer since: no run decides which one is it."""
    words = ("--from", "1.qcow2", "--strategy", "commit")
    from tests.guest.spy import KILL, Fault, Place, Spy

    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        fault = Fault(0, Place.SENT, KILL)
        with Spy(tmp_path / "spy", machine.qmp, fault, counts=lambda name: name == "job-complete") as spy:
            assert subprocess.run(snapchain("merge", "--qmp", spy.path, *words), check=False).returncode == -9
        wait_until(lambda: all(job["status"] == "concluded" for job in machine.ask("query-jobs")))
        machine.write("vda", MIB, 64 * K, 99)
        machine.io("vda", "flush")
        machine.kill()
    [record] = unsettled(chain.files)
    assert record.live is not None
    assert record.live.pivot == "asked for"
    report = doctor.run(doctor.plan([chain.folder]))
    assert not report.well
    assert "may have been switched" in str(report.treated[0].error)
    assert all(path.exists() for path in chain.files)


def test_a_guest_that_is_off_is_merged_at_rest(chain: Chain) -> None:
    class Off:
        """As libvirt shows a domain that is shut off."""

        kind, name, option, streams = "libvirt", "web1", "--domain web1", False

        def state(self) -> object:
            from snapchain.guest.protocol import State

            return State.OFF

        def disks(self) -> Sequence[object]:
            from snapchain.guest.protocol import GuestDisk, Layer

            status = chain.active.stat()
            top = Layer("", chain.active, (status.st_dev, status.st_ino), "qcow2", chain.size)
            return [GuestDisk("vda", "", (), (top,), read_only=False)]

    guest: Guest = Off()  # type: ignore[assignment]
    planned = guest_chain_merge.plan(guest, guest_chain_merge.GuestMergeRequest(request=MergeRequest(image=Path())))
    assert not planned.runs
    report = guest_chain_merge.run(guest, planned)
    assert (report.layers_before, report.layers_after) == (5, 2)
    chain.check_view(chain.active, "4.qcow2")


# --- Speed.


class FeltGuest:
    """Statistics of a guest whose latency follows a script, in nanoseconds an operation."""

    def __init__(self, latencies: Sequence[int]) -> None:
        self._latencies, self._operations, self._ns = list(latencies), 0, 0

    def statistics(self, disk: str) -> DiskStatistics:
        assert disk == "vda"
        found = DiskStatistics(0, self._operations, 0, 0, self._ns, 0)
        if self._latencies:
            self._operations += 100
            self._ns += 100 * self._latencies.pop(0)
        return found


def test_idle_slows_down_when_the_guest_feels_it() -> None:
    guest = FeltGuest([10**6, 10**6, 10**6, 10**6, 10**7, 10**7, 10**6, 10**6])
    now = iter(range(100))
    waited: list[float] = []
    pace = Pace(idle=True, clock=lambda: float(next(now)), wait=waited.append)
    look = pace.begin(guest, "vda")  # type: ignore[arg-type]
    assert waited == [pace_module.BASELINE_SECONDS]
    speeds: list[int] = []

    class Quick:
        def set_speed(self, bytes_per_second: int) -> None:
            speeds.append(bytes_per_second)

    for _ in range(6):
        look(Quick(), None)  # type: ignore[arg-type]
    assert speeds[0] > pace.first_speed
    assert any(later < earlier for earlier, later in pairwise(speeds))
    assert speeds[-1] >= pace.first_speed


def test_an_idle_merge_ends(command: Command, tmp_path: Path, chain: Chain) -> None:
    with Machine(tmp_path / "m", disks={"vda": chain.active}) as machine:
        done = command("merge", "--qmp", machine.qmp, "--idle", "--json")
        assert done.returncode == 0, done.stderr
        assert patterns_hold(machine, chain)


# --- After it.


@pytest.mark.parametrize("strategy", [Strategy.COMMIT, Strategy.ABSORB])
def test_ship_reads_nothing_again(tmp_path: Path, chain: Chain, strategy: Strategy) -> None:
    repo = repository(MemoryStore(), block_size=256 * 1024)
    with running(tmp_path / "m", chain) as (machine, guest):
        sealed = chain.files[3]
        ship(sealed, repo)
        request = MergeRequest(
            image=chain.active, from_layer=str(chain.files[1]), to_layer=str(sealed), strategy=strategy
        )
        report = run(guest, plan(guest, "vda", request))
        assert report.result is not None
        again = ship(report.result, repo)
        assert again.bytes_read == 0
        assert again.layers_sent == 0
        machine.quit()
    restored = restore(repo, tmp_path / "restored.qcow2")
    assert restored is not None
    same(tmp_path / "restored.qcow2", chain.views["3.qcow2"])


@pytest.mark.parametrize("kind", ["", "dir:"])
def test_nights_of_an_idle_guest(command: Command, tmp_path: Path, kind: str) -> None:
    """Nothing is written to the lowest layer by a pivot, so the merged file is one of those it was made of."""
    image, place = layer(tmp_path / "0.qcow2", None, 4 * MIB), tmp_path / "there"
    fill(image, (0, MIB, 1))
    if not kind:
        assert command("init", place, "--no-encryption").returncode == 0
    with Machine(tmp_path / "m", disks={"vda": image}) as machine:
        for night in range(3):
            said = command("ship", "--qmp", machine.qmp, f"{kind}{place}", "--json")
            assert said.returncode == 0, said.stdout + said.stderr
            [disk] = json.loads(said.stdout)["disks"]
            assert (disk["bytes_read"] == 0) is (night > 0)
            known = ["--at", place, "--at", f"{place}::web1"] if not kind else []
            merged = command("merge", "--qmp", machine.qmp, "--flatten", "--strategy", "commit", "--json", *known)
            assert json.loads(merged.stdout)["layers_after"] == 1, merged.stdout + merged.stderr


def test_a_guest_job_that_is_not_there_is_gone(tmp_path: Path, chain: Chain) -> None:
    with running(tmp_path / "m", chain) as (_, guest):
        job: Job = guest.job("sc-merge-vda-00000000", JobKind.COMMIT, "vda")
        assert job.progress().status is JobStatus.GONE


def test_a_sealed_chain_is_readable_meanwhile(tmp_path: Path, chain: Chain) -> None:
    with (
        Machine(tmp_path / "m", disks={"vda": chain.active}) as machine,
        open_guest(GuestAddress(qmp=machine.qmp)) as guest,
        ImageAtRest(chain.active).opened(Scope.SEALED),
        pytest.raises(Busy, match=r"lock|busy|use"),
    ):
        # A ship that reads the sealed layers locks them: a merge waits for it.
        run(guest, plan(guest, "vda", MergeRequest(image=chain.active, to_layer=str(chain.files[3]))))
    assert not journals(chain.folder)
