"""Root changes nothing where only a link of somebody else has led it: no note, no lock, no leftover, no replica."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import Unsupported
from snapchain.image import scan
from snapchain.ops import doctor
from snapchain.ops.hold import hold_image, release_image
from snapchain.ops.ownership import check_can_be_given, note_epoch
from snapchain.replica.confinement import chosen
from tests.host.others import ALICE, directory, link, open_host, root_only
from tests.ops.stacks import qemu_img

__all__ = ["open_host"]
pytestmark = root_only


def _give(image: Path) -> None:
    with scan(image) as chain:
        check_can_be_given(chain)


CHANGES: dict[str, Callable[[Path], object]] = {
    "hold": lambda image: hold_image(image, "tag"),
    "release": lambda image: release_image(image, "tag"),
    "release a note": lambda image: release_image(image.with_name("gone.qcow2"), "tag"),
    "note an epoch": lambda image: note_epoch(image, 7),
    "give away": _give,
    "doctor": lambda image: doctor.plan([image]),
    "doctor of a directory": lambda image: doctor.plan([image.parent]),
    "serve-replica": lambda image: chosen(str(image.parent), only=None, within=image.parent),
}
OF_A_DIRECTORY = {"release a note", "doctor of a directory", "serve-replica"}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("whole", [False, True], ids=["file", "directory"])
def test_a_link_of_somebody_chooses_nothing_that_root_changes(open_host: Path, change: str, *, whole: bool) -> None:
    roots = directory(open_host / "roots")
    qemu_img("create", "-q", "-f", "qcow2", roots / "disk.qcow2", "64k")
    hold_image(roots / "disk.qcow2", "tag")
    before = sorted(each.name for each in roots.iterdir())
    alices = directory(open_host / "alice", uid=ALICE)
    named = link(alices / "there", roots, uid=ALICE) / "disk.qcow2"
    if not whole:
        if change in OF_A_DIRECTORY:
            return
        named = link(alices / "disk.qcow2", roots / "disk.qcow2", uid=ALICE)
    with pytest.raises(Unsupported, match=f"a symbolic link of user {ALICE} leads to"):
        CHANGES[change](named)
    assert sorted(each.name for each in roots.iterdir()) == before
    link(open_host / "mine", roots)
    if change != "release a note":
        CHANGES[change](open_host / "mine" / "disk.qcow2")
