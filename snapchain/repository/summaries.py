"""All disks of a repository at a glance. What costs is the listing, and the catalogues that are new to this machine.

A generation is never changed, so a line made from one is true for good.  Lines are kept in this user's cache directory,
encrypted as the repository is, and used again while the store lists the same object: generation, size and time.  The
cache is never needed: one that is missing, damaged or of other keys is made anew.

What this machine knows of the generations counts as in `Repository.catalogues` (known.py), except that one disk that is
older than it was, or that cannot be read, hides no other: it is a summary with its trouble.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain

import zstandard

from snapchain.destination.records import Finding
from snapchain.destination.summary import DiskSummary, PointSummary, possible_guest, with_guests
from snapchain.errors import Corrupt, NotFound, SnapchainError, Unavailable
from snapchain.host.private import PrivateDirectory
from snapchain.host.records import cache_dir
from snapchain.model.freshness import has_gone_back
from snapchain.objects.store import ObjectInfo, Refused
from snapchain.repository.catalogue import generation_names, is_generation
from snapchain.repository.crypto import SALT_BYTES, Keyring, decrypt
from snapchain.repository.envelope import decompress
from snapchain.repository.glance import glance
from snapchain.repository.repository import Repository

GUESTS = "guests/"
"""Where the states of guests are (guest_states.py)."""
_THREADS = 16
_THREADS_HERE = 2
"""For a local directory: while one unpacks, or waits for the disk, the other one parses."""
_LOT = 16
"""Catalogues that such a thread reads before it takes others: to hand out each by itself would cost time."""
_SHARES = "0123456789abcdef"
"""First digits of a disk's folder: a remote store with more than _MANY disks is listed in as many shares at once."""
_MANY = 200
_OLDER = 3
"""Generations that are tried for the name of a disk whose newest one cannot be read."""
_LARGEST = 256 << 20
_NONCE = bytes(12)


def summaries(repository: Repository, now: datetime) -> tuple[DiskSummary, ...]:
    """All disks by name. now: the clock, see model/freshness.py

    Raises Unavailable where the store does not answer.
    """
    memory = repository.memory
    floors = {} if memory is None else memory.floors()
    lines = _read_lines(repository)
    listed = _listed(repository, is_large=len(lines) > _MANY)
    found: dict[str, _Line] = {}
    troubles: dict[str, SnapchainError] = {}
    unread: list[str] = []
    for key in sorted(listed.keys() | floors.keys()):
        history = listed.get(key, ())
        line = lines.get(key)
        try:
            if memory is not None:
                memory.note(key, _generation(history[-1].name) if history else 0, floors.get(key, 0))
        except Corrupt as error:
            troubles[key] = error
            continue
        if not history:
            continue
        if line is not None and line.is_of(history[-1]) and not has_gone_back(line.newest, line.points, now):
            found[key] = line
        else:
            unread.append(key)
    for key, result in zip(unread, _each(repository, unread, listed, now), strict=True):
        if isinstance(result, SnapchainError):
            troubles[key] = result
        else:
            found[key] = result
    if memory is not None:
        memory.flush()
    if found != lines:
        _write_lines(repository, found)
    names = {key: _name(repository, key, lines.get(key), listed.get(key, ()), now) for key in troubles}
    broken = [DiskSummary(name=name, trouble=Finding.of(troubles[key], name, ())) for key, name in names.items()]
    states = set(repository.store.list_dirs(GUESTS))
    return with_guests(
        [*(line.summary(repository.keys, states) for line in found.values() if not line.is_renamed), *broken]
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """What one generation gives. size, modified: of its object; newest: (point, time, virtual size)

    is_of_guest: whether its name or its points tell of a guest; is_renamed: whether only its new name is left
    """

    generation: int
    size: int
    modified: float | None
    name: str
    epoch: int
    points: int
    layers: int
    is_of_guest: bool
    is_renamed: bool
    newest: tuple[PointSummary, ...]

    def is_of(self, info: ObjectInfo) -> bool:
        """Whether it was made from this object."""
        return (self.generation, self.size, self.modified) == (_generation(info.name), info.size, info.modified)

    def summary(self, keys: Keyring, states: set[str]) -> DiskSummary:
        """The disk. states: keys of the guests of which a state is recorded"""
        above = possible_guest(self.name)
        belongs = above is not None and (self.is_of_guest or (bool(states) and keys.disk_key(above) in states))
        return DiskSummary(
            name=self.name,
            epoch=self.epoch,
            points=self.points,
            layers=self.layers,
            newest=self.newest,
            guest=above if belongs else None,
        )

    def row(self) -> list[object]:
        """As the cache has it."""
        newest = [[each.point, each.time.isoformat(), each.virtual_size] for each in self.newest]
        return [
            self.generation,
            self.size,
            self.modified,
            self.name,
            self.epoch,
            self.points,
            self.layers,
            self.is_of_guest,
            self.is_renamed,
            newest,
        ]

    @classmethod
    def of_row(cls, row: Sequence[object]) -> _Line:
        """Raises ValueError or TypeError for what is no row."""
        *fields, newest = row
        if not isinstance(newest, list):
            raise TypeError
        points = tuple(
            PointSummary(point=number, time=datetime.fromisoformat(time), virtual_size=size)
            for number, time, size in newest
        )
        return cls(*fields, points)  # type: ignore[call-arg, arg-type]


def _listed(repository: Repository, *, is_large: bool) -> dict[str, list[ObjectInfo]]:
    """The generations of each disk, ascending, by the disk's key. is_large: whether many disks are known"""
    store = repository.store

    def share(first: str) -> list[ObjectInfo]:
        return [info for info in store.list(f"disks/{first}") if is_generation(info.name)]

    found: dict[str, list[ObjectInfo]] = {}
    if is_large and store.properties.is_remote:
        with ThreadPoolExecutor(_THREADS, "listing") as pool:
            shares: Iterable[list[ObjectInfo]] = list(pool.map(share, _SHARES))
    else:
        shares = [share("")]
    for info in (each for some in shares for each in some):
        found.setdefault(info.name.split("/")[1], []).append(info)
    return found


def _each(
    repository: Repository, keys: Sequence[str], listed: Mapping[str, Sequence[ObjectInfo]], now: datetime
) -> Iterator[_Line | SnapchainError]:
    """The line of each disk, read anew, or why there is none; in the order given."""

    def one(key: str) -> _Line | SnapchainError:
        try:
            return _line(repository, key, listed[key][-1], now)
        except Refused as error:
            return error.detached()
        except Unavailable as error:
            if repository.store.properties.is_remote:  # it is so for all disks
                raise
            return error.detached()
        except SnapchainError as error:
            return error.detached()

    def some(keys: Sequence[str]) -> list[_Line | SnapchainError]:
        return list(map(one, keys))

    threads, lot = (_THREADS, 1) if repository.store.properties.is_remote else (_THREADS_HERE, _LOT)
    with ThreadPoolExecutor(threads, "catalogues") as pool:
        lots = (keys[at : at + lot] for at in range(0, len(keys), lot))
        yield from chain.from_iterable(pool.map(some, lots))


def _line(repository: Repository, key: str, info: ObjectInfo, now: datetime) -> _Line:
    """Read a generation; where it was collected since it was listed, the newest. Raises Corrupt, Unsupported."""
    try:
        data = repository.store.get(info.name)
    except NotFound:
        names = list(generation_names(repository.store, key))
        if not names or names[-1] == info.name:
            raise Corrupt("the store lists the catalogue and does not have it", subject=info.name) from None
        info = ObjectInfo(names[-1], -1)  # of no object that will be listed: the line is not used again
        data = repository.store.get(info.name)
    found, generation = glance(repository.keys, info.name, data, now)
    if repository.keys.disk_key(found.name) != key or generation != _generation(info.name):
        raise Corrupt("the catalogue belongs to another disk or generation", subject=info.name)
    return _Line(
        generation=generation,
        size=info.size,
        modified=info.modified,
        name=found.name,
        epoch=found.epoch,
        points=found.points,
        layers=found.layers,
        is_of_guest=found.guest is not None,
        is_renamed=found.renamed,
        newest=found.newest,
    )


def _name(repository: Repository, key: str, line: _Line | None, history: Sequence[ObjectInfo], now: datetime) -> str:
    """The name of a disk whose newest catalogue is of no use: by what was known of it, or by an older one."""
    if line is not None:
        return line.name
    for info in reversed(history[-_OLDER - 1 :]):
        with suppress(SnapchainError):
            return _line(repository, key, info, now).name
    return f"unknown disk {key}"


def _generation(name: str) -> int:
    return int(name.rpartition("/")[2])


# --- The cache: one file a repository, a salt and the sealed rows.


def _read_lines(repository: Repository) -> dict[str, _Line]:
    with suppress(SnapchainError, OSError, RuntimeError, ValueError, TypeError):
        with PrivateDirectory(cache_dir() / "summaries") as directory:
            data = directory.read(repository.config.id, cap=_LARGEST)
        cipher = repository.keys.record_cipher(data[:SALT_BYTES])
        packed = decrypt(cipher, _NONCE, data[SALT_BYTES:], _bound_to(repository), subject="summaries")
        rows = json.loads(decompress(packed, _LARGEST, subject="summaries"))
        return {key: _Line.of_row(row) for key, row in rows.items()}
    return {}


def _write_lines(repository: Repository, lines: Mapping[str, _Line]) -> None:
    text = json.dumps({key: line.row() for key, line in lines.items()}).encode()
    salt = secrets.token_bytes(SALT_BYTES)
    packed = zstandard.ZstdCompressor(level=3).compress(text)
    sealed = repository.keys.record_cipher(salt).encrypt(_NONCE, packed, _bound_to(repository))
    with (
        suppress(SnapchainError, OSError, RuntimeError),
        PrivateDirectory(cache_dir(), make=True),
        PrivateDirectory(cache_dir() / "summaries", make=True) as directory,
    ):
        directory.write(repository.config.id, salt + sealed)


def _bound_to(repository: Repository) -> bytes:
    return b"snapchain summaries 1" + repository.keys.repository
