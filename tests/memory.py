"""Where tests make their files: in memory, if this machine has room there, and on the disk in `make soak`.

A run makes and removes a million small files. On ext4 each removal waits for the journal, 1 ms and more while a second
worker is busy, which was a third of a run; in memory it takes 0.02 ms. What file systems do differently is tested on
ones that are mounted for it (tests/ops/test_full_disk.py, tests/host/test_file_systems.py), and all in `make soak`.

Each run has a directory of its own there, and each of its processes holds a lock on it. At its end it removes all but
what failed tests have left. A run that was killed cannot: the next one does, once nobody holds the lock any more.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.exhaustive import EXHAUSTIVE
from tests.waiting import taken

MEMORY = Path("/dev/shm")
PREFIX = "sc-"  # short: paths of sockets have 107 bytes at most
RUN = "SC_TESTS_RUN"
"""The environment variable with the directory of this run."""
ROOM = 4 << 30
"""Bytes that must be free there and in memory; a run takes a quarter of it at once."""
KEPT_BYTES = 256 << 20
KEPT_RUNS = 3
"""What stays of failed tests: so much of each run, and of so many runs."""
FAILED = "failed"

_held: list[int] = []


def scratch() -> str | None:
    """Where a test makes what it has by thousands: in memory, in `make soak` too. None: this machine has none."""
    return os.environ.get(RUN)


def begin_run(option: Any, memory: Path = MEMORY) -> None:
    """Let pytest and all programs make temporary files in memory, where nobody has told them another place.

    option: pytest's own
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        if run := scratch():
            _hold(Path(run))  # the first process may be killed before this one has ended
        return
    os.environ.pop(RUN, None)  # of a run whose test this run is
    if not os.access(memory, os.W_OK):
        return
    remove_dead_runs(memory)
    run_directory = _made(memory)
    os.environ[RUN] = str(run_directory)
    told = option.basetemp or "PYTEST_DEBUG_TEMPROOT" in os.environ
    if not EXHAUSTIVE and not told and _has_room(memory):
        option.basetemp = str(run_directory / "t")
        if "TMPDIR" not in os.environ:
            os.environ["TMPDIR"] = str(run_directory)
            tempfile.tempdir = None  # read it again


def note_failure(directory: Path) -> None:
    """What lies there stays after the run."""
    if run := scratch():
        with Path(run, FAILED).open("a") as file:
            file.write(f"{directory}\n")


def end_run() -> None:
    """Remove what this run has made, but for what failed tests have left."""
    if "PYTEST_XDIST_WORKER" not in os.environ and (run := os.environ.pop(RUN, None)):
        _tidy(Path(run))


def remove_dead_runs(memory: Path) -> None:
    """Tidy up after runs of this user that have ended or were killed, in any checkout."""
    kept = []
    for directory in memory.glob(f"{PREFIX}*"):
        with _ended(directory) as ended:
            if ended and _tidy(directory):
                kept.append(directory)
    for directory in sorted(kept, key=lambda path: path.stat().st_mtime)[:-KEPT_RUNS]:
        _remove([directory])


def _has_room(memory: Path) -> bool:
    try:
        found = os.statvfs(memory)
        facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return False
    available = int(facts["MemAvailable"].split()[0]) << 10
    programs = not found.f_flag & os.ST_NOEXEC  # tests write some and run them
    return programs and min(found.f_bavail * found.f_frsize, available) >= ROOM


def _made(memory: Path) -> Path:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=memory))
        directory.chmod(0o711)  # other users must reach what a test makes for them
        if _hold(directory):
            return directory


def _hold(directory: Path) -> bool:
    """Whether it is there still: another run may have taken it for a dead one's before it was locked."""
    with suppress(OSError):
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(fd, fcntl.LOCK_SH)
        _held.append(fd)
        return directory.exists()
    return False


@contextmanager
def _ended(directory: Path) -> Iterator[bool]:
    """Whether it is this user's and no process of its run is left; none can begin to use it meanwhile."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            yield False
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(fd)


def _tidy(run: Path) -> bool:
    """Leave of a run what its failed tests have made, the earliest ones first. Return whether that is anything."""
    noted = run / FAILED
    paths = [Path(line) for line in noted.read_text().splitlines()] if noted.exists() else []
    kept: list[Path] = []
    room = KEPT_BYTES
    for path in dict.fromkeys(paths):
        if path.is_relative_to(run) and path.is_dir() and (size := sum(taken(path))) <= room:
            room -= size
            kept.append(path)
    if not kept:
        _remove([run])
        return False
    _remove(list(_others(run, [noted, *kept])))
    return True


def _others(directory: Path, kept: list[Path]) -> Iterator[Path]:
    for path in directory.iterdir():
        if any(one.is_relative_to(path) for one in kept):
            if path not in kept:
                yield from _others(path, kept)
        else:
            yield path


def _remove(paths: list[Path]) -> None:
    """What cannot be removed, such as what is mounted, is left for the next run."""
    if paths:
        argv = ["rm", "-rf", "--one-file-system", "--", *map(str, paths)]
        subprocess.run(argv, check=False, stderr=subprocess.DEVNULL)
