"""The catalogue of a disk: all its points and the layers that give them, in one small object.

Every change (a point published, points dropped, layers merged) is the next generation, made by one
create-if-absent of disks/DISK/NUMBER.  So each change is atomic however much it touches, two writers can never both
succeed, and the generations before are the history that a repair can go back to.  A generation is never changed.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Literal, Self

import blake3
from pydantic import AwareDatetime, Field, field_validator, model_validator

from snapchain.destination.address import in_full
from snapchain.errors import Conflict, Corrupt, NotFound, SnapchainError, Unsupported
from snapchain.host.terminal import shell_word
from snapchain.model.consistency import Consistency
from snapchain.model.disk_name import is_disk_name
from snapchain.model.holds import Held
from snapchain.model.points import chosen_point
from snapchain.objects.exclusive import create_exclusively
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import Many, StoredModel, made_by, parse as parse_stored, seal, unseal
from snapchain.repository.format import generation_name
from snapchain.repository.known import SeenGenerations

KIND = b"C"
MOST_LAYERS = 50_000
"""Of one disk: a month of a layer a minute. A reader opens a record for each."""
ATTEMPTS = 8
"""How often a change is tried when others are faster each time."""


class Hold(StoredModel):
    """A reason to keep a point whatever the rules of retention say. tag: names it, once a point; reason: for people."""

    tag: str
    since: AwareDatetime
    reason: str = ""

    @classmethod
    def made(cls, tag: str, reason: str) -> Callable[[Held | None], Self]:
        """Makes a hold of now, or of the date of the one that it replaces."""
        return lambda before: cls(tag=tag, since=before.since if before else datetime.now(UTC), reason=reason)


class Point(StoredModel):
    """A restorable moment of a disk.

    layer: the top of the chain that gives it; size: virtual, bytes
    instant: the VM point, one for all disks of a guest that were taken at this moment; 32 hex digits
    made_by: the program that published it, None until it is published
    """

    point: int = Field(ge=1)
    time: AwareDatetime
    labels: Many[str] = ()
    layer: str
    size: int = Field(ge=0)
    content_id: str
    holds: Many[Hold] = ()
    instant: str | None = Field(default=None, pattern=r"^[0-9a-f]{32}$")
    consistency: Consistency | None = None
    made_by: str | None = None

    @model_validator(mode="after")
    def _names_holds_once(self) -> Self:
        if len({hold.tag for hold in self.holds}) != len(self.holds):
            raise ValueError("two of its holds have one tag")
        return self


class Catalogue(StoredModel):
    """One generation.

    previous: BLAKE3 of the object of the generation before, "" at the first
    parents: layer -> the layer below it, None at a root
    epoch, owner: who may write the disk; 0 and None until it was failed over, then the epoch grows each time
    nonce: tells our own write from another's
    renamed_to: the disk's new name; with points, the renaming is under way (renaming.py)
    renamed_from: its old name, until the disk of that name has no points any more
    """

    format: Literal[1] = 1
    disk: str
    generation: int = Field(ge=1)
    previous: str
    nonce: str
    time: AwareDatetime
    epoch: int = Field(default=0, ge=0)
    owner: str | None = None
    next_point: int = Field(ge=1)
    points: Many[Point]
    parents: Mapping[str, str | None]
    renamed_to: str | None = None
    renamed_from: str | None = None

    @field_validator("disk", "renamed_to", "renamed_from")
    @classmethod
    def _has_a_name_of_a_disk(cls, disk: str | None) -> str | None:
        if disk is not None and not is_disk_name(disk):
            raise ValueError("this cannot name a disk")
        return disk

    @field_validator("parents", mode="before")
    @classmethod
    def _stops_at_the_first_bad_parent(cls, parents: Any) -> Any:
        if isinstance(parents, dict) and len(parents) > MOST_LAYERS:
            raise ValueError(f"it has {len(parents)} layers; at most {MOST_LAYERS} are plausible")
        for below in parents.values() if isinstance(parents, dict) else ():
            if below is not None and not isinstance(below, str):
                raise ValueError("a layer lies on something that is no layer")
        return parents

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        numbers = [*(point.point for point in self.points), self.next_point]
        if any(upper <= lower for lower, upper in pairwise(numbers)):
            raise ValueError("its points do not ascend")
        return self

    @property
    def is_gone(self) -> bool:
        """Whether all that it had is a disk of another name now."""
        return self.renamed_to is not None and not self.points

    def encode(self) -> bytes:
        """As it is stored. Fields of a renaming only where there is one: older programs refuse them."""
        unset = {name for name in ("renamed_to", "renamed_from") if getattr(self, name) is None}
        return self.model_dump_json(exclude=unset).encode()

    def check_not_renamed(self) -> None:
        """Raises Conflict for a disk that was renamed, or is about to be: nothing of it may change but its epoch."""
        if self.renamed_to is None:
            return
        if self.is_gone:
            raise Conflict(
                f"the disk was renamed to {self.renamed_to}",
                subject=self.disk,
                hint=f"use the new name: DEST::{self.renamed_to}",
            )
        raise Conflict(
            f"the disk is being renamed to {self.renamed_to}",
            subject=self.disk,
            hint=f"finish that: snapchain rename DEST::{self.disk} DEST::{self.renamed_to}",
        )

    def chain(self, layer: str) -> tuple[str, ...]:
        """The layers that end in `layer`, root first. Raises Corrupt when a link is missing or goes in circles."""
        chain: list[str] = []
        at: str | None = layer
        while at is not None:
            if at not in self.parents or len(chain) == len(self.parents):
                raise self._broken(layer, at)
            chain.append(at)
            at = self.parents[at]
        return tuple(reversed(chain))

    def lengths(self) -> dict[str, int]:
        """How long the chain of each layer is; without those whose chain is broken. Costs what the catalogue holds."""
        return {layer: found for layer, found in self._followed().items() if isinstance(found, int)}

    def breaks(self) -> dict[str, str]:
        """Where the chain of each layer is broken, of those whose chain is. Costs what the catalogue holds."""
        return {layer: found for layer, found in self._followed().items() if isinstance(found, str)}

    def check_chain(self, layer: str, breaks: Mapping[str, str]) -> None:
        """Raises Corrupt as `chain` does, at no cost. breaks: what `breaks` gave."""
        if layer in breaks or layer not in self.parents:
            raise self._broken(layer, breaks.get(layer, layer))

    def above(self, layers: Collection[str]) -> set[str]:
        """The layers of which the chain holds one of `layers`, these not among them unless they are above another."""
        upper: dict[str, list[str]] = {}
        for layer, below in self.parents.items():
            if below is not None:
                upper.setdefault(below, []).append(layer)
        found: set[str] = set()
        waiting = list(layers)
        while waiting:
            fresh = [layer for layer in upper.get(waiting.pop(), ()) if layer not in found]
            found.update(fresh)
            waiting += fresh
        return found

    def _followed(self) -> dict[str, int | str]:
        """The length of each layer's chain, or where it is broken."""
        found: dict[str, int | str] = {}
        for layer in self.parents:
            way: list[str] = []
            on_way: set[str] = set()
            at: str | None = layer
            while at is not None and at in self.parents and at not in found and at not in on_way:
                way.append(at)
                on_way.add(at)
                at = self.parents[at]
            below = 0 if at is None else found.get(at, at)
            if isinstance(below, str):
                found.update(dict.fromkeys(way, below))
            else:
                found.update((each, below + place) for place, each in enumerate(reversed(way), 1))
        return found

    def _broken(self, layer: str, at: str) -> Corrupt:
        return Corrupt(f"the chain of layer {layer} is broken at {at}", subject=self.disk)

    @property
    def latest(self) -> Point | None:
        """The newest point."""
        return self.points[-1] if self.points else None


def needed_layers(points: Iterable[Point], parents: Mapping[str, str | None]) -> set[str]:
    """The layers that some point needs, as far as the links lead."""
    found: set[str] = set()
    for point in points:
        at: str | None = point.layer
        while at is not None and at not in found:
            found.add(at)
            at = parents.get(at)
    return found


class Disk:
    """Reads and advances the catalogue of one disk.

    conditional: whether the store's create-if-absent can be trusted; if not, see objects/exclusive.py
    memory: how far the disk was seen before; then reading raises Corrupt when it no longer is
    """

    def __init__(
        self, store: ObjectStore, keys: Keyring, name: str, *, conditional: bool, memory: SeenGenerations | None = None
    ) -> None:
        self.name = name
        self._store, self._keys, self._conditional, self._memory = store, keys, conditional, memory
        self._key = keys.disk_key(name)
        self._last: tuple[Catalogue, str] | None = None

    def read(self) -> tuple[Catalogue, str] | None:
        """The newest generation and the hash of its object; None when the disk has none."""
        for attempt in range(ATTEMPTS):
            newest = newest_known(self._store, self._key, self._memory)
            if self._memory is not None:
                self._memory.flush()
            try:
                return None if newest is None else self._load(newest)
            except NotFound as error:  # many were made since it was listed, and old ones collected
                if attempt == ATTEMPTS - 1:
                    raise _vanished(generation_name(self._key, newest or 0)) from error
        raise AssertionError("the loop returns or raises")

    def existing(self) -> tuple[Catalogue, str]:
        """Like `read`. Raises NotFound when the disk has no catalogue, or was renamed."""
        found = self.read()
        if found is not None and found[0].is_gone:
            new = found[0].renamed_to
            raise NotFound(
                f"the disk {self.name!r} was renamed to {new!r}",
                subject=self._store.url,
                hint=f"use the new name: DEST::{new}",
            )
        if found is None:
            url = self._store.url
            raise NotFound(
                f"there is no disk {self.name!r} here",
                subject=url,
                hint=f"`snapchain log {shell_word(url)}` lists them",
            )
        return found

    def _load(self, generation: int) -> tuple[Catalogue, str]:
        if self._last is not None and self._last[0].generation == generation:
            return self._last  # generations are never changed
        name = generation_name(self._key, generation)
        catalogue, digest = parse(self._keys, name, self._store.get(name))
        if catalogue.disk != self.name or catalogue.generation != generation:
            raise Corrupt("the catalogue belongs to another disk or generation", subject=name)
        self._last = catalogue, digest
        return self._last

    def advance(
        self, current: tuple[Catalogue, str] | None, *, time: datetime, **change: object
    ) -> tuple[Catalogue, str]:
        """Publish the next generation after `current`, with `change` (fields of Catalogue); gives what `read` would.

        Raises Conflict when somebody else published it first: read again and decide anew.
        """
        base: dict[str, object] = (
            {"disk": self.name, "next_point": 1, "points": (), "parents": {}} if current is None else dict(current[0])
        )
        generation = 1 if current is None else current[0].generation + 1
        base.update(change)
        if "renamed_from" not in change:  # points of a disk that gets another name were published long ago
            base["points"] = _signed(base["points"], 1 if current is None else current[0].next_point)
        base.update(
            generation=generation,
            previous="" if current is None else current[1],
            nonce=secrets.token_hex(16),
            time=time,
        )
        parents = base["parents"]
        if isinstance(parents, Mapping) and len(parents) > MOST_LAYERS:
            raise Unsupported(
                f"the disk would have more than {MOST_LAYERS} layers",
                subject=self.name,
                hint="merge some of them, or drop points: snapchain merge DEST::DISK --keep-...",
            )
        catalogue = Catalogue.model_validate(base)
        name = generation_name(self._key, generation)
        sealed = seal(self._keys, KIND, name, catalogue.encode())
        digest = blake3.blake3(sealed).hexdigest()
        if not create_exclusively(self._store, name, sealed, conditional=self._conditional):
            raise self._overtaken()
        if not self._is_followed(generation, digest):
            with suppress(SnapchainError):  # where nothing can be deleted it stays, older than the newest
                self._store.delete(name)
            raise self._overtaken()
        if self._memory is not None:
            self._memory.note(self._key, generation, 0)
            self._memory.flush()
        return catalogue, digest

    def _is_followed(self, generation: int, digest: str) -> bool:
        """Whether a generation that was just made is the newest, or its successor was made from it.

        If neither, its number had been taken, and was collected since: we stood still for longer than generations stay.
        """
        newest = newest_generation(self._store, self._key)
        if newest is None or newest == generation:
            return newest is not None
        try:
            return self._load(generation + 1)[0].previous == digest
        except NotFound:
            return False

    def _overtaken(self) -> Conflict:
        return Conflict(
            "another snapchain changed this disk at the same time", subject=self.name, hint="run the command again"
        )

    def update(
        self,
        change: Callable[[Catalogue], Mapping[str, object] | None],
        *,
        time: datetime,
        check: Callable[[], None],
    ) -> Catalogue:
        """Change the newest generation, whoever else changes it meanwhile; the one that is newest afterwards.

        change: fields of Catalogue to replace, None to leave all as it is; called anew for each generation that others
        publish first.  check: called before each attempt (Lease.check).
        Raises NotFound for a disk without a catalogue, Conflict when others were faster time and again.
        """
        for attempt in range(ATTEMPTS):
            current = self.existing()
            fields = change(current[0])
            if fields is None:
                return current[0]
            check()
            try:
                return self.advance(current, time=time, **fields)[0]
            except Conflict:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("the loop returns or raises")


def _signed(points: object, first: int) -> tuple[Point, ...]:
    """The points, those that are new (numbered `first` or more) with the name of this program."""
    assert isinstance(points, tuple)
    return tuple(
        point.model_copy(update={"made_by": made_by()}) if point.point >= first and point.made_by is None else point
        for point in points
    )


def newest_generation(store: ObjectStore, disk_key: str) -> int | None:
    """The highest generation stored of a disk."""
    newest = None
    for name in generation_names(store, disk_key):
        newest = int(name.rpartition("/")[2])
    return newest


def newest_known(store: ObjectStore, disk_key: str, memory: SeenGenerations | None) -> int | None:
    """As `newest_generation`. Raises Corrupt when this machine has seen a newer one."""
    if memory is None:
        return newest_generation(store, disk_key)
    floor = memory.floor(disk_key)
    newest = newest_generation(store, disk_key)
    memory.note(disk_key, newest or 0, floor)
    return newest


def generation_names(store: ObjectStore, disk_key: str) -> Iterator[str]:
    """The generations stored of a disk, ascending."""
    return (info.name for info in store.list(f"disks/{disk_key}/") if is_generation(info.name))


def is_generation(name: str) -> bool:
    """Whether an object below disks/ is a catalogue; there may be claims beside them (objects/exclusive.py)."""
    folder, _, number = name.rpartition("/")
    return number.isdecimal() and name == generation_name(folder.removeprefix("disks/"), int(number))


def read_any(
    store: ObjectStore, keys: Keyring, disk_key: str, memory: SeenGenerations | None = None
) -> Catalogue | None:
    """The newest catalogue in a disk's folder, whatever the disk's name."""
    for attempt in range(ATTEMPTS):
        newest = newest_known(store, disk_key, memory)
        if newest is None:
            return None
        name = generation_name(disk_key, newest)
        try:
            return parse(keys, name, store.get(name))[0]
        except NotFound as error:
            if attempt == ATTEMPTS - 1:
                raise _vanished(name) from error
    raise AssertionError("the loop returns or raises")


def _vanished(name: str) -> Corrupt:
    return Corrupt("the store lists the catalogue and does not have it", subject=name)


def parse(keys: Keyring, name: str, data: bytes) -> tuple[Catalogue, str]:
    """A catalogue as stored, and the hash of its object. Raises Corrupt, or Unsupported for a newer one."""
    body = unseal(keys, KIND, name, data)
    return parse_stored(Catalogue, body, what="the catalogue", subject=name), blake3.blake3(data).hexdigest()


def find_point(catalogue: Catalogue, wanted: str | None) -> Point:
    """The point that the text after '@' of an address means, in this machine's time zone. Raises NotFound."""
    return chosen_point(catalogue.disk, catalogue.points, in_full(wanted))
