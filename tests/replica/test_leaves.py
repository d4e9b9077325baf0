"""LEAVES: a sender gets the leaf hashes of the newest content there, and believes none that cannot be."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapchain.errors import Corrupt, Diverged, SnapchainError, Unsupported
from snapchain.model.content import LEAF_BYTES, leaf_hash
from snapchain.replica.endpoint import DirectoryEndpoint, Endpoint
from snapchain.replica.sender import Sender
from snapchain.replica.stream import session
from snapchain.replica.stream.frames import FrameReader, Kind
from snapchain.replica.stream.messages import Open
from tests.ops.stacks import Layer, build, flat
from tests.replica.conftest import DISK, Place
from tests.replica.test_stream import ANSWER, EMPTY, puppet, stream

SIZE = 4 * (1 << 20) + 3 * 512
DONE = (35, b'{"points":[],"layers":0}')


@pytest.fixture
def sent(tmp_path: Path, place: Place) -> tuple[Path, Place]:
    """Data that stay, are overwritten, zeroed, cut into by half a leaf, and data in the last, short leaf."""
    layers = [
        Layer(SIZE, ["write -P 1 0 1M", "write -P 2 2M 200k", "write -P 3 4M 1k"]),
        Layer(SIZE, ["write -P 4 64k 4k", "write -z 512k 256k", "write -P 0 2M 64k"]),
    ]
    image = build(tmp_path / "c", layers)[-1]
    place.send(image)
    return flat(image, tmp_path / "flat"), place


@contextmanager
def opened(endpoint: Endpoint, *, look: bool = True) -> Iterator[Sender]:
    with endpoint.connect() as channel, Sender(channel, link=endpoint.link) as sender:
        sender.open(Open(disk=DISK, look=look, replica=endpoint.replica))
        yield sender


@pytest.mark.parametrize("look", [True, False])
def test_they_are_those_of_the_newest_content(sent: tuple[Path, Place], look: bool) -> None:
    shown, place = sent
    told: list[tuple[int, int]] = []
    with opened(DirectoryEndpoint(place.root), look=look) as sender:
        numbers, hashes = sender.leaves(on_bytes=lambda done, total: told.append((done, total)))
        sender.finish()
    raw = shown.read_bytes()
    leaves = [raw[at : at + LEAF_BYTES] for at in range(0, len(raw), LEAF_BYTES)]
    wanted = {number: leaf_hash(leaf) for number, leaf in enumerate(leaves) if leaf.strip(b"\0")}
    assert numbers.dtype == np.int64
    assert hashes.dtype == np.uint8
    assert hashes.shape == (len(wanted), 32)
    assert dict(zip(numbers.tolist(), map(bytes, hashes), strict=True)) == wanted
    assert told[-1][0] == told[-1][1] > 0


def test_a_disk_without_layers_has_none(place: Place) -> None:
    with opened(DirectoryEndpoint(place.root), look=False) as sender:
        numbers, hashes = sender.leaves()
        sender.finish()
    assert (len(numbers), hashes.shape) == (0, (0, 32))


def test_batches_may_be_left_unread(sent: tuple[Path, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.replica import fetch_server, sender as sending

    monkeypatch.setattr(fetch_server, "_LEAVES_AT_ONCE", 1)
    monkeypatch.setattr(sending, "_BODIES", 1)
    with opened(DirectoryEndpoint(sent[1].root)) as sender:
        next(sender.leaf_batches())
        assert sender.finish() is not None


def test_damage_over_there_is_no_content(sent: tuple[Path, Place]) -> None:
    _, place = sent
    victim = place.files()[0]
    victim.chmod(0o600)
    raw = bytearray(victim.read_bytes())
    at = raw.rindex(b"\3" * 512)
    raw[at] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(Corrupt, match="its chain shows the content"), opened(DirectoryEndpoint(place.root)) as sender:
        sender.leaves()


def test_another_newest_layer(sent: tuple[Path, Place]) -> None:
    _, place = sent
    lowest = place.catalogue()["layers"][0]

    def ask(sender: Sender) -> None:
        sender._newest = (lowest["id"], lowest["size"], lowest["content_id"])
        sender.leaves()

    with (
        pytest.raises(Diverged, match="that layer is not the newest one here"),
        opened(DirectoryEndpoint(place.root)) as sender,
    ):
        ask(sender)


def test_an_older_receiver(sent: tuple[Path, Place], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FEATURES", ("ask",))
    with (
        pytest.raises(Unsupported, match="does not support 'leaves'") as caught,
        opened(DirectoryEndpoint(sent[1].root)) as sender,
    ):
        sender.leaves()
    assert caught.value.hint == "upgrade it there"


def entry(number: int, digest: bytes = b"\7" * 32) -> bytes:
    return struct.pack("<Q", number) + digest


END = (43, b"")
BAD: dict[str, tuple[tuple[tuple[int, bytes], ...], str]] = {
    "cut off": (((43, entry(0)[:-1]),), "leaf hashes are cut off"),
    "not ascending": (((43, entry(3)), (43, entry(2))), "leaf hashes do not ascend"),
    "one twice": (((43, entry(3) + entry(3)),), "leaf hashes do not ascend"),
    "beyond the end": (((43, entry(65)),), "beyond the end of the disk"),
    "beyond all numbers": (((43, entry((1 << 64) - 1)),), "beyond the end of the disk"),
    "of another content": (((43, entry(0)), END), "not those of its newest layer"),
    "none at all": ((END,), "not those of its newest layer"),
    "a layer": (((33, bytes(8)),), "mark 0 is confirmed"),
    "something else": (((37, b"{}"),), "DISK has no place here"),
    "progress of no size": (((40, b""),), "PROGRESS has no place here"),
    "an early end": ((DONE,), "the end is announced before"),
    "after the end": ((END, END), "not those|LEAF_HASHES has no place here"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_hostile_receiver(sent: tuple[Path, Place], name: str) -> None:
    then, words = BAD[name]
    with (
        pytest.raises(Corrupt, match=words),
        answering(sent[1], then) as endpoint,
        opened(endpoint) as sender,
    ):
        sender.leaves()


def answering(place: Place, then: tuple[tuple[int, bytes], ...]) -> Any:
    """A receiver that tells of the place's layers truly, and then answers LEAVES with that."""
    hello = json.loads(ANSWER[1]) | {"features": ["leaves"]}
    names = ("id", "file", "size", "content_id", "content_sum", "sources")
    layers = [{name: layer[name] for name in names} for layer in place.catalogue()["layers"]]
    inventory = json.loads(EMPTY[1]) | {"layers": layers}

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        opening = ((1, json.dumps(hello).encode()), (32, json.dumps(inventory).encode()))
        say(stream(*opening))
        with suppress(SnapchainError):
            while (frame := frames.read_or_end()) is not None:
                if frame.kind is Kind.LEAVES:
                    say(stream(*opening, *then)[len(stream(*opening)) :])

    return puppet(answer)
