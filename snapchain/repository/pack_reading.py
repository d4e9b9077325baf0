"""Reads packs whole, each stored byte once and in order, and proves each blob: it decrypts to the bytes of its id.

    directory of the pack -> its blobs, by offset -> decrypt -> unpack -> BLAKE3 of each 64 KiB -> id

So a record that names a blob by its id needs no reading of its own: what the id says of the bytes is proven here.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import blake3
import numpy as np
import numpy.typing as npt

from snapchain.errors import Corrupt, NotFound, SnapchainError
from snapchain.model.content import LEAF_BYTES
from snapchain.objects.store import ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.format import pack_name
from snapchain.repository.packs import FIRST_BLOB, TRAILER, PackReader, directory_of

WORKERS = 4
"""More than cores: on object storage the wait is for the network."""
_AT_ONCE = 16 * 1024 * 1024
"""Bytes of a pack that are asked for together: a pack of ordinary size is one request."""

Marks = npt.NDArray[np.uint64]
_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))


@dataclass(frozen=True, slots=True, eq=False)
class PackRead:
    """What came of reading a pack.

    marks: u64[n], ascending, of the blobs that are whole; raw: their plain bytes
    errors: (offset of a blob, or None for the pack itself; what is wrong)
    is_gone: it was there when packs were listed, and was collected since
    """

    pack: str
    size: int
    marks: Marks
    raw: int = 0
    errors: tuple[tuple[int | None, SnapchainError], ...] = ()
    is_gone: bool = False


def marks_of(rows: npt.NDArray[np.void], ids: npt.NDArray[np.uint8]) -> Marks:
    """A number for each blob and its place in its pack; two that differ have the same one by chance of 2^-64.

    rows: with columns offset, stored, raw; ids: uint8[n, 32]
    """
    marks = np.ascontiguousarray(ids[:, :8]).view("<u8").ravel().astype(np.uint64)
    for column, factor in zip(("offset", "stored", "raw"), _ODD, strict=True):
        marks = (marks ^ rows[column].astype(np.uint64)) * factor
    return marks


def read_packs(store: ObjectStore, keys: Keyring, packs: Iterable[tuple[str, int]]) -> Generator[PackRead]:
    """Read packs (name, bytes of the object) in several threads; the results in the same order."""
    pool = ThreadPoolExecutor(WORKERS, "packs")
    stop = threading.Event()
    under_way: deque[Future[PackRead]] = deque()
    waiting = iter(packs)

    def submit(count: int) -> None:
        under_way.extend(pool.submit(read_pack, store, keys, *each, stop) for each in islice(waiting, count))

    try:
        submit(2 * WORKERS)
        while under_way:
            yield under_way.popleft().result()
            submit(1)
    finally:
        stop.set()  # after a Ctrl-C nobody waits for what the workers are about to read
        pool.shutdown(wait=False, cancel_futures=True)


def read_pack(store: ObjectStore, keys: Keyring, pack: str, size: int, stop: threading.Event | None = None) -> PackRead:
    """Read one pack and prove its blobs. What is wrong with it is part of the result."""
    name = pack_name(pack)
    nothing = np.empty(0, np.uint64)
    try:
        body = memoryview(store.get(name)) if size <= _AT_ONCE else None
        if body is not None and len(body) != size:
            raise Corrupt(f"the pack has {len(body)} bytes, and the store lists it with {size}", subject=name)

        def read(offset: int, length: int) -> bytes:
            if body is None:
                return store.get(name, offset=offset, length=length)
            return bytes(body[offset : offset + length])

        reader, ids, rows = directory_of(keys, pack, size, read)
        offset, stored = rows["offset"].astype(np.int64), rows["stored"].astype(np.int64)
        ends = np.append(FIRST_BLOB, offset + stored)
        if not np.array_equal(ends[:-1], offset) or ends[-1] > size - TRAILER.size:
            raise Corrupt("the pack's directory does not fit the pack", subject=name)
    except NotFound:
        return PackRead(pack, size, nothing, is_gone=True)
    except SnapchainError as error:
        return PackRead(pack, size, nothing, errors=((None, error),))
    good = np.ones(len(rows), np.bool_)
    errors: list[tuple[int | None, SnapchainError]] = []
    for first, stop_at in _pieces(stored):
        if stop is not None and stop.is_set():
            break
        begin, end = int(offset[first]), int(ends[stop_at])
        try:
            piece = (
                body[begin:end] if body is not None else memoryview(store.get(name, offset=begin, length=end - begin))
            )
        except NotFound:
            return PackRead(pack, size, nothing, is_gone=True)
        except SnapchainError as error:
            good[first:stop_at] = False
            errors.extend((int(offset[at]), error) for at in range(first, stop_at))
            continue
        for at in range(first, stop_at):
            begin_at = int(offset[at]) - begin
            text = piece[begin_at : begin_at + int(stored[at])]
            try:
                prove(keys, reader, ids[at].tobytes(), int(offset[at]), int(rows["raw"][at]), text)
            except SnapchainError as error:
                good[at] = False
                errors.append((int(offset[at]), error))
    marks = marks_of(rows[good], ids[good])
    marks.sort()
    return PackRead(pack, size, marks, int(rows["raw"][good].astype(np.int64).sum()), tuple(errors))


def prove(keys: Keyring, reader: PackReader, blob: bytes, offset: int, raw: int, text: memoryview) -> None:
    """Raises Corrupt unless what is stored of a blob is whole, and has the bytes that its id stands for."""
    plain = memoryview(reader.blob(blob, offset, raw, text))
    pieces = (blake3.blake3(plain[at : at + LEAF_BYTES]).digest() for at in range(0, len(plain), LEAF_BYTES))
    if keys.blob_id(b"".join(pieces)) != blob:
        raise Corrupt("the bytes are not those of the blob's id", subject=f"{pack_name(reader.pack)} at {offset}")


def _pieces(stored: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Neighbouring blobs, as many as are asked for together: (first, stop)."""
    first, held = 0, 0
    for at, size in enumerate(stored.tolist()):
        if at > first and held + size > _AT_ONCE:
            yield first, at
            first, held = at, 0
        held += size
    if len(stored):
        yield first, len(stored)
