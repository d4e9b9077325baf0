"""Small chains made by stock QEMU tools, and what they read."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

MiB = 1 << 20


def qemu_img(*arguments: str | Path) -> str:
    return subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def write(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    """Guest writes; nothing is flushed, no test here loses power."""
    given = [part for command in commands for part in ("-c", command)]
    argv = ["qemu-io", "-t", "unsafe", "-d", "unmap", "-f", image_format, *given, str(path)]
    subprocess.run(argv, check=True, capture_output=True)


@dataclass(frozen=True)
class Layer:
    """One file: its size, the guest writes it takes, its `-o` options; `compress` makes what it holds compressed."""

    size: int = 4 * MiB
    writes: Sequence[str] = ()
    options: str = ""
    image_format: str = "qcow2"
    compress: bool = field(default=False)


def build(directory: Path, layers: Sequence[Layer], *, names: Sequence[str] | None = None) -> list[Path]:
    """Make a chain, root first; file n is `<n>.qcow2` and the top `disk.qcow2` unless named."""
    directory.mkdir(exist_ok=True)
    count = len(layers)
    chosen = names or [*(f"{n}.{layer.image_format}" for n, layer in enumerate(layers[:-1])), "disk.qcow2"]
    paths = [directory / name for name in chosen[:count]]
    for number, (path, layer) in enumerate(zip(paths, layers, strict=True)):
        link = ["-b", paths[number - 1].name, "-F", layers[number - 1].image_format] if number else []
        options = ["-o", layer.options] if layer.options else []
        qemu_img("create", "-q", "-f", layer.image_format, *link, *options, path, str(layer.size))
        if layer.writes:
            write(path, *layer.writes, image_format=layer.image_format)
        if layer.compress:
            flat = path.with_name("compressed")
            # Without -B every guest byte is copied; with it only this layer's own clusters, which is what is wanted.
            base = ["-B", paths[number - 1].name, "-F", layers[number - 1].image_format] if number else []
            qemu_img("convert", "-c", "-f", "qcow2", "-O", "qcow2", *base, *options, path, flat)
            flat.replace(path)
    return paths


def flat(path: Path, target: Path, image_format: str = "qcow2") -> Path:
    """What the chain reads, in a raw file; without qemu-img's fsync."""
    qemu_img("convert", "-f", image_format, "-O", "raw", path, target)
    return target


def same(path: Path, reference: Path, *, image_format: str = "qcow2") -> bool:
    """qemu-img compare, size included."""
    argv = ["qemu-img", "compare", "-f", image_format, "-F", "raw", str(path), str(reference)]
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode == 0 and "mismatch" not in done.stdout + done.stderr


def clean(path: Path) -> bool:
    """qemu-img check has nothing to say, leaks included."""
    return (
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=False, capture_output=True).returncode
        == 0
    )


def standing(path: Path) -> tuple[int, ...]:
    """All that stat tells of a file, but for when it was read."""
    found = path.stat()
    return (
        found.st_ino, found.st_mode, found.st_nlink, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns,
        found.st_ctime_ns,
    )  # fmt: skip


def names(directory: Path) -> list[str]:
    """Without the notes of layers, which are no images (source/notes.py)."""
    return sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith(".snapchain-layer-"))
