"""A merge at a replica is asked for by one side and done by another, and neither has to trust the other."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest

from snapchain.destination.records import PointsMergeReport
from snapchain.errors import Corrupt, InvalidInput, NotFound, Unsupported
from snapchain.model.retention import DropPoints, Policy, Rules
from snapchain.replica.client import merged_at
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.points_merge import ReplicaMerge
from snapchain.replica.stream.fields import POINTS_AT_ONCE
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.messages import Hello, Merge, encode
from snapchain.replica.stream.requests import FROM_RECEIVER, FROM_SENDER
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed
from tests.replica.test_asking import DONE, OLD, OTHER_ERRORS, check_refusal
from tests.replica.test_stream import HELLO, MAP, OPEN, offer, puppet, stream, take

ANSWER = (1, encode(Hello(first=1, last=1, software="puppet", features=("merge",), answers=True)))
POINT = {"time": "2026-01-01T00:00:00Z", "labels": ["a"], "kept": True, "reasons": ["newest"]}
OUTCOME: dict[str, Any] = {
    "done": True,
    "layers_before": 3,
    "layers_after": 2,
    "merges": [["0.qcow2", "1.qcow2"]],
    "staying": [],
    "strategy": "absorb+commit",
    "bytes_moved": 5,
    "bytes_freed": -7,
    "needs_bytes": 9,
    "free_bytes": 11,
}


def merged(*numbers: int, disk: str = DISK, outcome: dict[str, Any] | None = None, **change: Any) -> tuple[int, bytes]:
    points = [{"point": number, **POINT, **change} for number in numbers]
    return 41, json.dumps({"disk": disk, "points": points, "outcome": outcome}).encode()


def asked(*said: tuple[int, bytes], dry_run: bool = False, rules: Rules | None = None) -> Any:
    def answer(reader: Any, say: Any) -> None:
        raw = stream(*said)
        for at in range(0, len(raw), 1 << 16):
            say(raw[at : at + (1 << 16)])
        while reader.read().kind is not Kind.MERGE:
            pass

    with puppet(answer) as endpoint:
        work = ReplicaMerge(endpoint, DISK, rules or Policy(last=1), zone="UTC")
        return work.plan() if dry_run else work.run()


def test_an_honest_answer() -> None:
    progress = 40, struct.pack("<QQ", 1, 2)
    found: PointsMergeReport = asked(
        ANSWER, progress, (10, b""), merged(1, 2, kept=False), merged(3, outcome=OUTCOME), DONE
    )
    assert (found.points_kept, found.points_dropped, found.bytes_freed) == ((3,), (1, 2), -7)


def test_points_are_named_only_to_a_side_that_drops_them() -> None:
    with pytest.raises(Unsupported, match="does not support 'drop-points'"):
        asked(ANSWER, rules=DropPoints(frozenset({1})))
    newer = 1, encode(Hello(first=1, last=1, software="puppet", features=("merge", "drop-points"), answers=True))
    found = asked(newer, merged(1, kept=False), merged(3, outcome=OUTCOME), DONE, rules=DropPoints(frozenset({1})))
    assert found.points_dropped == (1,)
    assert b"drop" not in encode(Merge(disk=DISK, last=1, zone="UTC"))


LIES: dict[str, tuple[str, tuple[tuple[int, bytes], ...]]] = {
    "an old one": ("does not support 'merge'", (OLD,)),
    "nothing": ("lacks the outcome", (ANSWER, DONE)),
    "no outcome": ("lacks the outcome", (ANSWER, merged(1), DONE)),
    "half": ("closed by the other side", (ANSWER, merged(1))),
    "another disk": ("another disk than", (ANSWER, merged(1, disk="db", outcome=OUTCOME), DONE)),
    "two outcomes": ("MERGED has no place", (ANSWER, merged(1, outcome=OUTCOME), merged(2, outcome=OUTCOME), DONE)),
    "points that do not ascend": ("points do not ascend", (ANSWER, merged(2), merged(1, outcome=OUTCOME), DONE)),
    "too many points": ("at most 256 items", (ANSWER, merged(*range(1, POINTS_AT_ONCE + 2), outcome=OUTCOME), DONE)),
    "a label for a terminal": (
        "a label holds control characters",
        (ANSWER, merged(1, labels=["\x1b[31m"], outcome=OUTCOME), DONE),
    ),
    "only planned": (
        "contradicts itself, or the request",
        (ANSWER, merged(1, outcome={**OUTCOME, "done": False}), DONE),
    ),
    "more layers than before": (
        "contradicts itself",
        (ANSWER, merged(1, outcome={**OUTCOME, "layers_after": 4}), DONE),
    ),
    "fewer than it merged": ("contradicts itself", (ANSWER, merged(1, outcome={**OUTCOME, "layers_after": 1}), DONE)),
    "a merge of nothing": (
        "contradicts itself",
        (
            ANSWER,
            merged(1, outcome={**OUTCOME, "merges": [["0.qcow2", "1.qcow2", "2.qcow2"], []]}),
            DONE,
        ),
    ),
    "a file elsewhere": (
        "cannot be named",
        (ANSWER, merged(1, outcome={**OUTCOME, "merges": [["../../etc/passwd", "1.qcow2"]]}), DONE),
    ),
    "a file for a terminal": (
        "cannot be named",
        (
            ANSWER,
            merged(1, outcome={**OUTCOME, "staying": [{"file": "\x1b[31m.qcow2", "reason": "x"}]}),
            DONE,
        ),
    ),
    "a strategy for a terminal": (
        "strategy: .* match pattern",
        (ANSWER, merged(1, outcome={**OUTCOME, "strategy": "\x1b[31m"}), DONE),
    ),
    "bytes below zero": ("bytes_moved: .* greater", (ANSWER, merged(1, outcome={**OUTCOME, "bytes_moved": -1}), DONE)),
    "a question's answer": ("DISK has no place", (ANSWER, (37, b'{"disk":"web1/vda","epoch":1,"points":[]}'), DONE)),
    "half a progress": ("PROGRESS has no place", (ANSWER, (40, b"abc"), merged(1, outcome=OUTCOME), DONE)),
    "progress after the end": ("PROGRESS has no place", (ANSWER, merged(1, outcome=OUTCOME), (40, bytes(16)), DONE)),
    "a failure": ("\\?\\[31m", (ANSWER, (11, b'{"kind":"conflict","message":"\\u001b[31m"}'))),
}


@pytest.mark.parametrize("name", LIES)
def test_a_hostile_replica(name: str) -> None:
    says, said = LIES[name]
    with pytest.raises(OTHER_ERRORS.get(name, Corrupt), match=says) as caught:
        asked(*said)
    check_refusal(name, caught.value)


def test_what_it_says_cannot_colour_the_terminal() -> None:
    staying = [{"file": "0.qcow2", "reason": "\x1b[31mbad"}]
    outcome = {**OUTCOME, "done": False, "staying": staying}
    found = asked(ANSWER, merged(1, reasons=["\x1b[31m"], outcome=outcome), DONE, dry_run=True)
    assert (found.points[0].reasons, found.staying[0].reason) == (("?[31m",), "?[31mbad")


@pytest.mark.parametrize("said", [(OPEN,), (OPEN, offer(), MAP), ()])
def test_a_merge_out_of_place(place: Place, said: tuple[tuple[int, bytes], ...]) -> None:
    """In the middle of a transfer, or by one that does not listen."""
    with pytest.raises(Corrupt, match="MERGE has no place here"):
        take(place, stream(HELLO, *said, (15, encode(Merge(disk=DISK, last=1, zone="UTC")))))


REFUSED = (
    r"merge message is invalid|not a duration|there is no disk|no time zone|no rule|cannot be|may be named"
    r"|must be named"
)


@pytest.mark.parametrize(
    "question",
    [
        {},
        {"disk": DISK, "zone": "UTC"},  # no rule
        {"disk": "../..", "last": 1, "zone": "UTC"},
        {"disk": DISK, "last": -2, "zone": "UTC"},
        {"disk": DISK, "last": 1, "zone": "/etc/passwd"},
        {"disk": DISK, "last": 1, "zone": "x" * 200},
        {"disk": DISK, "within": "forever", "zone": "UTC"},
        {"disk": DISK, "labels": [f"x{n}" for n in range(101)], "zone": "UTC"},
        {"disk": DISK, "last": 1, "zone": "UTC", "replica": "/etc"},
        {"disk": DISK, "last": 1, "zone": "UTC", "more": 1},
    ],
)
def test_a_hostile_question(
    place: Place, tmp_path: Any, question: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from snapchain.replica.stream import session

    pointed = Pointed(place, tmp_path / "shots")
    for path in build(tmp_path / "c", [Layer(MiB, [f"write -P {n} 0 64k"]) for n in (1, 2)]):
        pointed.send(path)
    before = sorted((path, path.stat().st_mtime_ns) for path in place.root.rglob("*"))

    def bent(said: Any) -> bytes:
        return json.dumps(question).encode() if isinstance(said, Merge) else encode(said)

    monkeypatch.setattr(session, "encode", bent)
    with pytest.raises(
        (Corrupt, InvalidInput, NotFound),
        match=REFUSED,
    ) as caught:
        pointed.merge(last=1)
    assert caught.value.kind in {"corrupt", "invalid-input", "not-found"}
    assert sorted((path, path.stat().st_mtime_ns) for path in place.root.rglob("*")) == before


def test_rules_that_cannot_be_said(place: Place) -> None:
    with pytest.raises(InvalidInput, match="greater than or equal to -1") as caught:
        Policy(last=-2)
    assert caught.value.subject == "last"
    many = Policy(labels=frozenset(f"x{n}" for n in range(101)))
    with pytest.raises(InvalidInput, match="more than 100 labels"):
        merged_at(DirectoryEndpoint(place.root), DISK, many, zone="UTC", on_bytes=lambda _done, _total: None)


def test_kinds_go_one_way() -> None:
    assert Kind.MERGED not in FROM_SENDER
    assert Kind.MERGE not in FROM_RECEIVER
