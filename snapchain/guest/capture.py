"""The other way to capture a running guest: no overlay, but a frozen view of each disk, read over NBD.

    with capture_of(guest, request) as capture:
        for disk in capture.disks:
            disk.view                       what the guest's disk showed at that instant
            disk.changed_since(content_id)  where it was written to since it showed that content
        capture.name_bitmaps({...})         before the points are published
        capture.drop_bitmaps(...)           after it

Old data goes to a scratch file before the guest overwrites it.  Whatever becomes of that file or of this process, the
guest goes on: a write that the scratch file cannot take breaks the view, and never the write.

Which bitmap belongs to which content is in its name:

    snapchain-<8 hex: of the destination and the disk's name there>-<64 hex: content id of the point>

Its recording began before that point's instant, so it lists at least what was written since.  A destination whose
newest content has that id can be brought up to date by what the bitmap lists; docs/decisions/0121.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from snapchain.errors import Busy, SnapchainError, Unavailable, Unsupported
from snapchain.guest.nbd_client import ALLOCATION, DIRTY, ZERO, NbdExport
from snapchain.guest.protocol import Guest, State
from snapchain.image.view import View
from snapchain.model.consistency import Consistency
from snapchain.model.events import OnEvent, ignore
from snapchain.model.extents import ABSENT, DATA, Extents, over, rounded
from snapchain.model.fingerprint import Fingerprint

if TYPE_CHECKING:
    from snapchain.guest.qmp_guest import QmpGuest

PREFIX = "snapchain-"
_NAME = re.compile(r"snapchain-([0-9a-f]{8})-([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRequest:
    """disks: names, empty for all that can be protected

    scratch_dir: for the scratch files, None for the directory of each image; scratch_bytes: limit of each of them, None
    for a share of the free space; stall_seconds: after which a write that waits for its scratch file gives it up
    """

    disks: Sequence[str] = ()
    scratch_dir: Path | None = None
    scratch_bytes: int | None = None
    stall_seconds: int = 2


def place_of(destination: str, disk: str) -> str:
    """8 hex digits that stand for a disk at a destination in the names of bitmaps."""
    return hashlib.sha256(f"{destination}::{disk}".encode()).hexdigest()[:8]


def bitmap_name(place: str, content_id: str) -> str:
    """The name of the bitmap that records what is written since a disk showed this content."""
    return f"{PREFIX}{place}-{content_id}"


def parsed_name(name: str) -> tuple[str, str] | None:
    """(place, content id) of a bitmap of ours; None for any other."""
    found = _NAME.fullmatch(name)
    return None if found is None else (found[1], found[2])


CLUSTER = 64 << 10
"""Bytes. No request for data crosses a multiple of it; see guest/capture_filters.py."""


def dirty(export: NbdExport, context: str) -> Extents:
    """DATA where a dirty bitmap says so. Errors as `NbdExport.runs`."""
    at, flags = export.runs(context)
    return Extents.from_starts(export.size, at, np.where(flags & DIRTY != 0, np.int64(DATA), np.int64(ABSENT)))


class CapturedView:
    """A disk at the instant of its capture; implements `image.view.View`.

    written_since: DATA where the guest may have written between the instant and now
    """

    def __init__(self, name: str, export: NbdExport, written_since: Callable[[], Extents]) -> None:
        self._name, self._export, self._written_since = name, export, written_since

    @property
    def size(self) -> int:
        """Bytes."""
        return self._export.size

    def resolve(self) -> Extents:
        """See `View`. Asks for the map when it is first needed. Raises as `read_into`."""
        return self._resolved

    @cached_property
    def _resolved(self) -> Extents:
        with self._judged():
            at, flags = self._export.runs(ALLOCATION)
            # What was discarded since the instant may be shown as zero: so the map comes first.
            written = self._written_since()
        val = np.where(flags & ZERO != 0, np.int64(ABSENT), np.int64(DATA))
        return over(Extents.from_starts(self.size, at, val), rounded(written, CLUSTER))

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """See `View`. Raises Unavailable where the view broke, since old data could not be saved in time."""
        with self._judged():
            self._export.read_into(offset, buffer)

    @contextmanager
    def _judged(self) -> Iterator[None]:
        try:
            yield
        except Unavailable as error:
            raise Unavailable(
                f"the view of its disk {self._name} broke, and the guest went on: {error.message}",
                subject=error.subject,
                hint="run it again; where a scratch file was full or too slow, name another place by --scratch",
            ) from error


class _Unmapped:
    """The same view where all of it may be data: what a bitmap lists is read without a map of the whole disk."""

    def __init__(self, view: CapturedView) -> None:
        self._view, self.size = view, view.size

    def resolve(self) -> Extents:
        """See `View`."""
        return Extents.constant(self.size, DATA)

    def read_into(self, offset: int, buffer: memoryview, /) -> None:
        """See `View`."""
        self._view.read_into(offset, buffer)


@dataclass(frozen=True, slots=True)
class BitmapSet:
    """The bitmaps of ours at one disk, as they were at the instant.

    contexts: content id -> the map in which the export has a copy; faults: content id -> why there is none
    """

    contexts: Mapping[str, str]
    faults: Mapping[str, str]


class CapturedDisk:
    """One disk of a capture.

    name: as `GuestDisk` has it; path: of the active layer, None where it is no local file; size: bytes
    sources: keys of the files of its chain; the active one's matches no file, since it is written to
    """

    def __init__(
        self,
        name: str,
        *,
        path: Path | None,
        image_format: Literal["qcow2", "raw"],
        sources: tuple[Fingerprint, ...],
        export: NbdExport,
        written_since: Callable[[], Extents],
        bitmaps: BitmapSet,
    ) -> None:
        self.name, self.path, self.image_format, self.sources = name, path, image_format, sources
        self._export, self._bitmaps = export, bitmaps
        self.view = CapturedView(name, export, written_since)

    @property
    def size(self) -> int:
        """Virtual size, bytes."""
        return self._export.size

    @property
    def unmapped(self) -> View:
        """The view, to read ranges that are known without its map."""
        return _Unmapped(self.view)

    @property
    def bytes_read(self) -> int:
        """That were read of it so far."""
        return self._export.bytes_read

    def changed_since(self, content_id: str, size: int) -> tuple[Extents | None, str | None]:
        """(DATA where it may have been written to since it showed that content, None); (None, why it is not known).

        size: of the disk then
        """
        context = self._bitmaps.contexts.get(content_id)
        if context is None:
            return None, self._bitmaps.faults.get(content_id, "no dirty bitmap goes back to its newest point")
        if size != self.size:
            return None, "the disk was resized since its newest point"
        try:
            return dirty(self._export, context), None
        except SnapchainError as error:
            return None, f"its dirty bitmap cannot be read: {error}"


class Capture(Protocol):
    """All disks of a guest at one instant. It ends with the `with` block of `capture_of`.

    time: of the instant; consistency: that was reached; why_not, frozen_seconds: as `GuestSnapshot` has them
    """

    @property
    def disks(self) -> Sequence[CapturedDisk]: ...

    @property
    def time(self) -> datetime: ...

    @property
    def consistency(self) -> Consistency: ...

    @property
    def why_not(self) -> str | None: ...

    @property
    def frozen_seconds(self) -> float | None: ...

    def name_bitmaps(self, names: Mapping[str, tuple[str, str]]) -> None:
        """Give the bitmaps that began with this capture their names, all at once: disk -> (place, content id)."""
        ...

    def drop_bitmaps(self, names: Mapping[str, tuple[str, str]]) -> None:
        """Remove the older ones of those places, whose points were replaced by newer ones."""
        ...


class Reached(Protocol):
    """How the filesystems stood at the instant, right after the block: as `quiesce.Quiesced` has it."""

    consistency: Consistency
    why_not: str | None
    frozen_seconds: float | None


@dataclass(slots=True)
class _AsItComes:
    consistency: Consistency = Consistency.CRASH
    why_not: str | None = None
    frozen_seconds: float | None = None


@contextmanager
def as_it_comes() -> Iterator[Reached]:
    """A block that freezes nothing."""
    yield _AsItComes()


Freeze = Callable[[], AbstractContextManager[Reached]]
"""Makes a block in which the filesystems are frozen, where that is wanted and possible (`quiesce.frozen`)."""


@contextmanager
def capture_of(
    guest: Guest, request: CaptureRequest, *, freeze: Freeze = as_it_comes, on_event: OnEvent = ignore
) -> Iterator[Capture]:
    """A block in which the disks of a guest can be read as they were at one instant.

    Raises Unsupported for a guest that offers no such view, NotFound for a disk that it does not have, Busy where
    something else is at work in it or uses its NBD server, Unavailable where its monitor does not answer.
    """
    from snapchain.guest import capture_qmp

    with capture_qmp.capture_of(with_views(guest), request, freeze=freeze, on_event=on_event) as found:
        yield found


def with_views(guest: Guest) -> QmpGuest:
    """The guest, as one that offers frozen views of its disks. Raises Unsupported."""
    from snapchain.guest.qmp_guest import QmpGuest

    if not isinstance(guest, QmpGuest):
        raise Unsupported(
            "libvirt's own backup lets the guest's writes fail when its scratch file is full, so it is not used",
            subject=guest.name,
            hint="ship it without --bitmap: a snapshot with overlays harms no guest",
        )
    if guest.state() not in (State.RUNNING, State.PAUSED):
        raise Busy(
            "the guest waits for a migration, or was migrated away: its images are not its own now",
            subject=guest.name,
            hint="run it on the host where the guest runs",
        )
    return guest
