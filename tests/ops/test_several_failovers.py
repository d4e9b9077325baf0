"""All guests of a host are taken over by one command: which, in which order, one proof for the host; it goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import main
from snapchain.errors import InvalidInput, NotFound
from snapchain.host.qemu_processes import QemuProcess, qemu_processes
from snapchain.model.guest_state import GuestState
from snapchain.ops.failover import fence
from snapchain.ops.failover.several import groups_of, guests_from
from tests.ops.guest_points import Guest, Open, opened
from tests.ops.stacks import qemu_img
from tests.ops.test_failover import argv, program
from tests.waiting import kill_process


@pytest.fixture
def replica(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened("replica", request, tmp_path)


def stored(place: Open, tmp_path: Path, name: str, *, host: str = "kvm1", broken: bool = False) -> None:
    """A guest of one disk, shipped by a host. broken: its QEMU does not start"""
    words = [word.replace("guest=web1", f"guest={name}") for word in argv(tmp_path / "run" / name)]
    words = words[: words.index("-blockdev") + 4]  # one disk
    words = ["no-such-machine" if broken and word == "q35" else word for word in words]
    guest = Guest(tmp_path / host / name, names=("vda",), guest=name)
    guest.point(place(), 1, kind="qmp", inactive=None, live=None, argv=tuple(words), host=host)


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[None]:
    yield
    for process in running(tmp_path):
        kill_process(process.pid)


def running(tmp_path: Path) -> list[QemuProcess]:
    return [each for each in qemu_processes() if any(f"{tmp_path}/" in word for word in each.argv)]


def fencing(tmp_path: Path) -> tuple[Path, Path]:
    """A program that fences a host, and what it has logged."""
    log = tmp_path / "fenced"
    return program(tmp_path / "fence", f'echo "$SNAPCHAIN_HOST $SNAPCHAIN_ROUND: $SNAPCHAIN_GUESTS" >> {log}'), log


def test_groups_come_one_after_the_other() -> None:
    guests = ["app1", "app2", "db1", "db2", "mail"]
    text = "db2 db1   # first\n\n# none\napp*\n"
    assert groups_of(text, guests, subject="order") == [["db2", "db1"], ["app1", "app2"], ["mail"]]
    assert groups_of("*\nmail\n", guests, subject="order") == [guests]
    with pytest.raises(InvalidInput, match="line 2: 'ap1' names none of the guests"):
        groups_of("db*\nap1\n", guests, subject="order")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    status = main(["failover", *words, "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return status, found


def test_all_guests_of_a_host_and_no_others(
    replica: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be taken over keeps no other from it; the host is fenced once a round; run again it goes on."""
    for name in ("app1", "app2", "db1"):
        stored(replica, tmp_path, name)
    stored(replica, tmp_path, "other", host="kvm3")
    torn = Guest(tmp_path / "kvm1" / "torn", names=("vda", "vdb"), guest="torn")
    record = torn.point(replica(), 1, host="kvm1")
    shutil.rmtree(tmp_path / "replica" / "torn%2Fvdb")
    assert record.host == "kvm1"
    with pytest.raises(NotFound, match="kvm9 is the master of no guest there") as none:
        guests_from(replica(), "kvm9", here="kvm2")
    assert none.value.hint == "the masters of its guests are kvm1 (4 guests), kvm3 (1 guest)"
    order = tmp_path / "order"
    order.write_text("db*\n")
    script, log = fencing(tmp_path)
    words = [f"dir:{tmp_path}/replica", "--from", "kvm1", "--fence", str(script), "--order", str(order)]
    status, planned = said(capsys, *words, "--dry-run")
    assert status == 10
    assert [each["guest"] for each in planned["plan"]["guests"]] == ["app1", "app2", "db1"]
    assert [each["guest"] for each in planned["plan"]["failed"]] == ["torn"]
    assert not log.exists()
    words += ["--yes", "--concurrency", "3"]
    status, report = said(capsys, *words)
    assert status == 10
    assert [(each["guest"], each["order"], each["group"]) for each in report["guests"]] == [
        ("db1", 1, 1), ("app1", 2, 2), ("app2", 3, 2),
    ]  # fmt: skip
    assert [(each["guest"], each["order"], each["group"]) for each in report["failed"]] == [("torn", 4, 2)]
    assert (report["groups"], report["concurrency"]) == (2, 3)
    assert log.read_text().splitlines() == ["kvm1 1: app1 app2 db1 torn", "kvm1 2: app1 app2 db1 torn"]
    assert replica().guest_state("other").state is GuestState.PROTECTED
    status, again = said(capsys, *words)
    assert [each["epoch"] for each in again["guests"]] == [2, 2, 2]
    # A proof of the second round does not count for ever: the host may have come back.
    monkeypatch.setattr(fence, "_FRESH_SECONDS", 0.0)
    log.unlink()
    said(capsys, *words)
    assert [line.split(":")[0] for line in log.read_text().splitlines()] == ["kvm1 1"] + ["kvm1 2"] * 3


def test_a_host_that_is_not_fenced_keeps_all_of_its_guests(
    replica: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that fails is not run again for each of them."""
    for name in ("app1", "app2", "db1"):
        stored(replica, tmp_path, name)
    log = tmp_path / "log"
    script = program(tmp_path / "fence", f"echo ran >> {log}; exit 1")
    status, report = said(capsys, f"dir:{tmp_path}/replica", "--from", "kvm1", "--fence", str(script), "--yes")
    assert (status, report["guests"], len(report["failed"])) == (10, [], 3)
    assert log.read_text() == "ran\n"


GUESTS = 20


@pytest.mark.soak
def test_a_host_of_twenty_guests(
    replica: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str], clean: None
) -> None:
    """Real QEMUs, four at a time, in three groups; one is broken, and started when that is mended."""
    names = [f"g{number:02}" for number in range(GUESTS)]
    for name in names:
        stored(replica, tmp_path, name, broken=name == "g13")
    order = tmp_path / "order"
    order.write_text("g00 g01\ng0*\n")
    script, log = fencing(tmp_path)
    words = [f"dir:{tmp_path}/replica", "--from", "kvm1", "--fence", str(script), "--order", str(order)]
    words += ["--start", "--yes", "--concurrency", "4"]
    begun = time.monotonic()
    status, report = said(capsys, *words)
    took = time.monotonic() - begun
    assert status == 10
    assert sorted(each["guest"] for each in report["guests"]) == [name for name in names if name != "g13"]
    assert all(each["started"] for each in report["guests"])
    (failed,) = report["failed"]
    assert failed["guest"] == "g13"
    assert "unsupported machine type" in failed["message"]
    assert {each["guest"]: each["group"] for each in report["guests"]} == {
        name: 1 if name < "g02" else 2 if name < "g10" else 3 for name in names if name != "g13"
    }
    assert len(running(tmp_path)) == GUESTS - 1
    assert len(log.read_text().splitlines()) == 2
    seconds = sorted(each["seconds"] for each in report["guests"])
    before = {each.pid for each in running(tmp_path)}
    script_of_g13 = Path(replica_directory(tmp_path, "g13")) / "g13.sh"
    script_of_g13.write_text(script_of_g13.read_text().replace("no-such-machine", "q35"))
    begun = time.monotonic()
    status, again = said(capsys, *words)
    print(
        f"\n{GUESTS} guests, 4 at once: {took:.1f} s; a guest {seconds[0]:.1f} to {seconds[-1]:.1f} s; "
        f"once more with the broken one: {time.monotonic() - begun:.1f} s"
    )
    assert before <= {each.pid for each in running(tmp_path)}, "one that runs is left alone"
    assert {each["epoch"] for each in again["guests"]} == {2}
    for name in names:
        if name != "g13":
            (overlay,) = (tmp_path / "replica" / f"{name}%2Fvda" / "active").glob("*.qcow2")
            qemu_img("check", "-q", "-U", overlay)


def replica_directory(tmp_path: Path, guest: str) -> Path:
    return tmp_path / "replica" / ".guests" / f"{guest}.failover"
