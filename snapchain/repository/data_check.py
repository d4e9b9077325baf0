"""The data depth of a verification: which packs are read this time, what came of it, and what is kept of that.

By turns: the packs that were not read for longest come first, so that twenty runs of 5 % read everything, and each run
tells the next one by a record (verified.py) how far it came.  A layer has its turn likewise: its leaves are proven.
"""

from __future__ import annotations

import random
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta

import numpy as np

from snapchain.errors import SnapchainError, Unavailable
from snapchain.model.events import Notice, OnEvent, counting
from snapchain.model.extents import Int64s
from snapchain.objects.store import Archived
from snapchain.repository import verified
from snapchain.repository.catalogue import Catalogue
from snapchain.repository.leaf_proof import Flags
from snapchain.repository.pack_reading import Marks, PackRead, marks_of, read_packs
from snapchain.repository.packs import Location, read_directory
from snapchain.repository.pages import Page
from snapchain.repository.repository import CONFIG, Repository
from snapchain.repository.verified import DiskVerified, Reading, Verified

_MOST_ERRORS = 10_000
"""Errors of single blobs that are kept until it is known which of them a point names."""
_MARKS_BYTES = 64 * 1024 * 1024
"""Of the blobs that were read, as far as they are kept: else the pack's directory is read again."""
_OFTEN = 15.0
_PARTS = 32
"""Progress is kept when the last time is so many seconds ago, or one part in so many of the run: what a kill -9 costs.
Long runs leave few objects by the second."""
_CONTINUED = timedelta(days=7)
"""A run that was interrupted longer ago is not continued: it would have little to do with what is there now."""
_LAST_WORDS = 5.0
"""Seconds that an interrupted run may take to keep its progress: the network may have failed."""


class DataCheck:
    """The data of one run.

    layers: those whose leaves are to be proven in this run
    bad: packs in which it found damage -> marks of the blobs in them that are whole
    stored_bytes, read_bytes, fresh_bytes: of all packs in question; of those that were read; of those that need not be
    continued: whether it goes on with a run that was interrupted
    oldest: all data was read and found good at this time or later; None: not all of it was
    """

    def __init__(
        self, repository: Repository, sizes: Mapping[str, int], layers: Collection[str], on_event: OnEvent
    ) -> None:
        """sizes: pack -> bytes, of all packs in question; layers: all in question."""
        self.layers: frozenset[str] = frozenset()
        self.bad: dict[str, Marks] = {}
        self.stored_bytes = sum(sizes.values())
        self.read_bytes = self.fresh_bytes = 0
        self.continued = False
        self.oldest: datetime | None = None
        self._repository, self._sizes, self._on_event = repository, sizes, on_event
        self._known: Verified = verified.read(repository.store, repository.keys)
        self._all_layers = layers
        self._packs: list[str] = []
        self._raw = 0
        self._pages: dict[str, dict[int, int]] = {}  # of packs that were read: offset of a page -> its plain bytes
        self._reading: Reading | None = None
        self._errors: list[tuple[str, int | None, SnapchainError]] = []
        self._named: dict[str, list[Int64s]] = {}
        self._used: dict[str, int | None] = {}  # disk -> the oldest time of what it uses; None: some was never read
        self._marks: OrderedDict[str, Marks] = OrderedDict()
        self._marks_bytes = 0
        self._pending: dict[str, int] = {}
        self._keeps = repository.takes_notes

    def choose(self, share: float, since: datetime | None, disk: str | None) -> None:
        """Which packs and layers to read: those that were not for longest, until they are the share of all."""
        now = datetime.now(UTC)
        began: datetime | None = None
        if share >= 1:
            before = self._known.readings.get(disk)
            if before is not None and not before.finished and now - before.began < _CONTINUED:
                began = before.began
            self._reading = Reading(disk=disk, began=began or now, finished=False)
        self.continued = began is not None
        floor = min((each for each in (since, began) if each is not None), default=None)
        is_fresh_at = None if floor is None else int(floor.timestamp())
        times = self._known.times
        draw = random.Random()  # noqa: S311 -- chooses what to read, keeps no secret

        def by_turns(weights: Mapping[str, int]) -> list[str]:
            # Those that were never read in random order: where nothing can be kept a share is a random one.
            order = sorted(weights, key=lambda each: (times.get(each, 0), draw.random()))
            left, chosen = share * sum(weights.values()), list[str]()
            for each in order:
                if left <= 0:
                    break
                left -= weights[each]
                if is_fresh_at is None or times.get(each, 0) < is_fresh_at:
                    chosen.append(each)
            return chosen

        self._packs = sorted(by_turns(self._sizes))
        self.layers = frozenset(by_turns(dict.fromkeys(self._all_layers, 1)))
        if is_fresh_at is not None:
            self.fresh_bytes = sum(size for pack, size in self._sizes.items() if times.get(pack, 0) >= is_fresh_at)
        if began is not None:
            when = f"{began:%Y-%m-%d %H:%M} UTC"
            self._on_event(Notice(f"this continues a verification of {when} that was interrupted"))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """For the length of a `with` block: what was found good by then is kept, also when it is interrupted."""
        try:
            yield
        except (Exception, KeyboardInterrupt):
            self._keep_in_haste()
            raise

    def read_packs(self) -> None:
        """Read the chosen packs. Raises Unavailable when the store no longer answers."""
        total = sum(self._sizes[pack] for pack in self._packs)
        on_bytes = counting("verify", total, self._on_event)
        began = kept = time.monotonic()
        repository = self._repository
        work = ((pack, self._sizes[pack]) for pack in self._packs)
        with closing(read_packs(repository.store, repository.keys, work)) as results:
            for read in results:
                self._take(read)
                on_bytes(read.size)
                now = time.monotonic()
                if now - kept >= max(_OFTEN, (now - began) / _PARTS):
                    kept = now
                    self._keep()
                    with suppress(SnapchainError):  # recorded once more at the end
                        repository.record_damage()

    def _take(self, read: PackRead) -> None:
        for _, error in read.errors:
            check_answers(self._repository, error)
        if read.is_gone:
            return  # collected meanwhile; what somebody needs of it, its layers miss
        self.read_bytes += read.size
        self._pages[read.pack] = {}
        self._raw += read.raw
        if not read.errors:
            self._remember(read.pack, read.marks)
            self.note_good(read.pack)
            return
        self.bad[read.pack] = read.marks
        self._repository.blobs.damaged.add(read.pack)
        room = max(0, _MOST_ERRORS - len(self._errors))
        self._errors += [(read.pack, offset, error.detached()) for offset, error in read.errors[:room]]

    def note_good(self, each: str) -> None:
        """A pack was read and is whole, or a layer was proven."""
        self._pending[each] = int(datetime.now(UTC).timestamp())

    def note_named(self, disk: str, pack: str, offsets: Int64s) -> None:
        """A layer of a disk names these blobs."""
        if pack in self.bad:
            self._named.setdefault(pack, []).append(np.unique(offsets))
        if pack in self._sizes:  # of one that is known to be damaged each blob was looked at by itself
            self._use(disk, pack)

    def note_page(self, disk: str, where: Location) -> None:
        """A layer of a disk has this page."""
        self.note_named(disk, where.pack, np.array([where.offset], np.int64))
        if where.pack in self._pages:
            self._pages[where.pack][where.offset] = where.raw

    @property
    def guest_bytes(self) -> int:
        """Bytes of guest data that were read and are whole, each once; after all layers were looked at."""
        return max(0, self._raw - sum(sum(pages.values()) for pages in self._pages.values()))

    def _use(self, disk: str, each: str) -> None:
        seen = self._pending.get(each) or self._known.times.get(each)
        oldest = self._used.get(disk, seen)
        self._used[disk] = None if seen is None or oldest is None else min(seen, oldest)

    def runs_in(self, page: Page, packs: Collection[str]) -> Flags:
        """Which runs of a page are blobs in one of these packs that are not known to be whole."""
        found = np.zeros(len(page.runs), np.bool_)
        for place, pack in enumerate(page.packs):
            if pack in packs:
                mine = (page.runs["stored"] != 0) & (page.runs["pack"] == place)
                rows = page.runs[mine]
                good = self.bad.get(pack)
                found[mine] = True if good is None else ~np.isin(marks_of(rows, rows["id"]), good)
        return found

    def trusted(self, page: Page) -> Flags:
        """Which runs of a page are blobs that lie where the run says, by the pack's directory."""
        found = np.zeros(len(page.runs), np.bool_)
        marks = marks_of(page.runs, page.runs["id"])
        for place, pack in enumerate(page.packs):
            mine = (page.runs["stored"] != 0) & (page.runs["pack"] == place)
            if mine.any():
                found[mine] = np.isin(marks[mine], self._marks_in(pack))
        return found

    def _marks_in(self, pack: str) -> Marks:
        """Of the blobs that a pack has; of one that was read in an earlier run by its directory."""
        known = self._marks.get(pack)
        if known is None:
            repository = self._repository
            known = np.empty(0, np.uint64)
            with suppress(SnapchainError):  # then each blob is read by itself
                _, ids, rows = read_directory(repository.store, repository.keys, pack, self._sizes.get(pack, 0))
                known = marks_of(rows, ids)
            self._remember(pack, known)
        return known

    def _remember(self, pack: str, marks: Marks) -> None:
        self._marks[pack] = marks
        self._marks_bytes += marks.nbytes
        while self._marks_bytes > _MARKS_BYTES and len(self._marks) > 1:
            self._marks_bytes -= self._marks.popitem(last=False)[1].nbytes

    def unnamed_errors(self) -> Iterator[SnapchainError]:
        """What is wrong with packs, of which no layer has been told already."""
        for pack, offset, error in self._errors:
            named = self._named.get(pack, ())
            if offset is None or not any(offset in some for some in named):
                yield error

    def finish(self, found: Sequence[Catalogue], findings: Mapping[str, int]) -> None:
        """Keep what this run found out, as one that came to its end.

        found: the disks in question; findings: how many, by disk
        """
        now = datetime.now(UTC)
        disks = [self._summary(catalogue, findings.get(catalogue.disk, 0), now) for catalogue in found]
        if all(disk.since for disk in disks):
            self.oldest = min((disk.since for disk in disks if disk.since), default=None)
        for disk in disks:
            self._known.note_disk(disk)
        if self._reading is not None:
            self._reading = self._reading.model_copy(update={"finished": True})
        self._keep(disks)
        if not self._keeps:
            return
        with suppress(SnapchainError):  # where nothing may be deleted they stay
            verified.put_together(
                self._repository.store, self._repository.keys, self._known, avoid=self._repository.blobs.damaged
            )

    def _summary(self, catalogue: Catalogue, findings: int, now: datetime) -> DiskVerified:
        """What this run found out about a disk."""
        disk = catalogue.disk
        for layer in catalogue.parents:
            self._use(disk, layer)
        oldest = self._used.get(disk, int(now.timestamp()))
        since = None if findings or oldest is None else datetime.fromtimestamp(oldest, UTC)
        return DiskVerified(disk=disk, generation=catalogue.generation, time=now, since=since, findings=findings)

    def _keep(self, disks: Collection[DiskVerified] = ()) -> None:
        """Store what is not stored yet. Where that cannot be, it is reported once, and nothing is kept."""
        pending, self._pending = self._pending, {}
        self._known.note(pending)
        readings = () if self._reading is None else (self._reading,)
        for reading in readings:
            self._known.note_reading(reading)
        if not self._keeps:
            return
        repository = self._repository
        try:
            self._known.names += verified.write(
                repository.store, repository.keys, pending, readings=readings, disks=disks
            )
        except SnapchainError as error:
            check_answers(repository, error)
            self._keeps = False
            self._on_event(Notice(f"what was verified cannot be kept, so the next run does not go on from it: {error}"))

    def _keep_in_haste(self) -> None:
        """Keep the progress of a run that was interrupted, unless the store takes too long."""
        if not self._pending or not self._keeps:
            return

        def write() -> None:
            with suppress(SnapchainError):  # the error that has ended the run is the one to report
                self._keep()

        writer = threading.Thread(target=write, name="verified", daemon=True)
        writer.start()
        writer.join(_LAST_WORDS)


def check_answers(repository: Repository, error: SnapchainError) -> None:
    """Raises Unavailable when the store no longer answers. What it does not give of one object is a finding about that.

    error: of some call; others than Unavailable tell nothing of the store. One about an object in an archive tier is
    raised: such an object is no finding
    """
    if isinstance(error, Archived):
        raise error
    if isinstance(error, Unavailable):
        repository.store.size(CONFIG)
