"""A host that was replaced as the writer of a disk is refused, whatever it still has to send."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import Conflict, Corrupt, Diverged, InvalidInput, Unsupported
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.ops.log import log
from snapchain.ops.migrate.run import MigrateRequest, Move, migrate
from snapchain.ops.ship.run import ShipRequest
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.stream.frames import FrameReader
from snapchain.replica.stream.messages import Open, encode
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, flat
from tests.replica.conftest import DISK, Place, send
from tests.replica.sending import plan_send
from tests.replica.test_asking import OLD
from tests.replica.test_stream import HELLO, MAP, STOP, TWO, offer, puppet, stream, take


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 4)])


def test_an_older_epoch_is_refused(place: Place, chain: list[Path], tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(chain[0].parent, tmp_path / "another host")) / chain[2].name
    place.send(chain[0])
    place.send(chain[1], epoch=3)
    assert log(ReplicaDestination(DirectoryEndpoint(place.root))).disks[0].epoch == 3
    before = {path: path.read_bytes() for path in place.directory.iterdir()}
    to = DirectoryEndpoint(place.root)
    for epoch in (1, 2):
        with pytest.raises(Conflict, match=f"in epoch {epoch}, and here it is in epoch 3") as caught:
            place.send(theirs, epoch=epoch)
        assert caught.value.kind == "conflict"
        with pytest.raises(Conflict, match="epoch 3"):
            plan_send(ShipRequest(image=theirs, disk=DISK, epoch=epoch), to)
    assert {path: path.read_bytes() for path in place.directory.iterdir()} == before
    place.send(chain[2], epoch=3)
    place.check(flat(chain[2], tmp_path / "flat"))


def test_a_newer_epoch_holds_before_anything_came(place: Place, chain: list[Path]) -> None:
    """The old host is out from the moment that the new one has spoken, however far that came."""
    place.send(chain[0])
    raw = stream(HELLO, (2, encode(Open(disk=DISK, epoch=2))), offer(), MAP, TWO)
    with pytest.raises(Diverged, match="does not lie on the newest one here"):
        take(place, raw)
    assert place.catalogue()["epoch"] == 2
    with pytest.raises(Conflict, match="another host has taken it over since"):
        place.send(chain[1])


def test_a_look_changes_no_epoch(place: Place, chain: list[Path]) -> None:
    place.send(chain[0])
    plan_send(ShipRequest(image=chain[1], disk=DISK, epoch=7), DirectoryEndpoint(place.root))
    assert place.catalogue()["epoch"] == 1


def test_a_saved_stream_of_an_older_epoch(place: Place, chain: list[Path]) -> None:
    place.send(chain[0], epoch=2)
    with pytest.raises(Conflict, match="in epoch 1, and here it is in epoch 2"):
        take(place, stream(HELLO, (2, encode(Open(disk=DISK))), STOP))


def test_the_first_epoch_goes_without_saying(chain: list[Path]) -> None:
    """So that a receiver which has never heard of epochs understands."""
    assert "epoch" not in json.loads(encode(Open(disk=DISK)))
    assert json.loads(encode(Open(disk=DISK, epoch=2)))["epoch"] == 2

    def answer(frames: FrameReader, say: Callable[[bytes], None]) -> None:
        say(stream(OLD))
        while frames.read_or_end() is not None:
            pass

    with puppet(answer) as endpoint, pytest.raises(Unsupported, match="does not support 'epoch'"):
        send(chain[0], endpoint, DISK, epoch=2)


@pytest.mark.parametrize("epoch", [0, -1, (1 << 31) + 1])
def test_what_is_no_epoch(place: Place, chain: list[Path], epoch: int) -> None:
    with pytest.raises(InvalidInput, match="is no epoch"):
        place.send(chain[0], epoch=epoch)
    with pytest.raises(Corrupt, match="its open message is invalid: epoch"):
        take(place, stream(HELLO, (2, f'{{"disk":"a","epoch":{epoch}}}'.encode()), STOP))
    assert not place.root.exists()


def test_who_has_said_an_epoch_need_not_say_it_again(place: Place, chain: list[Path]) -> None:
    place.send(chain[0], epoch=3)
    place.send(chain[1], epoch=4)
    place.send(chain[2])
    assert place.catalogue()["epoch"] == 4


def test_after_the_last_epoch_there_is_no_handover(place: Place, chain: list[Path]) -> None:
    place.send(chain[2], epoch=LARGEST_EPOCH)
    with pytest.raises(Unsupported, match="there is none after it"):
        migrate(MigrateRequest(moves=[Move(chain[2], DISK)]), DirectoryEndpoint(place.root))
    assert chain[2].stat().st_mode & 0o200
