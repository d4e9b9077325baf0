"""A replica can be asked what it holds and whether that is sound; neither side has to trust the other."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.model.events import Event, Progress
from snapchain.ops.log import log
from snapchain.replica import names
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.permissions import chosen
from snapchain.replica.status import verify_disk
from snapchain.replica.store import Replica, ReplicaDisk, open_replica
from snapchain.replica.stream import session
from snapchain.replica.stream.fields import POINTS_AT_ONCE
from snapchain.replica.stream.frames import FrameReader, Kind
from snapchain.replica.stream.messages import Ask, Finding, Hello, Verdict, encode
from snapchain.replica.stream.requests import FROM_RECEIVER, FROM_SENDER
from snapchain.replica.stream.session import MOST_BYTES
from snapchain.replica.verification import verify_replica
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, qemu_img
from tests.replica.conftest import DISK, Place
from tests.replica.test_stream import HELLO, MAP, OPEN, offer, puppet, stream, take
from tests.waiting import HANG


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 4)])


@pytest.fixture
def sent(place: Place, chain: list[Path]) -> Place:
    for number, path in enumerate(chain):
        place.send(path, labels=[f"label-{number}"])
    return place


def test_points_are_told(sent: Place, chain: list[Path]) -> None:
    sent.send(chain[0], disk="db")
    found = log(ReplicaDestination(DirectoryEndpoint(sent.root)))
    assert (found.encryption, [disk.name for disk in found.disks]) == ("none", ["db", DISK])
    points = found.disks[1].points
    assert [(point.point, point.labels, point.layers) for point in points] == [
        (number + 1, (f"label-{number}",), number + 1) for number in range(3)
    ]
    assert [point.content_id for point in points] == [point["content_id"] for point in sent.catalogue()["points"]]
    assert log(ReplicaDestination(DirectoryEndpoint(sent.root)), DISK).disks == (found.disks[1],)


def test_a_disk_that_is_just_being_made_hides_no_other(sent: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was listed by the file of a layer that has another name by now."""
    listed = Replica.disks

    def with_another(self: Replica) -> list[ReplicaDisk]:
        return [ReplicaDisk(self.root, "db"), *listed(self)]

    monkeypatch.setattr(Replica, "disks", with_another)
    replica = ReplicaDestination(DirectoryEndpoint(sent.root))
    assert [disk.name for disk in log(replica).disks] == [DISK]
    with pytest.raises(NotFound, match="there is no disk 'db' here"):
        log(replica, "db")


def test_many_points_come_in_several_frames(sent: Place) -> None:
    disk = open_replica(sent.root).disk(DISK)
    catalogue = disk.read()
    assert catalogue is not None
    last = catalogue.points[-1]
    points = tuple(last.model_copy(update={"point": number}) for number in range(1, 2 * POINTS_AT_ONCE + 2))
    disk.write(catalogue.after(points=points, next_point=len(points) + 1))
    assert [point.point for point in log(ReplicaDestination(DirectoryEndpoint(sent.root)), DISK).disks[0].points] == [
        point.point for point in points
    ]


def test_what_is_not_there(place: Place, sent: Place) -> None:
    nowhere, here = (ReplicaDestination(DirectoryEndpoint(root)) for root in (place.root / "nowhere", sent.root))
    for share in (None, 1.0):

        def ask(to: ReplicaDestination, disk: str, share: float | None = share) -> object:
            return to.disks(disk) if share is None else to.verify(disk, share=share)

        with pytest.raises(NotFound, match="no replica"):
            ask(nowhere, DISK)
        with pytest.raises(NotFound, match="no disk 'gone'"):
            ask(here, "gone")
        with pytest.raises(InvalidInput, match="cannot name a disk"):
            ask(here, "a:b")
    assert not (place.root / "nowhere").exists()
    assert sorted(entry.name for entry in sent.root.iterdir()) == ["snapchain-replica.json", "web1%2Fvda"]


@pytest.mark.parametrize("read_data", [False, True])
def test_a_sound_replica(sent: Place, chain: list[Path], read_data: bool) -> None:
    sent.send(chain[0], disk="db")
    events: list[Event] = []
    found = verify_replica(DirectoryEndpoint(sent.root), share=float(read_data), on_event=events.append)
    assert (found.ok, found.disks, found.points, found.layers) == (True, 2, 4, 4)
    assert found.checked_bytes >= 4 * 128 * 1024 if read_data else found.checked_bytes == 0
    assert all(isinstance(event, Progress) and 0 < event.done <= (event.total or 0) for event in events)
    assert bool(events) is read_data


def _flip(place: Place) -> None:
    victim = place.files()[1]
    victim.chmod(0o644)
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)


def _remove(place: Place) -> None:
    place.files()[0].unlink()


def _relink(place: Place) -> None:
    place.files()[-1].chmod(0o644)
    qemu_img("rebase", "-u", "-q", "-f", "qcow2", "-b", "", place.files()[-1])


def _forge(place: Place) -> None:
    (place.directory / "catalogue.json").write_text("{}")


@pytest.mark.parametrize(
    ("harm", "records_too", "points"),
    [(_flip, False, (2, 3)), (_remove, True, (1, 2, 3)), (_relink, True, (1, 2, 3)), (_forge, True, ())],
)
def test_harm_is_found(
    sent: Place, chain: list[Path], harm: Callable[[Place], None], records_too: bool, points: tuple[int, ...]
) -> None:
    sent.send(chain[0], disk="db")
    harm(sent)
    to = DirectoryEndpoint(sent.root)
    found = verify_replica(to, share=1.0)
    assert not found.ok
    assert {finding.disk for finding in found.findings} == {DISK}
    assert found.findings[0].points == points
    assert verify_replica(to, share=0.0).ok is not records_too
    assert verify_replica(to, "db", share=1.0).ok


def test_a_disk_that_is_cut_while_it_is_looked_at(sent: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found wrong of a chain that is no longer the disk's does not count."""
    from snapchain.replica import status as checking

    calls: list[int] = []

    def meanwhile(disk: Any, *, share: float, on_bytes: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            catalogue = disk.read()
            disk.write(catalogue.after(layers=catalogue.layers[:2], points=catalogue.points[:2]))
            raise Corrupt("the files of this disk are not the chain that its catalogue names")
        return verify_disk(disk, on_bytes=on_bytes)

    monkeypatch.setattr(checking, "verify_disk", meanwhile)
    found = verify_replica(DirectoryEndpoint(sent.root), DISK, share=1.0)
    assert (found.ok, found.points, len(calls)) == (True, 2, 2)


# ---- hostile sides


def asked(**fields: Any) -> tuple[int, bytes]:
    return 14, json.dumps(fields).encode()


@pytest.mark.parametrize(
    "said",
    [
        (HELLO, asked(want="points")),  # by one that does not listen
        (HELLO, OPEN, asked(want="points")),
        (HELLO, OPEN, offer(), MAP, asked(want="points")),
    ],
)
def test_a_question_out_of_place(place: Place, said: tuple[tuple[int, bytes], ...]) -> None:
    with pytest.raises(Corrupt, match="ASK has no place here"):
        take(place, stream(*said))


@pytest.mark.parametrize(
    "question",
    [
        {"want": "everything"},
        {"want": "points", "disk": "../.."},
        {"want": "data", "disk": "/etc"},
        {"want": "points", "replica": "/etc"},
        {"want": "points", "more": 1},
        {"want": "points", "disk": "x" * 300},
        {},
    ],
)
def test_a_hostile_question(sent: Place, question: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.replica.stream import session

    before = sorted((path, path.stat().st_mtime_ns) for path in sent.root.rglob("*"))
    monkeypatch.setattr(session, "encode", lambda said: asked(**question)[1] if isinstance(said, Ask) else encode(said))
    with pytest.raises(
        (Corrupt, InvalidInput, NotFound),
        match=r"ask message is invalid|there is no disk|cannot name a disk|may be named|must be named",
    ) as caught:
        log(ReplicaDestination(DirectoryEndpoint(sent.root)))
    assert caught.value.kind in {"corrupt", "invalid-input", "not-found"}
    assert sorted((path, path.stat().st_mtime_ns) for path in sent.root.rglob("*")) == before


ANSWER = (1, encode(Hello(first=1, last=1, software="puppet", features=("ask",), answers=True)))
OLD = (1, encode(Hello(first=1, last=1, software="puppet", answers=True)))
DONE = (35, b'{"points":[],"layers":0}')
POINT = {"time": "2026-01-01T00:00:00Z", "labels": ["a"], "size": 1, "content_id": "0" * 64, "layers": 1}


def disk_said(name: str = DISK, *numbers: int, **change: Any) -> tuple[int, bytes]:
    points = [{"point": number, **POINT, **change} for number in numbers]
    return 37, json.dumps({"disk": name, "epoch": 1, "points": points}).encode()


VERDICT = (38, encode(Verdict(disk=DISK, points=1, layers=1, checked_bytes=1)))
FINDING = (39, encode(Finding(disk=DISK, kind="corrupt", message="\x1b[31mbad", points=(1,))))
OTHER_ERRORS: dict[str, type[SnapchainError]] = {
    "an old one": Unsupported,
    "half": Unavailable,
    "a failure": Conflict,
}
"""How some of the lies are refused; all others are Corrupt."""
LIES: dict[str, tuple[str, tuple[tuple[int, bytes], ...]]] = {
    "an old one": ("does not support 'ask'", (OLD,)),
    "another disk": ("another disk than the one asked for", (ANSWER, disk_said("db"), DONE)),
    "no disk": ("lacks the disk", (ANSWER, DONE)),
    "a name for a terminal": ("another disk than the one asked for", (ANSWER, disk_said("\x1b[31m"), DONE)),
    "a label for a terminal": (
        "a label holds control characters",
        (ANSWER, disk_said(DISK, 1, labels=["\x1b[31m"]), DONE),
    ),
    "points that do not ascend": ("points do not ascend", (ANSWER, disk_said(DISK, 2, 1), DONE)),
    "points again": ("points do not ascend", (ANSWER, disk_said(DISK, 1), disk_said(DISK, 1), DONE)),
    "too many points": ("at most 256 items", (ANSWER, disk_said(DISK, *range(1, POINTS_AT_ONCE + 2)), DONE)),
    "a size below zero": ("size: .* greater", (ANSWER, disk_said(DISK, 1, size=-1), DONE)),
    "no question": ("INVENTORY has no place", (ANSWER, (32, b"{}"))),
    "a verdict": ("VERDICT has no place", (ANSWER, VERDICT, DONE)),
    "half": ("closed by the other side", (ANSWER, disk_said(DISK, 1))),
    "a failure": ("\\?\\[31m", (ANSWER, (11, b'{"kind":"conflict","message":"\\u001b[31m"}'))),
}


def answering(*said: tuple[int, bytes]) -> Callable[[FrameReader, Callable[[bytes], None]], None]:
    def answer(reader: FrameReader, say: Callable[[bytes], None]) -> None:
        raw = stream(*said)
        for at in range(0, len(raw), 1 << 16):
            say(raw[at : at + (1 << 16)])
        while reader.read().kind is not Kind.ASK:
            pass

    return answer


@pytest.mark.parametrize("name", LIES)
def test_a_hostile_replica_tells_of_points(name: str) -> None:
    says, frames = LIES[name]
    kind = OTHER_ERRORS.get(name, Corrupt)
    with puppet(answering(*frames)) as endpoint, pytest.raises(kind, match=says) as caught:
        log(ReplicaDestination(endpoint), DISK)
    check_refusal(name, caught.value)


def check_refusal(name: str, error: SnapchainError) -> None:
    """It is of the right kind, of the other side, and fit for a terminal."""
    assert type(error) is OTHER_ERRORS.get(name, Corrupt)
    assert error.subject == "puppet"
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("says", "said"),
    [
        ("of disks that it did not check", (FINDING, DONE)),
        ("of disks that it did not check", (VERDICT, VERDICT, DONE)),
        ("PROGRESS has no place", (VERDICT, (40, bytes(3)), DONE)),
        ("DISK has no place", (disk_said(DISK, 1), VERDICT, DONE)),
        ("lacks the disk", (DONE,)),
        ("closed by the other side", (VERDICT,)),
        ("another disk than the one asked for", ((38, VERDICT[1].replace(b"web1", b"web2")), DONE)),
        (
            "points.0: .* valid integer",
            ((39, b'{"disk":"web1/vda","kind":"x","subject":null,"message":"m","points":["x"]}'), VERDICT, DONE),
        ),
    ],
)
def test_a_hostile_replica_tells_of_findings(says: str, said: tuple[tuple[int, bytes], ...]) -> None:
    name = "half" if said == (VERDICT,) else ""
    kind = OTHER_ERRORS.get(name, Corrupt)
    with puppet(answering(ANSWER, *said)) as endpoint, pytest.raises(kind, match=says) as caught:
        verify_replica(endpoint, DISK, share=1.0)
    check_refusal(name, caught.value)


def test_a_finding_cannot_colour_the_terminal() -> None:
    with puppet(answering(ANSWER, (40, struct.pack("<QQ", 1, 2)), FINDING, VERDICT, DONE)) as endpoint:
        found = verify_replica(endpoint, DISK, share=1.0)
    assert (found.ok, found.findings[0].message, found.checked_bytes) == (False, "?[31mbad", 1)


def test_an_endless_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.replica.stream import session

    monkeypatch.setattr(session, "MOST_BYTES", 1 << 20)
    assert MOST_BYTES > 1 << 20
    over = threading.Event()

    def answer(reader: FrameReader, say: Callable[[bytes], None]) -> None:
        # More frames than the limit lets through: each a disk of its own.
        answering(ANSWER, *(disk_said(f"d{number}", *range(1, 257)) for number in range(40)))(reader, say)
        over.set()

    with puppet(answer) as endpoint, pytest.raises(Corrupt, match="more than 1048576 bytes"):
        log(ReplicaDestination(endpoint))
    assert over.wait(HANG)


def test_points_without_end_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.replica import client as asking

    monkeypatch.setattr(asking, "MOST_POINTS", 600)
    pages = [disk_said("d", *range(first, first + 256)) for first in range(1, 1000, 256)]
    with puppet(answering(ANSWER, *pages)) as endpoint, pytest.raises(Corrupt, match="more than 600 points") as caught:
        log(ReplicaDestination(endpoint))
    assert "one disk" in (caught.value.hint or "")


# ---- which directory may be named


def test_a_root_confines(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    (root / "out").symlink_to(other)
    (tmp_path / "in").symlink_to(root)
    for named in map(str, (root, root / "a", root / "a" / ".." / "b", tmp_path / "in" / "a", f"{root}/")):
        assert chosen(named, only=None, within=root).is_relative_to(root)
    outside = map(str, (other, root / "out", root / "out" / "a", root / ".." / "other", tmp_path))
    for name in (*outside, "/", f"{root}2", "root", f"{root}/\0", "", None):
        with pytest.raises(InvalidInput, match=r"may be named|must be named"):
            chosen(name, only=None, within=root)
    assert chosen(str(root), only=None, within=tmp_path / "in") == root


def test_kinds_go_one_way() -> None:
    answers = {Kind.DISK, Kind.VERDICT, Kind.FINDING, Kind.PROGRESS}
    assert not answers & set(FROM_SENDER)
    assert Kind.ASK not in FROM_RECEIVER


def test_an_older_server_lists_all_points(sent: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place = ReplicaDestination(DirectoryEndpoint(sent.root))
    short = place.summaries()
    whole = place.usage()
    assert whole.disks[0].stored_bytes == sum(path.stat().st_blocks * 512 for path in sent.root.rglob("*.qcow2"))
    monkeypatch.setattr(session, "FEATURES", ("ask",))
    assert place.summaries() == short
    with pytest.raises(Unsupported, match="does not support 'summary'"):
        place.usage()


def test_a_disk_that_cannot_be_read_hides_no_other(sent: Place, chain: list[Path]) -> None:
    sent.send(chain[0], disk="db")
    ReplicaDisk(sent.root, "db").path(names.CATALOGUE).write_text("{}")
    place = ReplicaDestination(DirectoryEndpoint(sent.root))
    for found, count in ((place.summaries(), "points"), (place.usage().disks, "point_count")):
        broken, sound = found
        assert broken.trouble is not None
        assert (broken.trouble.kind, broken.trouble.disk, getattr(broken, count)) == ("corrupt", "db", 0)
        assert (sound.trouble, getattr(sound, count)) == (None, 3)
    with pytest.raises(Corrupt, match="db"):
        place.disks()
