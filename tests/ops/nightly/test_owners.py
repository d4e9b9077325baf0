"""Patterns of a configuration over directories of other users, as root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapchain.errors import Conflict, InvalidInput, Unsupported
from snapchain.ops.nightly.document import load
from snapchain.ops.nightly.selection import Selection, select
from tests.host.others import ALICE, BOB, directory, file, link, root_only
from tests.ops.stacks import qemu_img

pytestmark = root_only


def image(path: Path, *, uid: int) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", path, "64k")
    os.chown(path, uid, uid)
    path.chmod(0o600)
    return path


def selected(host: Path, pattern: str) -> Selection:
    (host / "nightly.toml").write_text(
        f"""time_zone = "UTC"
[[disks]]
glob = "{host}/{pattern}"
[[destinations]]
name = "d"
url = "{host}/repository"
password_file = "{file(host / "password")}"
"""
    )
    return select(load(host / "nightly.toml"))


@pytest.mark.parametrize("pattern", ["*/*.qcow2", "**/*.qcow2", "alice/*.qcow2"])
def test_links_of_other_users_add_nothing(open_host: Path, pattern: str) -> None:
    """Neither root's images nor those of a third, by a link to the file or to its directory."""
    alice, bob = directory(open_host / "alice", uid=ALICE), directory(open_host / "bob", uid=BOB)
    roots, hidden = directory(open_host / "roots"), directory(open_host / "hidden", mode=0o700)
    own = image(alice / "own.qcow2", uid=ALICE)
    for place, uid in ((bob, BOB), (roots, 0), (hidden, 0)):
        there = image(place / f"{place.name}.qcow2", uid=uid)
        link(alice / f"to-{there.name}", there, uid=ALICE)
        link(alice / place.name, place, uid=ALICE)
    link(alice / "again.qcow2", own, uid=ALICE)
    found = selected(open_host, pattern)
    of_alice = [disk.image for disk in found.disks if disk.image.is_relative_to(alice)]
    assert of_alice in ([own], [alice / "again.qcow2"]), "an image of her own counts once, by one of its names"
    refused = {Path(fault.subject).name for fault in found.faults if fault.subject}
    assert {f"to-{name}.qcow2" for name in ("bob", "roots", "hidden")} <= refused
    assert {type(fault) for fault in found.faults} <= {Unsupported, InvalidInput, Conflict}


def test_a_configuration_that_another_user_can_write_is_refused(open_host: Path) -> None:
    """It names programs, which would run as root."""
    made = file(open_host / "night.toml", "", mode=0o644, uid=ALICE)
    with pytest.raises(InvalidInput, match=f"user {ALICE} can write or replace this file"):
        load(made)
