"""What others may leave in a replica's directory: links, pipes, devices, other people's files, and gaps.

It is told clearly, nobody waits for it, and nothing that it points at is touched.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.host.retry import RetryPolicy
from snapchain.ops.log import log
from snapchain.ops.ship.request import ShipReport
from snapchain.ops.ship.run import ShipRequest
from snapchain.replica import sender
from snapchain.replica.catalogue import Catalogue, read_record
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.verification import verify_replica
from tests.ops.stacks import Layer, build, flat, same
from tests.replica.conftest import DISK, BentEndpoint, Place, send
from tests.replica.sending import plan_send, send_persistently

MiB = 1 << 20
SECRET = "not to be touched"


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 4)])


@pytest.fixture
def held(place: Place, chain: list[Path]) -> Place:
    """A replica with two layers."""
    place.send(chain[0])
    place.send(chain[1])
    return place


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text(SECRET)
    path.chmod(0o640)
    return path


def pipe(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def zeroes(path: Path) -> None:
    path.unlink()
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))


def moved(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def empty(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(b"")


Plant = Callable[[Path], None]
KINDS = [pipe, moved, nowhere, folder, empty, pytest.param(zeroes, marks=pytest.mark.root)]
IN_A_LAYERS_PLACE = [
    (pipe, (Unsupported, InvalidInput), "a FIFO, not a regular file"),
    (nowhere, (NotFound, NotFound), "the backing file is missing|no such file"),
    (folder, (Unsupported, InvalidInput), "a directory, not a regular file"),
    (empty, (Corrupt, Corrupt), "the magic bytes are missing"),
    pytest.param(zeroes, (Unsupported, InvalidInput), "a character device, not a regular file", marks=pytest.mark.root),
]
"""What is planted, how it is refused as a backing file and as the newest layer, and what is said."""


def refused(place: Place, image: Path) -> None:
    """By all that would build on it, and told by verify; nothing changes."""
    before = {path.name for path in place.directory.iterdir()}
    there = DirectoryEndpoint(place.root)
    for attempt in (place.send, lambda image: plan_send(ShipRequest(image=image, disk=DISK), there)):
        with pytest.raises(Corrupt) as caught:
            attempt(image)
        assert str(caught.value.subject).endswith(str(place.directory / "catalogue.json"))
    assert {path.name for path in place.directory.iterdir()} == before
    found = verify_replica(DirectoryEndpoint(place.root), share=1.0)
    assert not found.ok
    assert found.findings[0].disk == DISK


@pytest.mark.parametrize("plant", KINDS)
def test_in_the_place_of_the_catalogue(held: Place, chain: list[Path], plant: Callable[[Path], None]) -> None:
    plant(held.directory / "catalogue.json")
    refused(held, chain[2])
    with pytest.raises(Corrupt, match=r"it is unsound|larger than|not a regular file"):
        log(ReplicaDestination(DirectoryEndpoint(held.root)))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("plant", "kinds", "says"), IN_A_LAYERS_PLACE)
def test_in_the_place_of_a_layer(
    held: Place,
    chain: list[Path],
    plant: Plant,
    kinds: tuple[type[SnapchainError], type[SnapchainError]],
    says: str,
    number: int,
) -> None:
    before, file = held.catalogue(), f"{number}.qcow2"
    plant(held.directory / file)
    there = DirectoryEndpoint(held.root)
    with pytest.raises(kinds[number], match=says) as caught:
        held.send(chain[2])
    assert str(caught.value.subject).endswith(str(held.directory / file))
    (finding,) = verify_replica(there, share=1.0).findings
    assert re.search(says, finding.message)
    assert finding.disk == DISK
    assert held.catalogue() == before
    assert len(log(ReplicaDestination(there)).disks[0].points) == 2


@pytest.mark.parametrize("file", ["0.qcow2", "1.qcow2"])
def test_a_layer_may_be_a_link_to_its_file(held: Place, chain: list[Path], file: str, tmp_path: Path) -> None:
    moved(held.directory / file)
    assert held.send(chain[2]).layers_sent == 1
    assert verify_replica(DirectoryEndpoint(held.root), share=1.0).ok
    assert same(held.files()[-1], flat(chain[2], tmp_path / "shown"))


def test_a_catalogue_that_is_gone(held: Place, chain: list[Path]) -> None:
    (held.directory / "catalogue.json").unlink()
    refused(held, chain[2])
    with pytest.raises(Corrupt, match="its catalogue is gone, and 2 layers are here"):
        held.send(chain[2])


@pytest.mark.parametrize("name", [".incoming.qcow2", "2.qcow2", ".lock", "catalogue.json", ".incoming.json"])
def test_no_link_is_followed(held: Place, chain: list[Path], victim: Path, tmp_path: Path, name: str) -> None:
    (held.directory / name).unlink(missing_ok=True)
    (held.directory / name).symlink_to(victim)
    try:
        held.send(chain[2])
    except SnapchainError as error:
        assert name in {".lock", "catalogue.json", ".incoming.json"}, error  # noqa: PT017
    else:
        (held.directory / name).unlink(missing_ok=name != "2.qcow2")
        held.check(flat(chain[2], tmp_path / "shown"))
    assert (victim.read_text(), victim.stat().st_mode & 0o777) == (SECRET, 0o640)


@pytest.fixture
def cut_off(held: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An image whose transfer to the disk `other` was cut off in the middle, and its file there."""
    monkeypatch.setattr(sender, "MARK_BYTES", 256 << 10)
    noise = tmp_path / "noise"
    noise.write_bytes(os.urandom(4 * MiB))
    image = build(tmp_path / "d", [Layer(4 * MiB, [f"write -s {noise} 0 4M"])])[0]
    with pytest.raises(Unavailable, match=r"closed|ends in the middle"):
        send(image, BentEndpoint(held, there=lambda at, data: data if at < 3 * MiB else None), "other")
    incoming = held.root / "other" / ".incoming.qcow2"
    assert incoming.with_suffix(".json").exists()
    return image, incoming


def test_no_link_is_followed_by_who_goes_on(held: Place, cut_off: tuple[Path, Path], victim: Path) -> None:
    """A transfer that was cut off makes its file writable again: that file, and none that a link names."""
    image, incoming = cut_off
    incoming.unlink()
    incoming.symlink_to(victim)
    with pytest.raises(InvalidInput, match="symbolic link"):
        send(image, DirectoryEndpoint(held.root), "other")
    assert (victim.read_text(), victim.stat().st_mode & 0o777) == (SECRET, 0o640)


def test_a_transfer_does_not_go_on_in_a_file_that_was_changed(held: Place, cut_off: tuple[Path, Path]) -> None:
    image, incoming = cut_off
    os.truncate(incoming, incoming.stat().st_size - 512)
    with pytest.raises(Corrupt, match="the file of the layer that is arriving was changed") as caught:
        send(image, DirectoryEndpoint(held.root), "other")
    assert str(caught.value.subject).endswith(str(incoming))
    assert caught.value.hint == "remove it"
    incoming.unlink()
    assert send(image, DirectoryEndpoint(held.root), "other").layers_sent == 1


def test_a_transfer_does_not_go_on_in_a_file_with_two_names(held: Place, cut_off: tuple[Path, Path]) -> None:
    image, incoming = cut_off
    os.link(incoming, incoming.with_name("another name"))
    with pytest.raises(Corrupt, match="the file of the layer that is arriving was changed"):
        send(image, DirectoryEndpoint(held.root), "other")


def test_a_replica_that_has_lost_its_mark(held: Place, chain: list[Path]) -> None:
    (held.root / "snapchain-replica.json").unlink()
    there = DirectoryEndpoint(held.root)
    with pytest.raises(InvalidInput, match="holds other things"):
        held.send(chain[2])
    with pytest.raises(InvalidInput, match="holds other things"):
        plan_send(ShipRequest(image=chain[2], disk=DISK), there)


def persistently(image: Path, place: Place) -> ShipReport:
    policy = RetryPolicy(give_up_after=100)
    return send_persistently(ShipRequest(image=image, disk=DISK), DirectoryEndpoint(place.root), policy=policy)


@pytest.mark.root
def test_a_place_that_may_only_be_read(held: Place, chain: list[Path]) -> None:
    """It is told at once: asking again would find the same."""
    subprocess.run(["mount", "--bind", held.root, held.root], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", held.root], check=True)
        with pytest.raises(Unavailable, match="read-only file system"):
            persistently(chain[2], held)
        assert verify_replica(DirectoryEndpoint(held.root), share=1.0).ok
    finally:
        subprocess.run(["umount", held.root], check=True)
    assert persistently(chain[2], held).layers_sent == 1


@pytest.mark.root
def test_somebody_elses(held: Place) -> None:
    """Who may not read a catalogue is told that, and not that it is damaged."""
    path = held.directory / "catalogue.json"
    path.chmod(0)
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        status = 1
        with suppress(BaseException):
            try:
                read_record(Catalogue, path)
            except InvalidInput as error:
                status = 0 if error.message == "permission denied" else 2
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "order", [(1, 0), (0, 2), (0, 0), (1, 1, 0), (0, 1, 0)], ids=lambda order: "".join(map(str, order))
)
def test_a_record_of_a_merge_that_cannot_have_been(place: Place, chain: list[Path], order: tuple[int, ...]) -> None:
    for path in chain:
        place.send(path)
    layers = [layer["id"] for layer in place.catalogue()["layers"]]
    record = place.directory / ".merging.json"
    record.write_text(json.dumps({"format": 1, "members": [layers[at] for at in order]}))
    before = place.catalogue()
    with pytest.raises(Corrupt, match="not neighbours") as caught:
        place.send(chain[-1])
    assert str(record) in str(caught.value)
    assert (place.catalogue(), record.exists()) == (before, True)
