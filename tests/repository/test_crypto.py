"""Keys, ciphers and sealed records: known answers, and nothing opens anywhere but where it belongs."""

from __future__ import annotations

import hashlib
import hmac
from unittest import mock

import pytest
import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, strategies as st

from snapchain.errors import Corrupt, Unsupported
from snapchain.repository import envelope
from snapchain.repository.crypto import AES, CHACHA, NONE, SUITES, Keyring, cipher, derive
from snapchain.repository.envelope import decompress, head, seal, unseal

MASTER = bytes(range(32))
REPOSITORY = "00112233445566778899aabbccddeeff"


def keys(suite: str = AES, *, repository: str = REPOSITORY, master: bytes = MASTER) -> Keyring:
    return Keyring(suite, repository, master)


# ---- known answers: what is stored today must be read for ever


def test_known_keys_and_ids() -> None:
    assert derive(MASTER, "pack").hex() == "87e0b6382b247421dbe8de4e9d9232b76cc917202570ed7ac04b38bf550ea534"
    salted = derive(MASTER, "x", b"s" * 32).hex()
    assert salted == "dbe258335bb8d28dfeddac3a55de7f49b871cde6666b4090a071618ff3e0242f"
    pieces = blake3(b"data").digest()
    assert keys().blob_id(pieces).hex() == "717f19604f303bd0c51d3784a5b0c8634d317111c02056052fa62ffec2789eea"
    assert keys().disk_key("web1/vda") == "9050685ef50c6b60f20a647c293c1de0"
    public = Keyring.public_master(REPOSITORY).hex()
    assert public == "77ed40d4a9167c8342a886ff1a04d7ce1b813031a39a7c02f056b27df0c6c532"


@pytest.mark.parametrize(
    ("suite", "blob", "record"),
    [
        (AES, "bb89319dd1e510a4d9587a32311bf26e65425580ab", "86da243a67cb15901c8140baa35bd67fc11d0f7a22"),
        (CHACHA, "65044ff4846d1132d017b6517e4d8d3abada397b8f", "a998c9f6e221d4c28ad86953de38c88ff71e05ce7c"),
        (NONE, "706c61696efbb4f93ae01e031660ae73f31d8c9cd1", "706c61696ea3f766a210def89fe3dc58ffd7f99c50"),
    ],
)
def test_known_texts(suite: str, blob: str, record: str) -> None:
    offset = (16).to_bytes(12, "little")
    assert keys(suite).pack_cipher(b"p" * 16).encrypt(offset, b"plain", b"aad").hex() == blob
    assert keys(suite).record_cipher(b"r" * 32).encrypt(bytes(12), b"plain", b"aad").hex() == record


def test_keys_are_hkdf_sha256_by_the_letter() -> None:
    """RFC 5869 with the standard library: extract, then one round of expand."""
    salt = b"any salt"
    extracted = hmac.new(salt, MASTER, hashlib.sha256).digest()
    expanded = hmac.new(extracted, b"snapchain 1 record\x01", hashlib.sha256).digest()
    assert derive(MASTER, "record", salt) == expanded
    extracted = hmac.new(bytes(32), MASTER, hashlib.sha256).digest()
    assert derive(MASTER, "id") == hmac.new(extracted, b"snapchain 1 id\x01", hashlib.sha256).digest()


@pytest.mark.parametrize(("suite", "make"), [(AES, AESGCM), (CHACHA, ChaCha20Poly1305)])
def test_a_record_opens_by_hand(suite: str, make: type[AESGCM | ChaCha20Poly1305]) -> None:
    data = seal(keys(suite), b"L", "layers/x", b"body" * 100)
    key = derive(derive(MASTER, "record"), "record", data[16:48])
    bound = data[:16] + bytes.fromhex(REPOSITORY) + b"layers/x"
    frame = make(key).decrypt(bytes(12), data[48:], bound)
    assert zstandard.ZstdDecompressor().decompress(frame) == b"body" * 100


# ---- nothing opens elsewhere


@pytest.mark.parametrize("suite", SUITES)
def test_a_record_opens_only_under_its_name_kind_repository_and_key(suite: str) -> None:
    data = seal(keys(suite), b"L", "layers/x", b"body")
    assert unseal(keys(suite), b"L", "layers/x", data) == b"body"
    elsewhere = [
        (keys(suite), b"L", "layers/y", data),
        (keys(suite), b"C", "layers/x", data),
        (keys(suite), b"C", "layers/x", head(b"C") + data[16:]),
        (keys(suite, repository="ff" * 16), b"L", "layers/x", data),
        (keys(suite, master=b"m" * 32), b"L", "layers/x", data),
    ]
    for ring, kind, name, stored in elsewhere:
        with pytest.raises(Corrupt, match=f"^{name}: "):
            unseal(ring, kind, name, stored)


@pytest.mark.parametrize("suite", SUITES)
def test_every_altered_byte_and_every_cut_of_a_record_is_noticed(suite: str) -> None:
    data = seal(keys(suite), b"I", "index/x", b"some body that is stored")
    for at in range(len(data)):
        for flip in (0x01, 0x80):
            altered = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            with pytest.raises((Corrupt, Unsupported), match=r"^index/x: "):
                unseal(keys(suite), b"I", "index/x", altered)
    for stop in range(len(data)):
        with pytest.raises(Corrupt, match=r"^index/x: "):
            unseal(keys(suite), b"I", "index/x", data[:stop])
    with pytest.raises(Corrupt, match=r"^index/x: .* altered"):
        unseal(keys(suite), b"I", "index/x", data + b"\0")


@given(data=st.binary(max_size=200))
def test_any_bytes_are_refused_with_an_error_of_ours(data: bytes) -> None:
    for stored in (data, head(b"L") + data):
        with pytest.raises((Corrupt, Unsupported), match=r"^layers/x: "):
            unseal(keys(), b"L", "layers/x", stored)


def test_a_newer_format_is_unsupported_and_says_so() -> None:
    data = bytearray(seal(keys(), b"L", "layers/x", b"body"))
    data[7] = 2
    with pytest.raises(Unsupported, match="format 2"):
        unseal(keys(), b"L", "layers/x", bytes(data))
    with pytest.raises(Unsupported, match="unknown encryption 'rot13'"):
        cipher("rot13", MASTER)


def test_two_records_never_share_a_key_or_a_text() -> None:
    salts = {seal(keys(), b"L", "layers/x", b"body")[16:48] for _ in range(1000)}
    assert len(salts) == 1000


def test_ids_of_one_repository_say_nothing_in_another() -> None:
    pieces = blake3(b"data").digest()
    rings = [keys(), keys(master=b"m" * 32), keys(NONE, master=Keyring.public_master(REPOSITORY))]
    assert len({ring.blob_id(pieces) for ring in rings}) == 3
    assert len({ring.disk_key("web1/vda") for ring in rings}) == 3


# ---- frames that lie


def test_a_frame_that_claims_too_much_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 * 1024 * 1024))
    assert len(bomb) < 8192
    with pytest.raises(Corrupt, match="claim 67108864 bytes"):
        decompress(bomb, 1024 * 1024, subject="x")
    sealed = seal(keys(), b"L", "layers/x", bytes(2048))
    monkeypatch.setitem(envelope.EXPANSIONS, b"L", envelope.Expansion(1024, 8, 1024))
    with pytest.raises(Corrupt, match="at most 1024"):
        unseal(keys(), b"L", "layers/x", sealed)
    with pytest.raises(Unsupported, match=r"^layers/x: a record of 2048 bytes is larger than any reader accepts"):
        seal(keys(), b"L", "layers/x", bytes(2048))


@pytest.mark.parametrize("kind", sorted(envelope.EXPANSIONS))
def test_a_record_unpacks_to_no_more_than_a_few_times_what_is_stored(kind: bytes) -> None:
    """A bomb of 4 KiB is refused before it is unpacked; what a writer seals is read again, however well it packs."""
    size = 12 * 1024 * 1024
    true = seal(keys(), kind, "disks/x", bytes(size))
    assert unseal(keys(), kind, "disks/x", true) == bytes(size)
    with mock.patch.object(envelope, "EXPANSIONS", {kind: envelope.Expansion(1 << 30, 1 << 30, 1 << 30)}):
        bomb = seal(keys(), kind, "disks/x", bytes(size))
    assert len(bomb) < 4096
    with pytest.raises(Corrupt, match="claim 12582912 bytes; at most"):
        unseal(keys(), kind, "disks/x", bomb)


@given(st.binary(max_size=300), st.sampled_from([0, 1, 131071, 131072, 131073, 400_000]))
def test_a_frame_of_raw_blocks_is_what_zstd_reads(start: bytes, size: int) -> None:
    body = start + bytes(size)
    frame = b"".join(envelope._plain_frame(body))
    assert zstandard.ZstdDecompressor().decompress(frame) == body
    assert decompress(frame, len(body), subject="x") == body


def test_a_frame_that_does_not_say_its_size_is_refused() -> None:
    silent = zstandard.ZstdCompressor(write_content_size=False).compress(b"x" * 100)
    with pytest.raises(Corrupt, match=r"^x: compressed data claim"):
        decompress(silent, 1000, subject="x")


@given(data=st.binary(min_size=1, max_size=300), cut=st.integers(1, 40), flip=st.integers(0, 255))
def test_damaged_frames_are_corrupt_and_nothing_else(data: bytes, cut: int, flip: int) -> None:
    frame = zstandard.ZstdCompressor(level=1).compress(data)
    assert decompress(frame, 4096, subject="x") == data
    for stored in (frame[: max(0, len(frame) - cut)], b"?" + frame[1:], data):
        with pytest.raises(Corrupt, match=r"are damaged|are plausible") as caught:
            decompress(stored, 4096, subject="x")
        assert caught.value.subject == "x"
    # A byte inside may as well be other data, which the seal around the frame notices; it never becomes more of them.
    bent = bytearray(frame)
    bent[flip % len(bent)] ^= 1 + flip % 255
    try:
        assert len(decompress(bytes(bent), 4096, subject="x")) <= 4096
    except Corrupt as error:
        assert error.subject == "x"  # noqa: PT017
