"""Stacks with random histories, made by stock QEMU tools, what each layer showed, and repositories to ship them to."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapchain.destination.protocol import Destination
from snapchain.model.events import OnEvent, ignore
from snapchain.objects.local import LocalStore
from snapchain.objects.store import ObjectStore
from snapchain.ops.restore.run import Restoration, RestoreReport
from snapchain.ops.ship.run import Files, Shipment, ShipReport, ShipRequest, opened
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.repository import Repository
from tests.ops.stacks import flat, qemu_img, write
from tests.repository.synthetic import again, repository

MiB = 1 << 20
LARGEST = 5 * MiB
DISK = "web1/vda"


@dataclass(frozen=True)
class Stack:
    """files, root first; shown[n] is a raw file with what files[n] showed when it was the top."""

    files: list[Path]
    shown: list[Path]


def random_stack(directory: Path, seed: int, *, layers: int = 4, grown: Callable[[Path], None] | None = None) -> Stack:
    """Mixed cluster sizes, compression, subclusters, zeroes, sizes that grow and shrink and are odd, raw roots.

    grown: called with each file as soon as it is whole, and before the next one lies on it
    """
    draw = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    shown: list[Path] = []
    common = draw.randrange(1, LARGEST // 512) * 512
    for number in range(layers):
        raw = number == 0 and draw.random() < 0.25
        path = directory / f"{number}.{'raw' if raw else 'qcow2'}"
        size = draw.choice([common, common, draw.randrange(1, LARGEST // 512) * 512])
        cluster = 1 << draw.choice([9, 12, 14, 16, 16, 18, 21])
        preallocated = _create(path, size, cluster, draw, below=files[-1] if files else None)
        compressed = [] if raw or preallocated else _compressed(draw, size, cluster)
        for commands in (compressed, _writes(draw, size, cluster)):
            if commands:
                write(path, *commands, image_format="raw" if raw else "qcow2")
        files.append(path)
        shown.append(flat(path, directory / f"{number}.shown", "raw" if raw else "qcow2"))
        if grown is not None:
            grown(path)
    return Stack(files, shown)


def _create(path: Path, size: int, cluster: int, draw: random.Random, *, below: Path | None) -> bool:
    """Whether it is preallocated: then no cluster can be written compressed."""
    if path.suffix == ".raw":
        qemu_img("create", "-q", "-f", "raw", path, str(size))
        return False
    options = [f"cluster_size={cluster}"]
    if draw.random() < 0.2:
        options.append("compat=0.10")
    else:
        options.append(f"compression_type={draw.choice(['zlib', 'zstd'])}")
        if cluster >= 1 << 14 and draw.random() < 0.5:
            options.append("extended_l2=on")
        elif below is None and draw.random() < 0.3:
            options.append(f"preallocation={draw.choice(['metadata', 'falloc'])}")
    link = [] if below is None else ["-b", below.name, "-F", "raw" if below.suffix == ".raw" else "qcow2"]
    qemu_img("create", "-q", "-f", "qcow2", *link, "-o", ",".join(options), path, str(size))
    return any(option.startswith("preallocation") for option in options)


def _compressed(draw: random.Random, size: int, cluster: int) -> list[str]:
    """In a session of their own: QEMU 7.2 damages images where one session discards and then compresses."""
    if draw.random() < 0.5:
        return []
    chosen = draw.sample(range(-(-size // cluster)), min(6, -(-size // cluster)))
    return [f"write -c -P {draw.randrange(1, 255)} {n * cluster} {min(cluster, size - n * cluster)}" for n in chosen]


def _writes(draw: random.Random, size: int, cluster: int) -> list[str]:
    commands = []
    for _ in range(draw.randrange(9)):
        grain = draw.choice([512, 4096, cluster])
        start = draw.randrange(size) // grain * grain
        length = min(size - start, draw.choice([512, 5120, 65536, 3 * 65536 + 512, MiB]))
        verb = draw.choice(["write -P", "write -P", "write -P", "write -z", "write -z -u", "discard"])
        pattern = f" {draw.randrange(256)}" if verb == "write -P" else ""
        commands.append(f"{verb}{pattern} {start} {length}")
    return commands


def local(directory: Path) -> Repository:
    """A repository in a directory, opened; its key costs nothing to derive (see synthetic)."""
    return repository(LocalStore(directory, make=True), block_size=256 * 1024)


def shipment(
    image: Path, into: Repository, disk: str, *, on_event: OnEvent = ignore, **options: Any
) -> AbstractContextManager[Shipment]:
    """An image opened to be shipped to a repository."""
    return delivery(RepositoryDestination(into), image, disk, on_event=on_event, **options)


def delivery(
    to: Destination, image: Path, disk: str, *, each_layer: bool = False, on_event: OnEvent = ignore, **options: Any
) -> AbstractContextManager[Shipment]:
    """An image opened to be shipped."""
    files = Files.EACH if each_layer else Files.COMPOSED
    request = ShipRequest(image=image, disk=disk, files=files, each_point=each_layer, **options)
    return opened(request, to, on_event=on_event)


def ship(
    image: Path,
    into: Repository,
    *,
    disk: str = DISK,
    labels: Sequence[str] = (),
    each_layer: bool = False,
    store: ObjectStore | None = None,
) -> ShipReport:
    """Ship by a repository opened afresh."""
    with shipment(image, again(into, store), disk, labels=labels, each_layer=each_layer) as work:
        return work.run()


def restore(
    source: Repository,
    output: Path,
    point: object = None,
    *,
    disk: str = DISK,
    chain: bool = False,
    force: bool = False,
) -> RestoreReport:
    """Restore by a repository opened afresh."""
    named = None if point is None else str(point)
    return Restoration(
        RepositoryDestination(again(source)), disk, output, point=named, whole_chain=chain, force=force
    ).run()


def same_bytes(one: Path, other: Path) -> bool:
    """cmp(1): sizes too."""
    return subprocess.run(["cmp", "-s", one, other], check=False).returncode == 0
