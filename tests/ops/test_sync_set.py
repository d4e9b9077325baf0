"""The disks of one guest: made ready together, sealed at one instant, moved by one command."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, InvalidInput
from snapchain.host.locks import ImageLock, LockMode
from snapchain.model.convergence import Verdict
from snapchain.ops.sync.run import Guest, SetReport, SyncRequest, check_set, sealed_request, sync_set
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.source import sealing as snapshot
from snapchain.source.at_rest import ImageAtRest, OfflineSet
from tests.ops.stacks import Layer, MiB, build, flat, names, same, write

VDA, VDB = "web1/vda", "web1/vdb"


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Two layers and a top; one file alone."""
    first = build(tmp_path / "a", [Layer(4 * MiB, ["write -P 1 0 2M"]), Layer(4 * MiB, ["write -P 2 1M 256k"])])
    second = build(tmp_path / "b", [Layer(MiB, ["write -P 3 0 512k"])], names=["data.qcow2"])
    return [first[-1], second[-1]]


@pytest.fixture
def endpoint(tmp_path: Path) -> DirectoryEndpoint:
    return DirectoryEndpoint(tmp_path / "replica")


def requests(images: list[Path], **options: Any) -> list[SyncRequest]:
    return [
        SyncRequest(
            send=sealed_request(image, disk), guest=Guest("web1", disk[-3:], "qemu+ssh://kvm2/system"), **options
        )
        for image, disk in zip(images, (VDA, VDB), strict=True)
    ]


def ready(images: list[Path], endpoint: DirectoryEndpoint, **options: Any) -> SetReport:
    return sync_set(requests(images, **options), endpoint)


def test_all_become_ready_and_one_command_moves_them(images: list[Path], endpoint: DirectoryEndpoint) -> None:
    report = ready(images, endpoint, rounds=1)
    assert report.ready
    assert [disk.disk for disk in report.disks] == [VDA, VDB]
    assert report.outcome is Verdict.ENOUGH
    assert report.bytes_left == 0
    for disk, image in zip(report.disks, images, strict=True):
        assert disk.overlay is not None
        assert same(Path(disk.overlay), flat(image, image.with_name("flat")))
    assert report.virsh_command is not None
    words = shlex.split(report.virsh_command)
    assert words[words.index("--migrate-disks") + 1] == "vda,vdb"
    for disk in report.disks:
        assert str(disk.overlay) in report.commands[0]
    stands = check_set(requests(images), endpoint)
    assert stands.ready
    assert stands.commands == report.commands


def test_one_that_is_not_ready_is_none_ready(images: list[Path], endpoint: DirectoryEndpoint) -> None:
    ready(images, endpoint, rounds=1)
    write(images[1], "write -P 4 0 64k")
    snapshot.run(snapshot.plan(images[1]))
    stands = check_set(requests(images), endpoint)
    assert [disk.ready for disk in stands.disks] == [True, False]
    assert (stands.ready, stands.commands) == (False, ())


def test_none_is_sealed_where_one_is_in_use(images: list[Path], endpoint: DirectoryEndpoint) -> None:
    before = [names(image.parent) for image in images]
    with ImageLock(images[1], LockMode.WRITE), pytest.raises(Busy, match=f"{images[1].name}: somebody"):
        ready(images, endpoint, rounds=1)
    assert [names(image.parent) for image in images] == before


def test_nothing_is_sent_where_one_has_nothing_sealed(images: list[Path], endpoint: DirectoryEndpoint) -> None:
    with pytest.raises(InvalidInput, match="nothing of the image is sealed"):
        ready(images, endpoint)
    assert not Path(endpoint.url.removeprefix("dir:")).exists()


def test_the_target_is_of_all_together(images: list[Path], endpoint: DirectoryEndpoint) -> None:
    report = ready(images, endpoint, target_downtime=60.0)
    assert report.on_target is True
    assert report.predicted_cutover_seconds is not None
    assert report.predicted_cutover_seconds <= 60
    left = [disk.bytes_left for disk in report.disks]
    assert sum(left) == report.bytes_left


def test_written_to_while_the_others_are_sealed(images: list[Path]) -> None:
    """Then what is sealed is no moment of the guest, and is told so."""

    class Late(ImageAtRest):
        def seal(self) -> Path:
            write(images[1], "write -P 9 0 64k")
            return super().seal()

    with pytest.raises(Conflict, match="while the other disks"):
        OfflineSet([Late(images[0]), ImageAtRest(images[1])]).seal()
    assert OfflineSet([ImageAtRest(image) for image in images]).seal()


def test_a_set_is_disks_of_one_guest(images: list[Path], endpoint: DirectoryEndpoint) -> None:
    pair = requests(images)
    with pytest.raises(InvalidInput, match="named twice"):
        sync_set([pair[0], pair[0]], endpoint)
    other = SyncRequest(send=pair[1].send, guest=Guest("web2", "vdb", "qemu+ssh://kvm2/system"))
    with pytest.raises(InvalidInput, match="several guests: web1, web2"):
        sync_set([pair[0], other], endpoint)
    same_place = SyncRequest(send=pair[1].send, guest=pair[0].guest)
    with pytest.raises(InvalidInput, match="one disk of the guest"):
        sync_set([pair[0], same_place], endpoint)
