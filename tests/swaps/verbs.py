"""The verbs that root runs over a directory of another user: what they find, and what must come of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.ops.stacks import qemu_img
from tests.swaps.supervisor import Call, Ended
from tests.swaps.world import Access, World, make_chain, truth

Check = Callable[["Scene"], Iterator[str]]
RENAMES = ("rename", "renameat", "renameat2")
UNLINKS = ("unlink", "unlinkat")


@dataclass
class Scene:
    """A verb in its world. truth: what the user's disk reads; run: snapchain, without any swap."""

    world: World
    run: Callable[..., Ended]
    truth: Path = field(init=False)

    @property
    def disk(self) -> Path:
        return self.world.disk

    def done(self, *words: str | Path, **options: str | Path) -> None:
        """Part of what a verb finds: must succeed."""
        ended = self.run([str(word) for word in words], **options)
        assert ended.status == 0, (words, (self.world.logs / "stderr").read_text())


@dataclass(frozen=True)
class Verb:
    """words: the command line, with {u}, {images}, {disk} and {root}.

    prepare: makes what is found, once; first: command lines before each run, where a record is bound to its file
    killed: a command line that dies before each run, at its n-th call of these names in the user's tree
    stdin: a file in WORLD/root; check: what is wrong after exit 0, besides the user's disk
    ends: exits without a swap; function: is run instead of the command line
    """

    name: str
    words: str
    prepare: Callable[[Scene], None] | None = None
    check: Check | None = None
    killed: tuple[str, tuple[str, ...], int] | None = None
    first: Sequence[str] = ()
    stdin: str | None = None
    layers: int = 4
    ends: Sequence[int] = (0,)
    function: Callable[[World], object] | None = None
    access: Access = Access.OWN

    def make(self, scene: Scene) -> None:
        make_chain(scene.world, self.layers)
        scene.truth = truth(scene.world, scene.disk)
        scene.world.give()
        if self.prepare is not None:
            self.prepare(scene)

    def line(self, world: World, words: str | None = None) -> list[str]:
        places = {"u": world.user, "images": world.images, "disk": world.disk, "root": world.root}
        return [word.format(**places) for word in (words or self.words).split()]

    def dies_at(self, world: World) -> Callable[[Call], bool]:
        """Whether the command line of `killed` dies at this call."""
        assert self.killed is not None
        _, names, nth = self.killed
        left = [nth]

        def is_there(call: Call) -> bool:
            if call.name in names and any(str(path).startswith(f"{world.user}/") for path in call.paths):
                left[0] -= 1
            return left[0] == 0

        return is_there


def _repository(scene: Scene) -> None:
    scene.done("init", scene.world.root / "repo", "--no-encryption")


def _shipped(scene: Scene) -> None:
    _repository(scene)
    scene.done("ship", scene.disk, f"{scene.world.root}/repo::d")


def _users_repository(scene: Scene) -> None:
    scene.done("init", scene.world.user / "repo", "--no-encryption")
    scene.world.give()
    scene.done("ship", scene.disk, f"{scene.world.user}/repo::d")
    scene.world.give()


def _replica(scene: Scene) -> None:
    scene.done("send", scene.disk, f"dir:{scene.world.root}/replica::d", "--each-layer")


def _users_replica(scene: Scene) -> None:
    scene.done("send", scene.disk, f"dir:{scene.world.user}/replica::d", "--each-layer")
    scene.world.give()


def _users_directory(scene: Scene) -> None:
    (scene.world.user / "replica").mkdir()
    scene.world.give()


def _stream(scene: Scene) -> None:
    scene.done("send", scene.disk, "--disk", "d", stdout=scene.world.root / "stream")
    (scene.world.user / "replica").mkdir()
    scene.world.give()


def _raw(scene: Scene) -> None:
    raw = scene.world.images / "flat.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", scene.disk, raw)
    scene.world.give()


def _nightly(scene: Scene) -> None:
    _repository(scene)
    (scene.world.root / "night.toml").write_text(
        f"""time_zone = "UTC"
state = "{scene.world.root}/state"
[keep]
daily = 3
[[disks]]
glob = "{scene.world.user}/*/*.qcow2"
merge_above = 4
[[destinations]]
name = "here"
url = "{scene.world.root}/repo"
"""
    )


def _elsewhere(scene: Scene) -> None:
    """One layer of the chain lies in another directory of the user's."""
    other = scene.world.user / "other"
    other.mkdir()
    layer = scene.world.images / "1.qcow2"
    layer.rename(other / "1.qcow2")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", f"{scene.world.images}/root.qcow2", "-F", "qcow2", other / "1.qcow2")
    above = scene.world.images / "2.qcow2"
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", str(other / "1.qcow2"), "-F", "qcow2", above)
    scene.world.give()


def _planted(scene: Scene) -> None:
    """Records and temporary files as a user may write them."""
    images = scene.world.images
    record = {"version": 2, "remove": [{"path": str(scene.world.out / "etc" / "hosts"), "device": 1, "inode": 2}]}
    for name in (".snapchain-merge-disk.qcow2.json", ".disk.qcow2.snapshot-0123abcd", ".new.qcow2.snapchain-part"):
        (images / name).write_text(json.dumps(record))
    (images / ".disk.qcow2.merge-0123abcd").write_bytes(scene.disk.read_bytes())
    (images / ".disk.qcow2.snapchain-part-0123abcd").write_bytes(b"x")
    scene.world.give()


def _fake_ssh(scene: Scene) -> None:
    """An ssh that runs the command here."""
    _users_directory(scene)
    script = scene.world.root / "ssh"
    script.write_text(
        f'#!/bin/sh\nexec "{sys.executable}" -m snapchain serve-replica --stdio --root {scene.world.user}\n'
    )
    script.chmod(0o700)


def _restored(name: str, image_format: str = "qcow2") -> Check:
    def check(scene: Scene) -> Iterator[str]:
        if wrong := scene.world.problem(scene.world.images / name, scene.truth, image_format):
            yield wrong

    return check


def _in_repository(place: str) -> Check:
    """The newest point reads as the disk did."""

    def check(scene: Scene) -> Iterator[str]:
        target = scene.world.logs / "back.raw"
        target.unlink(missing_ok=True)
        ended = scene.run(["restore", f"{place.format(root=scene.world.root, u=scene.world.user)}::d", str(target)])
        if ended.status:
            yield f"what was shipped does not restore: exit {ended.status}"
        elif wrong := scene.world.problem(target, scene.truth, "raw"):
            yield wrong
        target.unlink(missing_ok=True)

    return check


def _replicas(*names: str) -> Check:
    def check(scene: Scene) -> Iterator[str]:
        found = [path for name in names for path in (scene.world.place / name).rglob("*.qcow2")]
        if not found:
            yield "nothing has arrived"
        if not any(scene.world.problem(path, scene.truth) is None for path in found):
            yield f"no file of {', '.join(path.name for path in found)} reads as the disk did"

    return check


_MIGRATE = "migrate {disk} dir:{root}/replica::d --offline"
_LABELLED = tuple(f"snapshot {{disk}} --label {label}" for label in ("one", "two", "three"))

VERBS: Sequence[Verb] = (
    Verb("snapshot", "snapshot {disk}", layers=2),
    Verb("snapshot-label", "snapshot {disk} --sealed-name disk.monday.qcow2 --label monday", layers=2),
    Verb("snapshot-overlay", "snapshot {disk} --overlay over.qcow2", layers=2, check=_restored("over.qcow2")),
    Verb(
        "snapshot-raw", "snapshot {images}/flat.raw --format raw --overlay {images}/over.qcow2", prepare=_raw, layers=2,
        check=_restored("over.qcow2"),
    ),
    Verb("merge-new-file", "merge {disk} --strategy new-file"),
    Verb("merge-absorb", "merge {disk} --strategy absorb"),
    Verb("merge-commit", "merge {disk} --strategy commit"),
    Verb("merge-range", "merge {disk} --from 1.qcow2 --to 2.qcow2 --strategy commit", layers=5),
    Verb("merge-range-absorb", "merge {disk} --from 1.qcow2 --to 2.qcow2 --strategy absorb", layers=5),
    Verb("merge-flatten", "merge {disk} --flatten"),
    Verb("merge-keep-inputs", "merge {disk} --keep-inputs"),
    Verb("merge-rules", "merge {disk} --keep-label two", first=_LABELLED, layers=2),
    Verb("merge-remove",
         "merge {disk} --strategy new-file --image-dir {u}/other --remove {u}/other/1.qcow2",
         prepare=_elsewhere),
    Verb("merge-remove-absorb",
         "merge {disk} --strategy absorb --image-dir {u}/other --remove {u}/other/1.qcow2",
         prepare=_elsewhere),
    Verb("merge-replica", "merge dir:{u}/replica::d --keep-last 1", prepare=_users_replica),
    Verb("nightly", "nightly {root}/night.toml", prepare=_nightly, layers=5),
    Verb("doctor-planted", "doctor {images}", prepare=_planted, ends=(0, 10)),
    Verb("doctor-new-file", "doctor {images}", killed=("merge {disk} --strategy new-file", RENAMES, 2)),
    Verb("doctor-unlinking", "doctor {images}", killed=("merge {disk} --strategy new-file", UNLINKS, 1)),
    Verb("doctor-absorb", "doctor {images}", killed=("merge {disk} --strategy absorb", RENAMES, 2)),
    Verb("doctor-commit", "doctor {images}", killed=("merge {disk} --strategy commit", RENAMES, 2)),
    Verb("merge-again", "merge {disk} --strategy new-file", killed=("merge {disk} --strategy new-file", UNLINKS, 1)),
    Verb("doctor-snapshot", "doctor {disk}", killed=("snapshot {disk}", RENAMES, 2), layers=2),
    Verb("snapshot-again", "snapshot {disk}", killed=("snapshot {disk}", RENAMES, 2), layers=2),
    Verb("ship", "ship {disk} {root}/repo::d", prepare=_repository, check=_in_repository("{root}/repo")),
    Verb("ship-each-layer", "ship {disk} {root}/repo::d --each-layer", prepare=_repository,
         check=_in_repository("{root}/repo")),
    Verb("ship-users-repository", "ship {disk} {u}/repo::d", prepare=_users_repository,
         check=_in_repository("{u}/repo")),
    Verb("ship-replica", "ship {disk} dir:{root}/replica::d", check=_replicas("root/replica")),
    Verb("send", "send {disk} dir:{root}/replica::d --each-layer", check=_replicas("root/replica")),
    Verb("send-users-replica", "send {disk} dir:{u}/replica::d", prepare=_users_directory,
         check=_replicas("u/replica")),
    Verb("send-new-directory", "send {disk} dir:{u}/new::d", check=_replicas("u/new")),
    Verb("send-on", "send {disk} dir:{u}/replica::d", prepare=_users_replica, check=_replicas("u/replica")),
    Verb("send-stream", "send {disk} --disk d"),
    Verb("sync", "sync {disk} dir:{root}/replica::d"),
    Verb("sync-rounds", "sync {disk} dir:{u}/replica::d --rounds 1", prepare=_users_directory),
    Verb("migrate", "migrate {disk} dir:{root}/replica::d --offline", check=_replicas("root/replica")),
    Verb("migrate-users-replica", "migrate {disk} dir:{u}/replica::d --offline", prepare=_users_directory,
         check=_replicas("u/replica")),
    Verb("migrate-sealed", _MIGRATE, first=("snapshot {disk}",), check=_replicas("root/replica")),
    Verb("take-back", "migrate {disk} dir:{root}/replica::d --take-back", first=(_MIGRATE,)),
    Verb("take-back-alone", "migrate {disk} dir:{root}/replica::d --take-back --destination-is-gone",
         first=(_MIGRATE,)),
    Verb("restore", "restore {root}/repo::d {images}/new.qcow2", prepare=_shipped, check=_restored("new.qcow2")),
    Verb("restore-raw", "restore {root}/repo::d {images}/new.raw", prepare=_shipped, check=_restored("new.raw", "raw")),
    Verb("restore-force", "restore {root}/repo::d {disk} --force", prepare=_shipped),
    Verb("restore-chain", "restore {root}/repo::d {images}/new.qcow2 --chain", prepare=_shipped,
         check=_restored("new.qcow2")),
    Verb("restore-replica", "restore dir:{u}/replica::d {root}/new.qcow2", prepare=_users_replica,
         check=lambda scene: _found(scene.world.problem(scene.world.root / "new.qcow2", scene.truth))),
    Verb("restore-users-repository", "restore {u}/repo::d {images}/new.qcow2", prepare=_users_repository,
         check=_restored("new.qcow2")),
    Verb("verify-replica", "verify dir:{u}/replica --read-data", prepare=_users_replica),
    Verb("verify-users-repository", "verify {u}/repo --read-data", prepare=_users_repository),
    Verb("diff", "diff {images}/1.qcow2 {disk}"),
    Verb("diff-point", "diff {root}/repo::d {disk}", prepare=_shipped),
    Verb("log", "log dir:{u}/replica", prepare=_users_replica),
    Verb("inspect", "inspect {disk}"),
    Verb("inspect-replica", "inspect dir:{u}/replica::d", prepare=_users_replica),
    Verb("hold", "hold {images}/1.qcow2 --tag audit"),
    Verb("release", "release {images}/1.qcow2 --tag audit", first=("hold {images}/1.qcow2 --tag audit",)),
    Verb("receive", "receive {u}/replica", prepare=_stream, stdin="stream", check=_replicas("u/replica")),
    Verb("receive-new", "receive {u}/new", prepare=_stream, stdin="stream", check=_replicas("u/new")),
    Verb("serve-replica", "send {disk} ssh://here{u}/replica::d", prepare=_fake_ssh, check=_replicas("u/replica")),
    Verb("init", "init {u}/repo --no-encryption"),
    Verb("gc", "gc {u}/repo", prepare=_users_repository),
    *(
        Verb(f"{name}-{access.name.lower()}", words, layers=3, prepare=prepare, check=check, access=access,
             killed=killed)
        for access in (Access.GROUP, Access.ALL, Access.STICKY)
        for name, words, prepare, check, killed in (
            ("snapshot", "snapshot {disk}", None, None, None),
            ("merge", "merge {disk} --strategy new-file", None, None, None),
            ("merge-commit", "merge {disk} --strategy commit", None, None, None),
            ("doctor", "doctor {images}", None, None, ("merge {disk} --strategy new-file", UNLINKS, 1)),
            ("ship", "ship {disk} {root}/repo::d", _repository, _in_repository("{root}/repo"), None),
            ("restore", "restore {root}/repo::d {images}/new.qcow2", _shipped, _restored("new.qcow2"), None),
        )
    ),
)  # fmt: skip


def _found(wrong: str | None) -> Iterator[str]:
    if wrong is not None:
        yield wrong


def environment(world: World) -> dict[str, str]:
    """What a command is run with."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    home = world.root / "home"
    return kept | {
        "HOME": str(home), "TMPDIR": str(world.root / "tmp"), "TZ": "UTC", "SNAPCHAIN_SSH": str(world.root / "ssh"),
        "OPENBLAS_NUM_THREADS": "1", "SNAPCHAIN_PASSWORD": "secret",
    }  # fmt: skip
