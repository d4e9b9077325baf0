"""The life of one disk, made by stock QEMU tools: everything that a destination must bring back, in seven moments.

    root        raw, and of a size that is no multiple of 64 KiB
    hides       zero clusters over data
    grown       larger, with clusters of 4 KiB
    packed      compressed clusters, some of them equal to the clusters below
    shrunk      shorter, ending inside a cluster: what lies behind is gone
    grown again what was cut off reads zero
    empty       an overlay that holds nothing

What each moment shows is in a raw file, by qemu-img.  The bytes are the same each time, so their content ids are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from snapchain.host.processes import run
from snapchain.testing import qemu_img
from snapchain.testing.qemu_img import BackingLink, Qcow2Options

KiB, MiB = 1 << 10, 1 << 20
PLAIN = Qcow2Options()


@dataclass(frozen=True, slots=True)
class Step:
    """A file: its size, what the guest does to it (qemu-io), how it is made: options of qcow2, or raw."""

    name: str
    size: int
    guest: Sequence[str] = ()
    options: Qcow2Options | None = PLAIN


STEPS: Sequence[Step] = (
    Step("root", 1536 * KiB + 512, ("write -P 17 0 200k", "write -P 18 1536k 512", "write -P 19 700k 300k"), None),
    Step("hides", 1536 * KiB + 512, ("write -P 33 100k 300k", "write -z 0 64k", "write -z 704k 128k")),
    Step("grown", 3 * MiB, ("write -P 44 2500k 130k", "write -P 45 1k 3k"), Qcow2Options(cluster_size=4096)),
    Step(
        "packed",
        3 * MiB,
        ("write -c -P 55 64k 64k", "write -c -P 56 2048k 64k", "write -P 33 192k 64k"),
        Qcow2Options(compression_type="zstd"),
    ),
    Step("shrunk", MiB + 1024, ("write -P 66 1000k 20k",)),
    Step("grown again", 2 * MiB, ("write -P 77 1990k 4k",), Qcow2Options(cluster_size=65536, extended_l2=True)),
    Step("empty", 2 * MiB),
)

CONTENT_IDS: Sequence[str] = (
    "1619ed0876b451b4ef33f4ce7b4dc4877d58235e96bcaa455dea51e7658a3511",
    "584cc48718432605c481bdbd0de992fe402ced79b123f43c29805b92ad66fc8b",
    "0ac8665ad6adc88aaf4fa8ce9e9560bcb091557c2f2f2fb3f403fcc57a904da8",
    "733c5fb0a7475d4a3ef27bef4c5a6821004fb48be264e67d4e5406d1b7190999",
    "ed1fd1dacc5bd49ff6099f155551ce4e5cb52311fa4d9210d1c2f94c378a34ea",
    "d161ffa3b10a8250ebaf84dba5abde1c5aa863e4639d08e243614fa768c1e31b",
    "d161ffa3b10a8250ebaf84dba5abde1c5aa863e4639d08e243614fa768c1e31b",
)
"""Of each moment, in every kind of destination and every version of snapchain."""


@dataclass(frozen=True, slots=True)
class Moment:
    """image: the top of the chain; shown: a raw file with what it shows; size: virtual, bytes."""

    name: str
    image: Path
    format: qemu_img.Format
    shown: Path
    size: int
    content_id: str


def build_history(directory: Path) -> list[Moment]:
    """The moments, oldest first; each image lies on the one before."""
    made: list[Moment] = []
    for number, (step, known) in enumerate(zip(STEPS, CONTENT_IDS, strict=True)):
        kind: qemu_img.Format = "raw" if step.options is None else "qcow2"
        path = directory / f"{number}-{step.name.replace(' ', '-')}.{kind}"
        overlay(path, made[-1].image if made else None, step)
        shown = flat(path, directory / f"{number}.shown", kind)
        made.append(Moment(step.name, path, kind, shown, step.size, known))
    return made


def overlay(path: Path, below: Path | None, step: Step) -> Path:
    """One file, on another where there is one. The suffix of `below` tells its format."""
    kind: qemu_img.Format = "raw" if step.options is None else "qcow2"
    if step.options is None:
        qemu_img.create_raw(path, step.size)
    else:
        link = None if below is None else BackingLink(below.name, "raw" if below.suffix == ".raw" else "qcow2")
        qemu_img.create(path, step.size, options=step.options, backing=link)
    if step.guest:
        guest(path, *step.guest, image_format=kind)
    return path


def guest(path: Path, *commands: str, image_format: qemu_img.Format = "qcow2") -> None:
    """Guest writes, by qemu-io; nothing is flushed: no test here loses power."""
    given = [part for command in commands for part in ("-c", command)]
    run(["qemu-io", "-t", "unsafe", "-d", "unmap", "-f", image_format, *given, str(path)])


def flat(path: Path, target: Path, image_format: qemu_img.Format = "qcow2") -> Path:
    """What a chain shows, in a raw file."""
    qemu_img.convert(path, target, formats=(image_format, "raw"))
    return target


def identical(path: Path, reference: Path) -> bool:
    """Whether qemu-img finds a file the same as a raw one, size included. The suffix of `path` tells its format."""
    kind: qemu_img.Format = "raw" if path.suffix == ".raw" else "qcow2"
    return qemu_img.compare(path, reference, formats=(kind, "raw")) is None
