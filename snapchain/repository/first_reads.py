"""What clients of a served point read first (model/first_reads.py), as a repository keeps it: one object for each disk.

    reads/DISK      kind R, sealed, replaced; body: n * FIRST_READS_ROW, in the order in which they were read

Only the speed of `serve` depends on it.  Programs that do not know it ignore it; a collector leaves it alone.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.model.first_reads import MOST_LEAVES, FirstReads, size_of
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal, unseal
from snapchain.repository.format import FIRST_READS_ROW, first_reads_name

KIND = b"R"
_MOST_LEAF = 1 << 40
"""Of the largest disk: 2^56 bytes."""


@dataclass(frozen=True, slots=True)
class StoredFirstReads:
    """The record of one disk."""

    store: ObjectStore
    keys: Keyring
    disk: str

    def read(self) -> FirstReads:
        """Nothing where none is stored. Raises Corrupt, Unsupported for a newer one, Unavailable."""
        name = self._name
        try:
            body = unseal(self.keys, KIND, name, self.store.get(name))
        except NotFound:
            return ()
        try:
            rows = np.frombuffer(body, FIRST_READS_ROW)
        except ValueError as error:
            raise Corrupt(f"the record of first reads is unsound: {error}", subject=name) from error
        found = tuple((int(row["first"]), int(row["count"])) for row in rows[: MOST_LEAVES + 1])
        is_sound = all(count and first < _MOST_LEAF and count <= MOST_LEAVES for first, count in found)
        if not is_sound or size_of(found) > MOST_LEAVES:
            raise Corrupt("the record of first reads is unsound: more than a program records", subject=name)
        return found

    def write(self, reads: FirstReads) -> None:
        """Store it in the place of the one before. Raises as the store does."""
        body = np.array(list(reads), FIRST_READS_ROW).tobytes()
        self.store.put(self._name, seal(self.keys, KIND, self._name, body))

    @property
    def _name(self) -> str:
        return first_reads_name(self.keys.disk_key(self.disk))


def move(old: StoredFirstReads, new: StoredFirstReads) -> None:
    """Give it to the new name of a disk. Where that fails, it is recorded again."""
    with suppress(SnapchainError):
        if reads := old.read():
            new.write(reads)
            old.store.delete(old._name)  # noqa: SLF001 - of the same class
