"""kill -9 of a real process at every system call that changes a file, by strace; run as a program of its own.

    python -m tests.ops.kill_nine JOB DIRECTORY

A process of one thread forks for each death, so that nothing is imported again: the child stops itself, strace takes
hold of it and is told to send SIGKILL at the n-th such call of any of its threads, and the child goes on.  As strace
counts for each thread by itself, it is done for all calls together, and in `make soak` for each kind alone, too.
After each death everything is checked, done again, and checked again.  The last line says how often it died.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

from snapchain.model.retention import Policy
from snapchain.objects.local import LocalStore
from snapchain.ops.restore.run import Restoration
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.exhaustive import EXHAUSTIVE
from tests.ops.shipping import DISK, MiB, same_bytes, shipment
from tests.ops.stacks import Layer, build, clean, flat, same
from tests.repository.synthetic import again, repository

CALLS = (
    "write", "pwrite64", "writev", "pwritev", "ftruncate", "fsync", "fdatasync", "link", "linkat", "rename", "renameat",
    "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "fallocate", "copy_file_range",
)  # fmt: skip


def deaths(job: Callable[[], object], reset: Callable[[], object]) -> Iterator[int]:
    """Runs `job` in children that die at their first call, their second, ...; counts the deaths.

    reset: puts back what a child that lived has done; after a death that is the caller's work
    """
    died = 0
    for calls in (",".join(CALLS), *(CALLS if EXHAUSTIVE else ())):
        for _ in _deaths(job, calls):
            died += 1
            yield died
        reset()
    assert died >= (8 if EXHAUSTIVE else 4), "hardly anything was ever killed"


def _deaths(job: Callable[[], object], calls: str) -> Iterator[int]:
    for nth in count(1):
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            try:
                job()
            except BaseException as error:  # noqa: BLE001 -- the parent reads it
                print(repr(error), flush=True)
                os._exit(1)
            os._exit(0)
        os.waitpid(pid, os.WUNTRACED)
        inject = f"inject={calls}:signal=KILL:when={nth}"
        argv = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={calls}", "-e", inject, "-p", str(pid)]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as tracer:
            while "TracerPid:\t0\n" in Path(f"/proc/{pid}/status").read_text():
                assert tracer.poll() is None, "strace may not trace here"
                time.sleep(0.002)
            os.kill(pid, signal.SIGCONT)
            status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, f"the job failed by itself in run {nth}"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield nth


class Scene:
    """A repository with points of some files of a chain, as it was before a job."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        layers = [Layer(MiB, [f"write -P {n + 1} {n * 32}k 64k", f"write -z {n * 64 + 256}k 4k"]) for n in range(3)]
        self.files = build(directory / "chain", layers)
        self.shown = [flat(path, directory / f"{path.name}.flat") for path in self.files]
        self._made = repository(LocalStore(directory / "before", make=True), block_size=64 * 1024)

    @property
    def place(self) -> Path:
        return self.directory / "repo"

    def open(self) -> Repository:
        return again(self._made, LocalStore(self.place))

    def ship(self, number: int) -> None:
        with shipment(self.files[number], self.open(), DISK) as work:
            work.run()

    def keep(self) -> None:
        """What is in the repository now is what every run begins with."""
        shutil.rmtree(self.directory / "before")
        shutil.copytree(self.place, self.directory / "before")

    def reset(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.directory / "before", self.place)

    def points(self) -> list[int]:
        found = self.open().disk(DISK).read()
        return [point.point for point in found[0].points] if found else []

    def check(self, points: dict[int, int]) -> None:
        """These points (number -> file) restore, and verify has no finding."""
        opened = self.open()
        report = verify(opened, share=1.0)
        assert report.ok, report.findings
        for point, number in points.items():
            out = self.directory / "checked.raw"
            out.unlink(missing_ok=True)
            Restoration(RepositoryDestination(opened), DISK, out, point=str(point)).run()
            assert same_bytes(out, self.shown[number]), point


def ship(scene: Scene) -> int:
    scene.reset()
    scene.ship(0)
    scene.keep()
    died = 0
    for died in deaths(lambda: scene.ship(1), scene.reset):  # noqa: B007 -- counted
        before = scene.points()
        assert before in ([1], [1, 2])
        scene.check(dict(zip(before, (0, 1), strict=False)))
        scene.ship(1)
        scene.check(dict.fromkeys(scene.points()[1:], 1) | {1: 0})
        scene.reset()
    return died


def merge(scene: Scene) -> int:
    scene.reset()
    for number in range(3):
        scene.ship(number)
    scene.keep()
    died = 0
    for died in deaths(lambda: RepositoryMerge(scene.open(), DISK, Policy(last=1)).run(), scene.reset):  # noqa: B007
        before = scene.points()
        assert before in ([1, 2, 3], [3])
        scene.check({point: point - 1 for point in before})
        report = RepositoryMerge(scene.open(), DISK, Policy(last=1)).run()
        assert report.layers_after == 1
        scene.check({3: 2})
        scene.reset()
    return died


def restore(scene: Scene) -> int:
    return _restore(scene, "out.raw", whole_chain=False)


def chain(scene: Scene) -> int:
    return _restore(scene, "out.qcow2", whole_chain=True)


def _restore(scene: Scene, name: str, *, whole_chain: bool) -> int:
    scene.reset()
    for number in range(3):
        scene.ship(number)
    place = scene.directory / "place"
    place.mkdir()
    out = place / name

    def job() -> None:
        Restoration(RepositoryDestination(scene.open()), DISK, out, whole_chain=whole_chain).run()

    def whole() -> bool:
        shown = scene.shown[2]
        return same(out, shown) and clean(out) if whole_chain else same_bytes(out, shown)

    died = 0
    for died in deaths(job, out.unlink):  # noqa: B007
        if out.exists():
            assert whole(), "an output under its name is whole"
            out.unlink()
        job()
        assert whole()
        left = [path.name for path in place.iterdir() if path.name.startswith(".")]
        assert left == [], "leftovers are taken over"
        out.unlink()
    scene.check({1: 0, 2: 1, 3: 2})
    return died


JOBS: dict[str, Callable[[Scene], int]] = {"ship": ship, "merge": merge, "restore": restore, "chain": chain}

if __name__ == "__main__":
    print(f"died {JOBS[sys.argv[1]](Scene(Path(sys.argv[2])))} times")
