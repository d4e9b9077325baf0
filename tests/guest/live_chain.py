"""Chains for tests of live merges: files with known bytes, a guest on them, and the judge of what it reads."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from snapchain.guest.address import GuestAddress, open_guest
from snapchain.guest.protocol import Guest
from tests.guest.machine import Machine

MIB = 1 << 20
K = 1 << 10


def tool(*words: object, cwd: Path) -> str:
    """What qemu-img or qemu-io prints."""
    done = subprocess.run([*map(str, words)], cwd=cwd, check=True, capture_output=True, text=True)
    return done.stdout


def layer(path: Path, backing: Path | None, size: int, *, raw_backing: bool = False) -> Path:
    """An empty qcow2 file, its backing name relative."""
    link = [] if backing is None else ["-b", backing.name, "-F", "raw" if raw_backing else "qcow2"]
    tool("qemu-img", "create", "-q", "-f", "qcow2", *link, path.name, size, cwd=path.parent)
    return path


def fill(path: Path, *writes: tuple[int, int, int], image_format: str = "qcow2") -> None:
    """(offset, length, pattern) each, as a guest writes."""
    commands = [word for at, length, pattern in writes for word in ("-c", f"write -P {pattern} {at} {length}")]
    tool("qemu-io", "-f", image_format, *commands, path.name, cwd=path.parent)


def names(path: Path) -> list[str]:
    """The files of a chain by stock qemu-img, root first, by name."""
    found = json.loads(tool("qemu-img", "info", "-U", "--backing-chain", "--output=json", path.name, cwd=path.parent))
    return [Path(each["filename"]).name for each in reversed(found)]


def links(path: Path) -> list[str | None]:
    """The backing names as they are recorded, root first."""
    found = json.loads(tool("qemu-img", "info", "-U", "--backing-chain", "--output=json", path.name, cwd=path.parent))
    return [each.get("backing-filename") for each in reversed(found)]


def same(one: Path, other: Path, *, formats: tuple[str, str] = ("qcow2", "raw")) -> None:
    """Fails unless two images read the same, by stock qemu-img."""
    tool("qemu-img", "compare", "-U", "-f", formats[0], "-F", formats[1], one, other, cwd=one.parent)


def sound(path: Path) -> None:
    """Fails unless `qemu-img check` is content with it and all below it."""
    for name in names(path):
        info = json.loads(tool("qemu-img", "info", "-U", "--output=json", name, cwd=path.parent))
        if info["format"] == "qcow2":
            tool("qemu-img", "check", "-q", "-f", "qcow2", name, cwd=path.parent)


@dataclass
class Chain:
    """Files 0.qcow2 (the root) to N.qcow2 (the active layer) in a folder, each with bytes of its own.

    Layer n holds pattern n + 1 in [n * 256 KiB, (n + 1) * 256 KiB), and hides a part of the one below it
    """

    folder: Path
    count: int = 5
    size: int = 4 * MIB
    files: list[Path] = field(default_factory=list)
    views: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        below: Path | None = None
        for number in range(self.count):
            path = layer(self.folder / f"{number}.qcow2", below, self.size)
            at = number * 256 * K
            hides = [(at - 64 * K, 64 * K, 100 + number)] if number else []
            fill(path, (at, 256 * K, number + 1), *hides)
            self.files.append(path)
            below = path
        self.copies = self.folder.parent / f"{self.folder.name}-copies"
        self.copies.mkdir(exist_ok=True)
        self.remember()

    def copy(self, folder: Path) -> Self:
        """Another one with the same bytes; the copies of its views are shared."""
        shutil.copytree(self.folder, folder)
        made = copy(self)
        made.folder, made.files = folder, [folder / path.name for path in self.files]
        return made

    @property
    def active(self) -> Path:
        return self.files[-1]

    def remember(self) -> None:
        """Copy each view as it is."""
        for path in self.files:
            copy = self.copies / f"{path.stem}.raw"
            tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, copy, cwd=self.folder)
            self.views[path.name] = copy

    def check_view(self, path: Path, of: str) -> None:
        """Fails unless a file shows what the file `of` showed."""
        same(path, self.views[of])


def patterns_hold(machine: Machine, chain: Chain, disk: str = "vda") -> bool:
    """Whether the guest reads each layer's bytes, where no layer above hides them."""
    return all(
        machine.reads(disk, number * 256 * K, (192 if number < chain.count - 1 else 256) * K, number + 1)
        for number in range(chain.count)
    )


@contextmanager
def running(folder: Path, chain: Chain, **more: object) -> Iterator[tuple[Machine, Guest]]:
    """A QEMU on a chain, and snapchain's view of it."""
    with (
        Machine(folder, disks={"vda": chain.active}, **more) as machine,  # type: ignore[arg-type]
        open_guest(GuestAddress(qmp=machine.qmp)) as guest,
    ):
        yield machine, guest
