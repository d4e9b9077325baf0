"""Every verb over image directories as the managers of VMs make them: the right bytes, and owners as they should be.

As root, and as the unprivileged user whose images they are.
"""

from __future__ import annotations

import codecs
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from tests.exhaustive import chosen
from tests.memory import scratch
from tests.ops import owners
from tests.ops.owners import KVM, OTHER, QEMU, USER, Host, Standing, add_accounts, make, own
from tests.ops.stacks import clean, same
from tests.swaps.campaign import preload

pytestmark = [pytest.mark.root, pytest.mark.sampled]
EACH = 7
"""One in so many pairs of a layout and a verb belongs to `make test`; no number of layouts or verbs is a multiple."""


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


@dataclass
class Desk:
    """Where a command is run from. mine: the caller's own directory, for repositories and replicas.

    accounts: of users and their only groups, by number, that there are besides those of this machine
    """

    host: Host
    mine: Path
    caller: tuple[int, int]
    accounts: dict[int, int] = field(default_factory=dict)

    def run(self, *words: str | Path) -> Ended:
        """The command in a child with the caller's identity."""
        out, err = self.mine / "out", self.mine / "err"
        pid = os.fork()
        if pid == 0:
            status = 125
            try:
                status = self._run([str(word) for word in words], out, err)
            except BaseException:  # noqa: BLE001 - told by the status
                traceback.print_exc()
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        ended = Ended(status, out.read_text(), err.read_text())
        assert "Traceback" not in ended.err, ended.err
        assert "bug in snapchain" not in ended.out + ended.err, ended.err
        return ended

    def done(self, *words: str | Path) -> str:
        ended = self.run(*words)
        assert ended.status == 0, ended.err
        return ended.out

    def _run(self, words: list[str], out: Path, err: Path) -> int:
        import sys

        from snapchain.cli import main

        os.environ |= {"HOME": str(self.mine), "TMPDIR": str(self.mine), "SNAPCHAIN_PASSWORD": "secret"}
        os.environ |= {"XDG_STATE_HOME": str(self.mine / "state"), "XDG_CACHE_HOME": str(self.mine / "cache")}
        os.umask(0o022)
        if self.accounts:
            add_accounts(self.accounts, self.mine)
        uid, gid = self.caller
        if uid:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        for number, path in ((1, out), (2, err)):
            opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(opened, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(self.mine)
        status = main(words)
        sys.stdout.flush()
        sys.stderr.flush()
        return status


@pytest.fixture(scope="module", autouse=True)
def _preloaded() -> None:
    """Another user need not be able to read where Python lies."""
    preload()
    codecs.lookup("ascii")


@pytest.fixture
def place() -> Iterator[Path]:
    """Reachable for everybody, as what pytest makes is not, and in memory."""
    found = Path(tempfile.mkdtemp(prefix="layouts-", dir=scratch() or "/var/tmp"))
    found.chmod(0o755)
    try:
        yield found
    finally:
        shutil.rmtree(found)


def desk(layout: str, place: Path, *, as_owner: bool = False) -> Desk:
    tree, mine = place / "tree", place / "mine"
    tree.mkdir()
    mine.mkdir(0o700)
    scratch = place / "scratch"
    scratch.mkdir(0o700)
    host = make(layout, tree, scratch)
    caller = host.owner if as_owner else (0, 0)
    os.chown(mine, *caller)
    return Desk(host, mine, caller)


# Each verb: does its work, and returns the images that are new, with the file whose standing each should have.

Verb = Callable[[Desk], dict[Path, Path]]


def _snapshot(desk: Desk) -> dict[Path, Path]:
    desk.done("snapshot", desk.host.disk, *desk.host.options, "--label", "one")
    return {}


def _overlay(desk: Desk) -> dict[Path, Path]:
    desk.done("snapshot", desk.host.disk, *desk.host.options, "--overlay", "over.qcow2")
    over = desk.host.layers[-1].with_name("over.qcow2")
    assert same(over, desk.host.truth)
    return {over: desk.host.disk}


def _merge(*options: str) -> Verb:
    def merge(desk: Desk) -> dict[Path, Path]:
        removed = [word for path in desk.host.layers[:-1] for word in ("--remove", path)]
        words: list[str | Path] = ["merge", desk.host.disk, *desk.host.options, *options]
        if "--flatten" in options:
            words += removed
            if any(path.is_symlink() for path in desk.host.layers[-1].parent.iterdir() if path.name == "0"):
                ended = desk.run(*words)
                assert (ended.status, "0 is a symbolic link to it" in ended.err) == (4, True), ended.err
                return {}
        desk.done(*words)
        return {}

    return merge


def _ship(desk: Desk) -> dict[Path, Path]:
    desk.done("init", desk.mine / "repo", "--no-encryption")
    desk.done("ship", desk.host.disk, *desk.host.options, f"{desk.mine}/repo::d")
    desk.done("verify", f"{desk.mine}/repo", "--read-data")
    desk.done("restore", f"{desk.mine}/repo::d", desk.mine / "back.qcow2")
    assert same(desk.mine / "back.qcow2", desk.host.truth)
    return {}


def _send(desk: Desk) -> dict[Path, Path]:
    desk.done("send", desk.host.disk, *desk.host.options, f"dir:{desk.mine}/replica::d", "--each-layer")
    desk.done("verify", f"dir:{desk.mine}/replica", "--read-data")
    desk.done("restore", f"dir:{desk.mine}/replica::d", desk.mine / "back.qcow2")
    assert same(desk.mine / "back.qcow2", desk.host.truth)
    return {}


def _restore(desk: Desk) -> dict[Path, Path]:
    _ship(desk)
    new = desk.host.layers[-1].with_name("new.qcow2")
    desk.done("restore", f"{desk.mine}/repo::d", new)
    assert same(new, desk.host.truth)
    assert Standing.of(new).mode & 0o7133 == 0
    new.unlink()
    return {}


def _restore_over(desk: Desk) -> dict[Path, Path]:
    _ship(desk)
    desk.done("restore", f"{desk.mine}/repo::d", desk.host.disk, "--force", "--format", "qcow2")
    return {}


def _migrate(desk: Desk) -> dict[Path, Path]:
    before = Standing.of(desk.host.disk)
    desk.done("migrate", desk.host.disk, f"dir:{desk.mine}/replica::d", *desk.host.options, "--offline")
    assert not Standing.of(desk.host.disk).mode & 0o222
    assert any(same(path, desk.host.truth) for path in (desk.mine / "replica").rglob("*.qcow2"))
    desk.done("migrate", desk.host.disk, f"dir:{desk.mine}/replica::d", *desk.host.options, "--take-back")
    assert Standing.of(desk.host.disk) == before
    return {}


def _sync(desk: Desk) -> dict[Path, Path]:
    ended = desk.run("sync", desk.host.disk, f"dir:{desk.mine}/replica::d", *desk.host.options, "--rounds", "1")
    assert ended.status in (0, 4), ended.err
    return {}


def _look(desk: Desk) -> dict[Path, Path]:
    desk.done("inspect", desk.host.disk, *desk.host.options)
    desk.done("diff", desk.host.layers[-2], desk.host.disk, *desk.host.options)
    desk.done("doctor", desk.host.disk.parent)
    return {}


def _hold(desk: Desk) -> dict[Path, Path]:
    layer = desk.host.layers[-2]
    desk.done("hold", layer, "--tag", "audit")
    assert "audit" in desk.done("inspect", desk.host.disk, *desk.host.options, "--json")
    assert desk.run("merge", desk.host.disk, *desk.host.options).status != 0
    desk.done("release", layer, "--tag", "audit")
    return {}


def _nightly(desk: Desk) -> dict[Path, Path]:
    desk.done("init", desk.mine / "repo", "--no-encryption")
    directories = ", ".join(f'"{each}"' for each in desk.host.image_dirs)
    (desk.mine / "night.toml").write_text(
        f'time_zone = "UTC"\nstate = "{desk.mine}/state"\n[keep]\ndaily = 3\n'
        f'[[disks]]\npath = "{desk.host.disk}"\nname = "d"\nformat = "qcow2"\nimage_dirs = [{directories}]\n'
        f'[[destinations]]\nname = "here"\nurl = "{desk.mine}/repo"\n'
    )
    os.chown(desk.mine / "night.toml", *desk.caller)
    desk.done("nightly", desk.mine / "night.toml")
    desk.done("restore", f"{desk.mine}/repo::d", desk.mine / "back.qcow2")
    assert same(desk.mine / "back.qcow2", desk.host.truth)
    return {}


VERBS: dict[str, Verb] = {
    "snapshot": _snapshot, "snapshot-overlay": _overlay, "merge-new-file": _merge("--strategy", "new-file"),
    "merge-absorb": _merge("--strategy", "absorb"), "merge-commit": _merge("--strategy", "commit"),
    "merge-flatten": _merge("--flatten", "--strategy", "new-file"), "ship": _ship, "send": _send, "restore": _restore,
    "restore-over": _restore_over, "migrate": _migrate, "sync": _sync, "look": _look, "hold": _hold,
    "nightly": _nightly,
}  # fmt: skip


def _images(tree: Path) -> Sequence[Path]:
    return [
        path for path in sorted(tree.rglob("*"))
        if path.is_file() and not path.is_symlink() and not path.name.startswith(".")
    ]  # fmt: skip


def _check(desk: Desk, before: dict[Path, Standing], new: dict[Path, Path]) -> None:
    host = desk.host
    assert same(host.disk, host.truth)
    assert all(clean(path) for path in host.layers if path.exists())
    after = {path: Standing.of(path) for path in _images(host.tree)}
    for path, standing in after.items():
        if path in before:
            assert standing == before[path], path.name
        elif path in new:
            assert standing == before[new[path].resolve()], path.name
        else:  # sealed: the old file under a new name, and so with its old standing
            assert standing in before.values(), path.name
    for path in host.tree.rglob("*"):  # notes and journals, too
        status = path.lstat()
        if not path.is_symlink() and path.is_file() and path.name.startswith("."):
            assert not status.st_mode & 0o7133, (path.name, oct(status.st_mode))
            assert status.st_uid in (0, desk.caller[0], host.tree.joinpath(path).parent.stat().st_uid), path.name


def _cases(layouts: Sequence[str]) -> Iterator[object]:
    for number, (layout, verb) in enumerate(product(layouts, VERBS)):
        marks = [] if chosen(number, each=EACH) else [pytest.mark.soak]
        yield pytest.param(layout, verb, id=f"{layout}-{verb}", marks=marks)


@pytest.mark.parametrize(("layout", "verb"), list(_cases(list(owners.LAYOUTS))))
def test_as_root(layout: str, verb: str, place: Path) -> None:
    at = desk(layout, place)
    before = {path: Standing.of(path) for path in _images(at.host.tree)}
    new = VERBS[verb](at)
    _check(at, before, new)


@pytest.mark.parametrize(("layout", "verb"), list(_cases(["home", "tmp", "opennebula"])))
def test_as_the_owner_of_the_images(layout: str, verb: str, place: Path) -> None:
    at = desk(layout, place, as_owner=True)
    before = {path: Standing.of(path) for path in _images(at.host.tree)}
    new = VERBS[verb](at)
    _check(at, before, new)


@pytest.mark.parametrize("then", ["doctor", "snapshot"])
def test_after_a_snapshot_that_was_killed_with_two_names_given(then: str, place: Path) -> None:
    """The disk is one that only root and QEMU may read, in a directory of nova's."""
    at = desk("nova-private", place)
    disk = at.host.disk
    standing = Standing.of(disk)
    os.link(disk, disk.with_name("disk.2"))
    if then == "doctor":
        assert "removed" in at.done("doctor", disk.parent)
        assert not disk.with_name("disk.2").exists()
    at.done("snapshot", disk, *at.host.options)
    assert same(disk, at.host.truth)
    assert Standing.of(disk) == Standing.of(disk.with_name("disk.2")) == standing
    assert sorted(path.name for path in _images(disk.parent)) == ["disk", "disk.1", "disk.2"]


# What is refused, and with which remedy.

READERS = ("inspect {disk}", "ship {disk} {mine}/repo::d", "send {disk} dir:{mine}/replica::d", "merge {disk}")


def _refused(at: Desk, words: str, image_dirs: Sequence[Path] = ()) -> str:
    """What a command says that is refused."""
    options = [word for each in image_dirs for word in ("--image-dir", str(each))]
    ended = at.run(*words.format(disk=at.host.disk, mine=at.mine).split(), *options)
    assert ended.status == 6, ended.err
    assert "snapchain: hint: " in ended.err
    return ended.err


@pytest.mark.parametrize("words", [*READERS, "snapshot {disk}"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_base_that_the_owner_of_the_image_cannot_read(words: str, place: Path, *, beside: bool) -> None:
    """Also where root has put it into their own directory: a merge would give them what it holds."""
    at = desk("home", place)
    base = at.host.disk.parent if beside else place / "tree" / "roots"
    base.mkdir(exist_ok=True)
    secret, overlay = base / "secret.qcow2", at.host.disk.with_name("over.qcow2")
    owners.chain(secret, overlay, links=[str(secret)])
    own(secret, 0, 0, 0o600)
    own(overlay, USER, USER, 0o600)
    at.host.disk = overlay
    at.done("init", at.mine / "repo", "--no-encryption")
    before = [Standing.of(path) for path in (secret, overlay)]
    said = _refused(at, words, [base])
    assert f"which user {USER}, to whom that belongs, cannot read" in said
    assert str(secret) in said
    assert [Standing.of(path) for path in (secret, overlay)] == before
    secret.chmod(0o644)
    at.done(*words.format(disk=overlay, mine=at.mine).split(), "--image-dir", base)


@pytest.mark.parametrize("words", [*READERS, "snapshot {disk}", "restore {mine}/repo::d {disk} --force"])
def test_two_users_on_one_path(words: str, place: Path) -> None:
    at = desk("home", place)
    at.done("init", at.mine / "repo", "--no-encryption")
    at.done("ship", at.host.disk, f"{at.mine}/repo::d")
    directory = at.host.disk.parent
    os.chown(directory, OTHER, OTHER)
    said = _refused(at, words)
    assert f"user {USER} and user {OTHER} may both change what this path leads to" in said
    os.chown(directory, USER, USER)
    assert same(at.host.disk, at.host.truth)


@pytest.mark.parametrize("words", [*READERS, "snapshot {disk}"])
@pytest.mark.parametrize("mode", [0o660, 0o666])
def test_a_base_that_those_cannot_read_who_may_write_to_an_image_of_root(words: str, mode: int, place: Path) -> None:
    """A guest that has broken out of a QEMU of this group can write another guest's disk into its header."""
    at = desk("proxmox", place)
    base, others = at.host.layers[-2], [*at.host.layers[:-2], at.host.disk]
    for path in others:
        own(path, 0, KVM, mode)
    own(base, 0, 0, 0o600)
    at.done("init", at.mine / "repo", "--no-encryption")
    said = _refused(at, words)
    assert f"which {f'group {KVM}' if mode == 0o660 else 'everybody'}, who may write to that, cannot read" in said
    assert str(base) in said
    own(base, 0, KVM, mode & 0o664)
    at.done(*words.format(disk=at.host.disk, mine=at.mine).split())
    assert same(at.host.disk, at.host.truth)


@pytest.mark.parametrize("has_account", [False, True])
def test_a_base_that_only_a_group_may_read(place: Path, *, has_account: bool) -> None:
    """The groups of an account count; a user without one has none."""
    at = desk("nova", place)
    base = at.host.layers[0]
    own(base.parent, 0, 0, 0o755)
    own(base.parent.parent, 0, 0, 0o755)
    own(base, OTHER, KVM, 0o640)
    if has_account:
        at.accounts = {QEMU: KVM}
        at.done("inspect", at.host.disk, *at.host.options)
        at.done("snapshot", at.host.disk, *at.host.options)
        assert same(at.host.disk, at.host.truth)
    else:
        assert f"which user {QEMU}, to whom that belongs, cannot read" in _refused(
            at, "inspect {disk} --format qcow2", at.host.image_dirs
        )
