"""A guest that writes, nights with a clock that a test sets, and what was on its disks on each of them."""

from __future__ import annotations

import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from snapchain.ops.nightly import run as runner
from snapchain.ops.nightly.document import parse
from snapchain.ops.nightly.report import GuestReport, NightlyReport
from snapchain.repository.opening import create_repository
from tests.guest.machine import Machine
from tests.ops.nightly.night import Clock
from tests.ops.stacks import qemu_img

KiB, MiB = 1 << 10, 1 << 20
EVENING = datetime(2026, 3, 10, 22, 0, tzinfo=UTC)
PIECE = 64 * KiB
SIZE = 4 * MiB
DISKS = ("vda", "vdb")


class Host:
    """A directory with a guest's images, a repository, a replica and one configuration."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.images = folder, folder / "images"
        self.images.mkdir()
        self.truths: dict[int, dict[str, bytearray]] = {}
        self.now = {name: bytearray(SIZE) for name in DISKS}
        self.path = folder / "nightly.toml"
        for name in DISKS:
            qemu_img("create", "-q", "-f", "qcow2", self.images / f"{name}.qcow2", str(SIZE))
        create_repository(str(folder / "repo"), passphrase=lambda: None, encryption="none")

    def machine(self) -> Machine:
        """The guest, on the newest layer of each disk."""
        return Machine(self.folder / "run", disks={name: self.top(name) for name in DISKS})

    def top(self, name: str) -> Path:
        """The active layer: the file on which none lies."""
        files = sorted(self.images.glob(f"{name}*.qcow2"))
        below = set()
        for path in files:
            said = subprocess.run(
                ["qemu-img", "info", "-U", "--output=json", path], capture_output=True, check=True, text=True
            ).stdout
            below.add(self.images / Path(said.partition('"full-backing-filename": "')[2].partition('"')[0]).name)
        (found,) = [path for path in files if path not in below]
        return found

    def write(self, machine: Machine, disk: str, piece: int, value: int) -> None:
        """As the guest writes."""
        machine.write(disk, piece * PIECE, PIECE, value)
        self.now[disk][piece * PIECE : (piece + 1) * PIECE] = bytes([value]) * PIECE

    def remember(self, number: int) -> None:
        """What the disks hold now is what this guest point must show."""
        self.truths[number] = {name: bytearray(content) for name, content in self.now.items()}

    @property
    def replica(self) -> str:
        """Its address."""
        return f"dir:{self.folder}/replica"

    def configure(self, text: str, *, standby: bool = False) -> None:
        """Write the configuration. One guest and the repository are in it, where `text` names no others.

        standby: the replica, too
        """
        head = 'time_zone = "UTC"\nstate = "state"\nmetrics = "nightly.prom"\n'
        if "[[guests]]" not in text:
            text += '\n[[guests]]\nqmp = "run/qmp"\n'
        if "[[destinations]]" not in text:
            places = {"vault": "repo"} | ({"standby": self.replica} if standby else {})
            for name, url in places.items():
                text += f'\n[[destinations]]\nname = "{name}"\nurl = "{url}"\nverify = {{ share = 0 }}\n'
        self.path.write_text(head + text)

    def night(self, number: int) -> NightlyReport:
        """The run of this night."""
        config = parse(self.path.read_text(), path=self.path)
        return runner.run(config, self.path, clock=Clock(EVENING + timedelta(days=number)))

    def files(self, name: str) -> int:
        """Of a disk here."""
        return len(list(self.images.glob(f"{name}*.qcow2")))

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series."""
        for line in (self.folder / "nightly.prom").read_text().splitlines():
            series, _, value = line.rpartition(" ")
            if series.partition("{")[0] == f"snapchain_{name}" and all(
                f'{k}="{v}"' in series for k, v in labels.items()
            ):
                return float(value)
        raise AssertionError(f"no series {name} {labels}")

    def restores(self, url: str, number: int, point: int) -> None:
        """A guest point restores to what the disks held, judged by qemu-img."""
        from snapchain.cli import main

        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        assert main(["restore", f"{url}::web1@{point}", str(out), "--quiet"]) == 0
        for name in DISKS:
            truth = self.folder / f"{name}.truth"
            truth.write_bytes(self.truths[number][name])
            (restored,) = [path for path in out.rglob("*") if path.suffix == ".qcow2" and name in path.name]
            qemu_img("compare", "-f", "raw", "-F", "qcow2", truth, restored)


def row(report: NightlyReport) -> GuestReport:
    """The one guest of a report."""
    (found,) = report.guests
    return found
