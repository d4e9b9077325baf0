"""What a key may ask for: every request with every set of rights, and what an append-only server keeps."""

from __future__ import annotations

import json
import os
import threading
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from snapchain.cli import preconnect as serving
from snapchain.errors import InvalidInput, NotFound, SnapchainError
from snapchain.host.channel import Channel
from snapchain.ops import receive as serve_replica
from snapchain.replica.permissions import CONFINED, EVERYTHING, Permissions, parse_permissions
from snapchain.replica.receiver import receive
from snapchain.replica.stream.requests import Right
from tests.replica.conftest import DISK, Place
from tests.replica.test_stream import ALL, GRAIN, HELLO, MAP, OPEN, STOP, end, offer, stream, take
from tests.waiting import HANG

BASE = stream(HELLO, OPEN, offer(), MAP, ALL, end(), STOP)
LISTENS = (1, b'{"first":1,"last":1,"software":"test","features":[],"answers":true}')
OVERLAY = {"name": "disk.qcow2", "size": 4 * GRAIN, "cluster_size": GRAIN, "extended_l2": False}


def say(kind: int, **fields: Any) -> tuple[int, bytes]:
    return kind, json.dumps(fields).encode()


def requests(place: Place) -> dict[str, tuple[set[Right], bytes]]:
    """By name: the rights of which one will do, and a stream. All of them are good with all rights."""
    layer = place.catalogue()["layers"][-1]
    on = {**OVERLAY, "on": layer["id"], "prove": False}
    point = say(8, time="2026-01-01T00:00:00Z", labels=[], size=layer["size"], content_id=layer["content_id"])
    handed = [{"disk": DISK, "epoch": 2, "overlay": {**on, "make": False}}]
    look = say(2, disk=DISK, look=True)
    return {
        "look": ({Right.SEND}, stream(LISTENS, look, STOP)),
        "open": ({Right.SEND}, stream(LISTENS, OPEN, STOP)),
        "point": ({Right.SEND}, stream(LISTENS, OPEN, point, STOP)),
        "look at the overlay": ({Right.SEND}, stream(LISTENS, look, say(13, **on, make=False), STOP)),
        "points": ({Right.SEND, Right.FETCH}, stream(LISTENS, say(14, want="points"))),
        "data": ({Right.SEND, Right.FETCH}, stream(LISTENS, say(14, want="data", disk=DISK))),
        "fetch": ({Right.FETCH}, stream(LISTENS, say(17, disk=DISK))),
        "cut": ({Right.CUT}, stream(LISTENS, OPEN, say(12, keep=None), STOP)),
        "merge": ({Right.MERGE}, stream(LISTENS, say(15, disk=DISK, last=1, zone="UTC"))),
        "plan of a merge": ({Right.MERGE}, stream(LISTENS, say(15, disk=DISK, last=1, zone="UTC", dry_run=True))),
        "overlay": ({Right.HANDOVER}, stream(LISTENS, OPEN, say(13, **on, make=True), STOP)),
        "give": ({Right.HANDOVER}, stream(LISTENS, say(16, step="give", token="a" * 32, disks=handed))),
        "back": ({Right.HANDOVER}, stream(LISTENS, say(16, step="back", token="a" * 32, disks=handed))),
        "who is master": ({Right.HANDOVER}, stream(LISTENS, say(16, step="look", token="a" * 32, disks=handed))),
        "leaves": ({Right.SEND}, stream(LISTENS, look, say(18, layer=layer["id"]), STOP)),
        "hold": ({Right.SEND, Right.MERGE}, stream(LISTENS, say(19, disk=DISK, tag="x"))),
        "release": ({Right.MERGE}, stream(LISTENS, say(20, disk=DISK, tag="held", dry_run=True))),
        "a move": (
            {Right.GUESTS},
            stream(LISTENS, say(24, step="look", token="a" * 32, guest="web1", by="kvm1", disks=handed), STOP),
        ),
        "a named epoch": ({Right.EPOCHS}, stream(LISTENS, say(2, disk=DISK, epoch=7, by_name=True), STOP)),
    }


NAMES = (
    "look", "open", "point", "look at the overlay", "points", "data", "fetch", "cut", "merge", "plan of a merge",
    "overlay", "leaves", "hold", "release", "give", "back", "who is master", "a named epoch", "a move",
)  # fmt: skip


@pytest.fixture
def filled(place: Place) -> Place:
    take(place, BASE)
    layer = place.catalogue()["layers"][-1]
    point = say(8, time="2025-01-01T00:00:00Z", labels=["x"], size=layer["size"], content_id=layer["content_id"])
    take(place, stream(HELLO, OPEN, point, STOP))
    return place


def ask(place: Place, raw: bytes, permissions: Permissions) -> None:
    """As a sender that listens, whatever it is told."""
    reader, writer = os.pipe()
    answers, told = os.pipe()

    def swallow() -> None:
        while os.read(answers, 1 << 16):
            pass

    threads = [threading.Thread(target=swallow)]
    for thread in threads:
        thread.start()
    os.write(writer, raw)
    os.close(writer)
    try:
        with Channel(reader, told, peer="the sender", patience=HANG) as channel:
            receive(channel, place.root, permissions=permissions)
    finally:
        for thread in threads:
            thread.join(HANG)
        os.close(answers)


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize("name", NAMES)
def test_each_request_needs_its_right(filled: Place, name: str) -> None:
    needed, raw = requests(filled)[name]
    opens = {Right.SEND} if name in ("cut", "overlay", "a named epoch") else set()
    before = content(filled.root)
    for lacking in (needed, opens):
        granted = frozenset(Right) - lacking
        if not lacking:
            continue
        with pytest.raises(InvalidInput, match=f"lacks the right '{min(lacking)}'") as caught:
            ask(filled, raw, Permissions(granted))
        words = ",".join(right for right in Right if right in granted | {min(lacking)})
        assert "authorized_keys on the replica's host: command=\"snapchain serve-replica" in (caught.value.hint or "")
        assert f'--allow {words}"' in (caught.value.hint or "")
        assert content(filled.root) == before
    for right in needed:
        try:
            ask(filled, raw, Permissions(frozenset({right} | opens)))
        except SnapchainError as error:
            assert "is not allowed" not in error.message, error  # noqa: PT017


def test_every_right_is_asked_for_here(filled: Place) -> None:
    asked = requests(filled)
    assert set(asked) == set(NAMES)
    assert set().union(*(needed for needed, _ in asked.values())) == set(Right)


@pytest.mark.parametrize("name", NAMES)
def test_an_append_only_server_loses_nothing(filled: Place, name: str) -> None:
    """Whatever is asked: each file that was there is there, as it was; the catalogue has all that it had."""
    needed, raw = requests(filled)[name]
    files, before = content(filled.root), filled.catalogue()
    refused = not needed & {Right.SEND, Right.FETCH}
    permissions = parse_permissions(None, append_only=True, confined=True)
    if refused:
        with pytest.raises(InvalidInput, match="append-only"):
            ask(filled, raw, permissions)
    else:
        ask(filled, raw, permissions)
    now, after = content(filled.root), filled.catalogue()
    catalogue = filled.directory / "catalogue.json"
    assert {path: now.get(path) for path in files if path != catalogue} == {
        path: data for path, data in files.items() if path != catalogue
    }
    assert after["layers"][: len(before["layers"])] == before["layers"]
    kept = zip(before["points"], after["points"][: len(before["points"])], strict=True)
    assert all(point.items() <= now_.items() for point, now_ in kept), "a hold alone may be new"
    assert after["epoch"] == before["epoch"]


def test_words_of_allow() -> None:
    for count in range(1, len(Right) + 1):
        for chosen in combinations(Right, count):
            assert parse_permissions(",".join(chosen), append_only=False, confined=True).granted == set(chosen)
    assert parse_permissions(None, append_only=False, confined=True) == CONFINED
    assert parse_permissions(None, append_only=False, confined=False) == EVERYTHING
    assert not {Right.EPOCHS, Right.GUESTS} & CONFINED.granted
    for bad in ("", "all", "send,,fetch", "SEND", "send fetch"):
        with pytest.raises(InvalidInput, match="--allow does not support") as caught:
            parse_permissions(bad, append_only=False, confined=True)
        assert "send, fetch, cut, merge, handover, epochs" in (caught.value.hint or "")
    for right in set(Right) - {Right.SEND, Right.FETCH}:
        with pytest.raises(InvalidInput, match=f"--append-only excludes {right}"):
            parse_permissions(f"send,{right}", append_only=True, confined=True)
    assert parse_permissions("send", append_only=True, confined=True).granted == {Right.SEND}


LINES: tuple[tuple[list[str], dict[str, object] | None], ...] = (
    ([], {}),
    (["--root", "/r"], {"root": Path("/r")}),
    (["--append-only", "--root", "/r"], {"root": Path("/r"), "append_only": True}),
    (["--allow", "send,cut", "--group", "kvm"], {"allow": "send,cut", "group": "kvm"}),
    (["--root", "/r", "--root", "/s"], None),
    (["--allow"], None),
    (["--allow", "--root"], None),
    (["--help"], None),
    (["--stdio"], None),
)


@pytest.mark.parametrize(("words", "wanted"), LINES)
def test_the_words_of_an_authorized_keys_file(
    monkeypatch: pytest.MonkeyPatch, words: list[str], wanted: dict[str, object] | None
) -> None:
    said: list[dict[str, object]] = []
    monkeypatch.setattr(serve_replica, "serve_stdio", lambda **options: said.append(options))
    served = serving.serve_directly(["serve-replica", "--stdio", *words])
    assert served == (wanted is not None)
    if wanted is not None:
        assert said == [{"root": None, "allow": None, "append_only": False, "group": None, **wanted}]


def test_a_group_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such group"):
        serve_replica.serve_stdio(root=tmp_path, group="nobody has such a group")
    with pytest.raises(InvalidInput, match="--allow does not support"):
        serve_replica.serve_stdio(root=tmp_path, allow="everything")
