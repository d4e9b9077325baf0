"""Packs and layers that are to be deleted, said before it is done: so gc works beside writers.

A writer may be about to name a pack that no record names yet: it has just stored it, or an index told of it.  So a
collector does not delete what it finds unused.  It *condemns* it first, and deletes it later:

    index/condemned-NAME   packs and layers that are to go. Who begins after this is stored finds no blob in such a pack
    index/awaited-NAME     the leases of the writers that were there after that: these may still rely on such packs

Once all of those have ended, or can no longer publish (fence.py), nobody can begin to name what was condemned.  What no
catalogue names then never will be, and is deleted, however late.

What a catalogue does name by then stays condemned for ever: others may have decided on it while it was unused.  So gc
moves what is needed out of such packs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, TypeVar

from snapchain.errors import Corrupt
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import Many, StoredModel, made_by, parse as parse_stored, seal, unseal
from snapchain.repository.format import awaited_name, condemned_name, fresh_id, is_awaited, is_condemned

KIND = b"X"
Record = TypeVar("Record", bound=StoredModel)
_MOST = 100_000
"""Packs and layers of one record: 4 MiB."""


class CondemnedRecord(StoredModel):
    """What is to go. packs, layers: their ids."""

    format: Literal[1] = 1
    time: datetime
    packs: Many[str] = ()
    layers: Many[str] = ()
    made_by: str | None = None


class AwaitedRecord(StoredModel):
    """For whom that waits. condemned: names of the objects above; leases: names of the leases there were after them."""

    format: Literal[1] = 1
    time: datetime
    condemned: Many[str]
    leases: Many[str]
    made_by: str | None = None


@dataclass(slots=True)
class Condemned:
    """What the store says is to go, by the names of the objects that say so.

    packs, layers: of each `condemned` object; awaits: of each `awaited` object, the `condemned` objects that it is
    about, and the leases
    unreadable: objects of either kind that are damaged, and what is wrong with them
    """

    packs: dict[str, frozenset[str]] = field(default_factory=dict)
    layers: dict[str, frozenset[str]] = field(default_factory=dict)
    awaits: dict[str, tuple[frozenset[str], frozenset[str]]] = field(default_factory=dict)
    unreadable: dict[str, Corrupt] = field(default_factory=dict)

    @property
    def all_packs(self) -> frozenset[str]:
        """All packs that are to go."""
        return frozenset().union(*self.packs.values())

    @property
    def all_layers(self) -> frozenset[str]:
        """All layers that are to go."""
        return frozenset().union(*self.layers.values())

    def unsettled(self) -> list[str]:
        """The records of which nobody has said yet for whom they wait."""
        settled = {name for about, _ in self.awaits.values() for name in about}
        return [name for name in self.packs if name not in settled]

    def ready(self, at_work: Collection[str]) -> list[str]:
        """The records that wait for nobody any more. at_work: the leases of writers that have not ended."""
        here = set(at_work)
        ended = {name for about, leases in self.awaits.values() if not leases & here for name in about}
        return [name for name in self.packs if name in ended]

    def over(self, gone: Collection[str]) -> list[str]:
        """The `awaited` objects that are about none but these `condemned` ones, or about none that is there."""
        left = self.packs.keys() - set(gone)
        return [name for name, (about, _) in self.awaits.items() if not about & left]


def read(store: ObjectStore, keys: Keyring, names: Iterable[str]) -> Condemned:
    """What these objects say; names of other kinds are passed over. Raises NotFound for one that is gone."""
    found = Condemned()
    for name in names:
        try:
            if is_condemned(name):
                said = _parsed(CondemnedRecord, store, keys, name)
                found.packs[name], found.layers[name] = frozenset(said.packs), frozenset(said.layers)
            elif is_awaited(name):
                about = _parsed(AwaitedRecord, store, keys, name)
                found.awaits[name] = frozenset(about.condemned), frozenset(about.leases)
        except Corrupt as error:
            found.unreadable[name] = error
    return found


def condemn(
    store: ObjectStore, keys: Keyring, packs: Collection[str], layers: Collection[str]
) -> Mapping[str, CondemnedRecord]:
    """Store that these are to go; the records by their names."""
    made = {}
    for some_packs, some_layers in _portions(sorted(packs), sorted(layers)):
        name = condemned_name(fresh_id())
        record = CondemnedRecord(
            time=datetime.now(UTC), packs=tuple(some_packs), layers=tuple(some_layers), made_by=made_by()
        )
        store.put(name, seal(keys, KIND, name, record.model_dump_json().encode()))
        made[name] = record
    return made


def wait_for(store: ObjectStore, keys: Keyring, condemned: Collection[str], leases: Collection[str]) -> str:
    """Store for whom these records wait; the name. leases: all of writers that were listed after the records."""
    name = awaited_name(fresh_id())
    record = AwaitedRecord(
        time=datetime.now(UTC), condemned=tuple(sorted(condemned)), leases=tuple(sorted(leases)), made_by=made_by()
    )
    store.put(name, seal(keys, KIND, name, record.model_dump_json().encode()))
    return name


def _portions(packs: Sequence[str], layers: Sequence[str]) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    for at in range(0, max(len(packs), len(layers)), _MOST):
        yield packs[at : at + _MOST], layers[at : at + _MOST]


def _parsed(model: type[Record], store: ObjectStore, keys: Keyring, name: str) -> Record:
    body = unseal(keys, KIND, name, store.get(name))
    return parse_stored(model, body, what="the record of what is to be deleted", subject=name)
