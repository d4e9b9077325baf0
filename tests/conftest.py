"""What every test meets: hypothesis profiles, serial tests one at a time, and no silent skip in CI.

In CI a skipped test is a failed run, unless its reason is one of ALLOWED_SKIPS: a test that did not run has proved
nothing, and a green run would hide that.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
import signal
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path
from typing import Annotated

import botocore.loaders
import botocore.session
import pytest
from hypothesis import HealthCheck, settings
from pydantic import Field

from snapchain.host import records as state_key
from snapchain.repository import keys
from tests.exhaustive import EXHAUSTIVE
from tests.host.others import open_host as open_host  # noqa: PLC0414 - a fixture
from tests.memory import begin_run, end_run, note_failure

IN_CI = os.environ.get("CI", "").lower() in {"1", "true", "yes"}

# (pattern on the node id, pattern on the reason, why a machine may rightly lack it)
ALLOWED_SKIPS: tuple[tuple[str, str, str], ...] = (
    (r"", r"^no loop device", "containers without the loop driver cannot attach block devices, even as root"),
    (r"", r"^no network namespaces", "containers may not make any, even as root"),
    (r"", r"^no FUSE", "containers without /dev/fuse cannot mount what most kernels lack: NTFS and exFAT"),
    (r"", r"^no reflink", "a kernel without XFS or btrfs cannot mount what these tests look at"),
)

# No deadline: the machine's other core may be busy. Derandomised in CI: a failure there is seen here again.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if IN_CI else "dev"))


def _set_environment(patch: pytest.MonkeyPatch, home: Path) -> None:
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("XDG_STATE_HOME", str(home / "state"))
    for name in [name for name in os.environ if name.startswith("SNAPCHAIN_")]:
        patch.delenv(name)


@pytest.fixture(autouse=True, scope="session")
def _shared_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What a user has set for snapchain must not reach a test, nor a test the user's cache and state.

    This one is for what several tests share, such as the images of a module.
    """
    home = tmp_path_factory.getbasetemp() / "home"
    with pytest.MonkeyPatch.context() as patch:
        _set_environment(patch, home)
        state_key.made_key()
        yield home


_HOMES = itertools.count(1)


@pytest.fixture(autouse=True)
def _own_home(monkeypatch: pytest.MonkeyPatch, _shared_home: Path) -> None:
    """What a test knows of stores and replicas no other test does: an address may be given to a server once more.

    The key of records is the same, so that those of shared images count, and making it is no step of any test.
    """
    home = _shared_home.with_name("homes") / str(next(_HOMES))
    _set_environment(monkeypatch, home)
    key = Path("state", "snapchain", state_key.NAME)
    if (_shared_home / key).exists():  # (root may have another)
        (home / key).parent.mkdir(parents=True, mode=0o700)
        shutil.copy(_shared_home / key, home / key)


def _checked_only(fd: int) -> None:
    """As fsync fails for what it cannot be called on, and without the wait for the disk."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)


@pytest.fixture(autouse=True, scope="session")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No test here sees a power loss: fsync waits for nothing in this process and its forks, but in `make soak`.

    Programs that tests start call the real one. What a power loss may undo is read off the order of the calls.
    """
    if EXHAUSTIVE:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _checked_only)
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_description_of_s3() -> Iterator[None]:
    """A worker reads boto3's description of S3 once, and not for each client, which takes 60 ms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", cache(botocore.loaders.create_loader))
        yield


class _CheapSlot(keys.KeySlot):
    """Takes a millisecond where a real one takes a fifth of a second and 64 MiB."""

    memory_kib: Annotated[int, Field(ge=8, le=4 * keys.MEMORY_KIB)] = 8
    iterations: Annotated[int, Field(ge=1, le=4 * keys.ITERATIONS)] = 1
    lanes: Annotated[int, Field(ge=1, le=16)] = 1


@pytest.fixture(autouse=True)
def _cheap_passphrases(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """New repositories of this process have key slots that cost little, but for tests marked `costly_slots`."""
    if request.node.get_closest_marker("costly_slots") is None:
        monkeypatch.setattr(keys, "KeySlot", _CheapSlot)


@pytest.fixture(autouse=True)
def _one_at_a_time(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Serial tests wait for each other, whichever workers they run in.

    A lock and not pytest-xdist's groups: those need `--dist loadgroup`, and are ignored without a word by pytest 9.
    """
    if request.node.get_closest_marker("serial") is None:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (shared / "serial.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.hookimpl(tryfirst=True)  # before pytest asks where temporary files go
def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        begin_run(config.option)
    _let_children_be_interrupted()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    end_run()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed and isinstance(item, pytest.Function) and isinstance(path := item.funcargs.get("tmp_path"), Path):
        note_failure(path)
    return report


def _let_children_be_interrupted() -> None:
    """Children must be able to be interrupted, also where this was started by `nohup` or as `make test &`.

    A shell without job control lets its background jobs ignore SIGINT, and what is ignored stays so in children.
    """
    for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, default)


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that sample belong to `make soak` too, where they are whole; tests that need root say so without it."""
    for item in items:
        if EXHAUSTIVE and item.get_closest_marker("sampled"):
            item.add_marker(pytest.mark.soak)
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))


def _forbidden_skips(session: pytest.Session) -> Iterator[tuple[str, str]]:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:  # an xdist worker: the controller judges
        return
    for report in reporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        if not any(re.search(node, report.nodeid) and re.search(why, reason) for node, why, _ in ALLOWED_SKIPS):
            yield report.nodeid, reason


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if IN_CI and session.exitstatus == pytest.ExitCode.OK and any(_forbidden_skips(session)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    session = getattr(terminalreporter, "_session", None)
    missing = sorted(set(_forbidden_skips(session))) if IN_CI and session is not None else []
    if missing:
        terminalreporter.section("skipped in CI, which fails the run", red=True)
        for nodeid, reason in missing:
            terminalreporter.line(f"{nodeid}: {reason}")
