"""A real disk, its generations and its clones, for comparing snapchain with restic and borg.

    base.raw        an ext4 filesystem of 1.5 GiB: files of this machine, and some free space
    generation1     240 MiB of other files written to it, and some removed; generation2: as many again
    clone0 ... 9    2 % of the base changed, in pieces of 64 KiB anywhere in it

Each is a raw disk, as restic and borg read it, and a qcow2 overlay on the one before (a clone: on the base) of the
clusters of 64 KiB that differ, as a guest leaves it.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import plan
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.model.extents import covering
from tests.bench.block_sizes import copy, filesystem
from tests.bench.measure import GiB, KiB, MiB, real_files

FILES = int(1.2 * GiB)
CHANGED = 240 * MiB
PIECE = 64 * KiB
CLONES = 10
DISK = "1920M"


def generations(folder: Path) -> list[tuple[Path, Path]]:
    """(image for snapchain, raw disk) of the base and of two generations."""
    pool = real_files(FILES + 2 * CHANGED, seed=11)
    sizes = list(accumulate(path.stat().st_size for path in pool))
    count = sum(size < FILES for size in sizes)
    base = folder / "base.raw"
    filesystem(folder, base, pool[:count], size=DISK)
    made = [(base, base)]
    for number in (1, 2):
        first = sum(size < FILES + (number - 1) * CHANGED for size in sizes)
        last = sum(size < FILES + number * CHANGED for size in sizes)
        disk, image = folder / f"generation{number}.raw", folder / f"generation{number}.qcow2"
        copy(made[-1][1], disk)
        draw = random.Random(number)
        gone = [f"rm /{name // 100}/{name}" for name in draw.sample(range(count), count // 40)]
        added = [
            f"write {path} /{draw.randrange(count // 100)}/new{number}-{at}" for at, path in enumerate(pool[first:last])
        ]
        words = "\n".join([*gone, *added]).encode()
        subprocess.run(["debugfs", "-w", "-f", "-", disk], input=words, check=True, capture_output=True)
        overlay(made[-1], disk, image)
        made.append((image, disk))
    return made


def clones(folder: Path, base: tuple[Path, Path]) -> list[tuple[Path, Path]]:
    """(image for snapchain, raw disk) of each. The new bytes are pieces of other real files."""
    filled = _filled(base[1])
    body = b"".join(path.read_bytes() for path in real_files(CLONES * len(filled) // 50 * PIECE + 64 * MiB, seed=12))
    made, at = [], 0
    for number in range(CLONES):
        disk, image = folder / f"clone{number}.raw", folder / f"clone{number}.qcow2"
        copy(base[1], disk)
        with disk.open("r+b") as file:
            for place in random.Random(number).sample(filled, len(filled) // 50):
                os.pwrite(file.fileno(), body[at : at + PIECE], place * PIECE)
                at += PIECE
        overlay(base, disk, image)
        made.append((image, disk))
    return made


def _filled(disk: Path) -> list[int]:
    """Numbers of the pieces that are not all zero."""
    whole = np.memmap(disk, np.uint8, "r").reshape(-1, PIECE)
    return [number for number, piece in enumerate(whole) if piece.any()]


def overlay(below: tuple[Path, Path], disk: Path, image: Path) -> None:
    """An image on another one that shows a raw disk, and holds the clusters that differ."""
    old, new = (np.memmap(path, np.uint8, "r").reshape(-1, PIECE) for path in (below[1], disk))
    places = [number for number in range(len(new)) if not np.array_equal(old[number], new[number])]
    first = np.array(places, np.int64) * PIECE
    kind = "raw" if below[0].suffix == ".raw" else "qcow2"
    layout = plan(
        covering(disk.stat().st_size, first, first + PIECE), cluster_size=PIECE, backing=Backing(below[0].name, kind)
    )
    with image.open("x+b") as file, Qcow2Writer(file.fileno(), layout) as writer:
        for number in places:
            writer.write_pieces([(number * PIECE, memoryview(new[number].tobytes()))])


def weight(folder: Path) -> int:
    """Bytes of all files of a repository, but for the room that is kept for a full disk."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != ".reserve")


__all__: Sequence[str] = ["clones", "generations", "overlay", "weight"]
