"""[test] of a nightly run: clones boot by turns, last of all; what a killed run left goes at the next one."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapchain.destinations import open_destination
from snapchain.errors import InvalidInput
from snapchain.host.qemu_processes import qemu_processes
from snapchain.model.guest_checks import GuestCheck
from snapchain.ops.guest_status import status
from snapchain.ops.nightly.document import parse
from snapchain.ops.nightly.preview import preview
from snapchain.ops.nightly.report import BootTestReport, Outcome
from tests.guest.nights import Host
from tests.ops.test_failover import program

ROOM = "clones"


@pytest.fixture
def host() -> Iterator[Host]:
    """In a directory of a short name: the sockets of clones are below it."""
    with tempfile.TemporaryDirectory(prefix="sc") as short:
        yield Host(Path(short))


def configured(host: Host, *lines: str) -> None:
    """One guest at a repository and a replica."""
    host.configure("\n".join(["[test]", f'directory = "{ROOM}"', *lines]), standby=True)


def clones(host: Host) -> list[str]:
    room = host.folder / ROOM
    assert not [each for each in qemu_processes() if f"{room}/" in " ".join(each.argv)]
    return [path.name for path in room.iterdir()]


def where(tests: tuple[BootTestReport, ...]) -> list[str]:
    return [each.destination for each in tests]


def test_one_clone_a_night_by_turns(host: Host) -> None:
    configured(host)
    plan = preview(parse(host.path.read_text(), path=host.path), host.path)
    assert plan.tests == (), "no point has come yet"
    with host.machine():
        reports = [host.night(number) for number in range(3)]
        plan = preview(parse(host.path.read_text(), path=host.path), host.path)
        assert [each.destination for each in plan.tests] == ["standby"]
    assert [where(each.tests) for each in reports] == [["vault"], ["standby"], ["vault"]]
    for number, report in enumerate(reports):
        (test,) = report.tests
        assert (report.outcome, test.outcome, test.booted) == (Outcome.OK, Outcome.OK, True), test
        assert (test.guest, test.guest_point, test.by) == ("web1", number + 1, "running")
    assert clones(host) == []
    assert host.metric("guest_boot_test_success", guest="web1", destination="standby") == 1
    (row,) = status([(open_destination(host.replica), None)]).guests
    assert isinstance(row.booted, GuestCheck)
    assert (row.booted.ok, row.booted.point) == (True, 2)


def test_one_that_does_not_boot_fails_the_run_and_is_tested_again(host: Host) -> None:
    check = program(host.folder / "check", f"test -e {host.folder}/repaired")
    configured(host, f'check = ["{check}"]', 'timeout = "1s"', 'destinations = ["vault"]')
    with host.machine():
        first = host.night(0)
        assert (first.outcome, first.tests[0].booted, first.complete) == (Outcome.FAILED, False, False)
        assert "did not boot" in first.tests[0].faults[0].message
        assert first.guests[0].outcome is Outcome.OK, "the work of the night is done"
        assert host.metric("guest_boot_test_success", guest="web1", destination="vault") == 0
        (host.folder / "repaired").touch()
        assert host.night(1).outcome is Outcome.OK
    assert host.metric("guest_boot_test_success", guest="web1", destination="vault") == 1
    assert clones(host) == []


def test_neither_time_nor_space_is_exceeded(host: Host) -> None:
    configured(host, 'space = "4K"', 'destinations = ["vault"]')
    with host.machine() as machine:
        host.write(machine, "vda", 1, 7)
        report = host.night(0)
        assert report.tests[0].outcome is Outcome.FAILED
        assert "may take 4096" in report.tests[0].faults[0].message
        assert clones(host) == []
        configured(host, "time = 1e-9", 'destinations = ["vault"]')
        report = host.night(1)
    assert (report.tests[0].outcome, report.tests[0].left) == (
        Outcome.LEFT,
        ("boot test: the time for boot tests has gone",),
    )
    assert report.guests[0].outcome is Outcome.OK


@pytest.mark.parametrize("point", ["_booted", "_empty"])
def test_what_a_killed_run_left_goes(host: Host, point: str) -> None:
    """Killed while the clone runs, and before its directory is removed."""
    configured(host, 'destinations = ["vault"]')
    with host.machine():
        words = [host.folder, "0", "snapchain.ops.failover.trial", point, "before"]
        ended = subprocess.run([sys.executable, "-m", "tests.guest.dying_night", *map(str, words)], check=False)
        assert ended.returncode == -signal.SIGKILL
        (left,) = (host.folder / ROOM).iterdir()
        report = host.night(1)
        assert report.outcome is Outcome.OK
        assert report.tests[0].booted
    assert not left.exists()
    assert clones(host) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[test]\n", r"test\.directory: is missing"),
        ('[test]\ndirectory = "x"\nguests = 0\n', r"test\.guests: input should be greater"),
        ('[test]\ndirectory = "x"\ntimeout = "5m"\n', r"test\.timeout: .*is not a duration"),
        ('[test]\ndirectory = "x"\ndestinations = ["valt"]\n', r'test\.destinations\[0\]: "valt" is not a destination'),
        ('[test]\ndirectory = "x"\ndirectories = 1\n', r"test\.directories: is unknown here; did you mean directory"),
    ],
)
def test_a_mistake_is_named(host: Host, text: str, words: str) -> None:
    host.configure(text)
    with pytest.raises(InvalidInput, match=words):
        parse(host.path.read_text(), path=host.path)


def test_boot_tests_without_guests_are_a_mistake(tmp_path: Path) -> None:
    text = (
        'time_zone = "UTC"\n[test]\ndirectory = "x"\n[[disks]]\npath = "a"\n[[destinations]]\nname = "v"\nurl = "r"\n'
    )
    with pytest.raises(InvalidInput, match=r"test: boot tests are of \[\[guests\]\]"):
        parse(text, path=tmp_path / "nightly.toml")


def test_a_check_that_is_not_installed_is_told_beforehand(host: Host) -> None:
    configured(host, 'check = ["no-such-program"]')
    plan = preview(parse(host.path.read_text(), path=host.path), host.path)
    assert "boot test" in [each.step for each in plan.faults]
