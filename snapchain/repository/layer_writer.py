"""Puts layers into a repository: data, then pages, then the index, then the record.  A point is published apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, Self

from snapchain.errors import SnapchainError
from snapchain.model.compression import LEVELS, Compression, Effort, next_effort
from snapchain.model.content import content_id, encode_sum
from snapchain.model.fingerprint import Fingerprint
from snapchain.repository import layers as records
from snapchain.repository.format import fresh_id
from snapchain.repository.ingest import Ingest, LayerSource
from snapchain.repository.layers import LayerHeader, StoredLayer
from snapchain.repository.packer import Packer
from snapchain.repository.repository import Repository
from snapchain.repository.tidying import tidy
from snapchain.repository.unlisted import adoptable


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a layer comes from: see LayerHeader."""

    name: str
    image_format: Literal["qcow2", "raw"]
    cluster_size: int
    sources: tuple[Fingerprint, ...]


class CompressionLevel:
    """The level of zstd for the next blob. Read by any thread; `note_waited` is called by one at a time."""

    def __init__(self, mode: Compression, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fixed = LEVELS.get(mode)
        self._effort = Effort()
        self._clock, self._last = clock, clock()

    def current(self) -> int:
        """Of zstd."""
        return self._effort.level if self._fixed is None else self._fixed

    def note_waited(self, seconds: float) -> None:
        """A full pack has waited so long until the store took it."""
        now = self._clock()
        self._effort = next_effort(self._effort, waited=seconds, elapsed=now - self._last)
        self._last = now


class LayerUpload:
    """A writing session; a context manager. index: what it knows of the blobs, and what was added since."""

    def __init__(self, repository: Repository, *, on_durable: Callable[[], None] = lambda: None) -> None:
        """on_durable: called in any thread when something has become durable; what it raises ends the work."""
        self._repository = repository
        self.index = repository.near_index()
        level = CompressionLevel(repository.compression)
        self._packer = Packer(
            repository.store,
            repository.keys,
            self.index,
            pack_size=repository.pack_size,
            on_durable=on_durable,
            on_waited=level.note_waited,
        )
        self._packer.adopt(adoptable(repository.store, repository.keys, self.index))
        self._intake = Ingest(
            keys=repository.keys,
            index=self.index,
            packer=self._packer,
            block_size=repository.config.block_size,
            level=level.current,
        )
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._packer.__exit__(kind, error, trace)
        if error is None:
            repository = self._repository
            repository.blobs.damaged |= self.index.avoid & self.index.sizes.keys()
            with suppress(SnapchainError):  # the layers are stored: what is left is for the next one
                repository.record_damage()
                tidy(repository.store, repository.keys, self.index, pack_size=repository.pack_size)

    @property
    def bytes_stored(self) -> int:
        """Bytes of packs sent to the store so far."""
        return self._packer.bytes_stored

    @property
    def bytes_pending(self) -> int:
        """Guest bytes that were read and are not in the store yet."""
        return self._packer.bytes_pending

    def add(
        self,
        source: LayerSource,
        below: Sequence[StoredLayer],
        origin: Origin,
        *,
        on_bytes: Callable[[int], None],
        confirm: Callable[[], None],
    ) -> StoredLayer:
        """Take in one layer on the chain `below` (root first); durable and complete on return.

        confirm: called when all is read and before the record is written; raises when the source changed meanwhile.
        """
        taken = self._intake.take(source, below, on_bytes)
        self.bytes_read += taken.bytes_read
        self._packer.flush()
        confirm()
        header = LayerHeader(
            id=fresh_id(),
            size=source.size,
            time=datetime.now(UTC),
            name=origin.name,
            image_format=origin.image_format,
            cluster_size=origin.cluster_size,
            sources=origin.sources,
            data_bytes=taken.data_bytes,
            zero_bytes=taken.zero_bytes,
            content_sum=encode_sum(taken.total),
            content_id=content_id(source.size, taken.total),
        )
        records.write(self._repository.store, self._repository.keys, header, taken.pages)
        return self._repository.written(header, taken.pages)
