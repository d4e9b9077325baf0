"""What QEMU says of the same files: the judge of every map and every byte."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt

from snapchain.image import ImageChain
from snapchain.image.file import ImageFile
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents, pairwise


def qemu(*argv: str | Path) -> bytes:
    return subprocess.run([str(word) for word in argv], check=True, capture_output=True).stdout


def their_map(path: Path, image_format: str) -> Extents:
    """`qemu-img map` of one layer alone."""
    if image_format == "raw":
        said = qemu("qemu-img", "map", "--output=json", "-f", "raw", path)
    else:
        alone = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, "backing": None}
        said = qemu("qemu-img", "map", "--output=json", f"json:{json.dumps(alone)}")
    entries = [entry for entry in json.loads(said) if entry["length"]]
    return Extents.from_runs(
        sum(entry["length"] for entry in entries),
        [(entry["start"], entry["length"], _kind(entry)) for entry in entries],
    )


def _kind(entry: dict[str, bool]) -> int:
    if entry["data"]:
        return DATA
    return ZERO if entry["present"] and entry["zero"] else ABSENT


def their_bytes(path: Path, image_format: str, scratch: Path) -> npt.NDArray[np.uint8]:
    """What `qemu-img convert` reads through the whole chain."""
    flat = scratch / "flat.raw"
    qemu("qemu-img", "convert", "-f", image_format, "-O", "raw", path, flat)
    return np.fromfile(flat, np.uint8)


def our_bytes(chain: ImageChain, step: int = 70001) -> npt.NDArray[np.uint8]:
    """What the chain reads, in pieces that keep to no boundary."""
    data = np.full(chain.size, 0xEE, np.uint8)
    view = data.data
    for offset in range(0, chain.size, step):
        chain.read_into(offset, view[offset : offset + step])
    return data


def assert_only_holes_differ(file: ImageFile) -> None:
    """What a file shows is what its tables say, but for DATA that is a hole of the file and ZERO."""
    at, shown, told = pairwise(file.extents, file.physical.extents())
    assert all((one, other) in {(ZERO, DATA), (other, other)} for one, other in zip(shown, told, strict=True))
    assert (at[shown != told] % file.grain == 0).all()


def assert_as_qemu(chain: ImageChain, scratch: Path) -> None:
    """Each layer's map, the composed size and every byte."""
    for file in chain.files:
        theirs = their_map(file.real_path, file.format)
        assert list(file.physical.extents().runs()) == list(theirs.runs()), file.path.name
        assert_only_holes_differ(file)
        file.extents.from_starts(file.extents.size, file.extents.at, file.extents.val)
        assert file.extents.size == theirs.size
    theirs_read = their_bytes(chain.top.path, chain.top.format, scratch)
    assert len(theirs_read) == chain.size
    assert np.array_equal(our_bytes(chain), theirs_read)
