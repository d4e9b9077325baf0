"""Layers made of numbers, and what they read as, byte by byte: the reference that stored layers are held against.

A layer is drawn as a size and some runs (start, length, what); what is shown is made by plain slicing of bytes, without
any of the code that is judged.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import blake3
from hypothesis import strategies as st

from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.model.fingerprint import Fingerprint
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.repository.chain import ChainView
from snapchain.repository.crypto import AES, Keyring
from snapchain.repository.layer_writer import LayerUpload, Origin
from snapchain.repository.layers import StoredLayer
from snapchain.repository.repository import Config, Repository

LEAF = 64 * 1024
ORIGIN = Origin("disk.qcow2", "qcow2", 65536, ())


@dataclass(frozen=True)
class Drawn:
    """One layer: its map, its own bytes (what is under ABSENT does not count), and what its chain shows."""

    extents: Extents
    shown: bytes

    @property
    def size(self) -> int:
        return self.extents.size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        assert offset + len(buffer) <= self.size
        buffer[:] = self.shown[offset : offset + len(buffer)]


@dataclass(frozen=True)
class Run:
    """what: None ZERO, 0 DATA of zero bytes, other numbers DATA: below 256 one byte, above it noise by that seed."""

    start: int
    length: int
    what: int | None


def drawn(size: int, runs: Sequence[Run], below: bytes) -> Drawn:
    """The layer of these runs (later ones over earlier ones) on a disk that shows `below`."""
    values = bytearray([2]) * size  # 0 DATA, 1 ZERO, 2 ABSENT
    shown = bytearray(below[:size].ljust(size, b"\0"))
    for run in runs:
        start, stop = min(run.start, size), min(run.start + run.length, size)
        values[start:stop] = bytes([1 if run.what is None else 0]) * (stop - start)
        shown[start:stop] = _body(run.what, stop - start)
    return Drawn(_map_of(bytes(values)), bytes(shown))


def _body(what: int | None, length: int) -> bytes:
    if what is not None and what > 255:
        return random.Random(what).randbytes(length)
    return bytes([what or 0]) * length


def _map_of(values: bytes) -> Extents:
    at, val, kinds = [], [], (DATA, ZERO, ABSENT)
    place = 0
    while place < len(values):
        at.append(place)
        val.append(kinds[values[place]])
        here = values[place : place + 1]
        place += len(values[place:]) - len(values[place:].lstrip(here))
    return Extents.from_starts(len(values), at, val)


_WHAT = st.sampled_from([None, None, 0, 1, 2, 7, 1000, 1001, 1002])


@st.composite
def stacks(draw: st.DrawFn, *, max_layers: int = 4, units: Sequence[int] = (1, 512, 4096, 16384, LEAF)) -> list[Drawn]:
    """Layers root first; sizes grow and shrink, and end anywhere; a few bytes, or several leaves."""
    unit = draw(st.sampled_from(units))
    longest = min(24, 6 * LEAF // unit)
    odd = st.sampled_from([0, 0, 1, 511, 513])
    stack: list[Drawn] = []
    below = b""
    common = draw(st.integers(0, longest)) * unit
    for _ in range(draw(st.integers(1, max_layers))):
        size = draw(st.sampled_from([common, common, draw(st.integers(0, longest)) * unit + draw(odd)]))
        places = st.tuples(st.integers(0, longest), st.integers(1, longest), _WHAT)
        runs = [Run(start * unit, length * unit, what) for start, length, what in draw(st.lists(places, max_size=6))]
        stack.append(drawn(size, runs, below))
        below = stack[-1].shown
    return stack


def content_id_of(content: bytes) -> str:
    """By the words of the definition (model/content.py), with nothing but BLAKE3 and whole numbers."""
    element_key = blake3.blake3(b"snapchain content element").digest()
    lanes = [0] * 1024
    for number in range(-(-len(content) // LEAF)):
        leaf = content[number * LEAF : (number + 1) * LEAF].ljust(LEAF, b"\0")
        if not leaf.strip(b"\0"):
            continue
        head = number.to_bytes(8, "little") + blake3.blake3(leaf).digest()
        element = blake3.blake3(head, key=element_key).digest(length=2048)
        for lane in range(1024):
            lanes[lane] = (lanes[lane] + int.from_bytes(element[2 * lane : 2 * lane + 2], "little")) % 65536
    total = b"".join(lane.to_bytes(2, "little") for lane in lanes)
    key = blake3.blake3(b"snapchain content id").digest()
    return blake3.blake3(len(content).to_bytes(8, "little") + total, key=key).hexdigest()


def repository(store: ObjectStore | None = None, *, suite: str = AES, block_size: int = LEAF) -> Repository:
    """An open repository without the key slot, which costs 0.1 s and is tested by itself."""
    store = MemoryStore() if store is None else store
    config = Config(
        id=secrets.token_hex(16),
        created=datetime.now(UTC),
        encryption=suite,
        block_size=block_size,
        conditional_put=True,
    )
    return Repository(store, config, Keyring(suite, config.id, secrets.token_bytes(32)), conditional=True)


def again(opened: Repository, store: ObjectStore | None = None) -> Repository:
    """The same repository, opened by somebody else: nothing cached, perhaps through another store."""
    return Repository(store or opened.store, opened.config, opened.keys, conditional=opened.conditional)


def nothing(*_: object) -> None:
    pass


@dataclass
class Shipped:
    """A stack in a repository; layers[n] is that of stack[n]."""

    repository: Repository
    stack: Sequence[Drawn]
    layers: list[StoredLayer] = field(default_factory=list)

    def shows(self, chain: Sequence[StoredLayer]) -> bytes:
        """What a chain reads as, through a repository opened afresh."""
        fresh = again(self.repository)
        view = ChainView([fresh.layer(layer.id) for layer in chain], fresh.blobs)
        buffer = memoryview(bytearray(view.size))
        view.read_into(0, buffer)
        return bytes(buffer)


def ship(stack: Sequence[Drawn], into: Repository | None = None) -> Shipped:
    """Take in a stack, layer by layer."""
    shipped = Shipped(into or repository(), stack)
    with LayerUpload(shipped.repository) as deposit:
        for number, layer in enumerate(stack):
            source = Fingerprint(inode=number + 1, size=1, mtime_ns=1, ctime_ns=1)
            origin = Origin("disk.qcow2", "qcow2", 65536, (source,))
            shipped.layers.append(deposit.add(layer, shipped.layers[:], origin, on_bytes=nothing, confirm=nothing))
    return shipped
