"""Automatic failover between two hosts: one that is cut off stops its guest by itself, and the other one starts it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from snapchain.destinations import open_destination
from snapchain.errors import NotFound
from snapchain.guest.address import GuestAddress, open_guest
from snapchain.host.deadman import is_stopped
from snapchain.host.process_identity import Identity
from snapchain.model.guest_state import GuestStanding, GuestState
from snapchain.ops.guest_status import status
from tests.guest.counting_guest import Counting, counts_on
from tests.guest.machine import Machine, Monitor
from tests.net.sites import Site, Sites, two_sites
from tests.ops.stacks import qemu_img
from tests.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.soak]
FAULTS = ("cable", "killed watch", "stopped watch")


@pytest.fixture
def sites(tmp_path: Path) -> Iterator[Sites]:
    with two_sites(tmp_path) as pair:
        yield pair


@dataclass
class Leased:
    """A guest of one host, whose watch renews a lease at two replicas of the other one."""

    sites: Sites
    machine: Machine
    process: Identity

    @property
    def there(self) -> Site:
        return self.sites.b

    @property
    def witness(self) -> Path:
        return self.there.folder / "witness"

    def standing(self, replica: Path | None = None) -> GuestStanding:
        return open_destination(f"dir:{replica or self.there.replica}").guest_state("web1")

    def renewals(self, replica: Path | None = None) -> int:
        """So far, of the lease that is recorded there; -1 without one."""
        try:
            lease = self.standing(replica).lease
        except NotFound:  # the watch has not made the replica yet
            return -1
        return -1 if lease is None else lease.count

    def has_point(self) -> bool:
        """Whether it can be taken over."""
        try:
            rows = status([(open_destination(f"dir:{self.there.replica}"), None)]).guests
        except NotFound:  # a disk of the first shipment has only just come there
            return False
        return bool(rows) and rows[0].guest_point is not None

    @property
    def failover(self) -> tuple[str, ...]:
        there, witness = f"dir:{self.there.replica}::web1", f"dir:{self.witness}"
        return ("failover", there, "--lease", "--witness", witness, "--start", "--yes", "--json")

    def begin(self, *more: str) -> subprocess.Popen[str]:
        """The watch."""
        a, b = self.sites.a, self.sites.b
        words = ("watch", "--qmp", self.machine.qmp, "--every", "10s", b.url)
        return a.begin(*words, "--lease", "30s", "--witness", b.sshd.url(self.witness), *more, "--json")

    def wait_until_ready(self, watch: subprocess.Popen[str]) -> None:
        """Until it can be taken over, and is held. Each may take a busy machine long."""
        wait_until(self.has_point, alive=lambda: watch.poll() is None)
        wait_until(lambda: self.renewals() > 0, alive=lambda: watch.poll() is None)

    def check_renewed(self) -> None:
        """A host that lives is not taken over."""
        exit_code, out, error = self.there.snapchain(*self.failover)
        assert exit_code == 9, out + error
        assert "is being renewed" in out + error


@contextmanager
def watched(lease: Leased, *more: str) -> Iterator[subprocess.Popen[str]]:
    """A watch, ended and shown at the end of the test."""
    with lease.begin(*more) as watch:
        try:
            yield watch
        finally:
            watch.send_signal(signal.SIGCONT)
            watch.terminate()
            try:
                print(*watch.communicate(timeout=120))  # shown where the test fails
            except subprocess.TimeoutExpired:
                watch.kill()


@contextmanager
def leased(sites: Sites, machine: Machine) -> Iterator[Leased]:
    with machine:
        with open_guest(GuestAddress(qmp=machine.qmp)) as guest:
            process = guest.process()
        assert process is not None
        found = Leased(sites, machine, process)
        sites.a.report("ship", "--qmp", machine.qmp, sites.b.sshd.url(found.witness))
        try:
            yield found
        finally:
            machine.kill()  # which may be stopped


@pytest.fixture
def lease(sites: Sites, tmp_path: Path) -> Iterator[Leased]:
    with leased(sites, Counting(tmp_path / "source").machine) as found:
        yield found


@contextmanager
def broken(lease: Leased, watch: subprocess.Popen[str], fault: str) -> Iterator[None]:
    if fault == "cable":
        with lease.sites.cable.cut():
            yield
        return
    os.kill(watch.pid, signal.SIGSTOP if fault == "stopped watch" else signal.SIGKILL)
    yield
    os.kill(watch.pid, signal.SIGCONT)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_host_that_renews_nothing_is_taken_over(lease: Leased, fault: str) -> None:
    b, process = lease.there, lease.process
    with watched(lease) as watch:
        lease.wait_until_ready(watch)
        lease.check_renewed()
        assert counts_on(lease.machine.monitor)
        with broken(lease, watch, fault):
            with b.begin(*lease.failover) as failover:
                wait_until(lambda: lease.standing().state is GuestState.PROMOTING)
                assert is_stopped(process), "it has stopped long before the other one may start"
                out, error = failover.communicate(timeout=600)
                assert failover.returncode == 0, out + error
            assert lease.standing().state is GuestState.ACTIVE
            assert is_stopped(process)
            qmp = b.replica / ".guests" / "web1.failover" / "test.qmp"
            monitor = Monitor(qmp)
            assert counts_on(monitor), out
            monitor.close()
        assert lease.standing().lease is None
        assert lease.standing(lease.witness).lease is None
    assert is_stopped(process), "for good"
    if fault == "killed watch":
        with watched(lease) as again:  # it stays, and keeps the guest stopped
            assert again.stderr is not None
            assert any("has taken the guest web1 over" in line for line in again.stderr)
            assert is_stopped(process)
        assert is_stopped(process)


def test_a_cable_that_is_mended_in_time(lease: Leased) -> None:
    """The guest stops, and continues."""
    with watched(lease) as watch:
        lease.wait_until_ready(watch)
        with lease.sites.cable.cut():
            wait_until(lambda: is_stopped(lease.process))
        wait_until(lambda: not is_stopped(lease.process))
        wait_until(lambda: lease.machine.status() == "running")
        assert counts_on(lease.machine.monitor)
        lease.check_renewed()
    wait_until(lambda: lease.standing().lease is None)
    assert not is_stopped(lease.process)


def test_a_witness_that_is_away(lease: Leased) -> None:
    """The destination is enough for the guest to run, and not for a failover."""
    with watched(lease) as watch:
        lease.wait_until_ready(watch)
        away = lease.witness.rename(lease.witness.with_name("away"))
        before = lease.renewals()
        wait_until(lambda: lease.renewals() >= before + 6)  # of which three are the time of a lease
        assert not is_stopped(lease.process)
        exit_code, out, error = lease.there.snapchain(*lease.failover)
        assert exit_code != 0
        assert "there is no replica here" in out + error
        assert lease.standing().state is GuestState.PROTECTED
        away.rename(lease.witness)


def test_a_shipment_that_takes_longer_than_the_lease(sites: Sites, tmp_path: Path) -> None:
    """The watch has QEMU's only connection all the time, and the guest runs under a lease."""
    raw, image = tmp_path / "raw", tmp_path / "vda.qcow2"
    raw.write_bytes(os.urandom(16 << 20))
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    machine = Machine(tmp_path / "source", disks={"vda": image})
    with leased(sites, machine) as lease, watched(lease, "--limit-rate", "128K") as watch:
        wait_until(lambda: lease.renewals() >= 6, alive=lambda: watch.poll() is None)
        assert not lease.has_point()
        assert not is_stopped(lease.process)
    assert lease.standing().lease is None
    assert not is_stopped(lease.process)
