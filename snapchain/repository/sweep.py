"""gc: packs that are mostly waste are rewritten, and what nobody needs is deleted, beside writers and readers.

    mark     what is in use, or being read, and what of it is damaged (mark.py)
    move     blobs in use leave the wasteful packs, those that are damaged, and those that were condemned and are in use
             all the same, for new ones; the layer records that name them are written anew, and the catalogues switched
             to them, each by its next generation; under a lease as any writer has it
    condemn  what is unused: whoever begins from here on does not rely on it (condemned.py)
    wait     for the writers that were there then; those that are dead are fenced (fence.py). Not for long: what others
             still may need goes the next time
    look     at all that was published since the mark: what it names stays
    sweep    old generations; one new index for all old ones; layers; packs

What is to go was unused at the last look, and nobody can name it any more: deletions may be delayed for any time.
What the store has locked (locked.py) is left, and stays condemned: a run after the end of the lock deletes it.

Deletion runs in the reverse order of writing: wherever a run is interrupted, nothing that is left names a deleted
object.  Another run finishes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate

from snapchain.destination.records import GcLimits
from snapchain.errors import Corrupt, NotFound
from snapchain.objects.exclusive import boot_time
from snapchain.objects.reserve import sweep_unfinished
from snapchain.objects.store import ObjectInfo, Refused
from snapchain.repository import condemned, eras, index as indexes, samples, tidying
from snapchain.repository.catalogue import ATTEMPTS
from snapchain.repository.condemned import Condemned
from snapchain.repository.fence import bury, bury_harmless
from snapchain.repository.format import PACK_BYTES, index_era, is_samples, layer_name, pack_name
from snapchain.repository.index import IndexedPack, IndexPart
from snapchain.repository.leases import DEAD_SECONDS, Holder, Lease, Mode
from snapchain.repository.locked import Locked, last_of
from snapchain.repository.mark import Marked, Usage, history, look_again, mark, unused, wasteful
from snapchain.repository.moving import move
from snapchain.repository.packs import read_directory
from snapchain.repository.repository import Repository
from snapchain.repository.samples import Samples

WASTE = 0.25
"""The share of a pack that may be waste. Below it, moving costs more requests than the space is worth."""

LEAST_WASTE = 64 * 1024
"""Bytes. Head and directory make up much of a small pack; moved for their sake, it would be moved by every gc."""

MOST_INDEXES = 32
"""Objects beyond those that their size demands; more are put together, for readers without a cache."""

ANY = GcLimits()
_INDEX_BLOBS = 500_000
_POLL_SECONDS = 1.0
_SKEW = 2 * 3600.0
"""By how much a host's clock may be wrong before packs of its shipments are condemned while they are under way."""


@dataclass(slots=True)
class Swept:
    """What gc did, or would do, in stored bytes.

    bytes_freed: less than before, new records counted; bytes_added: more than before, where these cost more than what
    was deleted; bytes_moved: blobs copied into new packs
    bytes_left: unused packs that stay for now, since somebody at work may have a use for them; waits_for: who
    bytes_locked, objects_locked: unused objects that the store has locked; locked_until: the end of the last lock
    marked: what was in use at the end, and what of it is lost
    """

    bytes_freed: int = 0
    bytes_added: int = 0
    bytes_moved: int = 0
    objects_deleted: int = 0
    packs_deleted: int = 0
    packs_moved: int = 0
    bytes_left: int = 0
    waits_for: tuple[str, ...] = ()
    bytes_locked: int = 0
    objects_locked: int = 0
    locked_until: datetime | None = None
    marked: Marked | None = None


def index_objects(repository: Repository) -> list[ObjectInfo]:
    """The index objects that a run replaces by new ones when packs go, the oldest first; then their samples."""
    listed = list(repository.store.list("index/"))
    found = [info for info in listed if index_era(info.name) is not None]
    # What was stored at one time is found again together, so it stays together.
    return sorted(found, key=_age_of) + [info for info in listed if is_samples(info.name)]


def estimate(
    marked: Marked,
    limits: GcLimits = ANY,
    indexes: Sequence[ObjectInfo] = (),
    locked: Mapping[str, datetime] | None = None,
) -> Swept:
    """What `sweep` would do, without the new records that moving costs.

    indexes: see `index_objects`; locked: those of the objects in `deletable` that the store has locked
    """
    stay = locked or {}
    wasted = [pack for pack in _wasteful(marked, limits) if pack_name(pack.pack) not in stay]
    empty = [pack for pack in _unused(marked) if pack_name(pack.pack) not in stay]
    rescued = sum(where.stored for key, (_, where) in marked.rescued.items() if key in marked.movable)
    moved = sum(pack.used_bytes for pack in wasted) + rescued
    freed = sum(pack.size for pack in (*wasted, *empty)) - moved
    dead_layers = {name: info.size for name, info in marked.dead_layers.items()}
    records = marked.dead_generations | marked.dead_claims | dead_layers | marked.stale
    records_gone = {name: size for name, size in records.items() if name not in stay}
    unused = deletable(marked)
    kept = {name: until for name, until in stay.items() if name in unused}
    goes = [*wasted, *empty]
    replaced = indexes if goes else ()
    # The new index is smaller by what it no longer lists: about as much as its packs are of all.
    share = sum(pack.size for pack in goes) / max(1, sum(pack.size for pack in marked.usage))
    return Swept(
        bytes_freed=max(0, freed + sum(records_gone.values()) + int(share * sum(info.size for info in replaced))),
        bytes_moved=moved,
        objects_deleted=len(records_gone) + len(wasted) + len(empty) + len(replaced),
        packs_deleted=len(wasted) + len(empty),
        packs_moved=len(wasted),
        bytes_locked=sum(unused[name] for name in kept),
        objects_locked=len(kept),
        locked_until=last_of(kept),
    )


def deletable(marked: Marked, wasteful_by: GcLimits | None = None) -> dict[str, int]:
    """Unused objects that a store may have locked -> bytes. wasteful_by: also packs that would be moved from."""
    wasted = () if wasteful_by is None else _wasteful(marked, wasteful_by)
    packs = {pack_name(pack.pack): pack.size for pack in (*wasted, *_unused(marked))}
    return packs | marked.dead_generations | {name: info.size for name, info in marked.dead_layers.items()}


def _wasteful(marked: Marked, limits: GcLimits) -> list[Usage]:
    """The packs to move from, the most wasteful first, as many as may be moved."""
    if marked.unread:
        return []
    found = wasteful(
        marked.usage,
        WASTE if limits.waste is None else limits.waste,
        least=LEAST_WASTE,
        avoid=marked.suspect,
        emptied=marked.index.condemned.all_packs,
    )
    if limits.most_moved is None:
        return found
    found.sort(key=lambda pack: pack.used_bytes / pack.size)
    moved = accumulate(pack.used_bytes for pack in found)
    return [pack for pack, total in zip(found, moved, strict=True) if total <= limits.most_moved]


def _unused(marked: Marked) -> list[Usage]:
    """Packs that may go. Without the map of a layer it is not known which packs it needs."""
    return [] if marked.unread else unused(marked.usage)


def sweep(
    repository: Repository,
    lease: Lease,
    limits: GcLimits = ANY,
    *,
    patience: float,
    on_object: Callable[[], None],
    on_wait: Callable[[str], None],
) -> Swept:
    """Mark and collect under a collector's lease.

    patience: seconds to wait for writers that may need what is to go; on_object: told of each deletion; on_wait: told
    for whom it waits
    Raises Conflict when others took this run for dead; then what was deleted is what nobody needs all the same.
    """
    return _Sweep(repository, lease, limits, patience, on_object, on_wait).run()


class _Sweep:
    """One run."""

    def __init__(
        self,
        repository: Repository,
        lease: Lease,
        limits: GcLimits,
        patience: float,
        on_object: Callable[[], None],
        on_wait: Callable[[str], None],
    ) -> None:
        self._repository, self._lease, self._limits, self._patience = repository, lease, limits, patience
        self._on_object, self._on_wait = on_object, on_wait
        self._done = Swept()
        self._locked = Locked(repository.store)
        self._kept: dict[str, datetime] = {}

    def run(self) -> Swept:
        """As `sweep`."""
        repository, lease, done = self._repository, self._lease, self._done
        held = _stored_bytes(repository)
        done.marked = marked = self._marked()
        if marked.lost or marked.suspect:
            lease.check()  # after another collection meanwhile, a missing object is no damage
        if not self._is_work(marked):
            _note_damage(repository, marked)
            return done
        wasted = self._movable(marked)
        if (wasted or marked.movable) and not lease.is_alone:
            self._move(marked, wasted)
            done.marked = marked = self._marked()
        _note_damage(repository, marked)
        lease.check()
        self._let_go(marked.dead_generations)
        self._delete(marked.dead_claims)
        said = self._condemn(marked)
        at_work = self._wait(marked, said)
        needed = look_again(repository, marked, lease.spared)
        self._report_left(marked, said, said.ready(at_work))
        self._sweep(marked, said, said.ready(at_work), needed)
        less = held - _stored_bytes(repository)
        done.bytes_freed, done.bytes_added = max(0, less), max(0, -less)
        return done

    def _marked(self) -> Marked:
        self._lease.survey()
        return mark(self._repository, self._lease.spared)

    def _is_work(self, marked: Marked) -> bool:
        would = estimate(marked, self._limits)
        if would.objects_deleted or self._lease.dead or marked.movable or _misleads(marked):
            return True
        said = marked.index.condemned
        return bool(said.packs or said.awaits or said.unreadable) or _is_scattered(self._repository)

    # --- Moving, as a writer.

    def _movable(self, marked: Marked) -> list[Usage]:
        """The wasteful packs that can be deleted afterwards; all of those that are condemned."""
        found = _wasteful(marked, self._limits)
        emptied = marked.index.condemned.all_packs
        locked = self._locked.among(pack_name(pack.pack) for pack in found if pack.pack not in emptied)
        return [pack for pack in found if pack_name(pack.pack) not in locked]

    def _move(self, marked: Marked, wasted: Sequence[Usage]) -> None:
        repository = self._repository
        with (
            suppress(Refused),  # a full disk: deleting waste makes room to move next time
            repository.lease(Mode.WRITE, "gc", on_wait=self._on_wait, spends=True) as writing,
        ):

            def published_to() -> frozenset[str] | None:
                self._lease.survey()
                return _published_to({name: at for name, at in self._lease.writers.items() if name != writing.name})

            moved_bytes, moved_packs = move(repository, marked, wasted, writing.check, published_to)
            self._done.bytes_moved += moved_bytes
            self._done.packs_moved += moved_packs

    # --- Condemning, and waiting.

    def _condemn(self, marked: Marked) -> Condemned:
        """Say of all that is unused that it is to go; what the store says of that by now."""
        repository, lease = self._repository, self._lease
        said = marked.index.condemned
        lease.survey()
        since = _began(lease.writers.values())
        packs = {pack.pack for pack in _unused(marked) if _is_older(pack.modified, since)} - said.all_packs
        dead = [name for name, info in marked.dead_layers.items() if _is_older(info.modified, since)]
        layers = {name.rpartition("/")[2] for name in dead} - said.all_layers
        try:
            made = condemned.condemn(repository.store, repository.keys, packs, layers) if packs or layers else {}
            for name, record in made.items():
                said.packs[name], said.layers[name] = frozenset(record.packs), frozenset(record.layers)
            unsettled = said.unsettled()
            if unsettled:
                leases = frozenset[str]()
                for _ in range(2):  # one listing may miss a lease that is put again at the moment
                    lease.survey()
                    leases |= lease.writers.keys() | lease.dead.keys()
                name = condemned.wait_for(repository.store, repository.keys, unsettled, leases)
                said.awaits[name] = frozenset(unsettled), leases
        except Refused:  # without room to say so, all others have to wait instead
            lease.shut_out_writers(self._patience)
            said.packs[""], said.layers[""] = frozenset(packs), frozenset(layers)
            said.awaits[""] = frozenset(said.packs), frozenset(lease.dead)
        return said

    def _bury(self, marked: Marked) -> None:
        """Make an end of the dead. The fence writes: on a disk that is full, into the room of what is history."""
        repository, lease = self._repository, self._lease
        try:
            bury(repository, lease)
        except Refused as error:
            # From here on this run works alone: who lives may be about to look at the generations that go.
            lease.shut_out_writers(self._patience)
            lease.check()
            # First the collectors that stood still: they look at all generations since they marked.
            made = bury_harmless(lease)
            older = history(repository, marked)
            self._delete(older)
            if not (made + len(older) + sweep_unfinished(repository.store, DEAD_SECONDS)):
                raise _no_room(error) from error
            lease.survey()
            try:
                bury(repository, lease)
            except Refused as again:
                raise _no_room(again) from again

    def _wait(self, marked: Marked, said: Condemned) -> set[str]:
        """Wait for those who may need what is to go, but not for long; the leases of writers that are still there."""
        lease = self._lease
        until = boot_time() + self._patience
        told = False
        over: set[str] = set()
        while True:
            lease.survey()
            if lease.dead:
                self._bury(marked)
                lease.survey()
            at_work = {*lease.writers, *lease.dead}
            for name in frozenset[str]().union(*(leases for _, leases in said.awaits.values())) - at_work - over:
                (over if lease.is_over(name) else at_work).add(name)
            if len(said.ready(at_work)) == len(said.packs) or boot_time() >= until:
                return at_work
            if not told:
                self._on_wait(f"waiting for {', '.join(_named(lease.writers.values()))}")
                told = True
            lease.check()
            time.sleep(_POLL_SECONDS)

    def _report_left(self, marked: Marked, said: Condemned, ready: Sequence[str]) -> None:
        """What is unused and stays for now: it waits for others, or it is so young that it may be of theirs."""
        going = frozenset[str]().union(*(said.packs[name] for name in ready))
        left = [pack.size for pack in _unused(marked) if pack.pack not in going]
        self._done.bytes_left = sum(left)
        if left:
            self._done.waits_for = _named(self._lease.writers.values())

    # --- Deleting.

    def _sweep(self, marked: Marked, said: Condemned, ready: Sequence[str], needed: frozenset[str]) -> None:
        repository, lease = self._repository, self._lease
        store, keys = repository.store, repository.keys
        used = {pack.pack for pack in marked.usage if len(pack.offsets)}
        in_use = used | needed
        there = {pack.pack: pack.size for pack in marked.usage}
        going = frozenset[str]().union(*(said.packs[name] for name in ready)) & there.keys()
        gone = frozenset[str]() if marked.unread or lease.hides_layers else going - in_use
        layers = frozenset[str]().union(*(said.layers[name] for name in ready)) - marked.alive
        avoid = marked.suspect | marked.index.avoid | said.all_packs
        gone -= self._locked_packs(gone, there)
        lease.check()
        rewritten: _Rewritten | None = None
        if gone or _is_scattered(repository) or _misleads(marked):
            stay = {pack: size for pack, size in there.items() if pack not in avoid}
            rewritten = _write_index(repository, stay, used, alone="" in said.packs)
            self._delete([name for name in (*rewritten.taken, *rewritten.samples) if not eras.is_end_of_era(name)])
            lease.check()
        # Who has begun to read since the last look, and found its layers still there, keeps them.
        lease.survey()
        gone -= look_again(repository, marked, lease.spared)
        layers = frozenset[str]() if lease.hides_layers else layers - marked.alive
        if marked.unread:
            gone = frozenset[str]()
        listed = {info.name: info.size for info in store.list("layers/")}
        due = sorted(listed.keys() & set(map(layer_name, layers)))
        left = self._let_go({name: listed[name] for name in due})
        self._delete(map(pack_name, sorted(gone)))
        self._delete(marked.stale)
        if rewritten is not None:
            for group in rewritten.unwritten:
                indexes.write(store, keys, group, era=rewritten.era)
            if not rewritten.is_complete:
                eras.complete_era(store, keys, rewritten.era)
            self._delete([name for name in rewritten.taken if eras.is_end_of_era(name)])
        self._forget_condemned(said, ready, going - gone, frozenset(name.rpartition("/")[2] for name in left))
        self._done.packs_deleted = len(gone)

    def _forget_condemned(
        self, said: Condemned, ready: Sequence[str], packs: frozenset[str], layers: frozenset[str]
    ) -> None:
        """Delete the records of which all is gone, once another says what stays condemned: these packs and layers."""
        store, keys = self._repository.store, self._repository.keys
        over = [name for name in ready if name]
        if len(over) == 1 and said.packs[over[0]] == packs and said.layers[over[0]] == layers:
            over = []  # it says what it would say again
        with suppress(Refused):  # then they stay, and say too much
            if (packs or layers) and over:
                condemned.condemn(store, keys, packs, layers)
            # What a damaged one lists is condemned anew, but for what may be of those at work.
            unreadable = () if self._lease.writers else said.unreadable
            for name in (*over, *filter(None, said.over(over)), *unreadable):
                store.delete(name)

    def _locked_packs(self, packs: Collection[str], sizes: Mapping[str, int]) -> frozenset[str]:
        """Those of these packs that the store has locked."""
        names = {pack_name(pack): pack for pack in sorted(packs)}
        locked = self._note_locked({name: sizes[pack] for name, pack in names.items()})
        return frozenset(names[name] for name in locked)

    def _let_go(self, objects: Mapping[str, int]) -> Collection[str]:
        """Delete those that the store has not locked; the names of the others. objects: name -> bytes"""
        locked = self._note_locked(objects)
        self._delete(name for name in objects if name not in locked)
        return locked

    def _note_locked(self, objects: Mapping[str, int]) -> Collection[str]:
        locked = self._locked.among(objects)
        self._kept |= locked
        self._done.objects_locked += len(locked)
        self._done.bytes_locked += sum(objects[name] for name in locked)
        self._done.locked_until = last_of(self._kept)
        return locked.keys()

    def _delete(self, objects: Iterable[str]) -> None:
        for name in objects:
            self._repository.store.delete(name)
            self._done.objects_deleted += 1
            self._on_object()


def _no_room(error: Refused) -> Refused:
    """The error of a disk that is so full that the dead cannot be fenced, whatever was deleted for that."""
    return Refused(
        error.message,
        subject=error.subject,
        hint="a writer that was killed has left its lease, and gc must write some KiB before it may delete what that "
        "writer relied on: make room for 1 MiB outside of the repository, or enlarge the disk, and run gc again",
    )


def _is_scattered(repository: Repository) -> bool:
    """Whether the index objects are many more than would do, of the size that they may have, or some do not count."""
    listed = [info for info in index_objects(repository) if not is_samples(info.name)]
    needed = 2 * sum(info.size for info in listed) // min(repository.pack_size or PACK_BYTES, indexes.INDEX_BYTES)
    return len(listed) > MOST_INDEXES + needed or len(listed) > len(eras.newest(repository.store)[1])


def _published_to(writers: Mapping[str, Holder | None]) -> frozenset[str] | None:
    """The disks to which these writers may publish; None: any."""
    if any(holder is None or not holder.disks for holder in writers.values()):
        return None
    return frozenset(disk for holder in writers.values() if holder is not None for disk in holder.disks)


def _began(writers: Iterable[Holder | None]) -> float | None:
    """When the first of these writers may have begun, in seconds since 1970; None without any.

    By the clocks of their hosts: it only tells what is not worth condemning, since it may be of theirs.
    """
    times = [0.0 if holder is None else holder.since.timestamp() - _SKEW for holder in writers]
    return min(times, default=None)


def _age_of(info: ObjectInfo) -> float:
    return info.modified or 0.0


def _is_older(modified: float | None, since: float | None) -> bool:
    return since is None or (modified is not None and modified < since)


def _named(writers: Iterable[Holder | None]) -> tuple[str, ...]:
    """Who they are, for people."""
    return tuple(sorted(str(holder or "another snapchain") for holder in writers))


def _misleads(marked: Marked) -> bool:
    """Whether an index lists packs that are missing or damaged, or cannot be read."""
    return bool(marked.index.unreadable) or any(pack in marked.index.avoid for pack in marked.index.sizes)


def _note_damage(repository: Repository, marked: Marked) -> None:
    """Record the damaged packs that records name: the next index no longer lists their sizes."""
    repository.blobs.damaged |= marked.suspect
    repository.record_damage()


def _stored_bytes(repository: Repository) -> int:
    """Bytes of all objects that gc may touch."""
    prefixes = ("disks/", "index/", "layers/", "packs/")
    return sum(info.size for prefix in prefixes for info in repository.store.list(prefix))


@dataclass(slots=True)
class _Rewritten:
    """A new era. taken: index objects that it takes the place of; samples: of these; unwritten: what is still to be
    listed, since the disk is full; is_complete: whether that was said.
    """

    era: int
    taken: list[str]
    samples: list[str]
    unwritten: list[list[IndexedPack]] = field(default_factory=list)
    is_complete: bool = False


def _write_index(repository: Repository, sizes: Mapping[str, int], used: Container[str], *, alone: bool) -> _Rewritten:
    """A new era: one index of the packs that stay, instead of all that there are, whichever of these can be read.

    sizes: bytes of the packs that stay; none of them is missing or damaged; used: those that some record names
    alone: as in `begin_era`
    On a full disk something is left to do, once the old indexes, which no longer count, and unused packs are gone.
    Raises Conflict when another collector has begun that era.
    """
    store, keys = repository.store, repository.keys
    listed = [info.name for info in index_objects(repository)]
    before = [name for name in listed if not is_samples(name)]
    era = eras.begin_era(store, keys, before, conditional=repository.conditional, alone=alone)
    made = _Rewritten(era, [], [name for name in listed if is_samples(name)], is_complete=alone)
    parts: list[Samples] = []
    pending: list[IndexedPack] = []
    seen: set[str] = set()
    blobs = listed_bytes = 0
    damaged = False

    def flush() -> None:
        nonlocal blobs, pending
        for group in indexes.split(pending, repository.pack_size):
            try:
                name = indexes.write(store, keys, group, era=era)
            except Refused:
                made.unwritten.append(group)
            else:
                parts.append(samples.of({name: samples.ids_of(group)}))
        pending, blobs = [], 0

    def add(found: IndexedPack) -> None:
        nonlocal blobs, listed_bytes
        seen.add(found.pack)
        pending.append(found)
        blobs += len(found.rows)
        listed_bytes += found.ids.nbytes + found.rows.nbytes
        if blobs >= _INDEX_BLOBS:
            flush()

    def take(name: str) -> None:
        nonlocal damaged
        made.taken.append(name)
        try:
            part = IndexPart(name, *indexes.parse(keys, name, store.get(name)))
        except NotFound:  # its writer has put it together with others, into one that is listed now
            return
        except Corrupt:
            damaged = True
            return
        for each in part.by_pack():
            if sizes.get(each.pack) == each.size and each.pack not in seen:
                add(each)

    def take_new() -> bool:
        """Take what others have listed since."""
        known = {*made.taken}
        fresh = [
            info.name
            for info in index_objects(repository)
            if info.name not in known and not is_samples(info.name) and (index_era(info.name) or 0) < era
        ]
        for name in fresh:
            take(name)
        return bool(fresh)

    for name in before:
        take(name)
    for _ in range(ATTEMPTS):
        if not take_new():
            break
    for pack in sorted(sizes.keys() - seen):
        # Where an index is damaged, or did not count any more when it was written.
        if damaged or pack in used:
            with suppress(Corrupt):  # then its blobs are stored again when they are shipped
                add(IndexedPack(pack, sizes[pack], *read_directory(store, keys, pack, sizes[pack])[1:]))
    flush()
    if listed_bytes >= tidying.LOOSE_BYTES:
        with suppress(Refused):  # nothing depends on them
            for some in samples.together(parts, {name for part in parts for name in part.indexes}):
                samples.write(store, keys, some)
    if not (made.unwritten or alone):
        with suppress(Refused):
            eras.complete_era(store, keys, era)
            made.is_complete = True
    if take_new():  # of who had read the era before, and knew nothing of this one
        flush()
    return made
