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
from snapchain.host.directory import Directory, same_file
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import os_errors
from snapchain.host.path_resolution import place_to_change
from snapchain.host.temporary_names import SNAPSHOT, temporary_beside
from snapchain.image import ImageFile, scan
from snapchain.image.backing import Allowed, Place
from snapchain.image.dependent_search import Dependents, Kind, find_dependents, is_linked_elsewhere
from snapchain.image.dependents import describe
from snapchain.image.file import Format
from snapchain.image.physical import RunBudget
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.write import write_overlay
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.model.points import check_label
from snapchain.source.lineage import seal
from snapchain.source.ownership import check_no_layer, check_not_given

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
    sealed_format: Format
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
    source = place_to_change(image, strict=True)
    with files.directory_of(source) as home:
        status = home.status(source.name)
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
    with ImageLock(planned.source, LockMode.WRITE) as lock, files.directory_of(planned.overlay) as place:
        if not lock.enforced:
            on_event(Notice.no_locks(planned.source.parent))
        _check_unchanged(planned)
        # Of runs that were killed: nobody else is at work here, we hold the lock.
        for name in files.temporary_names(place, planned.overlay.name, purpose=SNAPSHOT):
            place.remove(name)
        cluster_size = _replace(planned, lock, place, on_event)
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


def _replace(planned: SnapshotPlan, lock: ImageLock, place: Directory, on_event: OnEvent) -> int:
    """Make the overlay and give it its name. Its cluster size."""
    in_place = planned.overlay == planned.source
    temporary = temporary_beside(planned.overlay, purpose=SNAPSHOT)
    second_name, done = False, False
    fd = place.create(temporary.name)
    made = os.fstat(fd)
    try:
        _make_overlay(planned, fd, lock.fd, place, on_event)
        if in_place:
            second_name = _give_second_name(planned, lock, place)
        cluster_size = _check_overlay(planned, temporary, fd, lock)
        _note(planned, on_event)
        replacing = os.fstat(lock.fd) if in_place else None
        place.give_name(fd, temporary.name, planned.overlay.name, replacing=replacing)
        done = True
    finally:
        os.close(fd)
        with suppress(OSError):
            if second_name and not done and lock.same_file(planned.source):
                place.remove(planned.sealed.name, only=os.fstat(lock.fd))
        with suppress(OSError):
            place.remove(temporary.name, only=made)
    return cluster_size


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
    try:
        with files.directory_of(target) as place:
            if not place.has(target.name):
                return target
    except NotFound as error:
        raise NotFound("no such directory", subject=target.parent) from error
    raise Conflict("it exists already", subject=target)


def _sealed_path(source: Path, status: os.stat_result, own_name: str | None) -> Path:
    """The name for the sealed file; one that a crashed run has given it already is taken up again."""
    with files.directory_of(source) as home:
        names = home.names()
        twins = [name for name in names if name != source.name and _is(home, name, status)]
        if not _is(home, source.name, status) or home.status(source.name).st_nlink != status.st_nlink:
            raise Conflict("another program gives it a name, or takes one away", subject=source, hint="run it again")
    numbered = re.compile(re.escape(source.stem) + r"\.(\d+)" + re.escape(source.suffix))
    ours = [name for name in twins if name == own_name or numbered.fullmatch(name)]
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
        if own_name not in ours and own_name in names:
            raise Conflict("it exists already", subject=source.with_name(own_name))
        return source.with_name(own_name)
    if ours:
        return source.with_name(ours[-1])
    taken = [int(found[1]) for name in names if (found := numbered.fullmatch(name))]
    return source.with_name(f"{source.stem}.{max(taken, default=0) + 1}{source.suffix}")


def _is(home: Directory, name: str, status: os.stat_result) -> bool:
    """Whether a name, which may be gone meanwhile, is of this file."""
    try:
        return same_file(home.status(name), status)
    except FileNotFoundError:
        return False


def _recorded(sealed: Path, overlay: Path, *, is_linked: bool) -> str:
    """The backing name to record: relative where that holds from every path by which the overlay is opened.

    QEMU resolves a relative name from the directory of the path that it was given, symbolic link or not.
    """
    return str(sealed) if is_linked or sealed.parent != overlay.parent else sealed.name


def _check_names(image: Path, overlay: Path, backing: str) -> None:
    """Refuse control characters in a name that the overlay records: snapchain would not follow it afterwards.

    The overlay's own name is printed, line by line.
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


def _make_overlay(planned: SnapshotPlan, fd: int, replaced: int, place: Directory, on_event: OnEvent) -> None:
    write_overlay(
        fd,
        planned.virtual_size,
        Backing(planned.backing, planned.sealed_format),
        cluster_size=planned.cluster_size,
        extended_l2=planned.extended_l2,
        subject=planned.overlay.parent,
    )
    if lost := files.copy_standing(replaced, fd, subject=planned.source, directory=place):
        on_event(Notice.of(planned.image, lost))
    with os_errors(planned.overlay.parent):
        os.fsync(fd)


def _give_second_name(planned: SnapshotPlan, lock: ImageLock, place: Directory) -> bool:
    """Whether it was given just now."""
    name, locked = planned.sealed.name, os.fstat(lock.fd)
    if not place.has(name):
        try:
            place.link(planned.source.name, name)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP):
                raise
            raise Unsupported(
                "its filesystem has no hard links (or you do not own the file), so it cannot be renamed safely",
                subject=planned.source,
                hint="say --overlay NEW.qcow2, and let the guest use that file",
            ) from error
        place.sync()
        if same_file(place.status(name), locked):
            return True
    # By a run that was killed right after this step; `plan` has seen that it is the same file.
    if not same_file(place.status(name), locked):
        raise Conflict("another file took its name", subject=planned.sealed)
    return False


def _check_overlay(planned: SnapshotPlan, temporary: Path, fd: int, lock: ImageLock) -> int:
    """Read the overlay back with our own parser: it must be the old view, and nothing else. Its cluster size."""
    whole = Place.of(temporary)
    with ImageFile(whole, os.dup(fd), format="qcow2", budget=RunBudget()) as overlay:
        recorded = overlay.backing
        if recorded is not None and recorded.format == planned.sealed_format and _is_empty(overlay):
            found = Allowed(whole, [*planned.image_dirs, planned.sealed.parent]).place(recorded, overlay=whole.path)
            if lock.same_file(found.real):
                return overlay.cluster_size
    raise Conflict("the new overlay does not have the sealed file as its backing file", subject=planned.source)


def _is_empty(image: ImageFile) -> bool:
    return not image.extents.data_bytes and not image.extents.zero_bytes
