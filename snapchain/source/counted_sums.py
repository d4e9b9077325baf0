"""Content sums that this host has counted itself, so that it need not trust those of others.

A replica reports the content of its layers, and new layers are put on them.  The host of the replica, or another user
who may write there, could have put other bytes under the names of this host's files.  So the report is compared with
the sums of the files here.  These are counted when the files are read to be sent, and kept in the user's state
directory. Where a sum is missing, it is counted again.

    key     the files of a view, root first, each by device, inode, size, mtime and ctime: written to, replaced or
            rebased, a file has another key.  Setting the mtime back does not hide it: that moves the ctime
    place   one small file an image, which only this user can have written: else it is not believed
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from snapchain.errors import NotFound, SnapchainError
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
from snapchain.host.private import read_record, write_record
from snapchain.host.records import state_dir
from snapchain.image import ImageChain, ImageFile
from snapchain.image.leaves import counted
from snapchain.model.content import SUM_BYTES, Sum, SumText, content_id, decode_sum, empty_sum, encode_sum
from snapchain.model.events import Notice, OnEvent
from snapchain.source.at_rest import check_unchanged

_FILE = struct.Struct("<QQqqqB")
_MASK = (1 << 63) - 1
_MOST = 256
"""Sums of one image: one for each file of the longest chain, and some of what it was before a merge."""
_LARGEST = _MOST * (2 * SUM_BYTES)
_Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class _Remembered(BaseModel):
    """The file. image: for people; sums: by key, those that were used last at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str
    sums: dict[_Key, SumText] = Field(max_length=_MOST)


def guest_key(guest: str, disk: str) -> Path:
    """In the place of an image: a disk of a guest, whose top has another path after each snapshot."""
    return Path("/guest", *(part.replace("/", "%2F").replace("..", "%2E%2E") for part in (guest, disk)))


class CountedSums:
    """Sums of one image's views. If the file cannot be read or written, that costs only time, and is reported."""

    def __init__(self, image: Path | None, on_event: OnEvent) -> None:
        """image: the top of the chain; None: nothing is remembered beyond this object."""
        self._sums: dict[str, Sum] = {}
        self._written: dict[str, Sum] = {}
        self._path: Path | None = None
        if image is None:
            return
        self._image, self._on_event = os.path.realpath(image), on_event
        try:
            self._path = state_dir() / "sums" / f"{blake3(os.fsencode(self._image)).hexdigest(length=16)}.json"
            self._written = {
                key: decode_sum(text) for key, text in read_record(self._path, _Remembered, cap=_LARGEST).sums.items()
            }
            self._sums = dict(self._written)
        except NotFound:
            pass
        except (SnapchainError, RuntimeError) as error:  # no home directory
            self._tell("cannot be used", error)

    def of(self, chain: ImageChain, count: int) -> Sum | None:
        """The content sum of the lowest `count` files, if it is remembered."""
        if not count:
            return empty_sum()
        key = _key(chain.files[:count])
        return None if key is None else self._sums.get(key)

    def count(self, chain: ImageChain, count: int, *, on_bytes: Callable[[int], None]) -> Sum:
        """The content sum of the lowest `count` files. If it is not remembered, the files are read, and it is.

        on_bytes: told how much was read since it was last told
        Raises Conflict when a file was written to meanwhile; errors as ImageChain.read_into.
        """
        known = count - self.unread(chain, count)
        total = self.of(chain, known)
        for number in range(known, count):
            assert total is not None, "nothing shows nothing"
            view, below = chain.at(number), chain.at(number - 1) if number else None
            total = counted(view.top.extents, view, below, total, on_bytes=on_bytes)
            check_unchanged(view)
            self.note(chain, number + 1, total)
        assert total is not None, "nothing shows nothing"
        return total

    def unread(self, chain: ImageChain, count: int) -> int:
        """How many of the lowest `count` files must be read to know what they show."""
        return next(number for number in range(count + 1) if self.of(chain, count - number) is not None)

    def has_shown(self, size: int, shown: str) -> bool:
        """Whether a view of the image under this path once had that size and content id, whatever its files were."""
        return any(content_id(size, total) == shown for total in self._sums.values())

    def note(self, chain: ImageChain, count: int, total: Sum) -> None:
        """The lowest `count` files were read just now, and show that; nobody has written to them meanwhile."""
        key = _key(chain.files[:count])
        if key is not None:
            self._sums.pop(key, None)
            self._sums[key] = total.copy()

    def flush(self) -> None:
        """Remember what is new."""
        if self._path is None or list(self._sums) == list(self._written):
            return
        kept = dict(list(self._sums.items())[-_MOST:])
        record = _Remembered(image=self._image, sums={key: encode_sum(total) for key, total in kept.items()})
        try:
            write_record(self._path, record)
            self._written = kept
        except (SnapchainError, AttributeError) as error:
            self._tell("cannot be remembered", error)

    def _tell(self, what: str, error: Exception) -> None:
        self._on_event(
            Notice(f"what this host has counted of {self._image} {what}, so it is read again next time: {error}")
        )


def carry_over(
    image: Path,
    old: ImageChain,
    scanned: Callable[[], ImageChain],
    *,
    first: int,
    last: int,
    on_event: OnEvent,
) -> None:
    """After a merge of old files `first` to `last`: the new views show what the old ones did, which is proven.

    scanned: opens the chain as it is now; not called where nothing is remembered
    Others who may write to the directory could change the result before it is looked at here: then nothing is carried
    over, and its files are read again.
    """
    sums = CountedSums(image, on_event)
    known = {count: total for count in range(1, len(old.files) + 1) if (total := sums.of(old, count)) is not None}
    if not any(count > last for count in known) or _shared(old.files[last].real_path.parent):
        return
    with scanned() as new:
        for count in range(first + 1, len(new.files) + 1):
            total = known.get(count + last - first)
            if total is not None:
                sums.note(new, count, total)
    sums.flush()


def _shared(directory: Path) -> bool:
    """Whether another user may write to a directory, or to one of its parents."""
    with os_errors(directory), Directory.open(directory) as opened:
        status = os.fstat(opened.fd)
        return opened.rights is not None or status.st_uid != os.geteuid() or bool(status.st_mode & 0o022)


def _key(files: Sequence[ImageFile]) -> str | None:
    """Of a view by its files, root first; None where one is a device: nobody can tell whether it was written to."""
    state = blake3()
    for file in files:
        mark = file.fingerprint
        if not mark.size:
            return None
        numbers = (
            file.device[0],
            file.device[1],
            mark.size,
            mark.mtime_ns & _MASK,
            mark.ctime_ns & _MASK,
            file.format == "raw",
        )
        state.update(_FILE.pack(*numbers))
    return state.hexdigest(length=16)
