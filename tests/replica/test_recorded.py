"""Sessions recorded from the version before requests had one table: both sides still say the same, byte for byte.

`recorded.json` has for each session the frames of the sender and of the receiver, in this order on one replica: bodies
as text, or zlib in base85 after "=". Commit e78b667 made them, at /srv/replica.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, SnapchainError
from snapchain.host.channel import Channel
from snapchain.image import scan
from snapchain.model.content import decode_sum, empty_sum
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.retention import Policy
from snapchain.replica import client
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.fetch_client import fetch
from snapchain.replica.outgoing import OutgoingLayer
from snapchain.replica.receiver import receive
from snapchain.replica.sender import Sender
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.frames import FrameReader, Kind
from snapchain.replica.stream.guest_messages import HandedDisk, Step
from snapchain.replica.stream.messages import Active, Open
from snapchain.replica.stream.requests import FROM_FETCH, FROM_RECEIVER
from tests.ops.stacks import Layer, build
from tests.replica.conftest import DISK
from tests.replica.test_stream import puppet, stream
from tests.waiting import HANG

Frames = list[tuple[int, bytes]]
SESSIONS: dict[str, dict[str, list[tuple[int, str]]]] = json.loads(
    Path(__file__).with_name("recorded.json").read_text()
)
OF_THIS_HOST = ("free_bytes", "needs_bytes", "bytes_freed")
MAY_DIFFER = {Kind.HELLO, Kind.BEAT, Kind.PROGRESS}
"""HELLO names the version and what it can; the others come when time has passed."""


def recorded(name: str, way: str, root: Path | None = None) -> Frames:
    found = []
    for kind, text in SESSIONS[name][way]:
        body = zlib.decompress(base64.b85decode(text[1:])) if text.startswith("=") else text.encode()
        found.append((kind, body if root is None else body.replace(b"/srv/replica", str(root).encode())))
    return found


def compared(frames: Frames) -> list[tuple[Kind, Any]]:
    """What must be the same."""
    found: list[tuple[Kind, Any]] = []
    for kind, body in frames:
        if kind in MAY_DIFFER:
            continue
        if kind == Kind.FAIL:  # words for people get better
            found.append((Kind(kind), json.loads(body)["kind"]))
        elif kind == Kind.MERGED:
            said = json.loads(body)
            said["outcome"] = {name: value for name, value in said["outcome"].items() if name not in OF_THIS_HOST}
            found.append((Kind(kind), said))
        else:
            found.append((Kind(kind), body))
    return found


def test_a_receiver_answers_as_before(tmp_path: Path) -> None:
    root = tmp_path / "replica"
    for name in SESSIONS:
        raw = stream(*recorded(name, "sent", root))
        answers = replies(raw, lambda channel: receive(channel, root))
        assert compared(answers) == compared(recorded(name, "replied", root)), name


def replies(raw: bytes, serve: Callable[[Channel], object]) -> Frames:
    (there, here), (back, out) = os.pipe(), os.pipe()
    found: Frames = []

    def listen() -> None:
        with Channel(back, -1, peer="the receiver", patience=HANG) as channel:
            reader = FrameReader(channel, {**FROM_FETCH, **FROM_RECEIVER})
            while (frame := reader.read_or_end()) is not None:
                found.append((int(frame.kind), bytes(frame.body)))

    def speak() -> None:
        left = memoryview(raw)
        with suppress(BrokenPipeError):
            while left:
                left = left[os.write(here, left) :]
        os.close(here)

    threads = [threading.Thread(target=listen), threading.Thread(target=speak)]
    for thread in threads:
        thread.start()
    with Channel(there, out, peer="the sender", patience=HANG) as channel, suppress(SnapchainError):
        serve(channel)
    for thread in threads:
        thread.join(HANG)
    return found


# ---- the other side

NEWEST = json.loads(recorded("overlay", "sent")[2][1])["on"]
OVERLAY = Active(
    name="disk.qcow2", size=1 << 20, cluster_size=65536, extended_l2=False, on=NEWEST, make=False, prove=True
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    base = Layer(1 << 20, ["write -P 1 0 64k", "write -P 2 512k 4k"])
    build(tmp_path / "c", [base, Layer(1 << 20, ["write -P 3 4k 4k", "write -z 512k 64k"])], names=NAMES)
    return tmp_path / "c"


NAMES = ("base.qcow2", "top.qcow2")


def send(there: Endpoint, images: Path, number: int) -> None:
    with opened(there) as (sender, inventory), scan(images / NAMES[number]) as chain:
        base = inventory.layers[-1] if inventory.layers else None
        file = chain.files[number]
        source = Fingerprint(inode=7 + number, size=1000, mtime_ns=5_000_000_001, ctime_ns=6)
        layer = OutgoingLayer(
            name=NAMES[number],
            cluster_size=file.cluster_size,
            extended_l2=False,
            sources=(source,),
            extents=file.extents,
            view=chain,
            below=chain.at(number - 1) if number else None,
            below_sum=empty_sum() if base is None else decode_sum(base.content_sum),
        )
        sent = sender.send_layer(
            layer, None if base is None else base.id, confirm=lambda: None, on_bytes=lambda _count: None
        )
        time = datetime(2026, 1, 1 + number, tzinfo=UTC)
        sender.send_point(time=time, labels=["a"] if number else [], size=sent.size, shown=sent.content_id)
        sender.finish()


@contextmanager
def opened(there: Endpoint, **fields: Any) -> Iterator[tuple[Sender, Any]]:
    with there.connect() as channel, Sender(channel, link=there.link) as sender:
        yield sender, sender.open(Open(disk=DISK, **fields))


def give(there: Endpoint, step: Step, epoch: int) -> None:
    disk = HandedDisk(disk=DISK, epoch=epoch, overlay=OVERLAY.model_copy(update={"prove": False}))
    client.ask_for_handover(there, step, [disk], token="c" * 32)


def take(there: Endpoint, **options: Any) -> None:
    with fetch(there, DISK, None, **options) as answer:
        for layer in answer.layers():
            assert list(layer.batches()) or options.get("look") or not layer.extents.data_bytes


def overlay(there: Endpoint, *, make: bool, **fields: Any) -> None:
    with opened(there, **fields) as (sender, _):
        sender.ask_for_active(OVERLAY.model_copy(update={"make": make}))


def cut(there: Endpoint) -> None:
    with opened(there, epoch=4) as (sender, inventory):
        sender.cut(inventory.layers[0].id)
        sender.finish()


def old_epoch(there: Endpoint) -> None:
    with pytest.raises(Conflict, match="in epoch 1"), opened(there, epoch=1):
        pass


def merge(there: Endpoint, *, dry_run: bool) -> None:
    client.merged_at(there, DISK, Policy(last=1), zone="UTC", dry_run=dry_run, on_bytes=lambda _done, _total: None)


def points(there: Endpoint) -> None:
    assert [point.point for point in client.points_at(there)[0].points] == [1, 2]


def ask(there: Endpoint, share: float, disk: str | None) -> None:
    client.soundness_at(there, disk, share=share, on_bytes=lambda _done, _total: None)


CLIENTS: dict[str, Callable[[Any, Path], None]] = {
    "first": lambda there, images: send(there, images, 0),
    "second": lambda there, images: send(there, images, 1),
    "points": lambda there, _: points(there),
    "records": lambda there, _: ask(there, 0.0, DISK),
    "data": lambda there, _: ask(there, 1.0, None),
    "fetch": lambda there, _: take(there),
    "chain": lambda there, _: take(there, chain=True),
    "maps": lambda there, _: take(there, look=True),
    "plan": lambda there, _: merge(there, dry_run=True),
    "overlay": lambda there, _: overlay(there, make=False, look=True),
    "make": lambda there, _: overlay(there, make=True, epoch=2),
    "give": lambda there, _: give(there, Step.GIVE, 3),
    "look": lambda there, _: give(there, Step.LOOK, 3),
    "back": lambda there, _: give(there, Step.BACK, 4),
    "cut": lambda there, _: cut(there),
    "old epoch": lambda there, _: old_epoch(there),
    "merge": lambda there, _: merge(there, dry_run=False),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_sender_asks_as_before(name: str, images: Path) -> None:
    wanted, answers = recorded(name, "sent"), recorded(name, "replied")
    found: Frames = []

    def answer(reader: FrameReader, say: Callable[[bytes], None]) -> None:
        said = 0
        while (frame := reader.read_or_end()) is not None:
            found.append((int(frame.kind), bytes(frame.body)))
            # HELLO for HELLO, INVENTORY for OPEN, and the rest when all was said.
            upto = len(answers) if len(found) == len(wanted) else min(len(found), len(answers))
            if len(found) <= 2 or len(found) == len(wanted):
                say(stream(*answers[:upto])[len(stream(*answers[:said])) if said else 0 :])
                said = upto

    with puppet(answer) as endpoint:
        endpoint.link = Link.LOCAL
        CLIENTS[name](endpoint, images)
    assert compared(found) == compared(wanted)


def test_each_session_is_replayed_both_ways() -> None:
    assert set(CLIENTS) == set(SESSIONS)
