"""No foreign word unseats the host that runs a guest, and no epoch runs out."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, Corrupt, SnapchainError
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.ops.migrate.run import MigrateRequest, Move, migrate, take_back
from snapchain.replica.client import ask_for_handover
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.permissions import CONFINED, EVERYTHING
from snapchain.replica.stream.guest_messages import HandedDisk, Step
from snapchain.replica.stream.messages import Active
from tests.ops.stacks import Layer, MiB, build, write
from tests.replica.conftest import DISK, Place, send
from tests.replica.test_permissions import LISTENS, ask, say
from tests.replica.test_stream import STOP, stream

TOKEN = "f" * 32


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 128k"])])[0]


@pytest.fixture
def given(place: Place, image: Path) -> Place:
    """A replica whose host is the master of the disk, in epoch 2."""
    migrate(MigrateRequest(moves=[Move(image, DISK)]), DirectoryEndpoint(place.root))
    assert place.catalogue()["handover"]["epoch"] == 2
    return place


def overlay(place: Place) -> Path:
    return place.directory / str(place.catalogue()["handover"]["overlay"])


@contextmanager
def guest(place: Place) -> Iterator[None]:
    """Has the overlay open for writing, as QEMU does."""
    argv = ["qemu-io", "-f", "qcow2", str(overlay(place))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("length\n")
        child.stdin.flush()
        child.stdout.readline()
        yield
        child.stdin.close()


def stale(place: Place) -> HandedDisk:
    layer = place.catalogue()["layers"][-1]
    active = Active(
        name="disk.qcow2", size=MiB, cluster_size=65536, extended_l2=False, on=layer["id"], make=False, prove=False
    )
    return HandedDisk(disk=DISK, epoch=2, overlay=active)


def hand(place: Place, step: Step, epoch: int, token: str = TOKEN) -> None:
    asked = stale(place).model_copy(update={"epoch": epoch})
    ask_for_handover(DirectoryEndpoint(place.root), step, [asked], token=token)


@pytest.mark.parametrize("step", [Step.BACK, Step.GIVE])
@pytest.mark.parametrize("epoch", [2, 3, 4, 100, LARGEST_EPOCH])
def test_only_the_token_that_is_held_counts(given: Place, step: Step, epoch: int) -> None:
    before = given.catalogue()
    with pytest.raises(Conflict, match="this host has the disk by another handover"):
        hand(given, step, epoch)
    assert given.catalogue() == before
    assert overlay(given).exists()


def test_nobody_takes_back_what_is_open(given: Place, image: Path) -> None:
    before = given.catalogue()
    with guest(given), pytest.raises(Busy, match="open"):
        hand(given, Step.BACK, 3, before["handover"]["token"])
    assert given.catalogue() == before
    hand(given, Step.BACK, 3, before["handover"]["token"])
    after = given.catalogue()
    assert (after["handover"], after["epoch"], after["taken_back"]) == (None, 3, before["handover"]["token"])
    hand(given, Step.BACK, 3, before["handover"]["token"])
    with pytest.raises(Conflict, match="taken it over since"):
        hand(given, Step.GIVE, 2, before["handover"]["token"])
    assert given.catalogue() == after, "said again, it changes nothing"
    _ = image


@pytest.mark.parametrize("epoch", [1, 2, 3, 4, 1000, LARGEST_EPOCH])
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("state", ["open", "written", "untouched"])
def test_no_sender_ends_a_handover_that_is_in_force(given: Place, state: str, by_name: bool, epoch: int) -> None:
    """But for a human who says so by name, where no guest has written anything."""
    if state == "written":
        write(overlay(given), "write -P 5 0 64k")
    before = given.catalogue()
    fields: dict[str, Any] = {"disk": DISK, "epoch": epoch, **({"by_name": True} if by_name else {})}
    raw = stream(LISTENS, say(2, **fields), STOP)
    ends = state == "untouched" and by_name and epoch > 2
    with guest(given) if state == "open" else nothing():
        for permissions in (CONFINED, EVERYTHING):
            try:
                ask(given, raw, permissions)
            except SnapchainError:
                assert given.catalogue() == before
            else:
                assert ends
                assert permissions is EVERYTHING
                assert given.catalogue()["handover"] is None
                return
    assert not ends


@contextmanager
def nothing() -> Iterator[None]:
    yield


def test_a_handover_that_was_given_on_ends_with_the_next_epoch(given: Place, image: Path) -> None:
    overlay(given).chmod(0o400)
    ask(given, stream(LISTENS, say(2, disk=DISK, epoch=3), STOP), CONFINED)
    assert given.catalogue()["handover"] is None
    _ = image


def test_a_handover_whose_overlay_is_gone_ends_with_the_next_epoch(given: Place) -> None:
    overlay(given).unlink()
    ask(given, stream(LISTENS, say(2, disk=DISK, epoch=3), STOP), CONFINED)
    assert given.catalogue()["handover"] is None


@pytest.mark.parametrize("epoch", [3, 4, 100, LARGEST_EPOCH - 1, LARGEST_EPOCH])
def test_an_epoch_rises_by_one(place: Place, image: Path, epoch: int) -> None:
    place.send(image)
    before = place.catalogue()
    with pytest.raises(Conflict, match="an epoch rises by one at a time") as caught:
        ask(place, stream(LISTENS, say(2, disk=DISK, epoch=epoch), STOP), EVERYTHING)
    assert f"--epoch {epoch}" in (caught.value.hint or "")
    with pytest.raises(Conflict, match="an epoch rises by one at a time"):
        hand(place, Step.GIVE, epoch)
    with pytest.raises(Conflict, match="an epoch rises by one at a time"):
        hand(place, Step.BACK, epoch + 1 if epoch < LARGEST_EPOCH else epoch)
    assert place.catalogue() == before
    ask(place, stream(LISTENS, say(2, disk=DISK, epoch=2), STOP), CONFINED)
    assert place.catalogue()["epoch"] == 2


def test_a_new_disk_begins_in_an_epoch_that_leaves_many(place: Place) -> None:
    with pytest.raises(Conflict, match="rises by one"):
        ask(place, stream(LISTENS, say(2, disk="new", epoch=LARGEST_EPOCH), STOP), CONFINED)
    ask(place, stream(LISTENS, say(2, disk="new", epoch=9), STOP), CONFINED)
    assert json.loads((place.root / "new" / "catalogue.json").read_text())["epoch"] == 9


def test_an_epoch_that_a_human_names(place: Place, image: Path) -> None:
    place.send(image)
    place.send(image, epoch=9)
    assert place.catalogue()["epoch"] == 9


def test_a_migration_still_goes_there_and_back(given: Place, image: Path, tmp_path: Path) -> None:
    take_back(MigrateRequest(moves=[Move(image, DISK)]), DirectoryEndpoint(given.root))
    write(image, "write -P 3 0 64k")
    copy = tmp_path / "copy"
    shutil.copytree(image.parent, copy)
    migrate(MigrateRequest(moves=[Move(image, DISK)]), DirectoryEndpoint(given.root))
    assert given.catalogue()["epoch"] == 4
    with pytest.raises(Conflict, match="has taken the guest web1 over by a move"):
        send(copy / image.name, DirectoryEndpoint(given.root), DISK)


@pytest.mark.parametrize("name", ["../../x", "active/../x.qcow2", "/etc/passwd", "x.qcow2", "active/.x", "active/"])
def test_an_overlay_that_a_catalogue_cannot_name(given: Place, name: str) -> None:
    record = given.catalogue()
    record["handover"]["overlay"] = name
    (given.directory / "catalogue.json").write_text(json.dumps(record))
    with pytest.raises(Corrupt, match="cannot be named"):
        ask(given, stream(LISTENS, say(2, disk=DISK, epoch=3), STOP), EVERYTHING)
