"""What this host has sent to a replica's disk: the content id of each view when it was read here, by its file.

A replica reports from which files each layer was made, and `verify` on its own host compares the layer with the record
there.  Both depend on that host.  This record is kept here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from snapchain.errors import NotFound
from snapchain.host.private import read_record, write_record
from snapchain.host.records import state_dir
from snapchain.image import ImageChain
from snapchain.model.content import content_id
from snapchain.model.fingerprint import short_key
from snapchain.replica.stream.fields import Digest
from snapchain.replica.stream.messages import HeldLayer
from snapchain.source.counted_sums import CountedSums

_MOST = 4096
"""Views of one disk: one a night for eleven years."""
_LARGEST = _MOST * 128
_Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]


class _Sent(BaseModel):
    """The file. shown: content ids by the uppermost file of each view, the last ones at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    disk: str
    shown: dict[_Key, Digest] = Field(max_length=_MOST)


class SentViews:
    """Of one disk at one replica."""

    def __init__(self, destination: str, disk: str) -> None:
        """Raises Corrupt for a record that cannot be believed."""
        self._disk = f"{destination}::{disk}"
        self._shown: dict[str, str] = {}
        try:
            self._path = state_dir() / "sent" / f"{blake3(self._disk.encode()).hexdigest(length=16)}.json"
            self._shown = dict(read_record(self._path, _Sent, cap=_LARGEST).shown)
        except (NotFound, RuntimeError):  # no home directory
            pass

    def __bool__(self) -> bool:
        return bool(self._shown)

    def note(self, chain: ImageChain, sums: CountedSums) -> None:
        """The replica has all of a chain. Raises what writing a small file raises."""
        before = dict(self._shown)
        for number, file in enumerate(chain.files, 1):
            source, total = file.fingerprint, sums.of(chain, number)
            if source.size and total is not None:
                self._shown[short_key(source).raw.hex()] = content_id(file.size, total)
        if self._shown != before:
            kept = dict(list(self._shown.items())[-_MOST:])
            write_record(self._path, _Sent(disk=self._disk, shown=kept))

    def contradicted(self, layers: Sequence[HeldLayer]) -> list[tuple[int, str]]:
        """The layers whose content is not that of their uppermost file here: number, and the content id from here."""
        found = []
        for number, layer in enumerate(layers):
            here = self._shown.get(short_key(layer.sources[-1]).raw.hex()) if layer.sources else None
            if here is not None and here != layer.content_id:
                found.append((number, here))
        return found
