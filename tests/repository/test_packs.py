"""Packs: blobs open at their own place only, and a pack speaks for itself."""

from __future__ import annotations

import random

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import assume, given, settings, strategies as st

from snapchain.errors import Corrupt, Unsupported
from snapchain.objects.memory import MemoryStore
from snapchain.repository import packs
from snapchain.repository.blobs import GAP_BYTES, BlobReader
from snapchain.repository.crypto import AES, CHACHA, NONE, SUITES, Keyring
from snapchain.repository.format import BLOB_ROW, pack_name
from snapchain.repository.packs import (
    FIRST_BLOB,
    LARGEST_BLOB,
    TRAILER,
    ClosedPack,
    Location,
    OpenPack,
    PackReader,
    packed,
    read_directory,
)
from snapchain.testing.faults import Fault, FaultStore, On
from tests.repository.counting import CountingStore

REPOSITORY = "00112233445566778899aabbccddeeff"


def keys(suite: str = AES, master: bytes = bytes(32)) -> Keyring:
    return Keyring(suite, REPOSITORY, master)


def identity(plain: bytes) -> bytes:
    return blake3(plain).digest()


def payload(plain: bytes) -> bytes:
    return packed(zstandard.ZstdCompressor(level=1), plain)


def filled(ring: Keyring, blobs: list[bytes]) -> tuple[ClosedPack, list[Location], MemoryStore]:
    pack = OpenPack(ring)
    places = [pack.add(identity(plain), payload(plain), len(plain)) for plain in blobs]
    closed = pack.close()
    store = MemoryStore()
    store.put(pack_name(closed.pack), closed.parts)
    return closed, places, store


@pytest.mark.parametrize("suite", SUITES)
@settings(max_examples=25)
@given(blobs=st.lists(st.binary(min_size=1, max_size=3000) | st.integers(1, 5000).map(bytes), min_size=1, max_size=8))
def test_blobs_come_back_and_the_directory_lists_them(suite: str, blobs: list[bytes]) -> None:
    ring = keys(suite)
    closed, places, store = filled(ring, blobs)
    reader = BlobReader(store, ring)
    wanted = [(identity(plain), place) for plain, place in zip(blobs, places, strict=True)]
    assert dict(reader.read_all(wanted)) == dict(enumerate(blobs))
    size = store.size(pack_name(closed.pack))
    assert size == closed.size
    _, ids, rows = read_directory(store, ring, closed.pack, closed.size)
    assert [row.tobytes() for row in ids] == [identity(plain) for plain in blobs]
    assert [tuple(row)[1:] for row in rows.tolist()] == [(each.offset, each.stored, each.raw) for each in places]


@pytest.mark.parametrize("suite", SUITES)
def test_every_altered_byte_of_a_pack_is_noticed(suite: str) -> None:
    """By whom reads the blob, or by whom opens the pack by its directory."""
    ring = keys(suite)
    blobs = [b"one" * 50, random.Random(1).randbytes(80)]
    closed, places, store = filled(ring, blobs)
    name = pack_name(closed.pack)
    data = store.get(name)
    for at in range(len(data)):
        store.put(name, data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        noticed = 0
        for plain, place in zip(blobs, places, strict=True):
            inside = place.offset <= at < place.offset + place.stored
            try:
                assert BlobReader(store, ring).read(identity(plain), place) == plain
                assert not inside
            except Corrupt as error:
                assert inside
                assert name in str(error)  # noqa: PT017
                noticed += 1
        try:
            read_directory(store, ring, closed.pack, closed.size)
        except (Corrupt, Unsupported):
            noticed += 1
        assert noticed == 1, at


def test_a_pack_cut_anywhere_is_noticed() -> None:
    ring = keys()
    closed, _, store = filled(ring, [b"x" * 100, b"y" * 10])
    data = store.get(pack_name(closed.pack))
    for stop in range(len(data)):
        store.put(pack_name(closed.pack), data[:stop])
        with pytest.raises((Corrupt, Unsupported), match=r"cut short|no trailer"):
            read_directory(store, ring, closed.pack, stop)


@pytest.mark.parametrize("suite", SUITES)
def test_a_blob_opens_nowhere_else(suite: str) -> None:
    """Not at another offset, in another pack, under another id, length, repository or key."""
    ring = keys(suite)
    blob = b"same length 1"
    closed, (first, second), store = filled(ring, [blob, b"same length 2"])
    text = store.get(pack_name(closed.pack))[first.offset : first.offset + first.stored]
    right = PackReader(ring, closed.pack)
    assert right.blob(identity(blob), first.offset, first.raw, text) == blob
    elsewhere = [
        (right, identity(blob), second.offset, first.raw),
        (right, identity(b"same length 2"), first.offset, first.raw),
        (right, identity(blob), first.offset, first.raw + 1),
        (PackReader(ring, "ab" * 16), identity(blob), first.offset, first.raw),
        (PackReader(Keyring(suite, "ff" * 16, bytes(32)), closed.pack), identity(blob), first.offset, first.raw),
        (PackReader(keys(suite, b"m" * 32), closed.pack), identity(blob), first.offset, first.raw),
    ]
    for reader, name, offset, raw in elsewhere:
        with pytest.raises(Corrupt, match="altered or belong elsewhere"):
            reader.blob(name, offset, raw, text)


def test_a_directory_does_not_open_as_a_blob_nor_a_blob_as_a_directory() -> None:
    ring = keys()
    closed, (place,), store = filled(ring, [b"x" * 100])
    data = store.get(pack_name(closed.pack))
    reader = PackReader(ring, closed.pack)
    with pytest.raises(Corrupt, match="altered or belong elsewhere"):
        reader.directory(place.offset, 1, data[place.offset : place.offset + place.stored])
    stored = TRAILER.unpack(data[-TRAILER.size :])[0]
    offset = len(data) - TRAILER.size - stored
    with pytest.raises(Corrupt, match="cannot be stored in"):
        reader.blob(b"directory".ljust(32, b"\0"), offset, 1, data[offset : offset + stored])


@pytest.mark.parametrize("suite", [AES, CHACHA])
def test_equal_blobs_never_look_alike(suite: str) -> None:
    """Nonces are offsets and keys are the packs': no two texts of one plaintext are equal."""
    plain = random.Random(2).randbytes(64)
    seen = set()
    for _ in range(20):
        pack = OpenPack(keys(suite))
        for _ in range(20):
            pack.add(identity(plain), plain, len(plain))
        closed = pack.close()
        offsets = closed.rows["offset"].tolist()
        assert len(set(offsets)) == 20, "a nonce is used once under a key"
        body = b"".join(closed.parts)
        seen |= {body[offset : offset + 64] for offset in offsets}
    assert len(seen) == 400


def test_a_pack_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has the key may still lie about sizes: nothing is unpacked beyond what a blob may hold."""
    ring = keys()
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(256 * 1024 * 1024))
    pack = OpenPack(ring)
    place = pack.add(b"i" * 32, bomb, LARGEST_BLOB)
    store = MemoryStore()
    closed = pack.close()
    store.put(pack_name(closed.pack), closed.parts)
    with pytest.raises(Corrupt, match="claim"):
        BlobReader(store, ring).read(b"i" * 32, place)
    for raw in (LARGEST_BLOB + 1, 2**32 - 1):
        with pytest.raises(Corrupt, match="cannot be stored"):
            PackReader(ring, closed.pack).blob(b"i" * 32, place.offset, raw, b"x" * 100)
    monkeypatch.setattr(packs, "_LARGEST_DIRECTORY", 10)
    with pytest.raises(
        Corrupt, match=r"directory: a directory of 1 blobs in \d+ bytes is not plausible|of \d+ bytes is not"
    ):
        read_directory(store, ring, closed.pack, closed.size)


def test_a_blob_that_unpacks_to_another_length_is_refused() -> None:
    ring = keys()
    pack = OpenPack(ring)
    short = pack.add(b"i" * 32, zstandard.ZstdCompressor().compress(b"x" * 50), 100)
    closed = pack.close()
    store = MemoryStore()
    store.put(pack_name(closed.pack), closed.parts)
    with pytest.raises(Corrupt, match="unpacked to 50"):
        BlobReader(store, ring).read(b"i" * 32, short)


@given(trailer=st.binary(min_size=16, max_size=16), stored=st.integers(0, 2**32 - 1), count=st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_hostile_trailers(trailer: bytes, stored: int, count: int) -> None:
    ring = keys()
    closed, _, store = filled(ring, [b"x" * 100])
    data = store.get(pack_name(closed.pack))
    true = TRAILER.unpack(data[-TRAILER.size :])
    for end in (trailer, TRAILER.pack(stored, count, b"SNAPEND1"), TRAILER.pack(*true[:2], trailer[:8])):
        assume(end != data[-TRAILER.size :])
        store.put(pack_name(closed.pack), data[: -TRAILER.size] + end)
        with pytest.raises(Corrupt) as caught:
            read_directory(store, ring, closed.pack, closed.size)
        assert (caught.value.subject or "").startswith(pack_name(closed.pack))


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_store_that_gives_less_than_was_asked_for(nth: int) -> None:
    """Of the head, the trailer or the directory."""
    ring = keys()
    closed, _, store = filled(ring, [b"x" * 100])
    faulty = FaultStore(store, [On(nth, Fault.TRUNCATED, operation="get")])
    with pytest.raises(Corrupt) as caught:
        read_directory(faulty, ring, closed.pack, closed.size)
    assert (caught.value.subject or "").startswith(pack_name(closed.pack))


def test_what_does_not_shrink_is_stored_as_it_is() -> None:
    noise = random.Random(3).randbytes(1000)
    assert payload(noise) == noise
    assert len(payload(bytes(1000))) < 50
    _, (place,), _ = filled(keys(), [noise])
    assert place.stored == 1000 + 16


# ---- reading


def test_neighbours_are_read_at_once_and_far_ones_apart() -> None:
    ring = keys(NONE)
    shuffle = random.Random(4)
    blobs = [shuffle.randbytes(GAP_BYTES // 2 + 100) for _ in range(12)]
    closed, places, inner = filled(ring, blobs)
    store = CountingStore(inner)
    reader = BlobReader(store, ring)
    near = [(identity(blobs[at]), places[at]) for at in (3, 0, 1, 2)]
    assert {at: len(plain) for at, plain in reader.read_all(near)} == {at: len(blobs[0]) for at in range(4)}
    assert len(store.of("get")) == 1
    far = [(identity(blobs[at]), places[at]) for at in (0, 6, 11)]
    assert dict(reader.read_all(far)) == {0: blobs[0], 1: blobs[6], 2: blobs[11]}
    assert len(store.of("get")) == 4
    assert store.of("get")[0].name == pack_name(closed.pack)


def test_a_missing_pack_and_a_short_pack_are_corrupt() -> None:
    ring = keys()
    closed, (place,), store = filled(ring, [b"x" * 100])
    name = pack_name(closed.pack)
    store.put(name, store.get(name)[: place.offset + 10])
    with pytest.raises(Corrupt, match=closed.pack):
        BlobReader(store, ring).read(identity(b"x" * 100), place)
    store.delete(name)
    with pytest.raises(Corrupt, match="missing from the store"):
        BlobReader(store, ring).read(identity(b"x" * 100), place)


def test_rows_are_as_the_format_says() -> None:
    assert BLOB_ROW.itemsize == 16
    assert (FIRST_BLOB, TRAILER.size) == (16, 16)
    closed, places, _ = filled(keys(), [b"a", b"b"])
    assert np.array_equal(closed.rows["offset"], [place.offset for place in places])
    assert (closed.rows["pack"] == 0).all()
