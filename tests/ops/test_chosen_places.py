"""Places that a link of somebody else has chosen: root reads there what they can read, and changes nothing."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapchain.cli.verbs import VERBS
from snapchain.errors import InvalidInput, SnapchainError, Unsupported
from snapchain.host.path_resolution import Resolved, resolve
from snapchain.host.rights import Rights
from snapchain.ops import doctor, hold
from snapchain.source.notes import Notes
from snapchain.source.ownership import note_epoch
from tests.host.others import ALICE, directory, file, link, open_host
from tests.ops.owners import Host, chain
from tests.ops.stacks import flat
from tests.ops.taken_over import taken_over
from tests.ops.test_layouts import Desk
from tests.swaps.campaign import preload

pytestmark = pytest.mark.root
__all__ = ["open_host"]

# {disk}: alice's link to a disk of root's, {images}: to its directory, which is {real}, {mine}: root's own.
CHANGES = (
    "snapshot {disk} --image-dir {real}",
    "snapshot {disk} --overlay {mine}/over.qcow2 --image-dir {real}",
    "snapshot {images}/disk.qcow2",
    "merge {disk} --strategy commit --image-dir {real}",
    "merge {disk} --flatten --image-dir {real}",
    "merge {images}/disk.qcow2 --strategy new-file",
    "hold {disk} --tag audit",
    "hold {images}/root.qcow2 --tag audit",
    "release {disk} --tag audit",
    "release {images}/gone.qcow2 --tag audit",
    "doctor {disk} --image-dir {real}",
    "doctor {images}",
    "doctor {mine} --accept {images}/.snapchain-layer-x-1.json",
    "migrate {disk} dir:{mine}/replica::d --offline --image-dir {real}",
    "sync {disk} dir:{mine}/replica::d --rounds 1 --image-dir {real}",
    "fence {disk} dir:{mine}/points::web1/vda --image-dir {real}",
    "restore {mine}/repo::d {disk} --force",
    "restore {mine}/repo::d {images}/new.qcow2",
    "restore {mine}/repo::d {images}/new.qcow2 --chain",
    "serve {mine}/repo::d --socket {images}/s",
    "mount {mine}/repo {images}",
    "nightly {mine}/night.toml",
    "init {images}/repo --no-encryption",
    "gc {images}/repo",
    "send {mine}/own.qcow2 dir:{images}/replica::d",
    "ship {mine}/own.qcow2 {images}/repo::d",
)
READS = (
    "inspect {disk} --image-dir {real}",
    "diff {images}/1.qcow2 {disk} --image-dir {real}",
    "files volumes {disk} --image-dir {real}",
    "ship {disk} {mine}/repo::d --image-dir {real}",
    "send {disk} dir:{mine}/replica::d --image-dir {real}",
    "sync {disk} dir:{mine}/replica::s --image-dir {real}",
    "log {mine}/repo",
    "verify {mine}/repo",
    "status {mine}/repo",
    "repair {mine}/repo --from {disk} --image-dir {real}",
)
NO_IMAGE = {
    "receive", "serve-replica", "guests", "watch", "failover", "failback", "retire", "key", "forget", "rename", "copy",
    "stats",
}  # fmt: skip
"""They make files of a replica below a directory, as `send` does, or ask a guest for its images.

failback takes only images that `fence` has marked.
"""


@pytest.fixture(scope="module", autouse=True)
def _preloaded() -> None:
    preload()


@pytest.fixture(scope="module")
def shared() -> Iterator[Desk]:
    """For all tests after which nothing is changed."""
    place = Path(tempfile.mkdtemp(dir="/var/tmp"))
    place.chmod(0o755)
    yield make_desk(place)
    shutil.rmtree(place)


def make_desk(open_host: Path) -> Desk:
    """Root's public images, and alice's links to them."""
    real, mine = directory(open_host / "real"), directory(open_host / "mine", mode=0o700)
    alice = directory(open_host / "alice", uid=ALICE)
    layers = [real / "root.qcow2", real / "1.qcow2", real / "disk.qcow2"]
    chain(*layers, links=[str(path) for path in layers])
    chain(mine / "own.qcow2", links=[])
    link(alice / "disk.qcow2", real / "disk.qcow2", uid=ALICE)
    link(alice / "images", real, uid=ALICE)
    host = Host(open_host, alice / "disk.qcow2", layers, (0, 0), [real])
    host.truth = flat(layers[-1], mine / "truth")
    made = Desk(host, mine, (0, 0))
    made.done("init", mine / "repo", "--no-encryption")
    made.done("ship", layers[-1], f"{mine}/repo::d")
    taken_over(layers[-1], mine / "points")
    (mine / "night.toml").write_text(
        f'time_zone = "UTC"\nstate = "{mine}/state"\n[keep]\ndaily = 3\n'
        f'[[disks]]\npath = "{host.disk}"\nname = "e"\nimage_dirs = ["{real}"]\n'
        f'[[destinations]]\nname = "here"\nurl = "{mine}/repo"\n'
    )
    return made


def standing(place: Path) -> dict[str, tuple[object, ...]]:
    """All files of a directory as they are."""
    found: dict[str, tuple[object, ...]] = {}
    for path in (place, *sorted(place.rglob("*"))):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path)] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_mtime_ns,
            status.st_ctime_ns,
            content,
        )
    return found


def words_of(desk: Desk, line: str) -> list[str]:
    places = {"disk": desk.host.disk, "images": desk.host.disk.parent / "images", "mine": desk.mine}
    return shlex.split(line.format(real=desk.host.image_dirs[0], **places))


@pytest.mark.parametrize("line", CHANGES)
def test_nothing_is_changed_where_a_link_of_somebody_else_leads(line: str, shared: Desk) -> None:
    real = shared.host.layers[0].parent
    before = standing(real)
    ended = shared.run(*words_of(shared, line))
    assert ended.status not in (0, 1), ended.out
    assert f"user {ALICE}" in ended.err + ended.out or "another user could have made a symbolic link" in ended.err
    assert standing(real) == before


@pytest.mark.parametrize("line", READS)
def test_what_they_can_read_is_read(line: str, shared: Desk) -> None:
    real = shared.host.layers[0].parent
    before = standing(real)
    shared.done(*words_of(shared, line))
    assert standing(real) == before


def test_every_verb_is_among_them() -> None:
    known = {line.split()[0] for line in (*CHANGES, *READS)} | NO_IMAGE
    assert known == set(VERBS)


def test_a_disk_that_was_given_away_is_taken_back_by_its_own_name(open_host: Path) -> None:
    desk = make_desk(open_host)
    real, place = desk.host.layers[-1], f"dir:{desk.mine}/replica::d"
    desk.done("migrate", real, place, "--offline")
    before = standing(real.parent), standing(desk.mine / "replica")
    ended = desk.run("migrate", desk.host.disk, place, "--take-back", "--image-dir", real.parent)
    assert (ended.status, f"link of user {ALICE} leads to {real}" in ended.err) == (6, True), ended.err
    assert (standing(real.parent), standing(desk.mine / "replica")) == before, "nor is the destination asked"
    ended = desk.run("send", desk.host.disk, place, "--image-dir", real.parent)
    assert (ended.status, "was given to" in ended.err) == (4, True), "the mark counts by whatever name"
    desk.done("migrate", real, place, "--take-back")


# What tells it at the place itself, in whatever order a verb comes to it.

PLACES: dict[str, Callable[[Path], object]] = {
    "notes": lambda path: Notes().change(resolve(path), lambda note: note),
    "would-be notes": lambda path: Notes().changed(resolve(path), lambda note: note),
    "an epoch": lambda path: note_epoch(path, 7),
    "a hold": lambda path: hold.hold_image(path, "audit", dry_run=True),
    "a release": lambda path: hold.release_image(path, "audit"),
    "the doctor": lambda path: doctor.plan([path]),
}


@pytest.mark.parametrize("name", PLACES)
def test_each_place_is_judged_where_it_is_used(name: str, open_host: Path) -> None:
    target = file(directory(open_host / "real") / "disk.qcow2", mode=0o644)
    alices = link(directory(open_host / "alice", uid=ALICE) / "disk.qcow2", target, uid=ALICE)
    before = standing(target.parent)
    with pytest.raises(Unsupported, match=f"link of user {ALICE} leads to {target}, which root does not change"):
        PLACES[name](alices)
    assert standing(target.parent) == before


@pytest.mark.parametrize("mode", [0o711, 0o755])
def test_a_directory_is_listed_for_whoever_has_chosen_it_if_they_may_list_it(open_host: Path, mode: int) -> None:
    target = file(directory(open_host / "real") / "disk.qcow2", mode=0o644)
    hold.hold_image(target, "audit")
    target.parent.chmod(mode)
    alices = link(directory(open_host / "alice", uid=ALICE) / "disk.qcow2", target, uid=ALICE)
    place, notes = resolve(alices), Notes()
    assert place == Resolved(target, Rights.of_user(ALICE))
    holds = [each.tag for each in notes.of(place).holds]
    faults: list[SnapchainError] = notes.faults([place])
    if mode == 0o755:
        assert (holds, faults) == (["audit"], [])
    else:
        assert holds == []
        assert f"permission denied to user {ALICE}" in str(faults[0])
    assert [each.tag for each in Notes().of(target).holds] == ["audit"], "root's own choice is root's to read"


def test_a_directory_that_cannot_be_listed_ends_in_an_error_of_ours(open_host: Path) -> None:
    target = file(directory(open_host / "real", mode=0o711) / "disk.qcow2", mode=0o644)
    alices = directory(open_host / "alice", uid=ALICE)
    link(alices / "images", target.parent, uid=ALICE)
    with pytest.raises(InvalidInput, match=f"permission denied to user {ALICE}"):
        Notes().change(alices / "images" / "disk.qcow2", lambda note: note)
    assert os.listdir(target.parent) == ["disk.qcow2"]  # noqa: PTH208
