"""The service that a QEMU runs in. systemctl is a script here: what it says of a service, and which it is asked of."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapchain.errors import Conflict
from snapchain.host import service_unit
from snapchain.host.service_unit import Service, service_in, service_of
from snapchain.ops.migrate.live_check import check_service


@pytest.mark.parametrize(
    ("cgroups", "name"),
    [
        ("0::/system.slice/web1.service\n", "web1.service"),
        ("0::/system.slice/system-vm.slice/vm@web1.service/payload\n", "vm@web1.service"),
        ("0::/user.slice/user-0.slice/session-3.scope\n", None),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/term.scope\n", None),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/web1.service\n", "web1.service"),
        ("0::/machine.slice/machine-qemu.scope/libvirt/emulator\n", None),
        ("9:name=systemd:/system.slice/web1.service\n4:memory:/other\n0::/\n", "web1.service"),
        ("4:memory:/system.slice/web1.service\n0::/\n", None),
        ("", None),
    ],
)
def test_the_innermost_unit_counts(cgroups: str, name: str | None) -> None:
    assert service_in(cgroups) == name


@pytest.fixture
def process() -> Iterator[int]:
    with subprocess.Popen(["sleep", "1000"]) as running:
        yield running.pid
        running.kill()


class Systemd:
    """A systemctl that says of each service what the test wants, and the cgroups of the test's process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        self.own = "0::/user.slice/session-1.scope\n"
        monkeypatch.setattr(
            service_unit, "_cgroups", lambda pid: self.own if pid == "self" else "0::/system.slice/web1.service\n"
        )

    def says(self, *lines: str, status: int = 0) -> None:
        program = self._folder / "systemctl"
        rest = "\n".join(lines)
        program.write_text(f'#!/bin/sh\ntest "$*" = "{ASKED}" || exit 3\ncat <<END\n{rest}\nEND\nexit {status}\n')
        program.chmod(0o755)


ASKED = "show --property=LoadState,MainPID,Restart -- web1.service"


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    return Systemd(tmp_path, monkeypatch)


def test_a_service_ends_with_its_main_process(systemd: Systemd, process: int) -> None:
    systemd.says("Restart=always", "LoadState=loaded", f"MainPID={process}")
    assert service_of(process) == Service("web1.service", "always")
    systemd.says("Restart=always", "LoadState=loaded", f"MainPID={os.getpid()}")  # a script that started QEMU
    assert service_of(process) == Service("web1.service", "always")
    systemd.says("Restart=always", "LoadState=loaded", "MainPID=0")  # it has no main process, or none that is known
    assert service_of(process) == Service("web1.service", "always")
    with subprocess.Popen(["sleep", "1000"]) as other:  # QEMU is only one of those that it has started
        systemd.says("Restart=always", "LoadState=loaded", f"MainPID={other.pid}")
        assert service_of(process) is None
        other.kill()


def test_a_service_of_which_systemd_says_nothing(systemd: Systemd, process: int) -> None:
    systemd.says("Restart=no", "LoadState=not-found", "MainPID=0")  # a user's: the system's manager does not know it
    assert service_of(process) == Service("web1.service", "")
    systemd.says("System has not been booted with systemd", status=1)
    assert service_of(process) == Service("web1.service", "")


def test_the_service_of_snapchain_itself_is_none_of_qemu(systemd: Systemd, process: int) -> None:
    systemd.says("Restart=on-failure", "LoadState=loaded", "MainPID=0")
    assert service_of(process) is not None
    systemd.own = "0::/system.slice/web1.service\n"
    assert service_of(process) is None


def test_a_qemu_that_systemd_starts_again_does_not_move() -> None:
    assert check_service(None, subject="web1") is None
    assert check_service(Service("web1.service", "no"), subject="web1") is None
    words = check_service(Service("web1.service", ""), subject="web1")
    assert words is not None
    assert "does not say whether" in words
    with pytest.raises(Conflict, match=r"web1.service, which systemd may start again .*Restart=always") as caught:
        check_service(Service("web1.service", "always"), subject="web1")
    assert "systemctl edit --runtime web1.service" in (caught.value.hint or "")
