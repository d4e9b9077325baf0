"""snapshot (offline): seal the top of a chain and put a fresh overlay in its place, under the same path.

    disk.qcow2            ->  disk.1.qcow2     the old file, sealed, under a new name
                              disk.qcow2       an empty overlay on it; no VM definition changes

The order makes the path a valid image with the same content at every instant, also for a crash: the overlay
is finished under a temporary name, the old file gets its second name, and one rename replaces the first.
What a crash leaves behind (a temporary file, or a second name of the unchanged image) the next run uses or
removes.  The image is locked meanwhile as QEMU locks one that it writes, so no guest can start on it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host import files
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.temporary_names import SNAPSHOT, temporary_beside
from snapchain.image import ImageChain, ImageFile, qemu_img, scan
from snapchain.image.backing import check_no_layer
from snapchain.image.dependents import describe
from snapchain.image.qemu_img import BackingLink, Qcow2Options
from snapchain.ops.dependents import Dependents, Kind, find_dependents, is_linked_elsewhere
from snapchain.ops.events import Notice, OnEvent, ignore
from snapchain.ops.lineage import seal
from snapchain.ops.ownership import check_not_given
from snapchain.ops.ship import check_label

_SECTOR = 512


class SnapshotPlan(BaseModel):
    """What `run` will do. Sizes in bytes.

    image: as named; source: the file behind it; sealed: what it will be called (its own path with --overlay);
    overlay: where the new overlay comes; backing: the link that the overlay records; layers: of the new chain;
    labels: that the sealed file will bear as a point of its disk
    incomplete: what the search for other users of the image could not look at, a sentence
    """

    model_config = ConfigDict(frozen=True)

    image: Path
    source: Path
    sealed: Path
    overlay: Path
    backing: str
    sealed_format: qemu_img.Format
    virtual_size: int
    cluster_size: int | None
    extended_l2: bool
    layers: int
    bitmaps: tuple[str, ...]
    labels: tuple[str, ...]
    image_format: str | None
    image_dirs: tuple[Path, ...]
    incomplete: str | None = None


class SnapshotReport(BaseModel):
    """What `run` did: which file is which now. Sizes in bytes; layers: of the new chain; incomplete: as planned."""

    model_config = ConfigDict(frozen=True)

    image: Path
    sealed: Path
    overlay: Path
    virtual_size: int
    cluster_size: int
    layers: int
    incomplete: str | None = None


def plan(
    image: Path,
    *,
    sealed_name: str | None = None,
    overlay: Path | None = None,
    labels: Sequence[str] = (),
    image_format: str | None = None,
    image_dirs: Sequence[Path] = (),
) -> SnapshotPlan:
    """Look at the image and decide; changes nothing.

    sealed_name: what the old file is to be called, in its directory, instead of NAME.<n>.SUFFIX;
    overlay: leave the image where it is, sealed, and make the overlay there (what a raw image needs);
    labels: for `merge --keep-label`, noted beside the sealed file.

    Raises Unsupported for block devices, for raw images without `overlay`, and for images with further hard links;
    Conflict for a disk that was given to another host, and for an image that would be replaced although others depend
    on it; what `scan` raises for images that are broken or refused.
    """
    for label in labels:
        check_label(label)
    with os_errors(image):
        source = image.resolve(strict=True)
        status = source.stat()
    _check_kind(source, status)
    check_no_layer(source)
    with scan(image, format=image_format, image_dirs=image_dirs) as chain:
        check_not_given(chain)
        top = chain.files[-1]
        if overlay is not None:
            sealed = source
            target = _beside(overlay, source)
            is_linked = False
            incomplete = None
        else:
            _check_can_stay(source, top)
            own = [file.device for file in chain.files]
            others = find_dependents([top.path], top=top.path, own=own, image_dirs=image_dirs)
            _check_alone(top, others)
            is_linked = is_linked_elsewhere(top.path, others)
            incomplete = others.incomplete
            sealed = _sealed_path(source, status, sealed_name)
            target = source
        backing = _recorded(sealed, target, is_linked=is_linked)
        _check_names(source, target, backing)
        header = top.header
        return SnapshotPlan(
            image=image,
            source=source,
            sealed=sealed,
            overlay=target,
            backing=backing,
            sealed_format=top.format,
            virtual_size=-(-chain.size // _SECTOR) * _SECTOR,
            cluster_size=top.cluster_size if header else None,
            extended_l2=bool(header and header.extended_l2),
            layers=len(chain.files) + 1,
            bitmaps=tuple(bitmap.name for bitmap in header.bitmaps) if header else (),
            labels=tuple(labels),
            image_format=image_format,
            image_dirs=tuple(image_dirs),
            incomplete=incomplete,
        )


def run(planned: SnapshotPlan, *, on_event: OnEvent = ignore) -> SnapshotReport:
    """Do it. Raises Busy when somebody has the image open, Conflict when it is no longer as planned."""
    with ImageLock(planned.source, LockMode.WRITE) as lock:
        if not lock.enforced:
            on_event(Notice.no_locks(planned.source.parent))
        _check_unchanged(planned)
        # Of runs that were killed: nobody else is at work here, we hold the lock.
        files.remove_temporaries(planned.overlay, purpose=SNAPSHOT)
        temporary = temporary_beside(planned.overlay, purpose=SNAPSHOT)
        second_name, done = False, False
        try:
            _make_overlay(planned, temporary, lock.fd, on_event)
            if planned.overlay == planned.source:
                second_name = _give_second_name(planned.source, planned.sealed)
            cluster_size = _check_overlay(planned, temporary)
            _note(planned, on_event)
            if planned.overlay == planned.source:
                files.rename(temporary, planned.overlay)
            else:
                files.link(temporary, planned.overlay)
            done = True
        finally:
            if second_name and not done:
                _take_second_name(planned.source, planned.sealed)
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    if planned.incomplete is not None:
        on_event(Notice(planned.incomplete))
    if planned.bitmaps:
        names = ", ".join(planned.bitmaps)
        on_event(Notice(f"persistent bitmaps stay in the sealed file {planned.sealed.name}: {names}"))
    return SnapshotReport(
        image=planned.image,
        sealed=planned.sealed,
        overlay=planned.overlay,
        virtual_size=planned.virtual_size,
        cluster_size=cluster_size,
        layers=planned.layers,
        incomplete=planned.incomplete,
    )


def _note(planned: SnapshotPlan, on_event: OnEvent) -> None:
    """Note when it was sealed, which its mtime need not tell; worth a failure only where labels were asked for."""
    try:
        seal(planned.sealed, labels=planned.labels, time=datetime.now(UTC))
    except SnapchainError as error:
        if planned.labels:
            raise
        on_event(Notice(f"the time of the snapshot is not noted: {error}"))


def _check_kind(source: Path, status: os.stat_result) -> None:
    if stat.S_ISBLK(status.st_mode):
        raise Unsupported(
            "a block device cannot be given another name with a file put in its place",
            subject=source,
            hint="make an overlay file on it with `qemu-img create -b DEVICE -F FORMAT`, and let the guest use that",
        )
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInput("neither a regular file nor a block device", subject=source)


def _check_can_stay(source: Path, top: ImageFile) -> None:
    if top.format != "qcow2":
        raise Unsupported(
            "a raw image cannot be replaced by an overlay under its path: whoever opens that as raw would see a header",
            subject=source,
            hint="say --overlay NEW.qcow2, and let the guest use that file as qcow2",
        )


def _check_alone(top: ImageFile, others: Dependents) -> None:
    """Raises Conflict for an image that others depend on: an overlay under its name would change with the guest."""
    users = others.on(top.path, Kind.CONTENT)
    if users:
        raise Conflict(
            f"it cannot be replaced by an overlay: {describe(users)}",
            subject=top.path,
            hint="say --overlay NEW.qcow2, and let the guest use that file; this one then stays as it is",
        )


def _beside(overlay: Path, source: Path) -> Path:
    target = source.parent / overlay if overlay.parent == Path() else overlay.absolute()
    if os.path.lexists(target):
        raise Conflict("it exists already", subject=target)
    if not target.parent.is_dir():
        raise NotFound("no such directory", subject=target.parent)
    return target


def _sealed_path(source: Path, status: os.stat_result, own_name: str | None) -> Path:
    """The name for the sealed file; one that a crashed run has given it already is taken up again."""
    twins = [
        entry
        for entry in sorted(source.parent.iterdir())
        if entry != source and not entry.is_symlink() and _same_inode(entry, status)
    ]
    numbered = re.compile(re.escape(source.stem) + r"\.(\d+)" + re.escape(source.suffix))
    ours = [entry for entry in twins if entry.name == own_name or numbered.fullmatch(entry.name)]
    if status.st_nlink != 1 + len(ours):
        raise Unsupported(
            "it has further hard links, which would stay with the sealed file",
            subject=source,
            hint="remove the other names (`find -samefile`), or copy it",
        )
    if own_name is not None:
        if own_name in ("", ".", "..", source.name) or "/" in own_name:
            raise InvalidInput(
                "the sealed file's name must be another one in the same directory", subject=repr(own_name)
            )
        if not own_name.isprintable() and not numbered.fullmatch(own_name):
            raise InvalidInput("the sealed file's name holds control characters", subject=repr(own_name))
        wanted = source.with_name(own_name)
        if wanted not in ours and os.path.lexists(wanted):
            raise Conflict("it exists already", subject=wanted)
        return wanted
    if ours:
        return ours[-1]
    taken = [int(found[1]) for entry in source.parent.iterdir() if (found := numbered.fullmatch(entry.name))]
    return source.with_name(f"{source.stem}.{max(taken, default=0) + 1}{source.suffix}")


def _same_inode(entry: Path, status: os.stat_result) -> bool:
    try:
        found = entry.lstat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (status.st_dev, status.st_ino)


def _recorded(sealed: Path, overlay: Path, *, is_linked: bool) -> str:
    """The backing name to record: relative where that holds from every path by which the overlay is opened.

    QEMU resolves a relative name from the directory of the path that it was given, symbolic link or not.
    """
    return str(sealed) if is_linked or sealed.parent != overlay.parent else sealed.name


def _check_names(image: Path, overlay: Path, backing: str) -> None:
    """Refuse control characters in a name that the overlay records: snapchain would not follow it afterwards.

    The overlay's own name goes to qemu-img, whose messages are read line by line.
    """
    if any(character < " " or character == "\x7f" for character in backing) or "\n" in str(overlay):
        raise Unsupported(
            "a name with control characters cannot be part of a chain",
            subject=image,
            hint="rename the file or its directory, and what names it: the guest's definition",
        )


def _check_unchanged(planned: SnapshotPlan) -> None:
    """Under the lock, everything must be as it was planned."""
    in_place = planned.overlay == planned.source
    now = plan(
        planned.image,
        sealed_name=planned.sealed.name if in_place else None,
        overlay=None if in_place else planned.overlay,
        labels=planned.labels,
        image_format=planned.image_format,
        image_dirs=planned.image_dirs,
    )
    # How far the search came may be otherwise now.
    if now.model_copy(update={"incomplete": planned.incomplete}) != planned:
        raise Conflict("it was changed after the snapshot was planned", subject=planned.image, hint="run it again")


def _make_overlay(planned: SnapshotPlan, temporary: Path, standing: int, on_event: OnEvent) -> None:
    fd = files.open_new(temporary)
    try:
        options = Qcow2Options(cluster_size=planned.cluster_size, extended_l2=planned.extended_l2 or None)
        link = BackingLink(planned.backing, planned.sealed_format)
        qemu_img.create(temporary, planned.virtual_size, options=options, backing=link)
        if lost := files.copy_standing(standing, fd, subject=planned.source):
            on_event(Notice.of(planned.image, lost))
        with os_errors(planned.source):
            os.fsync(fd)
    finally:
        os.close(fd)


def _give_second_name(source: Path, sealed: Path) -> bool:
    """Whether it was given just now."""
    if os.path.lexists(sealed):
        return False  # by a run that was killed right after this step; `plan` has seen that it is the same file
    try:
        files.link(source, sealed)
    except InvalidInput as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.EPERM, errno.ENOTSUP):
            raise Unsupported(
                "its filesystem has no hard links (or you do not own the file), so it cannot be renamed safely",
                subject=source,
                hint="say --overlay NEW.qcow2, and let the guest use that file",
            ) from error
        raise
    return True


def _take_second_name(source: Path, sealed: Path) -> None:
    """After a failure: remove the second name, if the image is still the same file."""
    with suppress(OSError):
        if _same_inode(source, sealed.lstat()):
            sealed.unlink()


def _check_overlay(planned: SnapshotPlan, temporary: Path) -> int:
    """Read the overlay back with our own parser: it must be the old view, and nothing else. Its cluster size."""
    with scan(temporary, format="qcow2", image_dirs=(*planned.image_dirs, planned.sealed.parent)) as chain:
        below = chain.files[-2] if len(chain.files) > 1 else None
        if below is None or not _same_inode(planned.source, below.path.stat()) or not _is_empty(chain):
            raise Conflict("the new overlay does not have the sealed file as its backing file", subject=planned.source)
        return chain.top.cluster_size


def _is_empty(chain: ImageChain) -> bool:
    top = chain.files[-1]
    return not top.extents.data_bytes and not top.extents.zero_bytes
