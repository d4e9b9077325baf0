"""Nights by the command line, and what stock QEMU tools say of the same images: for tests of what a run tells.

Numbers are counted here by qemu-img and from the repository's records, never taken from a report.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric

from snapchain.cli import main
from snapchain.errors import Corrupt, NotFound
from snapchain.ops.restore.run import Restoration
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.opening import open_repository
from snapchain.repository.verification import verify
from tests.ops.nightly import exposition
from tests.ops.stacks import flat, qemu_img, same, write

KiB = 1 << 10
MiB = 1 << 20
PIECE = 128 * KiB
"""What a guest writes at once: whole clusters, whole leaves."""


@dataclass(frozen=True)
class Said:
    """What one command ended with."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "snapchain", *map(str, words)]


def snapchain(*words: str | Path, folder: Path) -> Said:
    """The command in this process, which saves the second that starting Python takes on a busy machine."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        status = main([str(word) for word in words])
    said = Said(status, *(each.buffer.getvalue().decode() for each in (out, err)))
    assert "Traceback" not in said.err, said.err
    assert "bug in snapchain" not in said.out + said.err, said.out + said.err
    return said


class House:
    """Images below `folder`/images, one repository and a configuration beside them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        self.truths = folder / "truths"
        self.truths.mkdir()
        self.config = folder / "web.toml"

    def init(self, name: str = "vault") -> None:
        assert snapchain("init", name, "--no-encryption", folder=self.folder).status == 0

    def configure(self, text: str) -> None:
        self.config.write_text(f'time_zone = "UTC"\nstate = "state"\nmetrics = "metrics/web.prom"\n{text}')

    def nightly(self, *words: str) -> Said:
        return snapchain("nightly", self.config, *words, folder=self.folder)

    def image(self, disk: str) -> Path:
        return self.images / f"{disk}.qcow2"

    def disk(self, name: str, *, seed: int) -> Path:
        """A chain of three files; the lower ones are there before any snapchain."""
        below = [self.images / f"{name}-{part}.qcow2" for part in ("base", "middle")]
        qemu_img("create", "-q", "-f", "qcow2", below[0], str(4 * MiB))
        write(below[0], f"write -P {seed % 250 + 1} 0 512k")
        for path, under in ((below[1], below[0]), (self.image(name), below[1])):
            qemu_img("create", "-q", "-f", "qcow2", "-b", under.name, "-F", "qcow2", path)
            write(path, f"write -P {seed % 200 + 40} 256k 128k", f"write -P {seed % 100 + 7} 2M 128k")
        return self.image(name)

    def guest_writes(self, disk: str, value: int, at: int) -> None:
        """One piece, the `at`-th of the disk."""
        write(self.image(disk), f"write -P {value} {at * PIECE} {PIECE}")

    def remember(self, disk: str) -> None:
        flat(self.image(disk), self.truths / f"{disk}.raw")

    def is_restored(self, disk: str, repository: str = "vault") -> bool:
        """Whether the newest point reads as the image did when it was remembered."""
        out = self.folder / "restored.raw"
        out.unlink(missing_ok=True)
        Restoration(
            RepositoryDestination(open_repository(str(self.folder / repository), passphrase=lambda: None)), disk, out
        ).run()
        return out.read_bytes() == (self.truths / f"{disk}.raw").read_bytes()

    def is_sound(self, repository: str = "vault") -> bool:
        """Whether everything there can be read and is what was recorded."""
        return verify(open_repository(str(self.folder / repository), passphrase=lambda: None), share=1.0).ok

    def reads_as_remembered(self, disk: str) -> bool:
        return same(self.image(disk), self.truths / f"{disk}.raw")

    def points(self, disks: Iterable[str], repository: str = "vault") -> dict[str, list[int] | None]:
        """disk -> numbers of its points; None for a disk whose records cannot be read."""
        opened = open_repository(str(self.folder / repository), passphrase=lambda: None)
        found: dict[str, list[int] | None] = {}
        for disk in disks:
            try:
                found[disk] = [point.point for point in opened.catalogue(disk).points]
            except NotFound:
                found[disk] = []
            except Corrupt:
                found[disk] = None
        return found

    def metrics(self) -> dict[str, Metric]:
        return exposition.read((self.folder / "metrics" / "web.prom").read_text())


def chain_of(image: Path) -> list[Path]:
    """The files, root first, as qemu-img finds them."""
    said = json.loads(qemu_img("info", "-U", "--backing-chain", "--output=json", image))
    return [image.parent / each["filename"] for each in reversed(said)]


def hidden_bytes(image: Path) -> int:
    """Data of each file that a file above it hides, counted in pieces of 64 KiB from what qemu-img maps."""
    seen: set[int] = set()
    hidden = 0
    for path in reversed(chain_of(image)):
        rows = json.loads(qemu_img("map", "-U", "-f", "qcow2", "--output=json", path))
        own = {
            at
            for row in rows
            if row["depth"] == 0 and row["present"] and row["data"]
            for at in range(row["start"] // (64 * KiB), (row["start"] + row["length"]) // (64 * KiB))
        }
        hidden += len(own & seen) * 64 * KiB
        seen |= own
    return hidden


def rows(report: Any) -> dict[str, Any]:
    """A report's disks by name."""
    return {each["disk"]: each for each in report["disks"]}


def leftovers(folders: Sequence[Path]) -> list[str]:
    """Temporary names that a run should not have left."""
    marks = (".new-", ".snapshot-", ".merge-", ".tmp", "journal")
    return [str(path) for folder in folders for path in folder.rglob("*") if any(mark in path.name for mark in marks)]
