"""From a path to the chain of files that QEMU would show under it, or a refusal that names the file and the reason.

Formats are never probed: the top's is said by the caller or by its suffix, a backing file's is recorded in its
overlay.  Contents that contradict it are refused, so a raw disk in which a guest has written a qcow2 header never
becomes a qcow2 image.  Backing names are judged by `backing`, files opened by `opening`, loops told by inode.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from snapchain.errors import Corrupt, InvalidInput, NotFound, Unsupported
from snapchain.host.terminal import shell_word
from snapchain.image.backing import Allowed, Place
from snapchain.image.chain import ImageChain
from snapchain.image.file import Format, ImageFile
from snapchain.image.opening import open_image, writers_to
from snapchain.image.physical import RunBudget
from snapchain.image.qcow2.header import Backing, is_qcow2

MAX_DEPTH = 200
_TRIES, _PAUSE = 10, 0.02
"""For the tables of an image that a guest writes to."""
_QCOW2_SUFFIXES = {".qcow2", ".qcow"}


def scan(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    image_dirs: Sequence[Path] = (),
    is_written: bool = False,
) -> ImageChain:
    """Open an image and everything below it.

    format: "qcow2" or "raw"; by the suffix when not given. image_dirs: where backing files may lie besides the
    directory of `path` and below it.
    is_written: a guest may write to the image meanwhile, whose own map is then as good as none: for what lies below

    Raises NotFound, InvalidInput (wrong request), Corrupt (broken or hostile), Unsupported (valid, refused), Busy.
    """
    if "\0" in os.fspath(path):
        raise InvalidInput("a path cannot hold a NUL byte", subject=repr(path))
    top = Place.of(path)
    if format not in (None, "qcow2", "raw"):
        raise InvalidInput(f"format {format!r}; known are qcow2 and raw", subject=top.path)
    for _ in range(_TRIES if is_written else 0):
        with suppress(Corrupt):  # its tables were caught halfway
            return _opened(top, format, image_dirs, is_written=True)
        time.sleep(_PAUSE)
    return _opened(top, format, image_dirs, is_written=is_written)


def _opened(top: Place, format: str | None, image_dirs: Sequence[Path], *, is_written: bool) -> ImageChain:
    allowed = Allowed(top, image_dirs)
    budget = RunBudget()
    files: list[ImageFile] = []
    try:
        fd = open_image(top.real, subject=top.path, named_by=top.named_by)
        files.append(ImageFile(top, fd, format=_top_format(fd, top, format), budget=budget, is_written=is_written))
        while backing := files[-1].backing:
            files.append(_open_backing(backing, files, allowed, budget))
    except BaseException:
        ImageChain(files).close()
        raise
    return ImageChain(files[::-1])


def _top_format(fd: int, top: Place, asked: str | None) -> Format:
    if asked is not None:
        return "qcow2" if asked == "qcow2" else "raw"
    try:
        return _told_format(fd, top)
    except BaseException:
        os.close(fd)
        raise


def _told_format(fd: int, top: Place) -> Format:
    """By the suffix; contents that contradict it are refused."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode) and top.path.suffix.lower() in _QCOW2_SUFFIXES:
        return "qcow2"
    if is_qcow2(fd, subject=top.path):
        raise InvalidInput(
            "the name does not say qcow2, but the contents begin like qcow2",
            subject=top.path,
            hint="say which it is: --format qcow2 or --format raw (a guest can write any header into a raw disk)",
        )
    return "raw"


def _open_backing(backing: Backing, above: Sequence[ImageFile], allowed: Allowed, budget: RunBudget) -> ImageFile:
    overlay = above[-1].path
    if len(above) >= MAX_DEPTH:
        raise Unsupported(f"the backing chain is more than {MAX_DEPTH} files deep", subject=above[0].path)
    place = allowed.place(backing, overlay=overlay)
    recorded = _recorded_format(backing, overlay)
    try:
        named_by = (*place.named_by, *writers_to(above[-1].fileno(), above[-1].real_path))
        fd = open_image(place.real, subject=place.path, refusal=Unsupported, named_by=named_by)
    except NotFound as error:
        raise NotFound("the backing file is missing", subject=place.path, hint=f"{overlay} is based on it") from error
    try:
        _check_backing(fd, place, recorded, above)
    except BaseException:
        os.close(fd)
        raise
    return ImageFile(place, fd, format=recorded, budget=budget)


def _check_backing(fd: int, place: Place, recorded: Format, above: Sequence[ImageFile]) -> None:
    overlay, status = above[-1].path, os.fstat(fd)
    if (status.st_dev, status.st_ino) in {file.device for file in above}:
        raise Corrupt(f"the backing chain loops: {place.path} is part of it already", subject=overlay)
    if recorded == "raw" and is_qcow2(fd, subject=place.path):
        raise Unsupported(
            f"{overlay} records it as raw, but its contents begin like qcow2",
            subject=place.path,
            hint=f"`qemu-img rebase -u -b {shell_word(place.path)} -F qcow2 {shell_word(overlay)}` if it is qcow2",
        )


def _recorded_format(backing: Backing, overlay: Path) -> Format:
    if backing.format == "qcow2":
        return "qcow2"
    if backing.format == "raw":
        return "raw"
    if backing.format is None:
        raise Unsupported(
            "the format of its backing file is not recorded, and snapchain does not guess formats",
            subject=overlay,
            hint=f"`qemu-img rebase -u -b {shell_word(backing.name)} -F FORMAT {shell_word(overlay)}` records it",
        )
    raise Unsupported(f"its backing file has the format {backing.format!r}", subject=overlay)
