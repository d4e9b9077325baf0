"""What was read and found good, and when: so that verify takes turns, goes on after an interruption, and can be asked.

An object verified/NAME (kind V), written once; all of them together are what is known, the newest time of each counts:

    u32     bytes of the header
            header, JSON: Header
            n * VERIFIED_ROW      packs of which every byte was read and found good, and layers whose leaves were proven

It says nothing about what was not there yet: a pack that gc wrote, or a layer that a merge wrote, has no row.  No other
program relies on it, and one that is lost costs reading again.  A collector leaves these objects alone; verify puts
them together, and drops the rows of what is gone.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Literal

import numpy as np
from pydantic import AwareDatetime, Field

from snapchain.errors import Corrupt, SnapchainError
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.damage import list_packs
from snapchain.repository.envelope import Many, StoredModel, made_by, parse as parse_stored, seal, unseal
from snapchain.repository.format import VERIFIED_ROW, fresh_id, is_verified, verified_name

KIND = b"V"
MOST_ROWS = 200_000
"""Rows of one object, 5 MB: those of more have several."""
_MOST_DISKS = 20_000
_MOST_KNOWN = 2_000_000
"""Packs and layers that are kept in memory: as many as a listing may have. More are as if they were never read."""
_MANY = 8
"""Objects of which one is made."""
_LENGTH = struct.Struct("<I")


class Reading(StoredModel):
    """A run that was to read everything. disk: the one that it was about, None: all; finished: it came to its end."""

    disk: str | None
    began: AwareDatetime
    finished: bool


class DiskVerified(StoredModel):
    """What a run found out about one disk.

    time: of that run; generation: of the catalogue that it read; findings: how many
    since: all data of that generation was read and found good at this time or later; None: not all of it was
    """

    disk: str
    generation: int = Field(ge=1)
    time: AwareDatetime
    since: AwareDatetime | None
    findings: int = Field(ge=0)


class Header(StoredModel):
    """The JSON of one object."""

    format: Literal[1] = 1
    time: AwareDatetime
    readings: Many[Reading] = ()
    disks: Many[DiskVerified] = ()
    made_by: str | None = None


@dataclass(slots=True)
class Verified:
    """What is known, put together. times: pack or layer -> seconds since 1970; names: the objects it was read from."""

    times: dict[str, int] = field(default_factory=dict)
    readings: dict[str | None, Reading] = field(default_factory=dict)
    disks: dict[str, DiskVerified] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def note(self, ids: Mapping[str, int]) -> None:
        """Packs or layers that were found good at these times."""
        for each, time in ids.items():
            if each in self.times or len(self.times) < _MOST_KNOWN:
                self.times[each] = max(time, self.times.get(each, 0))

    def note_reading(self, reading: Reading) -> None:
        """A run that reads everything; of each disk the one that began last counts."""
        known = self.readings.get(reading.disk)
        if known is None or (known.began, known.finished) < (reading.began, reading.finished):
            self.readings[reading.disk] = reading

    def note_disk(self, found: DiskVerified) -> None:
        """What a run found out about a disk; the last one counts."""
        known = self.disks.get(found.disk)
        if known is None or known.time <= found.time:
            self.disks[found.disk] = found


def read(store: ObjectStore, keys: Keyring) -> Verified:
    """All that is known. An object that cannot be read says nothing: what it was about is read again."""
    found = Verified()
    for info in store.list("verified/"):
        if not is_verified(info.name):
            continue
        try:
            header, times = parse(keys, info.name, store.get(info.name))
        except SnapchainError:
            continue
        found.names.append(info.name)
        found.note(times)
        for reading in header.readings:
            found.note_reading(reading)
        for disk in header.disks:
            found.note_disk(disk)
    return found


def parse(keys: Keyring, name: str, data: bytes) -> tuple[Header, dict[str, int]]:
    """The header of an object, and pack or layer -> seconds since 1970. Raises Corrupt, or Unsupported for a newer."""
    body = unseal(keys, KIND, name, data)
    try:
        (length,) = _LENGTH.unpack_from(body)
        rows = np.frombuffer(body, VERIFIED_ROW, offset=_LENGTH.size + length)
    except (ValueError, struct.error) as error:
        raise Corrupt(f"the record of what was verified is unsound: {error}", subject=name) from error
    text = body[_LENGTH.size : _LENGTH.size + length]
    header = parse_stored(Header, text, what="the record of what was verified", subject=name)
    latest = int(datetime.now(UTC).timestamp())
    # A time of the future, of a clock that was wrong, would keep a pack from being read for as long.
    return header, {row["id"].tobytes().hex(): int(row["time"]) for row in rows if 0 < int(row["time"]) <= latest}


def write(
    store: ObjectStore,
    keys: Keyring,
    times: Mapping[str, int],
    *,
    readings: Collection[Reading] = (),
    disks: Collection[DiskVerified] = (),
) -> list[str]:
    """Store this, in as many objects as it takes; their names."""
    names: list[str] = []
    waiting, further, said = iter(times.items()), iter(disks), tuple(readings)
    while True:
        rows = list(islice(waiting, MOST_ROWS))
        some = tuple(islice(further, _MOST_DISKS))
        if names and not rows and not some:
            return names
        table = np.array([(list(bytes.fromhex(each)), time) for each, time in rows], VERIFIED_ROW)
        header = Header(time=datetime.now(UTC), readings=said, disks=some, made_by=made_by())
        text = header.model_dump_json().encode()
        name = verified_name(fresh_id())
        store.put(name, seal(keys, KIND, name, _LENGTH.pack(len(text)) + text + table.tobytes()))
        names.append(name)
        said = ()


def put_together(store: ObjectStore, keys: Keyring, known: Verified, *, avoid: Collection[str]) -> None:
    """Make one object of many, without packs and layers that are gone, or damaged (avoid).

    The first is deleted before the new one is written: who may not delete would add one at each run. Raises as the
    store does where nothing may be deleted.
    """
    if len(known.names) <= _MANY:
        return
    there = list_packs(store).keys() | {info.name.rpartition("/")[2] for info in store.list("layers/")}
    first, *others = known.names
    store.delete(first)
    left = {each: time for each, time in known.times.items() if each in there and each not in avoid}
    known.names = write(store, keys, left, readings=known.readings.values(), disks=known.disks.values())
    for name in others:
        store.delete(name)


def last_verified(store: ObjectStore, keys: Keyring) -> dict[str, datetime | None]:
    """disk -> all data that it had then was read and found good at this time or later; None: not all of it was.

    Disks that no run has read data of are missing. Costs what the records hold, not what the repository does.
    """
    return dict(_since(read(store, keys)))


def _since(known: Verified) -> Iterator[tuple[str, datetime | None]]:
    for disk, found in known.disks.items():
        yield disk, found.since
