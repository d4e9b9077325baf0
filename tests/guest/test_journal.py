"""Records of what is in flight in guests."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapchain.guest import journal
from snapchain.guest.address import GuestAddress
from snapchain.host import process_identity as processes
from snapchain.ops import doctor, guest_doctor
from tests.servers import DIE_WITH_PARENT


@dataclass
class Named:
    name: str
    pid: int
    address = GuestAddress(qmp=Path("/run/web1.qmp"))

    def process(self) -> Any:
        return processes.identity(self.pid)


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


def noted(guest: Any, **details: Any) -> tuple[Path, journal.InFlight]:
    record = journal.begun(guest, "snapshot", **details)
    return journal.write(record), record


def test_a_record_is_found_until_it_is_removed() -> None:
    path, record = noted(Named("a/b c", os.getpid()), disks=["vda"])
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    found, faults = journal.find(guest="a/b c")
    assert [(each.path, each.record) for each in found] == [(path, record)]
    assert found[0].record.address is not None
    assert found[0].record.address.qmp == Path("/run/web1.qmp")
    assert not faults
    assert journal.find(guest="web2") == ([], [])
    journal.remove(path)
    journal.remove(path)
    assert journal.find() == ([], [])


def test_a_record_is_abandoned_when_its_writer_ends() -> None:
    """And its guest's QEMU is told from another process of the same number."""
    child = subprocess.Popen([*DIE_WITH_PARENT, "sleep", "600"])
    path, record = noted(Named("web1", child.pid))
    assert not record.is_abandoned
    assert record.qemu_runs
    left = record.model_copy(update={"writer": (child.pid, record.process[1])})  # type: ignore[index]
    journal.replace(path, left)
    assert not journal.abandoned(guest="web1", process=None, operations=["snapshot"])
    child.kill()
    child.wait()
    [found] = journal.abandoned(guest="web1", process=None, operations=["snapshot"])
    assert found.record.is_abandoned
    assert found.record.qemu_runs is False
    assert not journal.abandoned(guest="web1", process=None, operations=["merge"])
    assert not journal.abandoned(guest="web2", process=None, operations=["snapshot"])
    assert journal.abandoned(guest="renamed", process=record.process, operations=["snapshot"])


def test_a_record_of_an_earlier_boot_is_abandoned() -> None:
    _, record = noted(Named("web1", os.getpid()))
    earlier = record.model_copy(update={"boot": "0" * 36})
    assert earlier.is_abandoned
    assert earlier.qemu_runs is False


def test_an_unsound_record_hides_no_other() -> None:
    path, _ = noted(Named("web1", os.getpid()))
    path.with_name("snapshot-web0-00000000.json").write_text("{")
    path.with_name("snapshot-web0-00000000.json").chmod(0o600)
    found, faults = journal.find()
    assert [each.path for each in found] == [path]
    assert len(faults) == 1


@pytest.mark.parametrize("domain", [None, "web1"])
def test_a_guest_that_has_not_come_has_no_address_and_stops_no_doctor(tmp_path: Path, domain: str | None) -> None:
    """A move to this host is recorded before anything of the guest is here."""
    guest: Any = Named("web1", os.getpid())
    ended = (os.getpid(), 1)  # that process began at another time
    of_no_guest = {"qmp": None, "agent": None, "domain": domain, "writer": ended}
    record = journal.begun(guest, "incoming").model_copy(update=of_no_guest)
    path = journal.write(record)
    assert (record.address is None) is (domain is None)
    (finding,) = doctor.plan([tmp_path]).findings
    assert (finding.path, finding.guest) == (path, "web1")
    assert ("--domain web1" in finding.says) is (domain is not None)
    assert list(guest_doctor.left_behind(GuestAddress(qmp=Path("/run/web1.qmp")))) == []
