"""What lies on a replica's disk is judged before anything builds on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.replica.catalogue import Catalogue
from snapchain.replica.names import check_offered, directory_of, free_name, offered_name
from snapchain.replica.status import check_disk, verify_disk
from snapchain.replica.store import open_replica
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, qemu_img
from tests.replica.conftest import DISK, Place


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(MiB, [f"write -P {n} {n * 64}k 128k"]) for n in range(1, 4)])


def nobody(_count: int) -> None: ...


def test_a_sound_disk_has_no_findings(place: Place, chain: list[Path]) -> None:
    for path in chain:
        place.send(path)
    read: list[int] = []
    assert verify_disk(open_replica(place.root).disk(DISK), on_bytes=read.append) == []
    assert sum(read) >= 3 * 128 * 1024


def test_a_changed_byte_is_told_of_its_layer(place: Place, chain: list[Path]) -> None:
    for path in chain:
        place.send(path)
    victim = place.files()[1]
    victim.chmod(0o644)
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    found = verify_disk(open_replica(place.root).disk(DISK), on_bytes=nobody)
    assert found[0].file == victim.name
    assert found[0].recorded == place.catalogue()["layers"][1]["content_id"]


def _resized(place: Place) -> None:
    place.files()[-1].chmod(0o644)
    qemu_img("resize", "-q", "-f", "qcow2", place.files()[-1], "8M")


def _removed(place: Place) -> None:
    place.files()[0].unlink()


def _relinked(place: Place) -> None:
    place.files()[-1].chmod(0o644)
    qemu_img("rebase", "-u", "-q", "-f", "qcow2", "-b", "", place.files()[-1])


@pytest.mark.parametrize(
    ("harm", "error", "says", "file"),
    [
        (_resized, Corrupt, "are not the chain that its catalogue names", ""),
        (_removed, NotFound, "the backing file is missing", "0.qcow2"),
        (_relinked, Corrupt, "are not the chain that its catalogue names", ""),
    ],
)
def test_nothing_is_built_on_files_that_are_not_the_chain(
    place: Place, chain: list[Path], harm: Callable[[Place], None], error: type[SnapchainError], says: str, file: str
) -> None:
    place.send(chain[1])
    harm(place)
    before = place.catalogue(), sorted(path.name for path in place.directory.iterdir())

    def verify() -> None:
        verify_disk(open_replica(place.root).disk(DISK), on_bytes=nobody)

    for build_on_it in (lambda: place.send(chain[2]), verify):
        with pytest.raises(error, match=says) as caught:
            build_on_it()
        assert str(caught.value.subject).endswith(str(place.directory / file))
    assert (place.catalogue(), sorted(path.name for path in place.directory.iterdir())) == before


def _loop(record: dict[str, Any]) -> None:
    record["layers"].append(record["layers"][0])


def _point_of_nothing(record: dict[str, Any]) -> None:
    record["points"][0]["layer"] = "0" * 32


def _other_sum(record: dict[str, Any]) -> None:
    record["layers"][0]["content_sum"] = "A" * 2731 + "="


def _back(record: dict[str, Any]) -> None:
    record["next_point"] = 1


def _newer(record: dict[str, Any]) -> None:
    record["format"] = 2


@pytest.mark.parametrize("harm", [_loop, _point_of_nothing, _other_sum, _back, _newer])
def test_an_unsound_catalogue_is_refused(
    place: Place, chain: list[Path], harm: Callable[[dict[str, Any]], None]
) -> None:
    place.send(chain[0])
    record = place.catalogue()
    harm(record)
    (place.directory / "catalogue.json").write_text(json.dumps(record))
    with pytest.raises(Corrupt, match="it is unsound"):
        open_replica(place.root).disk(DISK).read()
    with pytest.raises(Corrupt, match="it is unsound"):
        place.send(chain[1])


def _checked(record: dict[str, Any]) -> str:
    record.pop("check", None)
    text = json.dumps(record, indent=1).removesuffix("\n}")
    return f'{text},\n "check": "{blake3(text.encode()).hexdigest()}"\n}}\n'


@pytest.mark.parametrize("newer", [{"format": 4}, {"format": 4, "colour": "red"}, {"colour": "red"}])
def test_a_catalogue_of_a_newer_version(place: Place, chain: list[Path], newer: dict[str, Any]) -> None:
    place.send(chain[0])
    (place.directory / "catalogue.json").write_text(_checked({**place.catalogue(), **newer}))
    with pytest.raises(Unsupported, match="written by a newer snapchain"):
        open_replica(place.root).disk(DISK).read()
    with pytest.raises(Unsupported, match="written by a newer snapchain"):
        place.send(chain[1])
    with pytest.raises(Unsupported, match="written by a newer snapchain"):
        check_disk(open_replica(place.root).disk(DISK), share=0, on_bytes=nobody)


def test_a_directory_of_another_disk(place: Place, chain: list[Path]) -> None:
    place.send(chain[0])
    place.directory.rename(place.root / "b")
    with pytest.raises(Conflict, match="this is the disk 'web1/vda', not 'b'"):
        open_replica(place.root).disk("b").read()


def test_all_disks_by_name(place: Place, chain: list[Path]) -> None:
    for disk in ("web2/vda", "web1/vda"):
        place.send(chain[0], disk=disk)
    assert [each.name for each in open_replica(place.root).disks()] == ["web1/vda", "web2/vda"]


def test_generations_count_every_change(place: Place, chain: list[Path]) -> None:
    place.send(chain[0])
    first = Catalogue.model_validate(place.catalogue()).generation
    place.send(chain[1])
    assert Catalogue.model_validate(place.catalogue()).generation == first + 2


@pytest.mark.parametrize(
    ("disk", "directory"),
    [
        ("web1/vda", "web1%2Fvda"),
        ("..", "%2E."),
        ("-rf", "%2Drf"),
        ("a b%", "a%20b%25"),
        ("ä", "%C3%A4"),
    ],
)
def test_directories_of_disks(disk: str, directory: str) -> None:
    assert directory_of(disk) == directory


def test_a_name_that_grows_too_long() -> None:
    with pytest.raises(InvalidInput, match="too long for a directory"):
        directory_of("ä" * 100)


@pytest.mark.parametrize("name", ["a.qcow2", "disk.raw", "../x", "", ".hidden", "-f", "ä:b.qcow2", "x" * 300])
def test_what_a_sender_offers_a_receiver_takes(name: str) -> None:
    assert check_offered(offered_name(name), subject="test")


def test_taken_names_give_way() -> None:
    layer = "0123456789abcdef" * 2
    assert free_name("a.qcow2", layer, set()) == "a.qcow2"
    assert free_name("a.qcow2", layer, {"a.qcow2"}) == "a-01234567.qcow2"
    assert free_name("a.qcow2", layer, {"a.qcow2", "a-01234567.qcow2"}) == f"a-{layer}.qcow2"


def test_a_flipped_byte_anywhere_in_a_catalogue_is_found(place: Place, chain: list[Path]) -> None:
    """Also where what it says is still sound: a label, a time, a digit of an epoch."""
    place.send(chain[0], labels=["golden"])
    record = place.directory / "catalogue.json"
    whole = record.read_bytes()
    disk = open_replica(place.root).disk(DISK)
    for at in [*range(0, len(whole), 37), whole.index(b"golden"), len(whole) - 1, len(whole) - 5]:
        bent = bytearray(whole)
        bent[at] ^= 1
        record.write_bytes(bent)
        with pytest.raises(Corrupt, match=r"its check is wrong|it is unsound"):
            disk.read()
    text = whole[: whole.index(b',\n "check"')]
    assert whole == text + b',\n "check": "%b"\n}\n' % blake3(text).hexdigest().encode()
    record.write_bytes(text + b"\n}\n")
    assert disk.read() is not None, "one that is older than the check"


def test_wrong_reference_counts_are_found(place: Place, chain: list[Path]) -> None:
    """What a layer shows is right, but a writer would be led astray, and `qemu-img check` is not clean."""
    place.send(chain[0])
    (file,) = place.files()
    whole = bytearray(file.read_bytes())
    table = int.from_bytes(whole[48:56])
    block = int.from_bytes(whole[table : table + 8])
    disk = open_replica(place.root).disk(DISK)
    for at, what in ((block + 1, "1 clusters have too low a count"), (block + 200, "1 too high a one")):
        bent = bytearray(whole)
        bent[at] ^= 1
        file.chmod(0o644)
        file.write_bytes(bent)
        (found,) = verify_disk(disk, on_bytes=nobody)
        assert found.shown == found.recorded
        assert what in found.message
