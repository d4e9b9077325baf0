"""Hostile peers: a mutated client against our server, and a mutated server against our client; see wire.py."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from snapchain.host import lanes as remote_lanes
from snapchain.replica import sender
from snapchain.replica.stream.compression import Link
from snapchain.replica.stream.frames import Kind
from tests.hostile import child
from tests.hostile.child import Outcome, Shell, Step
from tests.hostile.judge import Plan, unlike
from tests.hostile.mutate import Draw, spoil
from tests.hostile.wire import End, Frame, Script, Talk, meddling, pass_on, recorder, strings
from tests.hostile.world import DB, GIVEN, MERGED, WEB, World, enter, standing

PARTS = ("images", "replica")


@dataclass(frozen=True)
class Conversation:
    """words: of the command, where {case} is filled in; stage: of the world; empty: the replica is not there yet

    gives: the points of which the command must write one to out/; writes: it may change the images
    cut: it was run before, and its stream ended after so many frames
    """

    name: str
    words: str
    stage: str = "4"
    empty: bool = False
    gives: tuple[str, tuple[int, ...]] | None = None
    sends: int | None = None
    writes: bool = False
    cut: int = 0


_PREFACE = struct.Struct("<16s16sBB")
_W = f"dir:{{case}}/replica::{WEB}"
_D = f"dir:{{case}}/replica::{DB}"
CONVERSATIONS = (
    Conversation("send", f"send {{case}}/images/web1.qcow2 {_W} --label n4", sends=4),
    Conversation("send all", f"send {{case}}/images/web1.qcow2 {_W} --each-layer", empty=True, sends=4),
    Conversation("send again", f"send {{case}}/images/web1.qcow2 {_W} --each-layer", empty=True, sends=4, cut=6),
    Conversation("send later again", f"send {{case}}/images/web1.qcow2 {_W} --each-layer", empty=True, sends=4, cut=11),
    Conversation("send over a base", f"send {{case}}/images/web1.qcow2 {_W}", stage=MERGED, sends=4),
    Conversation("send and cut", f"send {{case}}/images/db.qcow2 {_W} --cut-replica", stage=MERGED),
    Conversation("send dry", f"send {{case}}/images/web1.qcow2 {_W} --dry-run"),
    Conversation("restore", f"restore {_W}@2 {{case}}/out/disk.raw", gives=(WEB, (2,))),
    Conversation("restore qcow2", f"restore {_W}@n3 {{case}}/out/disk.qcow2", stage=MERGED, gives=(WEB, (3,))),
    Conversation("restore chain", f"restore {_W}@3 {{case}}/out/disk.qcow2 --chain", gives=(WEB, (3,))),
    Conversation("restore latest", f"restore {_W} {{case}}/out/disk.raw", gives=(WEB, (1, 2, 3, 4))),
    Conversation("restore dry", f"restore {_W}@2 {{case}}/out/disk.raw --dry-run"),
    Conversation("log", "log dir:{case}/replica"),
    Conversation("log disk", f"log {_W}"),
    Conversation("inspect", f"inspect {_W}"),
    Conversation("verify", "verify dir:{case}/replica"),
    Conversation("verify data", f"verify {_W} --read-data"),
    Conversation("merge", f"merge {_W} --keep-last 1"),
    Conversation("merge dry", f"merge {_W} --keep-last 1 --keep-label n1 --dry-run"),
    Conversation("sync", f"sync {{case}}/images/web1.qcow2 {_W}", writes=True),
    Conversation("sync check", f"sync {{case}}/images/web1.qcow2 {_W} --check", writes=True),
    Conversation("migrate", f"migrate --offline {{case}}/images/db.qcow2 {_D}", stage=MERGED, writes=True),
    Conversation("take back", f"migrate --take-back {{case}}/images/db.qcow2 {_D}", stage=GIVEN, writes=True),
)


def record(world: World) -> None:
    """Hold each conversation once with nobody in the middle, and keep both directions."""
    place = world.root / "talks"
    place.mkdir(exist_ok=True)
    for held in CONVERSATIONS:
        _set_up(world, held)

        def talk(shell: Shell, held: Conversation = held) -> None:
            enter(world, random.Random(held.name))
            _run_before(world, held, shell)
            there, back = Talk(), Talk()
            with meddling(recorder(there), recorder(back), patience=60.0):
                step = shell.run(*_words(world, held))
            assert step.code == 0 or held.name == "sync check", step
            said = {"there": _kept(there), "back": _kept(back)}
            (place / f"{held.name}.json").write_text(json.dumps(said))

        done = child.run(talk, world.root / "build" / f"talk-{held.name}", limited=False)
        assert not done.failure, (held, done.failure, done.steps)
    talks.cache_clear()


def _run_before(world: World, held: Conversation, shell: Shell) -> None:
    """What has led to the state in which the conversation is held."""
    sender.MARK_BYTES = 1  # a mark after each frame of data
    if held.cut:
        left = [held.cut]

        def first_frames(frames: Iterator[Frame]) -> Iterator[Frame | bytes]:
            count = left.pop() if left else 0  # each time that it tries again, none
            yield from islice(frames, count)
            raise End

        with meddling(first_frames, pass_on, patience=60.0):
            shell.run(*_words(world, held))


def _kept(talk: Talk) -> list[tuple[int, str]]:
    return [(frame.kind, frame.body.hex()) for frame in talk.frames]


@cache
def talks(world: World) -> dict[str, tuple[Talk, Talk]]:
    """What was recorded: to the server, and back."""
    found = {}
    for held in CONVERSATIONS:
        said = json.loads((world.root / "talks" / f"{held.name}.json").read_text())
        found[held.name] = (_read(said["there"]), _read(said["back"]))
    return found


def _read(said: list[tuple[int, str]]) -> Talk:
    return Talk([Frame(kind, bytes.fromhex(body)) for kind, body in said])


def _words(world: World, held: Conversation) -> list[str]:
    return [word.replace("{case}", str(world.case)) for word in held.words.split()]


def _set_up(world: World, held: Conversation) -> None:
    parts: tuple[str, ...] = ("images",) if held.empty else PARTS
    if held.words.startswith("migrate"):  # it asks the guest's other destinations
        parts += ("enc", "plain")
    world.set_up(held.stage, parts)


def plan(world: World, draw: Draw) -> Plan:
    """One case."""
    known = talks(world)
    held = draw.choice(CONVERSATIONS)
    hostile_client = draw.random() < 0.5
    there, back = known[held.name]
    every = [frame for pair in known.values() for talk in pair for frame in talk.frames if len(frame.body) < 1 << 20]
    script = Script(draw, there if hostile_client else back, every, strings([there, back]))
    _set_up(world, held)
    words = _words(world, held)
    if draw.random() < 0.6:
        words.append("--json")
    link = draw.choice([None, Link.NETWORK])
    by_hand = hostile_client and draw.random() < 0.25
    images = _images(world)
    point = draw.choice([1, 2, 3, 4])

    def run(shell: Shell) -> None:
        enter(world, random.Random(draw.random()))
        _run_before(world, held, shell)
        if by_hand:
            stream = world.case / "home" / "stream"
            if Kind.OPEN in {frame.kind for frame in there.frames} and draw.random() < 0.6:
                stream.write_bytes(there.encoded(script))
                shell.run(
                    "receive", world.case / "replica", *(["--dry-run"] if draw.random() < 0.2 else []), stdin=stream
                )
            else:
                script.talk = _naming(there, world.case / "replica")
                stream.write_bytes(_lanes(draw) + script.talk.encoded(script))
                remote_lanes.JOIN_SECONDS = 0.2
                shell.run("serve-replica", "--stdio", "--root", world.case / "replica", stdin=stream)
        else:
            with meddling(script if hostile_client else pass_on, pass_on if hostile_client else script, link=link):
                shell.run(*words)
        (world.case / "home" / "told").write_text(json.dumps(script.told))
        if held.name != "take back":
            shell.run("verify", f"dir:{world.case}/replica", "--read-data")
            shell.run("restore", f"dir:{world.case}/replica::{WEB}@{point}", world.case / "out" / "again.raw")

    def judge(outcome: Outcome) -> Iterator[str]:
        steps = outcome.steps[bool(held.cut) :]
        if len(steps) < 1 or steps[0].code is None:
            return
        first = steps[0]
        if hostile_client and held.stage in (MERGED, GIVEN) and _two_masters(world):
            yield f"two masters: exit {first.code}"
        if not by_hand and first.code == 0:
            yield from _done(world, held, first, hostile_client=hostile_client)
        if images != (now := _images(world)) and not held.writes:
            yield f"the images were changed: {sorted(name for name in images if images[name] != now.get(name))}"
        for step in steps[1:]:
            if step.words[0] == "verify" and step.code not in (0, 3, 2) and not held.empty:
                yield f"the replica is not sound any more: {step.err}{step.out[-800:]}"
            if step.words[0] == "restore" and step.code == 0:
                again = world.case / "out" / "again.raw"
                shown = world.truth(WEB, 4 if held.empty else point)
                if not ((hostile_client or "cut" in held.name) and (point == 4 or held.empty)) and unlike(
                    again, [shown], "raw"
                ):
                    yield f"point {point} is not what it was"

    return Plan(run, judge)


def _done(world: World, held: Conversation, first: Step, *, hostile_client: bool) -> Iterator[str]:
    if held.gives is not None:
        disk, points = held.gives
        output = world.case / "out" / first.words[2].rpartition("/")[2]
        if not output.exists():
            yield "exit 0 and nothing was written"
        elif unlike(output, [world.truth(disk, point) for point in points], output.suffix[1:]):
            yield "exit 0 and other bytes than the point's"
    if held.sends is not None and hostile_client:
        # The server is honest: what it has now is what was said to be sent.
        catalogue = world.case / "replica" / WEB.replace("/", "%2F") / "catalogue.json"
        if not catalogue.exists() or not json.loads(catalogue.read_text())["points"]:
            yield "exit 0 and no point over there"
        elif unlike(catalogue.parent / _newest(catalogue), [world.truth(WEB, held.sends)], "qcow2"):
            yield "exit 0 and the newest point over there is another one"


def _two_masters(world: World) -> bool:
    """Whether the disk may be written both here and there: only what was asked of an honest server was changed."""
    catalogue = world.case / "replica" / DB.replace("/", "%2F") / "catalogue.json"
    given = catalogue.exists() and json.loads(catalogue.read_text()).get("handover") is not None
    return given and bool((world.case / "images" / "db.qcow2").stat().st_mode & 0o222)


def _newest(catalogue: Path) -> str:
    said = json.loads(catalogue.read_text())
    files = {layer["id"]: layer["file"] for layer in said["layers"]}
    return str(files[said["points"][-1]["layer"]])


def _lanes(draw: Draw) -> bytes:
    """What a stream over several connections begins with; most have only one, and no such thing."""
    if draw.random() < 0.7:
        return b""
    lane, count = draw.choice([(0, 1), (0, 1), (0, 2), (1, 2), (0, 0), (3, 2), (0, 255), (255, 16)])
    preface = _PREFACE.pack(remote_lanes.MAGIC, draw.randbytes(16), lane, count)
    return spoil(preface, draw) if draw.random() < 0.2 else preface


def _naming(talk: Talk, replica: Path) -> Talk:
    """As it is over ssh: the client names the directory."""
    frames = list(talk.frames)
    frames[1] = Frame(frames[1].kind, json.dumps({**json.loads(frames[1].body), "replica": str(replica)}).encode())
    return Talk(frames)


def _images(world: World) -> dict[str, tuple[int, ...]]:
    return {name: look for name, look in standing(world.case / "images").items() if name.endswith(".qcow2")}
