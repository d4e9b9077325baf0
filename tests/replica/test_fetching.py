"""A point comes back from a replica byte for byte, or an error comes and no output; neither side trusts the other."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from snapchain.destinations import replica_at
from snapchain.errors import (
    Busy,
    Conflict,
    Corrupt,
    Diverged,
    InvalidInput,
    NotFound,
    SnapchainError,
    Unavailable,
    Unsupported,
)
from snapchain.host.locks import ImageLock, LockMode
from snapchain.model.events import Event, Progress, ignore
from snapchain.model.retention import Policy
from snapchain.ops.inspect import inspect_point
from snapchain.ops.restore.run import Restoration
from snapchain.ops.restore.target import RestoreReport
from snapchain.ops.ship.request import Divergence
from snapchain.replica import destination as replica_destination
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint, Endpoint
from snapchain.replica.fetch_client import Answer
from snapchain.replica.points_merge import ReplicaMerge
from snapchain.replica.stream import session
from snapchain.replica.stream.frames import FrameReader, Kind
from snapchain.replica.stream.messages import Fetch, Hello, encode
from snapchain.replica.stream.requests import FROM_FETCH, FROM_RECEIVER, FROM_SENDER
from tests.ops.shipping import MiB, random_stack, same_bytes
from tests.ops.stacks import Layer, build, clean, flat, names, same, write
from tests.replica.conftest import DISK, Bend, BentEndpoint, Place
from tests.replica.test_stream import BLOB, GRAIN, HELLO, HOSTILE, MAP, OPEN, data, end, offer, puppet, stream, take


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    """Noise, so that nothing hides in compression."""
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(3).randbytes(3 * MiB))
    return build(
        tmp_path / "c",
        [
            Layer(8 * MiB, [f"write -s {noise} 1M 3M"]),
            Layer(8 * MiB, ["write -P 7 2M 128k", "write -z 3M 64k"]),
            Layer(9 * MiB, ["write -P 9 8M 64k"]),
        ],
    )


@pytest.fixture
def sent(place: Place, chain: list[Path]) -> Place:
    for number, path in enumerate(chain):
        place.send(path, labels=[f"label-{number}"])
    return place


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "web.raw"


def restore(place: Place | Endpoint, out: Path, point: object = None, **options: Any) -> RestoreReport:
    endpoint: Endpoint = DirectoryEndpoint(place.root) if isinstance(place, Place) else place
    on_event = options.pop("on_event", ignore)
    named = None if point is None else str(point)
    destination = ReplicaDestination(endpoint, limit_rate=options.pop("limit_rate", None))
    return Restoration(destination, DISK, out, point=named, **options).run(on_event=on_event)


def counting(lengths: list[int]) -> Bend:
    """A straight line that tells how much has passed."""

    def pass_on(at: int, raw: bytes) -> bytes:
        lengths.append(at + len(raw))
        return raw

    return pass_on


# ---- what comes


@pytest.mark.parametrize("seed", [1, 5])
def test_random_histories_come_back(place: Place, tmp_path: Path, seed: int) -> None:
    def grown(path: Path) -> None:
        place.send(path)

    stack = random_stack(tmp_path / "s", seed, grown=grown)
    for number, shown in enumerate(stack.shown, 1):
        (tmp_path / str(number)).mkdir()
        raw, qcow2, top = (tmp_path / str(number) / name for name in ("a.raw", "a.qcow2", "c.qcow2"))
        restore(place, raw, number)
        assert same_bytes(raw, shown)
        restore(place, qcow2, number)
        assert same(qcow2, shown)
        assert clean(qcow2)
        files = restore(place, top, number, whole_chain=True).files
        assert len(files) == number
        assert same(top, shown)
        assert all(clean(Path(file)) for file in files)


def test_a_plan_writes_nothing_and_holds(sent: Place, chain: list[Path], out: Path) -> None:
    for whole_chain in (False, True):
        work = Restoration(
            ReplicaDestination(DirectoryEndpoint(sent.root)),
            DISK,
            out.with_suffix(".qcow2"),
            point="label-1",
            whole_chain=whole_chain,
        )
        plan = work.plan()
        assert names(out.parent) == []
        assert (plan.point, plan.virtual_size, plan.device, plan.replaces) == (2, 8 * MiB, False, False)
        assert plan.source == f"dir:{sent.root}"
        said: list[Event] = []
        report = work.run(on_event=said.append)
        assert report.bytes_written == plan.bytes_to_write
        assert report.files == tuple(file.path for file in plan.files)
        assert said[-1] == Progress("restore", plan.bytes_to_write, plan.bytes_to_write)
        for file in report.files:
            Path(file).unlink()
    work = Restoration(ReplicaDestination(DirectoryEndpoint(sent.root)), DISK, out)
    assert work.plan().point == 3
    sent.send(chain[-1])
    assert work.run().point == 3, "the latest is what it was when the plan was made"


def test_lower_files_are_shared_and_never_overwritten(sent: Place, chain: list[Path], out: Path) -> None:
    one = restore(sent, out.with_name("web.qcow2"), 3, whole_chain=True)
    out.with_name("web.qcow2").rename(out.with_name("three.qcow2"))
    other = restore(sent, out.with_name("web.qcow2"), 2, whole_chain=True)
    assert other.files[0] == one.files[0]
    assert same(out.with_name("three.qcow2"), flat(chain[2], out.with_name("flat")))
    out.with_name("web.qcow2").unlink()
    write(Path(one.files[0]), "write -P 99 0 64k")
    with pytest.raises(Conflict, match="exists already"):
        restore(sent, out.with_name("web.qcow2"), 2, whole_chain=True)
    assert not out.with_name("web.qcow2").exists()


def test_zeroes_travel_free_and_a_rate_is_kept(sent: Place, chain: list[Path], out: Path) -> None:
    begun = time.monotonic()
    restore(sent, out, limit_rate=4 * MiB)
    assert time.monotonic() - begun > 0.3, "3 MiB of noise at 4 MiB a second, a quarter of a second saved up"
    write(chain[-1], "write -P 1 0 8M", "write -z 0 8M")
    sent.send(chain[-1], disk="zeroes")
    came: list[int] = []
    Restoration(ReplicaDestination(BentEndpoint(sent, back=counting(came))), "zeroes", out.with_name("z.raw")).run()
    assert came[-1] < 100_000


def test_a_block_device(sent: Place, chain: list[Path], tmp_path: Path, loop: Path) -> None:
    with pytest.raises(InvalidInput, match="flat raw"):
        restore(sent, loop, whole_chain=True)
    with pytest.raises(Conflict, match="the device is not empty: there is data at byte 0"):
        restore(sent, loop, 2)
    report = restore(sent, loop, 2, force=True)
    assert report.virtual_size == 8 * MiB
    shown = flat(chain[1], tmp_path / "flat").read_bytes()
    held = loop.read_bytes()
    assert held[: len(shown)] == shown
    assert held[len(shown) :] == b"\xff" * (len(held) - len(shown)), "what lies beyond the disk is left alone"


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """Larger than the disk, and full of old bytes."""
    image = tmp_path / "device"
    image.write_bytes(b"\xff" * (10 * MiB))
    attached = subprocess.run(["losetup", "--find", "--show", str(image)], capture_output=True, text=True, check=False)
    if attached.returncode:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    yield Path(attached.stdout.strip())
    subprocess.run(["losetup", "-d", attached.stdout.strip()], check=True)


def test_inspect(sent: Place, chain: list[Path]) -> None:
    found = inspect_point(ReplicaDestination(DirectoryEndpoint(sent.root)), DISK, point="2")
    assert [layer.path for layer in found.layers] == [path.name for path in sent.files()[:2]]
    assert (found.virtual_size, found.content_id) == (8 * MiB, sent.catalogue()["points"][1]["content_id"])
    assert [layer.shadowed_bytes for layer in found.layers] == [192 * 1024, 0]


# ---- what is not there, and what is in the way


def test_what_is_not_there(sent: Place, out: Path) -> None:
    for point in ("9", "0", "nix", "2001-01-01", "x" * 1000):
        with pytest.raises(NotFound, match=r"the disk has no point|is no label of this disk"):
            restore(sent, out, point)
    with pytest.raises(NotFound, match="no disk 'gone'"):
        Restoration(ReplicaDestination(DirectoryEndpoint(sent.root)), "gone", out).run()
    with pytest.raises(NotFound, match="no replica"):
        restore(Place(sent.root / "nowhere"), out)
    with pytest.raises(InvalidInput, match="cannot name a disk"):
        Restoration(ReplicaDestination(DirectoryEndpoint(sent.root)), "a:b", out).run()
    assert names(out.parent) == []


def test_what_is_in_the_way(sent: Place, chain: list[Path], out: Path) -> None:
    out.write_bytes(b"mine")
    with pytest.raises(Conflict, match="exists already"):
        restore(sent, out)
    assert out.read_bytes() == b"mine"
    restore(sent, out, force=True)
    assert same_bytes(out, flat(chain[-1], out.with_name("flat")))
    with pytest.raises(NotFound, match="no such directory"):
        restore(sent, out.with_name("gone") / "a.raw")


def test_no_room(sent: Place, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.ops.restore import run as restore_run, target as restore_target

    monkeypatch.setattr(restore_run, "free_bytes", lambda _: 1000)
    with pytest.raises(Unavailable, match="for its tables alone"):
        restore(sent, out.with_suffix(".qcow2"))
    monkeypatch.setattr(restore_target, "free_bytes", lambda _: 1000)
    with pytest.raises(Unavailable, match="only 1000 are free"):
        restore(sent, out)
    assert names(out.parent) == []


def test_a_file_in_use_and_a_cut_meanwhile(sent: Place, chain: list[Path], tmp_path: Path, out: Path) -> None:
    with ImageLock(sent.files()[0], LockMode.WRITE), pytest.raises(Busy, match=r"somebody .* for resizing"):
        restore(sent, out)
    other = build(tmp_path / "other", [Layer(MiB)])[0]
    refused: list[str] = []

    def meanwhile(event: Event) -> None:
        if not refused:
            with pytest.raises(Busy, match=r"somebody .* for reading") as caught:
                sent.send(other, divergence=Divergence.CUT_REPLICA)
            refused.append(caught.value.kind)

    noise = tmp_path / "more"
    noise.write_bytes(random.Random(4).randbytes(24 * MiB))
    big = build(tmp_path / "big", [Layer(32 * MiB, [f"write -s {noise} 0 24M"])])[0]
    with pytest.raises(Diverged, match="holds another disk under this name"):
        sent.send(big)
    place = Place(tmp_path / "second")
    place.send(big)
    sent = place
    restore(place, out, on_event=meanwhile)
    assert refused == ["busy"]
    assert same_bytes(out, flat(big, tmp_path / "flat"))


def test_a_point_that_is_merged_away_between_look_and_lock(
    sent: Place, chain: list[Path], out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with files counts only where the catalogue still is the one that named them."""
    from snapchain.replica import fetch_server as fetch_answering
    from snapchain.replica.arrival import opened_chain

    calls: list[int] = []

    def meanwhile(disk: Any, catalogue: Any, tip: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            now = disk.read()
            disk.write(now.after(layers=now.layers[:2], points=now.points[:2]))
            raise Corrupt("the files of this disk are not the chain that its catalogue names")
        return opened_chain(disk, catalogue, tip)

    monkeypatch.setattr(fetch_answering, "opened_chain", meanwhile)
    assert restore(sent, out).point == 2
    assert same_bytes(out, flat(chain[1], out.with_name("flat")))


def test_a_merge_meanwhile(tmp_path: Path, out: Path) -> None:
    """It goes round what is read; afterwards it merges, and a point reads as before."""
    noise = tmp_path / "more"
    noise.write_bytes(random.Random(5).randbytes(24 * MiB))
    writes = (f"write -s {noise} 0 24M", "write -P 1 1M 1M", "write -P 2 0 2M")
    files = build(tmp_path / "big", [Layer(32 * MiB, [each]) for each in writes])
    place = Place(tmp_path / "second")
    for path in files:
        place.send(path)
    endpoint = replica_at(f"dir:{place.root}")
    merge = ReplicaMerge(endpoint, DISK, Policy(last=1), zone="UTC")
    seen: list[tuple[int, int]] = []

    def meanwhile(event: Event) -> None:
        if not seen:
            try:
                report = merge.run()
                seen.append((report.layers_before, report.layers_after))
            except (Busy, Conflict):
                seen.append((3, 3))

    shown = flat(files[-1], tmp_path / "flat")
    restore(endpoint, out, on_event=meanwhile)
    assert seen == [(3, 3)]
    assert same_bytes(out, shown)
    assert merge.run().layers_after == 1
    restore(endpoint, out, force=True)
    assert same_bytes(out, shown)


# ---- damage, and ends in the middle


def test_a_flipped_byte_is_never_restored(sent: Place, chain: list[Path], out: Path) -> None:
    """Anywhere in any file: an error and no output, or the right bytes."""
    shown = [flat(path, out.with_name(f"{number}.flat")) for number, path in enumerate(chain)]
    draw = random.Random(8)
    refused = 0
    for victim in sent.files():
        whole = victim.read_bytes()
        victim.chmod(0o644)
        for at in [draw.randrange(len(whole)) for _ in range(4)] + [len(whole) - 1]:
            with victim.open("r+b") as file:
                file.seek(at)
                file.write(bytes([whole[at] ^ 0x40]))
            try:
                restore(sent, out, 3)
            except SnapchainError as error:
                refused += 1
                assert error.kind in {"corrupt", "unsupported", "not-found"}  # noqa: PT017
                assert not out.exists()
            else:
                assert same_bytes(out, shown[2])
                out.unlink()
            with victim.open("r+b") as file:
                file.write(whole)
    assert refused >= 3
    restore(sent, out, 3)


def test_an_older_point_does_not_need_newer_files(sent: Place, chain: list[Path], out: Path) -> None:
    sent.files()[-1].unlink()
    with pytest.raises(NotFound, match="no such file"):
        restore(sent, out, 3)
    restore(sent, out, 2)
    assert same_bytes(out, flat(chain[1], out.with_name("flat")))


@pytest.mark.parametrize("name", ["a.raw", "a.qcow2", "chain.qcow2"])
def test_an_interrupted_one_leaves_nothing_and_runs_again(sent: Place, chain: list[Path], out: Path, name: str) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done:
            raise KeyboardInterrupt

    whole_chain = name.startswith("chain")
    with pytest.raises(KeyboardInterrupt):
        restore(sent, out.with_name(name), whole_chain=whole_chain, on_event=stop)
    assert names(out.parent) == []
    restore(sent, out.with_name(name), whole_chain=whole_chain)
    (out.parent.parent / "flat").unlink(missing_ok=True)
    shown = flat(chain[-1], out.parent.parent / "flat")
    assert same_bytes(out.with_name(name), shown) if name.endswith("raw") else same(out.with_name(name), shown)


def test_a_line_that_is_cut_or_bent(sent: Place, out: Path) -> None:
    lengths: list[int] = []
    restore(BentEndpoint(sent, back=counting(lengths)), out)
    out.unlink()
    draw = random.Random(9)
    for _ in range(10):
        victim = draw.randrange(lengths[-1])

        def cut(at: int, raw: bytes, victim: int = victim) -> bytes | None:
            return None if at <= victim < at + len(raw) else raw

        def bend(at: int, raw: bytes, victim: int = victim) -> bytes:
            if not at <= victim < at + len(raw):
                return raw
            bent = bytearray(raw)
            bent[victim - at] ^= 1
            return bytes(bent)

        with pytest.raises(Unavailable, match=r"ends in the middle|closed") as broken:
            restore(BentEndpoint(sent, back=cut), out)
        assert broken.value.hint == "run it again: a restore continues what it had written"
        with pytest.raises((Corrupt, Unavailable, Unsupported), match=r"its check is wrong|closed by the other side"):
            restore(BentEndpoint(sent, back=bend), out)
        assert names(out.parent) == []


# ---- hostile sides

ANSWER = (1, encode(Hello(first=1, last=1, software="puppet", features=("fetch",), answers=True)))
OLD = (1, encode(Hello(first=1, last=1, software="puppet", features=("ask",), answers=True)))


def told(**change: Any) -> tuple[int, bytes]:
    point = {"point": 1, "time": "2026-01-01T00:00:00Z", "labels": [], "size": 4 * GRAIN, "layers": 1}
    fields = {**point, "content_id": end()[1].hex(), **change}
    return 37, json.dumps({"disk": fields.pop("disk", DISK), "epoch": 1, "points": [fields]}).encode()


TOTAL = (40, struct.pack("<QQ", 0, 3 * GRAIN))
ALL = data(0, 3 * GRAIN, BLOB)
DONE = (35, b'{"points":[],"layers":1}')
GOOD = (ANSWER, told(), TOTAL, offer(), MAP, ALL, end(), DONE)


def answering(*said: tuple[int, bytes]) -> Callable[[FrameReader, Callable[[bytes], None]], None]:
    def answer(reader: FrameReader, say: Callable[[bytes], None]) -> None:
        raw = stream(*said)
        for at in range(0, len(raw), 1 << 16):
            say(raw[at : at + (1 << 16)])
        while reader.read().kind is not Kind.FETCH:
            pass

    return answer


def test_an_answer_made_by_hand(out: Path) -> None:
    for name in ("a.raw", "a.qcow2"):
        with puppet(answering(*GOOD)) as endpoint:
            assert restore(endpoint, out.with_name(name)).bytes_written == 3 * GRAIN
    assert out.with_name("a.raw").read_bytes() == BLOB + bytes(GRAIN)
    assert same(out.with_name("a.qcow2"), out.with_name("a.raw"))


ON_FETCHING = {
    "no such parent": "not lie on the one before",
    "resumed from nothing": "not lie on the one before",
    "clusters of 513": "DONE has no place|cluster size of 513",  # a raw file has no clusters
    "small subclusters": "48 bytes of data left out|cluster size of 512",
    "other content": "the restored content id",
    "a point of other content": "kind 8, which is not",
}
"""What is said of a hostile sender's frames here, if it is something else."""
OTHER_ERRORS: dict[str, type[SnapchainError]] = {
    "another version": Unsupported,
    "no end": Unavailable,
    "no DONE": Unavailable,
    "a failure": Conflict,
}
"""How some of the lies are refused; all others are Corrupt."""
LIES: dict[str, tuple[str, tuple[tuple[int, bytes], ...]]] = {
    "another version": ("here 1, there 3 to 4", ((1, b'{"first":3,"last":4,"software":"x","answers":true}'),)),
    "no hello": ("began with DISK", GOOD[1:]),
    "another disk": ("about another disk than", (ANSWER, told(disk="db"), *GOOD[2:])),
    "another point": ("another point than", (ANSWER, told(point=2), *GOOD[2:])),
    "a label for a terminal": ("a label holds control characters", (ANSWER, told(labels=["\x1b[31m"]), *GOOD[2:])),
    "another content": ("announced as something else", (ANSWER, told(content_id="0" * 64), *GOOD[2:])),
    "another size": ("announced as something else", (ANSWER, told(size=8 * GRAIN), *GOOD[2:])),
    "no total": ("LAYER has no place", (ANSWER, told(), *GOOD[3:])),
    "half a total": ("PROGRESS has no place", (ANSWER, told(), (40, b""), *GOOD[3:])),
    "more than fits": (
        "more data than the disk holds",
        (ANSWER, told(), (40, struct.pack("<QQ", 0, 1 << 63)), *GOOD[3:]),
    ),
    "no layer": ("DONE has no place", (ANSWER, told(), TOTAL, DONE)),
    "a layer on another": ("not lie on the one before", (*GOOD[:3], offer(parent="0" * 32), *GOOD[4:])),
    "a layer that goes on": ("not lie on the one before", (*GOOD[:3], offer(resume_at=GRAIN), *GOOD[4:])),
    "a name for a terminal": ("cannot be named", (*GOOD[:3], offer(name="\x1b[31m.qcow2"), *GOOD[4:])),
    "two layers": ("LAYER has no place", (*GOOD[:7], *GOOD[3:])),
    "another number of layers": ("another number of layers", (*GOOD[:7], (35, b'{"points":[],"layers":2}'))),
    "no end": ("closed by the other side", GOOD[:6]),
    "no DONE": ("closed by the other side", GOOD[:7]),
    "other bytes": ("the restored content id", (*GOOD[:5], data(0, 3 * GRAIN, bytes(3 * GRAIN)), *GOOD[6:])),
    "fewer bytes": ("131072 bytes of data left out", (*GOOD[:5], data(0, GRAIN, BLOB[:GRAIN]), *GOOD[6:])),
    "a sender's word": ("kind 2, which is not", (*GOOD[:3], OPEN)),
    "a receiver's word": ("kind 32, which is not", (*GOOD[:3], (32, b"{}"))),
    "a mark": ("kind 6, which is not", (*GOOD[:6], (6, bytes(2056)), *GOOD[6:])),
    "a failure": ("\\?\\[31m", (*GOOD[:4], (11, b'{"kind":"conflict","message":"\\u001b[31m"}'))),
    "an unknown kind": ("kind 99, which is not", (*GOOD[:4], (99, b""))),
    **{
        f"hostile sender: {name}": (ON_FETCHING.get(name, says), (ANSWER, told(), TOTAL, *frames[2:], DONE))
        for name, (says, frames) in HOSTILE.items()
        if len(frames) > 2 and frames[2][0] == 3 and "mark" not in name
    },
}


@pytest.mark.parametrize("name", LIES)
def test_a_hostile_replica(name: str, out: Path) -> None:
    says, said = LIES[name]
    kind = OTHER_ERRORS.get(name, Corrupt)
    for suffix in (".raw", ".qcow2"):
        with puppet(answering(*said)) as endpoint, pytest.raises(kind, match=says) as caught:
            restore(endpoint, out.with_suffix(suffix), 1)
        assert type(caught.value) is kind
        assert caught.value.subject == "puppet"
        assert str(caught.value).isprintable()
        assert names(out.parent) == []


def test_an_older_replica(out: Path) -> None:
    with puppet(answering(OLD)) as endpoint, pytest.raises(Unsupported, match="does not support 'fetch'"):
        restore(endpoint, out)


def test_a_chain_longer_than_told_and_maps_without_end(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = offer()
    raw = (*GOOD[:3], lower, MAP, ALL, end(), lower, MAP, ALL, end(), DONE)
    with puppet(answering(*raw)) as endpoint, pytest.raises(Corrupt, match="LAYER has no place"):
        restore(endpoint, out.with_suffix(".qcow2"), whole_chain=True)
    assert names(out.parent) == []
    monkeypatch.setattr(replica_destination, "MOST_RUNS", 1)
    with puppet(answering(*GOOD[:5], end(), DONE)) as endpoint, pytest.raises(Unsupported, match="too many extents"):
        inspect_point(ReplicaDestination(endpoint), DISK)


def wanted(**fields: Any) -> tuple[int, bytes]:
    return 17, json.dumps(fields).encode()


@pytest.mark.parametrize(
    "said",
    [
        (HELLO, wanted(disk=DISK)),  # by one that does not listen
        (HELLO, OPEN, wanted(disk=DISK)),
        (HELLO, OPEN, offer(), MAP, wanted(disk=DISK)),
    ],
)
def test_a_request_out_of_place(place: Place, said: tuple[tuple[int, bytes], ...]) -> None:
    with pytest.raises(Corrupt, match="FETCH has no place here"):
        take(place, stream(*said))


@pytest.mark.parametrize(
    "request_",
    [
        {"disk": "../.."},
        {"disk": "/etc"},
        {"disk": DISK, "replica": "/etc"},
        {"disk": DISK, "more": 1},
        {"disk": DISK, "point": "x" * 300},
        {"disk": DISK, "point": ""},
        {"disk": "x" * 300},
        {"disk": DISK, "chain": "perhaps"},
        {},
    ],
)
def test_a_hostile_request(sent: Place, out: Path, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.replica.stream import session

    before = sorted((path, path.stat().st_mtime_ns) for path in sent.root.rglob("*"))
    monkeypatch.setattr(
        session, "encode", lambda said: wanted(**request_)[1] if isinstance(said, Fetch) else encode(said)
    )
    with pytest.raises(
        (Corrupt, InvalidInput, NotFound),
        match=r"fetch message is invalid|there is no disk|cannot name a disk|may be named|must be named",
    ) as caught:
        restore(sent, out)
    assert caught.value.kind in {"corrupt", "invalid-input", "not-found"}
    assert sorted((path, path.stat().st_mtime_ns) for path in sent.root.rglob("*")) == before
    assert names(out.parent) == []


def test_kinds_go_one_way() -> None:
    assert Kind.FETCH in FROM_SENDER
    assert Kind.FETCH not in FROM_RECEIVER
    assert not {Kind.LAYER, Kind.MAP, Kind.DATA, Kind.END} & set(FROM_RECEIVER), "only who has fetched is given layers"
    assert not {Kind.OPEN, Kind.MARK, Kind.INVENTORY, Kind.STORED, Kind.ACK} & set(FROM_FETCH)


def test_a_replica_is_read_on_its_own_host(sent: Place) -> None:
    found = ReplicaDestination(DirectoryEndpoint(sent.root), limit_rate=1).verify(DISK, share=1.0)
    assert found.checked_bytes > 0, "no data cross the link, so a rate limits nothing"
    for share in (-0.1, 1.1):
        with pytest.raises(InvalidInput, match="of the data"):
            ReplicaDestination(DirectoryEndpoint(sent.root)).verify(DISK, share=share)


# ---- a restore that was cut off


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Place, Path]:
    """A replica of 24 MiB of noise, and what it shows."""
    monkeypatch.setattr("snapchain.ops.restore.output.WORTH", 4 * MiB)
    noise = tmp_path / "more"
    noise.write_bytes(random.Random(6).randbytes(24 * MiB))
    image = build(tmp_path / "big", [Layer(32 * MiB, [f"write -s {noise} 0 24M"])])[0]
    place = Place(tmp_path / "second")
    place.send(image)
    return place, flat(image, tmp_path / "big.raw")


@pytest.mark.parametrize("is_old", [False, True])
def test_only_the_rest_is_fetched(
    large: tuple[Place, Path], out: Path, is_old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that knows where data are to begin sends no more; an older one sends all, and it comes out right."""
    place, shown = large
    carried = 0

    def count(_at: int, raw: bytes) -> bytes:
        nonlocal carried
        carried += len(raw)
        return raw

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= 13 * MiB:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(BentEndpoint(place, back=count), out, on_event=stop)
    if is_old:
        monkeypatch.setattr(session, "FEATURES", tuple(each for each in session.FEATURES if each != "fetch-from"))
    carried = 0
    report = restore(BentEndpoint(place, back=count), out)
    assert report.bytes_resumed >= 8 * MiB
    assert carried > 24 * MiB if is_old else carried < (24 - 8 + 1) * MiB
    assert same_bytes(out, shown)
    assert names(out.parent) == [out.name]


@pytest.mark.parametrize("first", [(0, 4096), (0, 65537)])
def test_data_begin_at_a_leaf(large: tuple[Place, Path], first: tuple[int, int]) -> None:
    request = Fetch(disk=DISK, first_layer=first[0], first_offset=first[1])
    with DirectoryEndpoint(large[0].root).connect() as channel, pytest.raises(InvalidInput, match="not at a leaf"):
        Answer(channel, request, limit_rate=None)
