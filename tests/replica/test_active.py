"""ACTIVE and READINESS on the wire: made by hand, hostile, and between a new side and an old one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Corrupt, Diverged, InvalidInput, SnapchainError, Unsupported
from snapchain.ops.sync.run import Destination, SyncRequest, check, sealed_request
from snapchain.replica.stream.frames import FrameReader, Kind
from snapchain.replica.stream.requests import FROM_RECEIVER, FROM_SENDER
from tests.ops.stacks import Layer, build, clean, same
from tests.replica.conftest import DISK, Place
from tests.replica.test_stream import (
    ALL,
    ANSWER,
    EMPTY,
    GRAIN,
    HELLO,
    MAP,
    OPEN,
    STOP,
    end,
    offer,
    puppet,
    stream,
    take,
)

BASE = stream(HELLO, OPEN, offer(), MAP, ALL, end(), STOP)


def active(place: Place, **change: Any) -> tuple[int, bytes]:
    fields = {
        "name": "disk.qcow2",
        "size": 4 * GRAIN,
        "cluster_size": 65536,
        "extended_l2": False,
        "on": place.catalogue()["layers"][-1]["id"],
        "make": True,
        "prove": True,
    }
    return 13, json.dumps({**fields, **change}).encode()


@pytest.fixture
def filled(tmp_path: Path) -> Place:
    place = Place(tmp_path / "replica")
    take(place, BASE)
    return place


def test_an_overlay_by_hand(filled: Place) -> None:
    take(filled, stream(HELLO, OPEN, active(filled), STOP))
    overlay = filled.directory / "active" / "disk.qcow2"
    assert clean(overlay)
    base = filled.files()[0]
    raw = base.with_suffix(".raw")
    subprocess.run(["qemu-img", "convert", "-O", "raw", base, raw], check=True)
    assert same(overlay, raw)


HOSTILE: dict[str, tuple[dict[str, Any], type[SnapchainError], str]] = {
    "a way out": ({"name": "../../x.qcow2"}, Corrupt, "cannot be named"),
    "absolute": ({"name": "/tmp/x.qcow2"}, Corrupt, "cannot be named"),
    "hidden": ({"name": ".x.qcow2"}, Corrupt, "cannot be named"),
    "no qcow2": ({"name": "authorized_keys"}, Corrupt, "cannot be named"),
    "another layer": ({"on": "0" * 32}, Diverged, "not the newest one here"),
    "no layer": ({"on": "x"}, Corrupt, "the sender: .* message is invalid: on"),
    "half a sector": ({"size": 1000}, InvalidInput, "cannot have 1000 bytes"),
    "a disk beyond all": ({"size": 1 << 60}, Corrupt, "the sender: .* message is invalid: size"),
    "no power of two": (
        {"cluster_size": 65537},
        InvalidInput,
        "choose a power of two|cluster size of 65537 bytes is not allowed",
    ),
    "a field too many": ({"backing": "/etc/passwd"}, Corrupt, "the sender: .* message is invalid: backing"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_sender(filled: Place, name: str) -> None:
    change, error, words = HOSTILE[name]
    before = sorted(path.name for path in filled.root.parent.rglob("*"))
    with pytest.raises(error, match=words):
        take(filled, stream(HELLO, OPEN, active(filled, **change), STOP))
    after = sorted(path.name for path in filled.root.parent.rglob("*"))
    assert [name for name in after if name != "active"] == before
    take(filled, stream(HELLO, OPEN, active(filled), STOP))


def test_on_a_disk_that_is_not_there(tmp_path: Path, filled: Place) -> None:
    other = Place(tmp_path / "other")
    with pytest.raises(Diverged, match="the layer below the overlay is not the newest one here"):
        take(other, stream(HELLO, OPEN, active(filled), STOP))


def test_directions() -> None:
    assert Kind.ACTIVE not in FROM_RECEIVER
    assert Kind.READINESS not in FROM_SENDER


READINESS = (36, b'{"directory":"/r","file":"active/disk.qcow2","state":"ready","proven":false,"broken":[]}')
DONE = (35, b'{"points":[],"layers":0}')
BAD_ANSWERS: dict[str, tuple[tuple[int, bytes], ...]] = {
    "told twice": (READINESS, READINESS),
    "nothing told": (),
    "noise": ((36, b"{}"),),
    "a state of no kind": ((36, READINESS[1].replace(b"ready", b"great")),),
    "another file": ((36, READINESS[1].replace(b"disk.qcow2", b"other.qcow2")),),
    "a way to other files": ((36, READINESS[1].replace(b"active/", b"../../")),),
    "a directory with an escape": ((36, READINESS[1].replace(b'"/r"', b'"/r\\u001b[2J"')),),
    "a directory with a line": ((36, READINESS[1].replace(b'"/r"', b'"/r\\ne rm"')),),
    "a relative directory": ((36, READINESS[1].replace(b'"/r"', b'"r"')),),
    "a layer that it does not hold": ((36, READINESS[1].replace(b"[]", b'["x"]')),),
    "proof that nobody asked for": ((36, READINESS[1].replace(b"false", b"true")),),
    "a failure": ((11, b'{"kind":"corrupt","message":"x"}'),),
}


def asked(endpoint: Any, image: Path) -> Destination:
    return check(SyncRequest(send=sealed_request(image, DISK)), endpoint)


def answering(place: Place, *, features: list[str], then: tuple[tuple[int, bytes], ...]) -> Any:
    """A receiver that tells of the place's layers truly, and then says something."""
    hello = json.loads(ANSWER[1]) | {"features": features}
    layers = [
        {name: layer[name] for name in ("id", "file", "size", "content_id", "content_sum", "sources")}
        for layer in place.catalogue()["layers"]
    ]
    inventory = json.loads(EMPTY[1]) | {"layers": layers}

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        opening = ((1, json.dumps(hello).encode()), (32, json.dumps(inventory).encode()))
        heard = False
        say(stream(*opening))
        with suppress(SnapchainError):
            while (frame := frames.read_or_end()) is not None:
                if frame.kind is Kind.ACTIVE and not heard:
                    heard = True
                    say(stream(*opening, *then)[len(stream(*opening)) :])

    return puppet(answer)


@pytest.fixture
def synced(tmp_path: Path) -> tuple[Path, Place]:
    paths = build(tmp_path / "c", [Layer(4 << 20, ["write -P 1 0 1M"]), Layer(4 << 20)])
    place = Place(tmp_path / "synced")
    place.send(paths[0])
    return paths[-1], place


WORDS = r"^puppet: (it |the end is announced|its readiness message is invalid|READINESS has no place|x$)"


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_hostile_receiver(synced: tuple[Path, Place], name: str) -> None:
    image, place = synced
    with (
        answering(place, features=["active"], then=(*BAD_ANSWERS[name], DONE)) as endpoint,
        pytest.raises(
            Corrupt,
            match=r"^puppet: (it |the end is announced|its readiness message is invalid|READINESS has no place|x$)",
        ) as caught,
    ):
        asked(endpoint, image)
    assert str(caught.value).isprintable()


def test_the_honest_answer_is_believed(synced: tuple[Path, Place]) -> None:
    """So that the cases above fail for what they say, and not for the way they are made."""
    image, place = synced
    with answering(place, features=["active"], then=(READINESS, DONE)) as endpoint:
        stands = asked(endpoint, image)
    assert (stands.ready, stands.overlay) == (True, "/r/active/disk.qcow2")


def test_a_receiver_that_is_older(synced: tuple[Path, Place]) -> None:
    image, place = synced
    with (
        answering(place, features=[], then=()) as endpoint,
        pytest.raises(Unsupported, match="does not support 'active'"),
    ):
        asked(endpoint, image)
