"""The catalogue of a disk: all its points and the layers that give them, in one small object.

Every change (a point published, points dropped, layers merged) is the next generation, made by one
create-if-absent of disks/DISK/NUMBER.  So each change is atomic however much it touches, two writers can never both
succeed, and the generations before are the history that a repair can go back to.  A generation is never changed.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from datetime import datetime
from itertools import pairwise
from typing import Literal, Self

import blake3
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from snapchain.errors import Conflict, Corrupt, NotFound
from snapchain.objects.exclusive import create_exclusively
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal, unseal
from snapchain.repository.format import generation_name

KIND = b"C"


class Point(BaseModel):
    """A restorable moment of a disk. layer: the top of the chain that gives it; size: virtual, bytes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    point: int = Field(ge=1)
    time: AwareDatetime
    labels: tuple[str, ...] = ()
    layer: str
    size: int = Field(ge=0)
    content_id: str


class Catalogue(BaseModel):
    """One generation.

    previous: BLAKE3 of the object of the generation before, "" at the first
    parents: layer -> the layer below it, None at a root
    epoch: who may write the disk, grows at each failover; nonce: tells our own write from another's
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    disk: str
    generation: int = Field(ge=1)
    previous: str
    nonce: str
    time: AwareDatetime
    epoch: int = Field(ge=1)
    next_point: int = Field(ge=1)
    points: tuple[Point, ...]
    parents: Mapping[str, str | None]

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        numbers = [*(point.point for point in self.points), self.next_point]
        if any(upper <= lower for lower, upper in pairwise(numbers)):
            raise ValueError("its points do not ascend")
        return self

    def chain(self, layer: str) -> tuple[str, ...]:
        """The layers that end in `layer`, root first. Raises Corrupt when a link is missing or goes in circles."""
        chain: list[str] = []
        at: str | None = layer
        while at is not None:
            if at not in self.parents or len(chain) == len(self.parents):
                raise Corrupt(f"the chain of layer {layer} is broken at {at}", subject=self.disk)
            chain.append(at)
            at = self.parents[at]
        return tuple(reversed(chain))

    @property
    def latest(self) -> Point | None:
        """The newest point."""
        return self.points[-1] if self.points else None


class Disk:
    """Reads and advances the catalogue of one disk.

    conditional: whether the store's create-if-absent can be trusted; if not, see objects/exclusive.py
    """

    def __init__(self, store: ObjectStore, keys: Keyring, name: str, *, conditional: bool) -> None:
        self.name = name
        self._store, self._keys, self._conditional = store, keys, conditional
        self._key = keys.disk_key(name)

    def read(self) -> tuple[Catalogue, str] | None:
        """The newest generation and the hash of its object; None when the disk has none."""
        newest = newest_generation(self._store, self._key)
        return None if newest is None else self._load(newest)

    def existing(self) -> tuple[Catalogue, str]:
        """Like `read`. Raises NotFound when the disk has no catalogue."""
        found = self.read()
        if found is None:
            url = self._store.url
            raise NotFound(f"there is no disk {self.name!r} here", subject=url, hint=f"snapchain log {url}")
        return found

    def _load(self, generation: int) -> tuple[Catalogue, str]:
        name = generation_name(self._key, generation)
        catalogue, digest = parse(self._keys, name, self._store.get(name))
        if catalogue.disk != self.name or catalogue.generation != generation:
            raise Corrupt("the catalogue belongs to another disk or generation", subject=name)
        return catalogue, digest

    def advance(
        self, current: tuple[Catalogue, str] | None, *, time: datetime, **change: object
    ) -> tuple[Catalogue, str]:
        """Publish the next generation after `current`, with `change` (fields of Catalogue); gives what `read` would.

        Raises Conflict when somebody else published it first: read again and decide anew.
        """
        base: dict[str, object] = (
            {"disk": self.name, "epoch": 1, "next_point": 1, "points": (), "parents": {}, "generation": 0}
            if current is None
            else dict(current[0])
        )
        generation = 1 if current is None else current[0].generation + 1
        base.update(change)
        base.update(
            generation=generation,
            previous="" if current is None else current[1],
            nonce=secrets.token_hex(16),
            time=time,
        )
        catalogue = Catalogue.model_validate(base)
        name = generation_name(self._key, generation)
        sealed = seal(self._keys, KIND, name, catalogue.model_dump_json().encode())
        if not create_exclusively(self._store, name, sealed, conditional=self._conditional):
            raise Conflict(
                "another snapchain changed this disk at the same time", subject=self.name, hint="run the command again"
            )
        return catalogue, blake3.blake3(sealed).hexdigest()


def newest_generation(store: ObjectStore, disk_key: str) -> int | None:
    """The highest generation stored of a disk."""
    newest = None
    for name in generation_names(store, disk_key):
        newest = int(name.rpartition("/")[2])
    return newest


def generation_names(store: ObjectStore, disk_key: str) -> Iterator[str]:
    """The generations stored of a disk, ascending."""
    return (info.name for info in store.list(f"disks/{disk_key}/") if is_generation(info.name))


def is_generation(name: str) -> bool:
    """Whether an object below disks/ is a catalogue; there may be claims beside them (objects/exclusive.py)."""
    folder, _, number = name.rpartition("/")
    return number.isdecimal() and name == generation_name(folder.removeprefix("disks/"), int(number))


def read_any(store: ObjectStore, keys: Keyring, disk_key: str) -> Catalogue | None:
    """The newest catalogue in a disk's folder, whatever the disk's name."""
    newest = newest_generation(store, disk_key)
    if newest is None:
        return None
    name = generation_name(disk_key, newest)
    try:
        return parse(keys, name, store.get(name))[0]
    except NotFound as error:
        raise Corrupt("the catalogue vanished while it was read", subject=name) from error


def parse(keys: Keyring, name: str, data: bytes) -> tuple[Catalogue, str]:
    """A catalogue as stored, and the hash of its object. Raises Corrupt."""
    body = unseal(keys, KIND, name, data)
    try:
        return Catalogue.model_validate_json(body), blake3.blake3(data).hexdigest()
    except ValidationError as error:
        first = error.errors()[0]
        raise Corrupt(f"the catalogue is unsound: {first['loc']}: {first['msg']}", subject=name) from error
