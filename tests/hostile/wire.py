"""A man in the middle of a stream: every frame of one direction passes through a mutator, and is sealed again after it.

    client -> pipe -> pump -> pipe -> server           one of the pumps mutates, the other one only passes on
    client <- pipe <- pump <- pipe <- server

Both sides are our own; whichever of them stands behind the mutator meets a hostile peer.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard
from blake3 import blake3

from snapchain.errors import SnapchainError
from snapchain.host.channel import Channel
from snapchain.replica import endpoint
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.frames import CHECK_BYTES, HEAD, MAGIC, Kind
from tests.hostile.mutate import Draw, Pool, document, number, spoil

PATIENCE = 0.6
"""Seconds of silence that either side bears."""
MOST_ENDLESS = 256 << 20
"""Bytes of what has no end, after which nothing more comes."""
_DATA_HEAD = struct.Struct("<QQBBH")
_MAP_HEAD = struct.Struct("<II")
_WORDS = {Kind.MARK: 8, Kind.ACK: 8, Kind.PROGRESS: 16}


@dataclass(frozen=True)
class Frame:
    """length: what its head claims, where that is not the truth"""

    kind: int
    body: bytes
    length: int | None = None
    flags: int = 0
    check: bytes | None = None


class Silence(Exception):
    """Nothing more is said, and the other side is not told."""


class End(Exception):
    """The stream ends here."""


Mutator = Callable[[Iterator[Frame]], Iterator[Frame | bytes]]
"""From the frames of one direction to those that arrive, with raw bytes among them. May raise Silence and End."""


@dataclass
class Talk:
    """One direction of a conversation, as it was."""

    frames: list[Frame] = field(default_factory=list)

    def encoded(self, mutator: Mutator) -> bytes:
        """The bytes of such a stream after a mutation."""
        seal = _Seal()
        out = bytearray()
        with suppress(Silence, End):
            for item in mutator(iter(self.frames)):
                out += seal(item)
                if len(out) > MOST_ENDLESS // 8:
                    break
        return bytes(out)


class _Seal:
    """Gives frames their checks."""

    def __init__(self) -> None:
        self._check = blake3(MAGIC).digest(CHECK_BYTES)
        self._before = MAGIC

    def __call__(self, item: Frame | bytes) -> bytes:
        before, self._before = self._before, b""
        if isinstance(item, bytes):
            return item if before and item.startswith(b"\0MAGIC") else before + item
        head = HEAD.pack(
            item.kind & 255, item.flags & 255, item.flags >> 8, len(item.body) if item.length is None else item.length
        )
        self._check = blake3(self._check).update(head).update(item.body).digest(CHECK_BYTES)
        return before + head + item.body + (self._check if item.check is None else item.check)


def read_frames(read: Callable[[int], bytes]) -> Iterator[Frame]:
    """The frames of a sound stream, to its end. read: exactly so many bytes, fewer at the end."""
    if read(len(MAGIC)) != MAGIC:
        return
    while len(head := read(HEAD.size)) == HEAD.size:
        kind, _, _, length = HEAD.unpack(head)
        body = read(length)
        if len(body) < length or len(read(CHECK_BYTES)) < CHECK_BYTES:
            return
        yield Frame(kind, body)


def pass_on(frames: Iterator[Frame]) -> Iterator[Frame | bytes]:
    """No mutation."""
    yield from frames


@contextmanager
def meddling(
    to_server: Mutator, to_client: Mutator, *, patience: float = PATIENCE, link: Link | None = None
) -> Iterator[None]:
    """While the block runs, every replica of this machine is reached through these mutators."""
    before = endpoint.DirectoryEndpoint.connect, endpoint.DirectoryEndpoint.link

    @contextmanager
    def connect(self: Any) -> Iterator[Channel]:
        from snapchain.replica.receiver import receive

        pipes = [os.pipe() for _ in range(4)]
        (to_pump, from_client), (to_there, from_pump), (to_back, from_there), (to_ours, from_back) = pipes
        ours = Channel(to_ours, from_client, peer=self.url, patience=patience)
        theirs = Channel(to_there, from_there, peer="the sender", patience=patience)
        broken: list[BaseException] = []

        def serve() -> None:
            with theirs:
                try:
                    receive(theirs, self._directory)
                except SnapchainError:
                    pass
                except BaseException as error:  # noqa: BLE001 -- raised again below
                    broken.append(error)

        threads = [
            threading.Thread(target=serve, daemon=True),
            threading.Thread(target=_pump, args=(to_pump, from_pump, to_server), daemon=True),
            threading.Thread(target=_pump, args=(to_back, from_back, to_client), daemon=True),
        ]
        for thread in threads:
            thread.start()
        try:
            with ours:
                yield ours
        finally:
            for thread in threads:
                thread.join()
            if broken:
                raise broken[0]

    endpoint.DirectoryEndpoint.connect = connect  # type: ignore[method-assign]
    if link is not None:
        endpoint.DirectoryEndpoint.link = property(lambda _self: link)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        endpoint.DirectoryEndpoint.connect, endpoint.DirectoryEndpoint.link = before  # type: ignore[method-assign]


def _pump(source: int, target: int, mutator: Mutator) -> None:
    seal = _Seal()
    with open(source, "rb", buffering=1 << 16) as file:
        closed = False
        try:
            for item in mutator(read_frames(file.read)):
                _write(target, seal(item))
        except (End, BrokenPipeError):
            os.close(target)
            closed = True
        except Silence:
            pass
        with suppress(OSError):
            while file.read(1 << 16):
                pass
        if not closed:
            os.close(target)


def _write(target: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(target, view) :]


def recorder(talk: Talk) -> Mutator:
    """Keeps what passes."""

    def keep(frames: Iterator[Frame]) -> Iterator[Frame | bytes]:
        for frame in frames:
            talk.frames.append(frame)
            yield frame

    return keep


# ---- what a hostile side does


@dataclass
class Script:
    """What happens to one direction: drawn when it is made, and told by `told`.

    talk: how that direction goes when nobody meddles; others: frames of other conversations
    """

    draw: Draw
    talk: Talk
    others: list[Frame]
    pool: Pool
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        count = max(1, len(self.talk.frames))
        self._at: dict[int, str] = {}
        for _ in range(self.draw.choice([1, 1, 1, 2, 3])):
            # The first frames are hellos: they end most conversations at once.
            place = (
                self.draw.randrange(count) if self.draw.random() < 0.7 else self.draw.randrange(max(1, count - 1)) + 1
            )
            self._at[place] = self.draw.choice(_DEEDS)

    def __call__(self, frames: Iterator[Frame]) -> Iterator[Frame | bytes]:
        held: list[Frame] = []
        for place, frame in enumerate(frames):
            deed = self._at.get(place)
            if deed is None:
                yield frame
                yield from held
                held = []
                continue
            self.told.append(f"{deed} {frame.kind}")
            if deed == "later":
                held.append(frame)
            else:
                yield from self._done(deed, frame)

    def _done(self, deed: str, frame: Frame) -> Iterator[Frame | bytes]:
        draw = self.draw
        match deed:
            case "drop":
                return
            case "twice":
                yield frame
                for _ in range(draw.choice([1, 1, 3, 500])):
                    yield frame
            case "kind":
                yield Frame(draw.choice([*(kind.value for kind in Kind), 0, 255, draw.randrange(256)]), frame.body)
            case "foreign":
                yield draw.choice(self.others)
                if draw.random() < 0.5:
                    yield frame
            case "body":
                changed = mutated(frame, draw, self.pool)
                yield changed
            case "length":
                yield Frame(frame.kind, frame.body, length=number(len(frame.body), draw, bits=32))
            case "cut":
                whole = _Seal()(frame)[len(MAGIC) :]
                yield whole[: draw.randrange(len(whole))]
                raise End
            case "end":
                raise End
            case "silence":
                raise Silence
            case "check":
                yield Frame(frame.kind, frame.body, check=draw.randbytes(CHECK_BYTES))
            case "flags":
                yield Frame(frame.kind, frame.body, flags=draw.randrange(1, 1 << 24))
            case "noise":
                yield draw.randbytes(draw.choice([1, 7, 100, 70_000]))
            case "endless":
                yield from endless(frame, draw)
                raise Silence
            case "planted":
                yield from planted(draw, self.talk)
                if draw.random() < 0.5:
                    yield frame
            case "big":
                yield Frame(
                    frame.kind, draw.choice([b"[", b'{"a":', b" ", b"\0"]) * draw.choice([1000, 200_000, 5_000_000])
                )


_DEEDS = (
    *["body"] * 24, "drop", "drop", "twice", "later", "kind", "foreign", "foreign", "length", "cut", "end", "silence",
    "check", "flags", "noise", "endless", "planted", "planted", "big",
)  # fmt: skip


def mutated(frame: Frame, draw: Draw, pool: Pool) -> Frame:
    """A frame of the same kind that says something else."""
    body = frame.body
    if body[:1] in (b"{", b"["):
        value = json.loads(body)
        pool.learn(value)
        return Frame(frame.kind, document(value, draw, pool))
    if frame.kind == Kind.MAP and len(body) > _MAP_HEAD.size:
        return Frame(frame.kind, _other_map(body, draw))
    if frame.kind == Kind.DATA and len(body) > _DATA_HEAD.size:
        return Frame(frame.kind, _other_data(body, draw))
    if frame.kind in _WORDS and len(body) >= 8 and draw.random() < 0.7:
        at = draw.randrange(_WORDS[Kind(frame.kind)] // 8) * 8
        (word,) = struct.unpack_from("<Q", body, at)
        return Frame(frame.kind, body[:at] + struct.pack("<Q", number(word, draw)) + body[at + 8 :])
    return Frame(frame.kind, spoil(body, draw))


def _other_map(body: bytes, draw: Draw) -> bytes:
    count, codec = _MAP_HEAD.unpack_from(body)
    packed = body[_MAP_HEAD.size :]
    plain = zstandard.ZstdDecompressor().decompress(packed) if codec else packed
    words = [int(word) for word in np.frombuffer(plain, "<u8")]
    kind = draw.randrange(8)
    at = draw.randrange(len(words))
    if kind == 0:
        words[at] = number(words[at], draw)
    elif kind == 1:
        words[at] ^= draw.choice([1, 2, 3])
    elif kind == 2:
        words.insert(at, draw.choice([words[at], 4, 5, 6, 7, 0]))
    elif kind == 3:
        del words[at]
    elif kind == 4:
        draw.shuffle(words)
    elif kind == 5:
        return (
            _MAP_HEAD.pack(number(count, draw, bits=32), number(codec, draw, bits=32) if draw.random() < 0.3 else codec)
            + packed
        )
    elif kind == 6:
        return _MAP_HEAD.pack(count, 1) + bomb(draw, 8 * count)
    else:
        return spoil(body, draw)
    return map_body(words, draw)


def map_body(words: list[int], draw: Draw) -> bytes:
    """A MAP frame's body of these words."""
    plain = np.array([word & ((1 << 64) - 1) for word in words], np.uint64).astype("<u8").tobytes()
    if draw.random() < 0.5:
        return _MAP_HEAD.pack(len(words), 0) + plain
    return _MAP_HEAD.pack(len(words), 1) + zstandard.ZstdCompressor().compress(plain)


def bomb(draw: Draw, length: int) -> bytes:
    """A zstd frame that unpacks to far more than it should hold, whatever its head claims."""
    huge = draw.choice([1 << 20, 64 << 20, 512 << 20])
    compressor = zstandard.ZstdCompressor(level=1)
    kind = draw.randrange(3)
    if kind == 0:  # says what it holds
        return _zeroes(huge, said=huge)
    if kind == 1:  # says nothing
        return _zeroes(huge, said=-1)
    # Two frames, of which the first is right.
    return compressor.compress(bytes(length)) + _zeroes(huge, said=-1)


def _zeroes(count: int, *, said: int) -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=said)
    piece = bytes(1 << 20)
    out = b"".join(compressor.compress(piece) for _ in range(count >> 20))
    return out + compressor.flush()


def _other_data(body: bytes, draw: Draw) -> bytes:
    start, stop, codec, zero, count = _DATA_HEAD.unpack_from(body)
    words = list(struct.unpack_from(f"<{count}I", body, _DATA_HEAD.size))
    payload = body[_DATA_HEAD.size + 4 * count :]
    plain = zstandard.ZstdDecompressor().decompress(payload) if codec == 1 else payload
    kind = draw.randrange(10)
    if kind == 0:
        start = number(start, draw)
    elif kind == 1:
        stop = number(stop, draw)
    elif kind == 2:
        codec, zero = draw.choice([(0, 0), (1, 0), (2, 0), (codec, 1), (255, 255)])
    elif kind == 3:
        count = number(count, draw, bits=16)
    elif kind == 4 and words:
        at = draw.randrange(len(words))
        words[at] = draw.choice([number(words[at], draw, bits=32), words[at] ^ draw.choice([1, 2, 3])])
    elif kind == 5 and words:
        words = draw.choice([words * 2, words[:-1], [*words, 0], [words[0] - 4, 4, *words[1:]], [4] * 4096])
        count = len(words) & 65535
    elif kind <= 7:  # sound in all but its bytes
        plain = spoil(plain, draw) if kind == 6 else bytes([plain[0] ^ 1]) + plain[1:] if plain else b"x"
        payload = zstandard.ZstdCompressor().compress(plain) if codec == 1 else plain
    elif kind == 8:
        codec, payload = 1, bomb(draw, len(plain))
    else:
        return spoil(body, draw)
    words = [word & 0xFFFFFFFF for word in words]
    return (
        _DATA_HEAD.pack(start, stop, codec & 255, zero & 255, count) + struct.pack(f"<{len(words)}I", *words) + payload
    )


def endless(frame: Frame, draw: Draw) -> Iterator[Frame]:
    """The same kind of frame again and again, as plausible as can be, up to a bound."""
    kind, body = frame.kind, frame.body
    if draw.random() < 0.3:
        kind, body = Kind.BEAT, b""
    left = MOST_ENDLESS
    for turn in range(400_000):
        if kind == Kind.PROGRESS:
            body = struct.pack("<QQ", turn, 1 << 40)
        elif kind in (Kind.DISK, Kind.MERGED):
            body = _next_page(body, turn)
        elif kind == Kind.FINDING:
            body = json.dumps({**json.loads(body), "message": f"{turn} " * 600}).encode()
        elif kind == Kind.MARK and len(body) > 8:
            body = body[:8] + bytes(len(body) - 8)
        left -= len(body) + HEAD.size + CHECK_BYTES
        if left < 0:
            return
        yield Frame(kind, body)


def _next_page(body: bytes, turn: int) -> bytes:
    said = json.loads(body)
    if not said.get("points"):
        return body
    said.pop("outcome", None)
    last = said["points"][-1]
    # As few bytes as a point can have: each is an object for who collects them.
    said["points"] = [{**last, "labels": [], "point": turn * 256 + number + 1_000_000} for number in range(256)]
    return json.dumps(said, separators=(",", ":")).encode()


def planted(draw: Draw, talk: Talk) -> Iterator[Frame]:
    """A layer that hangs together in itself, with a map to match, of a size and shape that nobody has."""
    offers = [json.loads(frame.body) for frame in talk.frames if frame.kind == Kind.LAYER]
    offer = draw.choice(offers) if offers else {"name": "x.qcow2", "parent": None, "sources": []}
    cluster = draw.choice([512, 4096, 65536, 2 << 20])
    extended = cluster >= 16384 and draw.random() < 0.5
    grain = cluster // 32 if extended else cluster
    size = draw.choice([0, 1, 512, 3 << 20, 1 << 30, 1 << 40, 1 << 48, 1 << 56, draw.randrange(1 << 33)])
    grains = -(-size // grain)
    runs = min(grains, draw.choice([1, 2, 3, 1000, 1 << 17, 1 << 22]))
    offer = {**offer, "size": size, "cluster_size": cluster, "extended_l2": extended, "runs": runs, "resume_at": 0}
    yield Frame(Kind.LAYER, json.dumps(offer).encode())
    kinds = draw.choice([(0, 1), (1, 2), (0, 2), (2, 0)])
    for first in range(0, runs, 1 << 16):
        count = min(1 << 16, runs - first)
        lengths = np.full(count, max(1, grains // runs), np.uint64)
        if first + count == runs:
            lengths[-1] += np.uint64(grains - max(1, grains // runs) * runs)
        turn = (np.arange(first, first + count) % 2).astype(np.uint64)
        words = lengths * np.uint64(4) + np.where(turn == 0, np.uint64(kinds[0]), np.uint64(kinds[1]))
        plain = words.astype("<u8").tobytes()
        yield Frame(Kind.MAP, _MAP_HEAD.pack(count, 1) + zstandard.ZstdCompressor(level=1).compress(plain))
    yield Frame(Kind.END, draw.randbytes(32))


def strings(talks: Iterable[Talk]) -> Pool:
    """What JSON frames of these conversations say."""
    pool = Pool()
    for talk in talks:
        for frame in talk.frames:
            if frame.body[:1] == b"{":
                pool.learn(json.loads(frame.body))
    return pool
