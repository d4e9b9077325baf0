"""What a replica says of its layers is compared with what the files here show: nothing is put on other bytes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from snapchain.destinations import open_destination
from snapchain.errors import Corrupt, Unavailable
from snapchain.host.records import state_dir
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.model.content import content_id, empty_sum
from snapchain.model.events import Event, Notice
from snapchain.ops.ship.run import Divergence, ShipRequest
from snapchain.replica import sender
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.stream.frames import FrameReader, Kind
from snapchain.replica.stream.maps import MapReader, layer_id
from snapchain.replica.stream.messages import Cut, Inventory, LayerOffer, Open, PointOffer, encode
from snapchain.replica.verification import verify_replica
from snapchain.repository.opening import create_repository
from snapchain.source import sealing as snapshot
from tests.ops.shipping import MiB, delivery
from tests.ops.stacks import Layer, build, flat, same, write
from tests.replica.conftest import DISK, BentEndpoint, Place, send
from tests.replica.sending import plan_send, send_to_replica
from tests.replica.test_stream import ANSWER, EMPTY, GRAIN, HELLO, STOP, puppet, stream, take, words

ZEROES = content_id(MiB, empty_sum())


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 4)])


@pytest.fixture
def held(place: Place, chain: list[Path]) -> Place:
    """A replica of the lower two files."""
    place.send(chain[0])
    place.send(chain[1])
    return place


def poison(place: Place, *, above: int = 0) -> None:
    """Somebody else who may send there puts zeroes in the place of all layers above some, under their sources."""
    layers = place.catalogue()["layers"]
    keep = layers[above - 1]["id"] if above else None
    frames, parent = [(12, encode(Cut(keep=keep)))], keep
    for held in layers[above:]:
        runs = words((MiB // GRAIN) << 2 | 1)
        offer = LayerOffer(
            name=held["file"], size=MiB, cluster_size=GRAIN, extended_l2=False, parent=parent,
            sources=held["sources"], runs=1,
        )  # fmt: skip
        frames += [(3, encode(offer)), runs, (7, bytes.fromhex(ZEROES))]
        parent = layer_id(offer, np.array([(MiB // GRAIN) << 2 | 1], np.uint64))
    point = PointOffer(time="2026-01-01T00:00:00Z", size=MiB, content_id=ZEROES)
    take(place, stream(HELLO, (2, encode(Open(disk=DISK))), *frames, (8, encode(point)), STOP))


def forgotten() -> None:
    shutil.rmtree(state_dir(), ignore_errors=True)


def writable_for_all() -> None:
    for path in state_dir().rglob("*.json"):
        path.chmod(0o666)


def unsound() -> None:
    for path in state_dir().rglob("*.json"):
        path.write_text('{"image":"x","sums":{"../..":"A"}}')


@pytest.mark.parametrize("above", [0, 1])
@pytest.mark.parametrize("memory", [lambda: None, forgotten, writable_for_all, unsound])
def test_other_bytes_under_our_sources(
    held: Place, chain: list[Path], tmp_path: Path, memory: Callable[[], None], above: int
) -> None:
    poison(held, above=above)
    memory()
    before = held.catalogue()
    with pytest.raises(Corrupt, match=rf"its layer {above}\.qcow2 does not show what .*{above}\.qcow2 shows") as caught:
        held.send(chain[2])
    assert str(caught.value.subject).endswith(f"::{DISK}")
    assert "--cut-replica" in (caught.value.hint or "")
    assert held.catalogue() == before
    held.send(chain[2], divergence=Divergence.CUT_REPLICA)
    held.check(flat(chain[2], tmp_path / "shown"))


def test_a_plan_says_it_where_it_is_remembered(held: Place, chain: list[Path]) -> None:
    held.send(chain[2])
    poison(held, above=2)
    with pytest.raises(Corrupt, match=r"its layer disk\.qcow2 does not show what"):
        plan_send(ShipRequest(image=chain[2], disk=DISK), DirectoryEndpoint(held.root))


def test_verify_tells_it(held: Place) -> None:
    there = DirectoryEndpoint(held.root)
    assert verify_replica(there, share=1.0).ok
    poison(held, above=1)
    found = verify_replica(there, share=1.0)
    (finding,) = found.findings
    assert not found.ok
    assert (finding.disk, finding.subject, finding.kind) == (DISK, "1.qcow2", "corrupt")
    assert "somebody has put other data there" in finding.message
    assert finding.points == (3,)
    forgotten()
    assert verify_replica(there, share=1.0).ok, "another host has nothing to compare with"


def test_a_file_that_was_written_to_and_got_its_time_back(held: Place, chain: list[Path]) -> None:
    held.send(chain[2])
    status = chain[0].stat()
    chain[0].chmod(0o600)
    write(chain[0], "write -P 77 64k 64k")
    os.truncate(chain[0], status.st_size)
    os.utime(chain[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(Corrupt, match=r"its layer 0\.qcow2 does not show"):
        held.send(chain[2])


@pytest.mark.parametrize("mode", [0o600, 0o620, 0o602, 0o666])
def test_a_memory_that_others_may_have_written_is_not_believed(held: Place, chain: list[Path], mode: int) -> None:
    """It says that the file here shows zeroes, as the replica does."""
    poison(held)
    for path in (state_dir() / "sums").iterdir():
        said = json.loads(path.read_text())
        said["sums"] = dict.fromkeys(said["sums"], "A" * 2731 + "=")
        path.write_text(json.dumps(said))
        path.chmod(mode)
    if mode == 0o600:
        held.send(chain[1])  # what this user has written is believed: nothing is read again
        return
    with pytest.raises(Corrupt, match="does not show what"):
        held.send(chain[1])


def notices(image: Path, place: Place) -> list[str]:
    said: list[str] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Notice):
            said.append(event.message)

    send_to_replica(ShipRequest(image=image, disk=DISK), DirectoryEndpoint(place.root), on_event=on_event)
    return said


def test_what_was_counted_is_not_read_again(place: Place, chain: list[Path], tmp_path: Path) -> None:
    image = chain[-1]
    for number in range(3):
        write(image, f"write -P {20 + number} {number * 64}k 64k")
        snapshot.run(snapshot.plan(image))
        assert not any("reading" in each for each in notices(image, place))
    merge_run.run_step(
        merge_plan.plan_step(MergeRequest(image=image, from_layer=str(chain[0]), to_layer=str(chain[1])))
    )
    write(image, "write -P 10 0 64k")
    assert not any("reading" in each for each in notices(image, place)), "a merge is proven"
    assert same(place.files()[-1], flat(image, tmp_path / "shown"))
    forgotten()
    snapshot.run(snapshot.plan(image))
    assert any(each.startswith("reading 5 files") for each in notices(image, place))


def test_a_sum_that_the_replica_gives_back_is_not_believed(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "MARK_BYTES", 256 << 10)
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(4 * MiB))
    image = build(tmp_path / "d", [Layer(4 * MiB, [f"write -s {noise} 0 4M"])])[0]
    with pytest.raises(Unavailable, match=r"closed|ends in the middle"):
        send(image, BentEndpoint(place, there=lambda at, data: data if at < 3 * MiB else None))
    record = place.directory / ".incoming.json"
    said = json.loads(record.read_text())
    said.pop("check")
    said["partial"]["content_sum"] = "A" * 2731 + "="
    record.write_text(json.dumps(said))
    assert place.send(image).resumed
    place.check(flat(image, tmp_path / "shown"))


INVENTORY_LIES: dict[str, tuple[dict[str, Any], str]] = {
    "a later epoch": ({"epoch": 2}, "its disk is in epoch 2"),
    "the last epoch": ({"epoch": 1 << 31}, "its disk is in epoch"),
    "beyond all epochs": ({"epoch": (1 << 31) + 1}, "message is invalid: epoch"),
    "a point beyond all": ({"last_point": 1 << 60}, "message is invalid: last_point"),
    "another disk": ({"disk": "b"}, "another disk"),
}


@pytest.mark.parametrize("name", INVENTORY_LIES)
def test_an_inventory_that_cannot_be(chain: list[Path], name: str) -> None:
    change, says = INVENTORY_LIES[name]
    said = {**json.loads(EMPTY[1]), **change}

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(ANSWER, (32, json.dumps(said).encode())))
        while frames.read_or_end() is not None:
            pass

    with puppet(answer) as endpoint, pytest.raises(Corrupt, match=says):
        send(chain[0], endpoint, DISK)


@pytest.mark.parametrize("name", ["../x.qcow2", "x\x1b]0;owned\x07.qcow2", "/etc/passwd", ".lock", "a/b.qcow2", "x"])
def test_file_names_of_a_replica_are_judged_as_they_come(name: str) -> None:
    said = json.loads(EMPTY[1])
    layer = {"id": "0" * 32, "size": 0, "content_id": ZEROES, "content_sum": "A" * 2731 + "=", "sources": []}
    with pytest.raises(ValueError, match="a layer cannot be named"):
        Inventory.model_validate({**said, "layers": [{**layer, "file": name}]})


@pytest.mark.parametrize("points", [[], [1, 2]])
def test_other_points_than_were_sent(chain: list[Path], points: list[int]) -> None:
    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        begun = stream(ANSWER, EMPTY)
        say(begun)
        while (frame := frames.read()).kind is not Kind.STOP:
            if frame.kind is Kind.LAYER:
                offer = LayerOffer.model_validate_json(bytes(frame.body))
                reader = MapReader(offer, subject="test")
                reader.add(frames.read().body)
        stored = {"layer": layer_id(offer, reader.words()), "file": "a.qcow2"}
        done = {"points": points, "layers": 1}
        frames_said = (34, json.dumps(stored).encode()), (35, json.dumps(done).encode())
        say(stream(ANSWER, EMPTY, *frames_said)[len(begun) :])

    with (
        puppet(answer) as endpoint,
        pytest.raises(Corrupt, match=f"published {len(points)} points of the 1 that were sent"),
    ):
        send(chain[0], endpoint, DISK)


def test_a_state_directory_that_cannot_be_written(
    held: Place, chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs reading, and is said."""
    blocked = tmp_path / "blocked"
    blocked.write_text("a file")
    monkeypatch.setenv("XDG_STATE_HOME", str(blocked))
    said = notices(chain[2], held)
    assert any("cannot be remembered" in each for each in said)
    poison(held)
    with pytest.raises(Corrupt, match="does not show what"):
        held.send(chain[2])


def test_ship_and_send_report_one_content_id(place: Place, chain: list[Path], tmp_path: Path) -> None:
    create_repository(str(tmp_path / "repo"), passphrase=lambda: None, encryption="none")
    for image in chain:
        with delivery(open_destination(str(tmp_path / "repo"), writing=True), image, DISK) as work:
            shipped = work.run()
        assert place.send(image).content_id == shipped.content_id
