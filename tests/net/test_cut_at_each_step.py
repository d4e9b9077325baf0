"""A live migration through ssh, and whoever carries it dies, or the link is cut, at each of its steps.

Never two guests that can write, and never none that can start; what is left ends by itself, or by `--abort`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.guest.counting_guest import Counting, run_directory
from tests.guest.machine import Monitor
from tests.guest.one_master import OneMaster
from tests.guest.spy import Fault, Place, Spy, call, changing
from tests.guest.test_live_migration import FIRST, LAST, SWITCH, check_settled, unfinished
from tests.net.namespaces import Cable
from tests.net.sshd import SshHost
from tests.net.test_live_migration_over_ssh import Moving, children, far_server
from tests.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.soak]
GIVES_UP = ("-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=3")
"""ssh notices a dead link in seconds: what comes first on its command line counts."""
STEPS = [(number, place) for number in range(FIRST, LAST + 1) for place in (Place.BEFORE, Place.SENT)]


@pytest.fixture
def run() -> Iterator[Path]:
    with run_directory() as folder:
        yield folder


@pytest.fixture
def moving(far: tuple[SshHost, Cable], run: Path, tmp_path: Path) -> Moving:
    found = Moving(far[0], run, tmp_path)
    found.environment["SNAPCHAIN_SSH"] += " " + " ".join(GIVES_UP)
    return found


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Counting]:
    counting = Counting(tmp_path / "source")
    with counting.machine:
        yield counting


def logins(snapchain: int, *, forwarding: bool) -> list[int]:
    """Its ssh processes: those that forward sockets, or those that run snapchain there."""
    found = []
    for pid in children(snapchain):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"ssh") and (b"-L" in words or b"-N" in words) == forwarding:
                found.append(pid)
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def witness(guest: Counting, run: Path) -> Iterator[None]:
    """Never two guests that run, as long as the block lasts."""
    machine, own = guest.machine, guest.machine.folder / "test.qmp"
    machine.monitor.close()
    with OneMaster(lambda: [own, *run.glob("snapchain/web1-*/test.qmp")]) as seen:
        yield
    assert seen.looks > 10
    if machine.process.poll() is None:
        machine.monitor = Monitor(own)


@pytest.mark.parametrize(("number", "place"), STEPS)
@pytest.mark.parametrize("who", ["the login", "the login that forwards", "the snapchain there", "the sessions there"])
def test_a_process_dies(
    far: tuple[SshHost, Cable],
    moving: Moving,
    guest: Counting,
    run: Path,
    tmp_path: Path,
    who: str,
    number: int,
    place: Place,
) -> None:
    """Before the destination has the guest it goes on here, after that there; nobody has to be told."""
    started: list[subprocess.Popen[str]] = []
    victims: dict[str, Callable[[], list[int]]] = {
        "the login": lambda: logins(started[0].pid, forwarding=False),
        "the login that forwards": lambda: logins(started[0].pid, forwarding=True),
        "the snapchain there": lambda: far_server(run),
        "the sessions there": far[0].sessions,
    }

    def strike() -> None:
        found = victims[who]()
        assert found or who == "the login that forwards", who
        kill(found)

    fault = Fault(number, place, call(strike))
    with Spy(tmp_path / "spy", guest.machine.qmp, fault, counts=changing) as spy, witness(guest, run):
        started.append(moving.begin("--qmp", spy.path, moving.host.url(tmp_path / "b")))
        with started[0] as child:
            out, error = child.communicate(timeout=300)
        assert spy.happened, out + error
        assert "Traceback" not in error, error
        wait_until(lambda: not unfinished())
    where = check_settled(guest, run, tmp_path / "b")
    assert (child.returncode == 0) <= (where == "there"), out + error
    if number < SWITCH and who != "the login that forwards":
        assert where == "here", out + error
    if number == LAST:
        assert where == "there", out + error


@pytest.mark.parametrize(("number", "place"), STEPS)
@pytest.mark.parametrize("cut", ["both ways", "only the answers", "for a moment"])
def test_the_link_is_cut(
    far: tuple[SshHost, Cable],
    moving: Moving,
    guest: Counting,
    run: Path,
    tmp_path: Path,
    cut: str,
    number: int,
    place: Place,
) -> None:
    """And healed once the command has ended. While it is cut no two guests run; after that one does."""
    cable = far[1]
    healing: list[threading.Timer] = []

    def strike() -> None:
        cable.set(cut=2 if cut == "only the answers" else 1)
        if cut == "for a moment":
            healing.append(threading.Timer(1.0, lambda: cable.set(cut=0)))
            healing[0].start()

    fault = Fault(number, place, call(strike))
    with Spy(tmp_path / "spy", guest.machine.qmp, fault, counts=changing) as spy, witness(guest, run):
        with moving.begin("--qmp", spy.path, moving.host.url(tmp_path / "b")) as child:
            out, error = child.communicate(timeout=400)
        assert spy.happened, out + error
        assert "Traceback" not in error, error
        for each in healing:
            each.join()
        if cut != "for a moment":
            cable.set(cut=0)
        wait_until(lambda: not unfinished())
    where = check_settled(guest, run, tmp_path / "b")
    if child.returncode == 0:
        assert where == "there", out + error
    elif number < SWITCH:
        assert where == "here", out + error
    if number == LAST:
        assert where == "there"
