"""Either side may say anything: it ends in a clear error, nothing that is there is damaged, and memory stays small."""

from __future__ import annotations

import base64
import json
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import given, settings, strategies as st

from snapchain.errors import (
    Conflict,
    Corrupt,
    Diverged,
    InvalidInput,
    NotFound,
    SnapchainError,
    Unavailable,
    Unsupported,
)
from snapchain.host.channel import Channel
from snapchain.model.content import content_id, leaf_hash, sum_of
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.replica.receiver import receive
from snapchain.replica.stream import compression as zstd
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.frames import MAGIC, MOST_BEATS, FrameReader, Kind
from snapchain.replica.stream.maps import (
    DataRuns,
    MapReader,
    Part,
    decode_data,
    encode_data,
    layer_id,
    map_frames,
    words_of,
)
from snapchain.replica.stream.messages import Hello, Inventory, LayerOffer, Open, PointOffer, Stored, encode
from snapchain.replica.stream.requests import FROM_FETCH, FROM_RECEIVER, FROM_SENDER, REQUESTS
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, clean, write
from tests.replica.conftest import DISK, Place, send
from tests.waiting import HANG

GRAIN = 65536
SUM = bytes(2048)


def stream(*frames: tuple[int, bytes]) -> bytes:
    """Frames as docs/stream.md has them, made without the package."""
    out, check = MAGIC, blake3(MAGIC).digest(16)
    for kind, body in frames:
        head = struct.pack("<BBHI", kind, 0, 0, len(body))
        check = blake3(check + head + body).digest(16)
        out += head + body + check
    return out


HELLO = (1, encode(Hello(first=1, last=1, software="test", answers=False)))
OPEN = (2, encode(Open(disk=DISK)))


def offer(**change: Any) -> tuple[int, bytes]:
    fields: dict[str, Any] = {
        "name": "a.qcow2",
        "size": 4 * GRAIN,
        "cluster_size": GRAIN,
        "extended_l2": False,
        "parent": None,
        "sources": (),
        "runs": 2,
    }
    return 3, encode(LayerOffer.model_construct(**{"resume_at": 0, **fields, **change}))


def words(*runs: int) -> tuple[int, bytes]:
    plain = np.array(runs, "<u8").tobytes()
    return 4, struct.pack("<II", len(runs), 0) + plain


MAP = words(3 << 2 | 2, 1 << 2 | 0)  # three clusters of DATA, one ABSENT
BLOB = random.Random(5).randbytes(3 * GRAIN)


def data(
    start: int, stop: int, payload: bytes, *, codec: int = 0, parts: tuple[int, ...] | None = None
) -> tuple[int, bytes]:
    chosen = (len(payload) * 4,) if parts is None else parts
    head = struct.pack("<QQBBH", start, stop, codec, 0, len(chosen))
    return 5, head + struct.pack(f"<{len(chosen)}I", *chosen) + payload


def end(size: int = 4 * GRAIN) -> tuple[int, bytes]:
    hashes = b"".join(leaf_hash(BLOB[at : at + GRAIN]) for at in range(0, len(BLOB), GRAIN))
    total = sum_of(np.arange(3), np.frombuffer(hashes, np.uint8).reshape(-1, 32))
    return 7, bytes.fromhex(content_id(size, total))


STOP = (9, b"")
BEAT = (10, b"")


POINT_OF_NOTHING = (8, b'{"time":"2026-01-01T00:00:00Z","labels":[],"size":1,"content_id":"' + b"0" * 64 + b'"}')
ONE, TWO, ALL = data(0, GRAIN, BLOB[:GRAIN]), data(0, 2 * GRAIN, BLOB[: 2 * GRAIN]), data(0, 3 * GRAIN, BLOB)


def take(place: Place, raw: bytes, *, patience: float = HANG) -> Any:
    """Received from a pipe."""
    reader, writer = os.pipe()

    def feed() -> None:
        with suppress(BrokenPipeError):
            left = memoryview(raw)
            while left:
                left = left[os.write(writer, left) :]
        os.close(writer)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        with Channel(reader, -1, peer="the sender", patience=patience) as channel:
            return receive(channel, place.root)
    finally:
        thread.join()


def test_a_stream_made_by_hand(place: Place, tmp_path: Path) -> None:
    point = (8, encode(PointOffer(time="2026-01-01T00:00:00Z", size=4 * GRAIN, content_id=end()[1].hex())))
    packed = zstandard.ZstdCompressor().compress(BLOB[GRAIN:])
    small = data(GRAIN, 4 * GRAIN, packed, codec=1, parts=(2 * GRAIN * 4,))
    mark = (6, struct.pack("<Q", GRAIN) + SUM)
    raw = stream(HELLO, OPEN, offer(), MAP, data(0, GRAIN, BLOB[:GRAIN]), mark, small, end(), point, STOP)
    assert take(place, raw).layers == ["a.qcow2"]
    shown = tmp_path / "shown"
    shown.write_bytes(BLOB + bytes(GRAIN))
    place.check(shown)


BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 28))
LAYER = HELLO, OPEN, offer(), MAP
HOSTILE: dict[str, tuple[str, tuple[tuple[int, bytes], ...]]] = {
    "no hello": ("began with OPEN, not with HELLO", (OPEN,)),
    "hello twice": ("HELLO has no place", (HELLO, HELLO)),
    "opened twice": ("OPEN has no place", (HELLO, OPEN, OPEN)),
    "unknown kind": ("kind 99, which is not allowed", (HELLO, OPEN, (99, b""))),
    "a receiver's word": ("kind 33, which is not allowed", (HELLO, OPEN, (33, bytes(8)))),
    "data first": ("DATA has no place", (HELLO, OPEN, data(0, GRAIN, BLOB[:GRAIN]))),
    "no such parent": ("does not lie on the newest", (HELLO, OPEN, offer(parent="0" * 32), MAP, end())),
    "size below zero": ("size: .* greater", (HELLO, OPEN, offer(size=-1), MAP)),
    "size of 2**60": ("size: .* less", (HELLO, OPEN, offer(size=1 << 60), MAP)),
    "clusters of 3": ("cluster_size: .* greater", (HELLO, OPEN, offer(cluster_size=3), MAP)),
    "clusters of 513": (
        "cluster size of 513",
        (HELLO, OPEN, offer(cluster_size=513, size=4 * 513), MAP, data(0, 513, BLOB[:513])),
    ),
    "small subclusters": (
        "cluster size of 512",
        (HELLO, OPEN, offer(cluster_size=512, extended_l2=True, size=64), MAP, end()),
    ),
    "a billion runs": ("runs: .* less", (HELLO, OPEN, offer(runs=1 << 30), MAP)),
    "more runs than clusters": ("5 runs cannot describe 4 clusters", (HELLO, OPEN, offer(runs=5), MAP)),
    "a way out": ("cannot be named", (HELLO, OPEN, offer(name="../../a.qcow2"), MAP, end())),
    "an absolute name": ("cannot be named", (HELLO, OPEN, offer(name="/etc/a.qcow2"), MAP, end())),
    "its own catalogue": ("cannot be named", (HELLO, OPEN, offer(name="catalogue.json"), MAP, end())),
    "a hidden name": ("cannot be named", (HELLO, OPEN, offer(name=".incoming.qcow2"), MAP, end())),
    "a protocol": ("cannot be named", (HELLO, OPEN, offer(name="nbd:a.qcow2"), MAP, end())),
    "map too short": ("ends after 2 of 2 runs", (HELLO, OPEN, offer(), words(2 << 2 | 2, 1 << 2), end())),
    "map too long": ("larger than the disk", (HELLO, OPEN, offer(), words(3 << 2 | 2, 1 << 61), end())),
    "map that overflows": (
        "larger than the disk",
        (HELLO, OPEN, offer(), words((1 << 62) - 1 << 2 | 2, 6 << 2), end()),
    ),
    "runs of nothing": ("of no length", (HELLO, OPEN, offer(), words(4 << 2 | 2, 0), end())),
    "kind 3": ("of no kind", (HELLO, OPEN, offer(), words(3 << 2 | 3, 1 << 2), end())),
    "equal neighbours": (
        "neighbouring runs are the same",
        (HELLO, OPEN, offer(), words(3 << 2 | 2, 1 << 2 | 2), end()),
    ),
    "map bomb": (
        "claim to hold 268435456, not 16",
        (HELLO, OPEN, offer(), (4, struct.pack("<II", 2, 1) + BOMB), end()),
    ),
    "map cut off": ("map is unsound: it is cut off", (HELLO, OPEN, offer(), (4, b"\1\0"), end())),
    "data beyond the disk": ("not follow byte 0 of", (*LAYER, data(0, 9 * GRAIN, BLOB))),
    "data backwards": ("not follow byte 0 of", (*LAYER, data(GRAIN, 0, BLOB))),
    "data twice": ("not follow byte 65536", (*LAYER, data(0, GRAIN, BLOB[:GRAIN]), data(0, GRAIN, BLOB[:GRAIN]))),
    "overlapping data": ("not follow byte 131072", (*LAYER, TWO, data(GRAIN, 3 * GRAIN, BLOB[GRAIN:]))),
    "data left out": ("between 0 and 65536 were left out", (*LAYER, data(GRAIN, 3 * GRAIN, BLOB[GRAIN:]))),
    "data where none is": ("0 bytes of data there", (*LAYER, ALL, data(3 * GRAIN, 4 * GRAIN, BLOB[:GRAIN]))),
    "too little data": ("carries 196607 bytes", (*LAYER, data(0, 3 * GRAIN, BLOB[:-1], parts=(3 * GRAIN * 4,)))),
    "too much data": ("carries 196608 bytes", (*LAYER, data(0, GRAIN, BLOB, parts=(GRAIN * 4,)))),
    "parts too large": ("parts do not cover", (*LAYER, data(0, GRAIN, BLOB[:GRAIN], parts=((1 << 30) - 1 << 2,)))),
    "parts of nothing": ("parts do not cover", (*LAYER, data(0, GRAIN, BLOB[:GRAIN], parts=(GRAIN * 4, 0)))),
    "no parts": ("head is wrong", (*LAYER, data(0, GRAIN, b"", parts=()))),
    "from below a root": ("parts do not cover", (*LAYER, data(0, 3 * GRAIN, b"", parts=(3 * GRAIN * 4 + 2,)))),
    "a bomb": (
        "claim to hold 268435456, not 196608",
        (*LAYER, data(0, 3 * GRAIN, BOMB, codec=1, parts=(3 * GRAIN * 4,))),
    ),
    "no zstd": ("cannot be unpacked", (*LAYER, data(0, 3 * GRAIN, BLOB[:999], codec=1, parts=(3 * GRAIN * 4,)))),
    "codec 9": ("head is wrong", (*LAYER, data(0, 3 * GRAIN, BLOB, codec=9))),
    "ends early": ("131072 bytes of data left out", (*LAYER, data(0, GRAIN, BLOB[:GRAIN]), end())),
    "other content": ("shows the content .* thrown away", (*LAYER, data(0, 3 * GRAIN, BLOB), (7, bytes(32)))),
    "a mark behind": (
        "mark at guest byte 5 does not follow",
        (*LAYER, data(0, GRAIN, BLOB[:GRAIN]), (6, struct.pack("<Q", 5) + SUM)),
    ),
    "a mark ahead": ("does not follow data up to 0", (*LAYER, (6, struct.pack("<Q", GRAIN) + SUM))),
    "a mark beyond": (
        "does not follow data up to 196608",
        (*LAYER, data(0, 3 * GRAIN, BLOB), (6, struct.pack("<Q", 1 << 63) + SUM)),
    ),
    "resumed from nothing": ("only 0 are here", (HELLO, OPEN, offer(resume_at=3 * GRAIN), MAP, end())),
    "a point of nothing": ("not what the chain shows", (HELLO, OPEN, POINT_OF_NOTHING)),
    "a point of other content": ("not what the chain shows", (*LAYER, ALL, end(), POINT_OF_NOTHING)),
    "not JSON": ("Invalid JSON", (HELLO, OPEN, (3, b"\xff{"))),
    "deep JSON": ("recursion limit", (HELLO, OPEN, (3, b"[" * 100_000))),
    "a field too many": ("x: Extra inputs", (HELLO, (2, b'{"disk":"a","x":1}'))),
    "a disk outside": ("cannot name a disk", (HELLO, (2, b'{"disk":"/a"}'))),
    "another replica": ("only the replica of this server", (HELLO, (2, b'{"disk":"a","replica":"/etc"}'))),
    "cut to nothing": ("there is no layer", (HELLO, OPEN, (12, b'{"keep":"' + b"0" * 32 + b'"}'))),
}


OTHER_ERRORS: dict[str, type[SnapchainError]] = {
    "no such parent": Diverged,
    "resumed from nothing": Conflict,
    "a disk outside": InvalidInput,
    "another replica": InvalidInput,
    "cut to nothing": NotFound,
}
NOT_ON_THE_NEWEST = "does not lie on the newest"
ON_WHAT_IS_THERE = {
    "clusters of 513": NOT_ON_THE_NEWEST,  # no root any more
    "small subclusters": NOT_ON_THE_NEWEST,
    "other content": "announced with other content",
    "resumed from nothing": None,  # all of that layer is there
}
"""What is said where the honest layer is there already, if it is something else; None: it is in order there."""


def refused(
    place: Place, frames: tuple[tuple[int, bytes], ...], says: str, kind: type[SnapchainError]
) -> SnapchainError:
    """How the stream ends. It has a proper end, so it is refused for what is in it."""
    with pytest.raises(kind, match=says) as caught:
        take(place, stream(*frames, STOP))
    return caught.value


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_sender(place: Place, name: str) -> None:
    says, frames = HOSTILE[name]
    good = stream(HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, BLOB), end(), STOP)
    other = Place(place.root.with_name("other"))
    take(other, good)
    before = {path.name: path.read_bytes() for path in other.directory.iterdir()}
    kind = OTHER_ERRORS.get(name, Corrupt)
    error = refused(place, frames, says, kind)
    assert type(error) is kind
    if type(error) is Corrupt:
        assert error.subject == "the sender"
    says_there = ON_WHAT_IS_THERE.get(name, says)
    if says_there is None:
        assert take(other, stream(*frames, STOP)).layers == []
    else:
        refused(other, frames, says_there, Diverged if says_there == NOT_ON_THE_NEWEST else kind)
    assert {path.name: path.read_bytes() for path in other.directory.iterdir()} == before
    # Whatever it was, the honest one gets through afterwards.
    take(place, good)
    assert place.files()[0].name == "a.qcow2"
    assert sorted(entry.name for entry in place.root.parent.iterdir()) == ["other", "replica"]


def test_a_stream_without_an_end(place: Place) -> None:
    with pytest.raises(Unavailable, match="closed") as caught:
        take(place, stream(HELLO, OPEN))
    assert caught.value.subject == "the sender"
    assert take(place, stream(HELLO, OPEN, STOP)).layers == []


def test_a_known_layer_is_taken_for_what_it_is_only_with_its_content(place: Place, tmp_path: Path) -> None:
    """Its id names the map and the names, not the bytes: STORED would be said of content that is not there."""
    assert take(place, stream(HELLO, OPEN, offer(), MAP, ALL, end(), STOP)).layers == ["a.qcow2"]
    before = place.catalogue()
    with pytest.raises(Corrupt, match="a layer that is here already is announced with other content") as caught:
        take(place, stream(HELLO, OPEN, offer(), MAP, ALL, (7, bytes(32)), STOP))
    assert caught.value.subject == "a.qcow2"
    assert place.catalogue() == before
    again = take(place, stream(HELLO, OPEN, offer(), MAP, ALL, end(), STOP))
    assert (again.layers, again.known) == ([], 1)
    shown = tmp_path / "shown"
    shown.write_bytes(BLOB + bytes(GRAIN))
    place.check(shown)


def test_a_sender_that_only_lives(place: Place) -> None:
    beats = [BEAT] * MOST_BEATS
    take(place, stream(HELLO, *beats, OPEN, *beats, offer(), MAP, *beats, ALL, end(), STOP))
    assert clean(place.files()[0])
    with pytest.raises(Unavailable, match="signs of life in a row, and nothing else"):
        take(place, stream(HELLO, OPEN, BEAT, *beats))


def test_frames_that_claim_too_much_are_not_read(place: Place) -> None:
    raw = stream(HELLO, OPEN) + struct.pack("<BBHI", 5, 0, 0, 0xFFFFFFFF)
    with pytest.raises(Corrupt, match="claims 4294967295 bytes"):
        take(place, raw)


def test_a_version_that_nobody_speaks_here(place: Place) -> None:
    newer = (1, b'{"first":2,"last":7,"software":"9.9","features":["x"],"answers":false,"later":"field"}')
    with pytest.raises(Unsupported, match=r"here 1, there 2 to 7 \(9\.9\)"):
        take(place, stream(newer))


def test_a_sender_that_says_nothing(place: Place) -> None:
    reader, writer = os.pipe()
    with (
        Channel(reader, -1, peer="the sender", patience=0.3) as channel,
        pytest.raises(Unavailable, match=r"nothing came from it for 0.3 seconds"),
    ):
        receive(channel, place.root)
    os.close(writer)


@given(raw=st.binary(min_size=1, max_size=300), kind=st.sampled_from(sorted(FROM_SENDER)))
@settings(max_examples=100, deadline=None)
def test_bodies_of_noise(tmp_path_factory: pytest.TempPathFactory, raw: bytes, kind: Kind) -> None:
    place = Place(tmp_path_factory.getbasetemp() / "noise")
    for frames in ((HELLO, OPEN, (kind, raw)), (HELLO, OPEN, offer(), MAP, (kind, raw))):
        with pytest.raises(Corrupt) as caught:
            take(place, stream(*frames, STOP))
        assert caught.value.subject == "the sender"
        assert "closed" not in str(caught.value)


# ---- maps and data, as values


maps = st.lists(st.tuples(st.integers(1, 9), st.sampled_from([ABSENT, ZERO, DATA])), min_size=1, max_size=30)


@given(runs=maps, tail=st.integers(0, 127))
def test_a_map_comes_through(runs: list[tuple[int, int]], tail: int) -> None:
    at = np.cumsum([0, *(length * GRAIN for length, _ in runs)])
    size = int(at[-1]) - tail * 512
    extents = Extents.from_starts(size, at[:-1], [val for _, val in runs])
    found = words_of(extents, GRAIN)
    said = LayerOffer(
        name="a", size=size, cluster_size=GRAIN, extended_l2=False, parent=None, sources=(), runs=len(found)
    )
    reader = MapReader(said, subject="test")
    for body in map_frames(found):
        reader.add(memoryview(body))
    assert reader.extents() == extents


@given(runs=maps, start=st.integers(0, 30), length=st.integers(1, 15), draw=st.randoms(use_true_random=False))
def test_data_come_through(runs: list[tuple[int, int]], start: int, length: int, draw: random.Random) -> None:
    at = np.cumsum([0, *(length * 512 for length, _ in runs)])
    held = DataRuns(Extents.from_starts(int(at[-1]), at[:-1], [val for _, val in runs]))
    begin = min(start * 512, held.size - 512)
    stop = min(begin + length * 512, held.size)
    pieces = held.pieces(begin, stop)
    total = sum(piece.length for piece in pieces)
    assert total == held.below(stop) - held.below(begin)
    if not total:
        return
    first = draw.randrange(1, total + 1)
    parts = [(first, Part.CARRIED), (total - first, Part.ZERO)][: 1 + (first < total)]
    body = b"".join(encode_data(begin, stop, parts, draw.randbytes(first), level=draw.choice([None, 3])))
    found = decode_data(memoryview(body), held, begin, on_base=False, subject="test")
    assert (found.start, found.stop, found.length, list(found.parts)) == (begin, stop, total, parts)


# ---- a hostile receiver


@contextmanager
def puppet(answer: Callable[[FrameReader, Callable[[bytes], None]], None], *, patience: float = HANG) -> Iterator[Any]:
    """An endpoint whose other side is a function. patience: seconds that our side waits for it."""
    a_read, a_write = os.pipe()
    b_read, b_write = os.pipe()

    class Endpoint:
        url, link, replica, directory = "puppet", Link.NETWORK, None, None

        @contextmanager
        def connect(self) -> Iterator[Channel]:
            ours = Channel(b_read, a_write, peer="puppet", patience=patience)
            with ours:
                yield ours

    def say(raw: bytes) -> None:
        with suppress(BrokenPipeError):
            left = memoryview(raw)
            while left:
                left = left[os.write(b_write, left) :]

    def run() -> None:
        with Channel(a_read, -1, peer="us", patience=HANG) as channel, suppress(SnapchainError):
            answer(FrameReader(channel, FROM_SENDER), say)
        os.close(b_write)

    thread = threading.Thread(target=run)
    thread.start()
    yield Endpoint()
    thread.join(HANG)
    assert not thread.is_alive()


EMPTY = (32, encode(Inventory(disk=DISK, epoch=1, layers=(), last_point=0, partial=None)))
ANSWER = (1, encode(Hello(first=1, last=1, software="puppet", answers=True)))
BAD_ANSWERS: dict[str, tuple[type[SnapchainError], str, tuple[tuple[int, bytes], ...]]] = {
    "another version": (
        Unsupported,
        "here 1, there 3 to 4",
        ((1, b'{"first":3,"last":4,"software":"x","answers":true}'),),
    ),
    "no hello": (Corrupt, "began with INVENTORY", (EMPTY,)),
    "another disk": (
        Corrupt,
        "another disk than the one asked for",
        (ANSWER, (32, EMPTY[1].replace(b"web1", b"web2"))),
    ),
    "noise": (Corrupt, "disk: Field required", (ANSWER, (32, b"{}"))),
    "a mark of the future": (Corrupt, "mark 99 is confirmed", (ANSWER, EMPTY, (33, struct.pack("<Q", 99)))),
    "mark 0": (Corrupt, "mark 0 is confirmed", (ANSWER, EMPTY, (33, struct.pack("<Q", 0)))),
    "half a mark": (Corrupt, "confirmation is cut off", (ANSWER, EMPTY, (33, b""))),
    "stored what was not sent": (
        Corrupt,
        "stored that was not sent",
        (ANSWER, EMPTY, (34, encode(Stored(layer="0" * 32, file="a.qcow2")))),
    ),
    "done at once": (Corrupt, "before everything was sent", (ANSWER, EMPTY, (35, b'{"points":[1],"layers":1}'))),
    "inventory twice": (Corrupt, "INVENTORY has no place here", (ANSWER, EMPTY, EMPTY)),
    "a sender's word": (Corrupt, "of kind 9, which is not allowed", (ANSWER, EMPTY, (9, b""))),
    "a failure": (
        Unavailable,
        "disk \\?\\[31mfull",
        (ANSWER, EMPTY, (11, b'{"kind":"unavailable","message":"disk \\u001b[31mfull"}')),
    ),
    "a failure of no kind": (Unavailable, "^puppet: x$|^x$", (ANSWER, (11, b'{"kind":"\\u0000","message":"x"}'))),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_hostile_receiver(tmp_path: Path, name: str) -> None:
    image = build(tmp_path / "c", [Layer(8 * MiB, ["write -P 1 0 8M"])])[0]
    kind, says, frames_said = BAD_ANSWERS[name]

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(*frames_said))
        while frames.read_or_end() is not None:
            pass

    with puppet(answer) as endpoint, pytest.raises(kind, match=says) as caught:
        send(image, endpoint, DISK)
    assert str(caught.value).isprintable()
    assert caught.value.subject == "puppet"


def test_a_receiver_that_only_lives(tmp_path: Path) -> None:
    """It says that it is alive, and never what it holds."""
    image = build(tmp_path / "c", [Layer(MiB)])[0]

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(ANSWER, *[BEAT] * (MOST_BEATS + 1)))
        while frames.read_or_end() is not None:
            pass

    with puppet(answer) as endpoint, pytest.raises(Unavailable, match="signs of life in a row, and nothing else"):
        send(image, endpoint, DISK)


@pytest.mark.parametrize("durable", [1, 5000, GRAIN, 8 * MiB, 8 * MiB + 1])
def test_a_receiver_that_lies_about_what_is_durable(tmp_path: Path, durable: int) -> None:
    """The sender goes on where it is told to, or begins again, and announces what it counted; it never breaks."""
    image = build(tmp_path / "c", [Layer(8 * MiB, ["write -P 1 0 8M"])])[0]
    offered: list[dict[str, Any]] = []

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(ANSWER, inventory_of(offered, durable)))
        while (frame := frames.read_or_end()) is not None:
            if frame.kind is Kind.LAYER:
                offered.append(json.loads(bytes(frame.body)))
            if frame.kind is Kind.MAP:
                plain = zstd.unpacked(frame.body[8:], 8, subject="") if frame.body[4] else bytes(frame.body[8:])
                words = np.frombuffer(plain, "<u8").astype(np.uint64)
                offered[-1]["id"] = layer_id(LayerOffer(**without_id(offered[-1])), words)
            if frame.kind is Kind.STOP:
                return

    for _ in range(2):
        with puppet(answer) as endpoint, pytest.raises(Unavailable, match="closed by the other side"):
            send(image, endpoint, DISK)
    fits = durable % GRAIN == 0 and durable <= 8 * MiB
    assert [each["resume_at"] for each in offered] == [0, durable if fits else 0]


def without_id(offer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in offer.items() if name != "id"}


def inventory_of(offered: list[dict[str, Any]], durable: int) -> tuple[int, bytes]:
    said = json.loads(EMPTY[1])
    if offered:
        zeroes = base64.b64encode(SUM).decode()
        said["partial"] = {"layer": offered[0]["id"], "durable": durable, "content_sum": zeroes}
    return 32, json.dumps(said).encode()


def test_a_receiver_that_reads_no_more(tmp_path: Path) -> None:
    image = build(tmp_path / "c", [Layer(8 * MiB)])[0]

    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(3).randbytes(8 * MiB))
    write(image, f"write -s {noise} 0 8M")
    over = threading.Event()

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(ANSWER, EMPTY))
        over.wait(HANG)

    with puppet(answer, patience=2) as endpoint:
        with pytest.raises(Unavailable) as caught:
            send(image, endpoint, DISK)
        assert caught.value.subject == "puppet"
        over.set()


def test_a_receiver_that_goes_on_about_its_layers(tmp_path: Path) -> None:
    image = build(tmp_path / "c", [Layer(MiB)])[0]

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(ANSWER) + struct.pack("<BBHI", 32, 0, 0, 1 << 30))
        while frames.read_or_end() is not None:
            pass

    with puppet(answer) as endpoint, pytest.raises(Corrupt, match="more than INVENTORY may have"):
        send(image, endpoint, DISK)


def test_kinds_go_one_way() -> None:
    assert not {Kind.ACK, Kind.DONE, Kind.INVENTORY, Kind.STORED} & set(FROM_SENDER)
    assert not {Kind.DATA, Kind.MAP, Kind.LAYER, Kind.STOP, Kind.CUT} & set(FROM_RECEIVER)


def test_every_request_has_its_handler() -> None:
    for kind, request in REQUESTS.items():
        module, _, name = request.handler.partition(":")
        assert callable(getattr(import_module(f"snapchain.replica.{module}"), name)), kind
        assert set(request.responses) <= set(FROM_RECEIVER) | set(FROM_FETCH), kind
        assert request.rights, kind
        assert kind not in FROM_RECEIVER or kind is Kind.LAYER, kind
