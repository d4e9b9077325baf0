"""failover --test: a clone without a network boots, is judged, and leaves nothing, whatever came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import main
from snapchain.errors import ToolFailed
from snapchain.host.qemu_processes import qemu_processes
from snapchain.model.guest_state import GuestState
from snapchain.ops.failover import trial as module
from snapchain.ops.failover.trial import TrialReport, TrialRequest, trial
from snapchain.ops.guest_points_merge import guest_at
from tests.ops.guest_points import GUEST, Guest, Open, opened
from tests.ops.test_failover import argv, program

CARD = ("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01")


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    return opened("directory", request, tmp_path)


def tried(place: Open, tmp_path: Path, **asked: Any) -> TrialReport:
    destination = place()
    values: dict[str, Any] = {"directory": tmp_path / "trial", **asked}
    return trial(destination, guest_at(destination, GUEST), TrialRequest(**values))


def check_nothing_is_left(place: Open, tmp_path: Path) -> None:
    assert list((tmp_path / "trial").iterdir()) == []
    assert not [each for each in qemu_processes() if str(tmp_path) in " ".join(each.argv)]
    assert place().guest_state(GUEST).state is GuestState.PROTECTED


def stored(place: Open, tmp_path: Path, words: tuple[str, ...]) -> None:
    guest = Guest(tmp_path / "kvm1")
    guest.point(place(), 1, kind="qmp", inactive=None, live=None, argv=words)


def test_a_clone_without_a_network_runs_and_goes(place: Open, tmp_path: Path) -> None:
    stored(place, tmp_path, (*argv(tmp_path), *CARD))
    seen = tmp_path / "seen"
    check = program(tmp_path / "check", f'test -S "$SNAPCHAIN_QMP" && cat /proc/[0-9]*/cmdline | tr "\\0" " " > {seen}')
    report = tried(place, tmp_path, check=[str(check)])
    assert (report.ok, report.by, report.guest_point, report.why_not) == (True, "check", 1, None)
    assert report.bytes_written > 0
    command = next(line for line in seen.read_text().split("qemu-system-x86_64") if f"{tmp_path}/trial" in line)
    assert "guest=web1-test-" in command
    assert "netdev" not in command
    assert "-nic none" in command
    check_nothing_is_left(place, tmp_path)
    assert tried(place, tmp_path).by == "running"
    check_nothing_is_left(place, tmp_path)


def test_one_that_does_not_boot_is_a_report(place: Open, tmp_path: Path) -> None:
    stored(place, tmp_path, tuple("no-such-machine" if word == "q35" else word for word in argv(tmp_path)))
    report = tried(place, tmp_path)
    assert not report.ok
    assert "unsupported machine type" in (report.why_not or "")
    check_nothing_is_left(place, tmp_path)


def test_a_check_that_never_succeeds(place: Open, tmp_path: Path) -> None:
    stored(place, tmp_path, argv(tmp_path))
    report = tried(place, tmp_path, check=["false"], seconds=0.1)
    assert (report.ok, report.by) == (False, "check")
    check_nothing_is_left(place, tmp_path)
    with pytest.raises(ToolFailed, match="the check hook: not installed"):
        tried(place, tmp_path, check=["no-such-program"])


def test_an_interrupt_leaves_nothing(place: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(place, tmp_path, argv(tmp_path))

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_booted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tried(place, tmp_path)
    check_nothing_is_left(place, tmp_path)


def test_on_the_command_line(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replica = opened("replica", request, tmp_path)
    stored(replica, tmp_path, argv(tmp_path))
    words = ["failover", f"dir:{tmp_path}/replica::web1", "--test"]
    assert main(words) == 2
    assert "--into" in capsys.readouterr().err
    assert main([*words, "--into", str(tmp_path / "trial")]) == 0
    assert "booted: it runs, and has no agent" in capsys.readouterr().out
    assert main([*words, "--into", str(tmp_path / "trial"), "--check", "false", "--timeout", "1"]) == 10
    check_nothing_is_left(replica, tmp_path)
