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
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from blake3 import blake3
from hypothesis import assume, given, settings, strategies as st

from snapchain.errors import Corrupt, InvalidInput, SnapchainError, Unavailable, Unsupported
from snapchain.host.remote_channel import Channel
from snapchain.model.content import content_id, leaf_hash, sum_of
from snapchain.model.extents import ABSENT, DATA, ZERO, Extents
from snapchain.replica.levels import Link
from snapchain.replica.receiver import receive
from snapchain.replica.stream import zstd
from snapchain.replica.stream.data import DataRuns, Part, decode_data, encode_data
from snapchain.replica.stream.frames import FROM_RECEIVER, FROM_SENDER, MAGIC, MOST_BEATS, FrameReader, Kind
from snapchain.replica.stream.maps import MapReader, layer_id, map_frames, words_of
from snapchain.replica.stream.messages import Hello, Inventory, LayerOffer, Open, PointOffer, Stored, encode
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
HOSTILE: dict[str, tuple[tuple[int, bytes], ...]] = {
    "no hello": (OPEN,),
    "hello twice": (HELLO, HELLO),
    "opened twice": (HELLO, OPEN, OPEN),
    "unknown kind": (HELLO, OPEN, (99, b"")),
    "a receiver's word": (HELLO, OPEN, (33, bytes(8))),
    "data first": (HELLO, OPEN, data(0, GRAIN, BLOB[:GRAIN])),
    "no such parent": (HELLO, OPEN, offer(parent="0" * 32), MAP, end()),
    "size below zero": (HELLO, OPEN, offer(size=-1), MAP),
    "size of 2**60": (HELLO, OPEN, offer(size=1 << 60), MAP),
    "clusters of 3": (HELLO, OPEN, offer(cluster_size=3), MAP),
    "clusters of 513": (HELLO, OPEN, offer(cluster_size=513, size=4 * 513), MAP, data(0, 513, BLOB[:513])),
    "small subclusters": (HELLO, OPEN, offer(cluster_size=512, extended_l2=True, size=64), MAP, end()),
    "a billion runs": (HELLO, OPEN, offer(runs=1 << 30), MAP),
    "more runs than clusters": (HELLO, OPEN, offer(runs=5), MAP),
    "a way out": (HELLO, OPEN, offer(name="../../a.qcow2"), MAP, end()),
    "an absolute name": (HELLO, OPEN, offer(name="/etc/a.qcow2"), MAP, end()),
    "its own catalogue": (HELLO, OPEN, offer(name="catalogue.json"), MAP, end()),
    "a hidden name": (HELLO, OPEN, offer(name=".incoming.qcow2"), MAP, end()),
    "a protocol": (HELLO, OPEN, offer(name="nbd:a.qcow2"), MAP, end()),
    "map too short": (HELLO, OPEN, offer(), words(2 << 2 | 2, 1 << 2), end()),
    "map too long": (HELLO, OPEN, offer(), words(3 << 2 | 2, 1 << 61), end()),
    "map that overflows": (HELLO, OPEN, offer(), words((1 << 62) - 1 << 2 | 2, 6 << 2), end()),
    "runs of nothing": (HELLO, OPEN, offer(), words(4 << 2 | 2, 0), end()),
    "kind 3": (HELLO, OPEN, offer(), words(3 << 2 | 3, 1 << 2), end()),
    "equal neighbours": (HELLO, OPEN, offer(), words(3 << 2 | 2, 1 << 2 | 2), end()),
    "map bomb": (HELLO, OPEN, offer(), (4, struct.pack("<II", 2, 1) + BOMB), end()),
    "map cut off": (HELLO, OPEN, offer(), (4, b"\1\0"), end()),
    "data beyond the disk": (HELLO, OPEN, offer(), MAP, data(0, 9 * GRAIN, BLOB)),
    "data backwards": (HELLO, OPEN, offer(), MAP, data(GRAIN, 0, BLOB)),
    "data twice": (HELLO, OPEN, offer(), MAP, data(0, GRAIN, BLOB[:GRAIN]), data(0, GRAIN, BLOB[:GRAIN])),
    "overlapping data": (HELLO, OPEN, offer(), MAP, TWO, data(GRAIN, 3 * GRAIN, BLOB[GRAIN:])),
    "data left out": (HELLO, OPEN, offer(), MAP, data(GRAIN, 3 * GRAIN, BLOB[GRAIN:])),
    "data where none is": (HELLO, OPEN, offer(), MAP, ALL, data(3 * GRAIN, 4 * GRAIN, BLOB[:GRAIN])),
    "too little data": (HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, BLOB[:-1], parts=(3 * GRAIN * 4,))),
    "too much data": (HELLO, OPEN, offer(), MAP, data(0, GRAIN, BLOB, parts=(GRAIN * 4,))),
    "parts too large": (HELLO, OPEN, offer(), MAP, data(0, GRAIN, BLOB[:GRAIN], parts=((1 << 30) - 1 << 2,))),
    "parts of nothing": (HELLO, OPEN, offer(), MAP, data(0, GRAIN, BLOB[:GRAIN], parts=(GRAIN * 4, 0))),
    "no parts": (HELLO, OPEN, offer(), MAP, data(0, GRAIN, b"", parts=())),
    "from below a root": (HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, b"", parts=(3 * GRAIN * 4 + 2,))),
    "a bomb": (HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, BOMB, codec=1, parts=(3 * GRAIN * 4,))),
    "no zstd": (HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, BLOB[:999], codec=1, parts=(3 * GRAIN * 4,))),
    "codec 9": (HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, BLOB, codec=9)),
    "ends early": (HELLO, OPEN, offer(), MAP, data(0, GRAIN, BLOB[:GRAIN]), end()),
    "other content": (HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, BLOB), (7, bytes(32))),
    "a mark behind": (HELLO, OPEN, offer(), MAP, data(0, GRAIN, BLOB[:GRAIN]), (6, struct.pack("<Q", 5) + SUM)),
    "a mark ahead": (HELLO, OPEN, offer(), MAP, (6, struct.pack("<Q", GRAIN) + SUM)),
    "a mark beyond": (HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, BLOB), (6, struct.pack("<Q", 1 << 63) + SUM)),
    "resumed from nothing": (HELLO, OPEN, offer(resume_at=3 * GRAIN), MAP, end()),
    "a point of nothing": (HELLO, OPEN, POINT_OF_NOTHING),
    "not JSON": (HELLO, OPEN, (3, b"\xff{")),
    "deep JSON": (HELLO, OPEN, (3, b"[" * 100_000)),
    "a field too many": (HELLO, (2, b'{"disk":"a","x":1}')),
    "a disk outside": (HELLO, (2, b'{"disk":"/a"}')),
    "another replica": (HELLO, (2, b'{"disk":"a","replica":"/etc"}')),
    "cut to nothing": (HELLO, OPEN, (12, b'{"keep":"' + b"0" * 32 + b'"}')),
    "an end of nothing": (HELLO, OPEN, STOP, STOP)[:2],
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_sender(place: Place, name: str) -> None:
    good = stream(HELLO, OPEN, offer(), MAP, data(0, 3 * GRAIN, BLOB), end(), STOP)
    other = Place(place.root.with_name("other"))
    take(other, good)
    before = {path.name: path.read_bytes() for path in other.directory.iterdir() if path.suffix != ".lock"}
    with pytest.raises(SnapchainError) as first:
        take(place, stream(*HOSTILE[name]))
    assert str(first.value)
    with suppress(SnapchainError):  # some of it is in order on top of what is there, or for a layer that is known
        take(other, stream(*HOSTILE[name]))
    for path, old in before.items():
        assert path == "catalogue.json" or (other.directory / path).read_bytes() == old
    # Whatever it was, the honest one gets through afterwards.
    take(place, good)
    assert place.files()[0].name == "a.qcow2"
    assert sorted(entry.name for entry in place.root.parent.iterdir()) == ["other", "replica"]


def test_a_sender_that_only_lives(place: Place) -> None:
    beats = [BEAT] * MOST_BEATS
    take(place, stream(HELLO, *beats, OPEN, *beats, offer(), MAP, *beats, ALL, end(), STOP))
    assert clean(place.files()[0])
    with pytest.raises(Unavailable, match="that it is alive, and nothing else"):
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


@given(raw=st.binary(max_size=300), kind=st.sampled_from(sorted(FROM_SENDER)))
@settings(max_examples=150, deadline=None)
def test_bodies_of_noise(tmp_path_factory: pytest.TempPathFactory, raw: bytes, kind: Kind) -> None:
    assume(kind is not Kind.STOP or raw)
    place = Place(tmp_path_factory.getbasetemp() / "noise")
    for frames in ((HELLO, OPEN, (kind, raw)), (HELLO, OPEN, offer(), MAP, (kind, raw))):
        with pytest.raises(SnapchainError):
            take(place, stream(*frames))


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
        url, link, replica = "puppet", Link.NETWORK, None

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
BAD_ANSWERS: dict[str, tuple[tuple[int, bytes], ...]] = {
    "another version": ((1, b'{"first":3,"last":4,"software":"x","answers":true}'),),
    "no hello": (EMPTY,),
    "another disk": (ANSWER, (32, EMPTY[1].replace(b"web1", b"web2"))),
    "noise": (ANSWER, (32, b"{}")),
    "a mark of the future": (ANSWER, EMPTY, (33, struct.pack("<Q", 99))),
    "mark 0": (ANSWER, EMPTY, (33, struct.pack("<Q", 0))),
    "half a mark": (ANSWER, EMPTY, (33, b"")),
    "stored what was not sent": (ANSWER, EMPTY, (34, encode(Stored(layer="0" * 32, file="a")))),
    "done at once": (ANSWER, EMPTY, (35, b'{"points":[1],"layers":1}')),
    "inventory twice": (ANSWER, EMPTY, EMPTY),
    "a sender's word": (ANSWER, EMPTY, (9, b"")),
    "a failure": (ANSWER, EMPTY, (11, b'{"kind":"unavailable","message":"disk \\u001b[31mfull"}')),
    "a failure of no kind": (ANSWER, (11, b'{"kind":"\\u0000","message":"x"}')),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_hostile_receiver(tmp_path: Path, name: str) -> None:
    image = build(tmp_path / "c", [Layer(8 * MiB, ["write -P 1 0 8M"])])[0]

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(*BAD_ANSWERS[name]))
        while frames.read_or_end() is not None:
            pass

    with puppet(answer) as endpoint, pytest.raises(SnapchainError) as caught:
        send(image, endpoint, DISK)
    assert str(caught.value).isprintable()
    assert not isinstance(caught.value, InvalidInput)


def test_a_receiver_that_only_lives(tmp_path: Path) -> None:
    """It says that it is alive, and never what it holds."""
    image = build(tmp_path / "c", [Layer(MiB)])[0]

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(ANSWER, *[BEAT] * (MOST_BEATS + 1)))
        while frames.read_or_end() is not None:
            pass

    with puppet(answer) as endpoint, pytest.raises(Unavailable, match="that it is alive, and nothing else"):
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
        with pytest.raises(Unavailable):
            send(image, endpoint, DISK)
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
