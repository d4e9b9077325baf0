"""A configuration, some disks and a repository, for tests of whole runs; and a clock that a test winds."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from snapchain.model.events import OnEvent, ignore
from snapchain.ops.nightly import run as runner
from snapchain.ops.nightly.document import parse
from snapchain.ops.nightly.report import DiskReport, NightlyReport
from snapchain.repository.opening import create_repository, open_repository
from snapchain.repository.repository import Repository
from tests.ops.stacks import qemu_img, write

MiB = 1 << 20
EVENING = datetime(2026, 3, 10, 22, 0, tzinfo=UTC)


class Clock:
    """Goes on by `step` at each look."""

    def __init__(self, now: datetime = EVENING, step: timedelta = timedelta(0)) -> None:
        self.now, self.step = now, step

    def __call__(self) -> datetime:
        now = self.now
        self.now += self.step
        return now


class Host:
    """A directory with images, unencrypted repositories and one configuration."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = directory / "images"
        self.images.mkdir()
        self.path = directory / "nightly.toml"

    def disk(self, name: str) -> Path:
        """A small qcow2 with some data."""
        path = self.images / f"{name}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", path, "4M")
        write(path, f"write -P {1 + len(list(self.images.iterdir())) % 200} 0 256k")
        return path

    def repository(self, name: str = "repo") -> Repository:
        """Made when it is not there yet."""
        place = str(self.directory / name)
        if not (self.directory / name / "config").exists():
            create_repository(place, passphrase=lambda: None, encryption="none")
        return open_repository(place, passphrase=lambda: None)

    def run(
        self, text: str, *, clock: Clock | None = None, any_time: bool = False, on_event: OnEvent = ignore
    ) -> NightlyReport:
        """A whole run of this configuration, the parts that every test has put in front of it."""
        self.path.write_text(self.whole(text))
        config = parse(self.path.read_text(), path=self.path)
        return runner.run(config, self.path, clock=clock or Clock(), any_time=any_time, on_event=on_event)

    def whole(self, text: str) -> str:
        head = 'time_zone = "UTC"\nstate = "state"\nmetrics = "snapchain.prom"\n'
        if "[[disks]]" not in text:
            text += '\n[[disks]]\nglob = "images/*.qcow2"\n'
        if "[[destinations]]" not in text:
            text += '\n[[destinations]]\nname = "vault"\nurl = "repo"\n'
        return head + text

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series."""
        for line in (self.directory / "snapchain.prom").read_text().splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == f"snapchain_{name}" and all(
                f'{label}="{text}"' in series for label, text in labels.items()
            ):
                return float(value)
        raise AssertionError(f"no series {name} {labels}")


@contextmanager
def in_use(image: Path) -> Iterator[None]:
    """Somebody has it open, as a guest does."""
    words = ["qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as guest:
        assert guest.stdin is not None
        assert guest.stdout is not None
        guest.stdin.write("write 0 64k\n")
        guest.stdin.flush()
        while "wrote" not in guest.stdout.readline():
            assert guest.poll() is None
        yield
        guest.stdin.close()


def row(report: NightlyReport, disk: str) -> DiskReport:
    """The disk's line of the report."""
    (found,) = (each for each in report.disks if each.disk == disk)
    return found
