"""restore over every kind of target, from either kind of destination, with and without --force: the right outcome each.

Whatever happens, nothing of anybody else changes, and no unfinished file is left.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from snapchain.destination.protocol import Destination
from snapchain.destinations import open_destination
from snapchain.errors import Busy, Conflict, InvalidInput, SnapchainError, Unsupported
from snapchain.host.files import standing_of
from snapchain.host.locks import ImageLock, LockMode
from snapchain.model.events import Event, Notice, Progress
from snapchain.objects.memory import MemoryStore
from snapchain.ops.hold import hold_image
from snapchain.ops.restore.run import Restoration
from snapchain.ops.restore.target import Format, RestoreReport, Target
from snapchain.repository.destination import RepositoryDestination
from snapchain.source.notes import Given, Notes, Overlay
from tests.host import others as people
from tests.ops.shipping import DISK, MiB, delivery
from tests.ops.stacks import Layer, build, clean, flat, names, qemu_img, same, standing, write
from tests.repository.synthetic import repository

SIZE = MiB
NOBODY = 65534
Outcome = tuple[type[SnapchainError], str] | None
"""An error and what it says; None where the restore is done."""
EXISTS: Outcome = (Conflict, "it exists already")
root_only = pytest.mark.root
"""Only root can give files away and attach devices."""


@dataclass
class Scene:
    """A directory of images, what is at work there, and OUT."""

    place: Path
    stack: ExitStack
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.place.mkdir()
        self.out = self.place / "out.qcow2"

    def image(self, name: str = "out.qcow2", backing: str | None = None) -> Path:
        path = self.place / name
        link = ["-b", backing, "-F", "qcow2"] if backing else []
        qemu_img("create", "-q", "-f", "qcow2", *link, path, str(SIZE))
        return path


# ---- kinds of targets


def new(_: Scene) -> None:
    """Nothing is there."""


def plain(scene: Scene) -> None:
    scene.image()


def held_by_qemu_nbd(scene: Scene) -> None:
    scene.stack.enter_context(exported(scene.image()))


def behind_a_link_and_held_by_qemu_nbd(scene: Scene) -> None:
    scene.stack.enter_context(exported(scene.image("there.qcow2")))
    scene.out.symlink_to("there.qcow2")


def locked_by_a_reader(scene: Scene) -> None:
    scene.stack.enter_context(ImageLock(scene.image(), LockMode.READ))


def written_without_a_lock(scene: Scene) -> None:
    scene.image()
    writer = subprocess.Popen(["sh", "-c", f"exec 3<>'{scene.out}'; echo; read x"], stdin=-1, stdout=-1)
    scene.stack.callback(ended, writer)
    assert writer.stdout is not None
    writer.stdout.readline()


def under_a_loop_device(scene: Scene) -> None:
    scene.image()
    scene.stack.enter_context(looped(scene.out))


def base_of_another(scene: Scene) -> None:
    scene.image()
    scene.image("other.qcow2", "out.qcow2")


def base_of_a_clone_elsewhere(scene: Scene) -> None:
    base = scene.image()
    (scene.place.parent / "clones").mkdir()
    qemu_img("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", scene.place.parent / "clones" / "c.qcow2")


def behind_a_link_and_base_of_another(scene: Scene) -> None:
    scene.image("base.qcow2")
    scene.image("other.qcow2", "base.qcow2")
    scene.out.symlink_to("base.qcow2")


def the_file_of_anothers_link(scene: Scene) -> None:
    scene.image()
    (scene.place / "their.qcow2").symlink_to("out.qcow2")


def link(scene: Scene) -> None:
    (scene.place.parent / "store").mkdir()
    image = scene.image("img")
    image.rename(scene.place.parent / "store" / "img")
    scene.out.symlink_to("../store/img")


def link_to_a_link(scene: Scene) -> None:
    link(scene)
    scene.out.rename(scene.place / "second")
    scene.out.symlink_to("second")


def dangling_link(scene: Scene) -> None:
    (scene.place.parent / "store").mkdir()
    scene.out.symlink_to("../store/img")


def link_to_itself(scene: Scene) -> None:
    scene.out.symlink_to("out.qcow2")


def planted_link(scene: Scene) -> None:
    """By another user, in a directory that everybody may write to."""
    link(scene)
    os.lchown(scene.out, NOBODY, NOBODY)
    scene.place.chmod(0o777)


def hard_linked(scene: Scene) -> None:
    os.link(scene.image(), scene.place / "second")


def directory(scene: Scene) -> None:
    scene.out.mkdir()


def link_to_a_directory(scene: Scene) -> None:
    (scene.place / "there").mkdir()
    scene.out.symlink_to("there")


def fifo(scene: Scene) -> None:
    os.mkfifo(scene.out)


def character_device(scene: Scene) -> None:
    scene.out.symlink_to("/dev/null")


def held(scene: Scene) -> None:
    hold_image(scene.image(), "audit", reason="until May")


def given_away(scene: Scene) -> None:
    overlay = Overlay(name="o", layer="l", virtual_size=SIZE, cluster_size=65536, extended_l2=False)
    mark = Given.model_validate(
        {"destination": "ssh://kvm2/r", "disk": "d", "epoch": 2, "token": "t", "time": "2026-11-01T00:00:00Z"}
        | {"overlay": overlay, "together": ["d"], "confirmed": True}
    )
    Notes().change(scene.image(), lambda note: note.model_copy(update={"given": mark}))


def of_another_owner(scene: Scene) -> None:
    os.chown(scene.image(), NOBODY, 4321)
    scene.out.chmod(0o640)
    os.setxattr(scene.out, "user.note", b"kept")


def layer_of_a_replica(scene: Scene) -> None:
    (scene.place.parent / "snapchain-replica.json").write_bytes(b"{}")
    (scene.place / "catalogue.json").write_bytes(b"{}")
    scene.image()


def device(scene: Scene, data: bytes = b"", at: int = 0) -> None:
    backing = scene.place.parent / "device"
    with backing.open("wb") as file:
        file.truncate(16 * MiB)
        os.pwrite(file.fileno(), data, at)
    scene.out = scene.stack.enter_context(looped(backing))


def empty_device(scene: Scene) -> None:
    device(scene)


def device_with_a_first_byte(scene: Scene) -> None:
    device(scene, b"\1")


def device_with_a_last_byte(scene: Scene) -> None:
    device(scene, b"\1", 16 * MiB - 1)


def device_with_data_in_the_middle(scene: Scene) -> None:
    device(scene, b"\1" * 65536, 5 * MiB)


def link_to_an_empty_device(scene: Scene) -> None:
    device(scene)
    # Not in /dev/shm, where pytest's directory may be: what lies below /dev is taken for the device's own name.
    scene.place = Path(scene.stack.enter_context(tempfile.TemporaryDirectory(dir="/var/tmp")), "d")
    scene.place.mkdir()
    there, scene.out = scene.out, scene.place / "disk"
    scene.out.symlink_to(there)


def link_that_others_may_change_to_an_empty_device(scene: Scene) -> None:
    link_to_an_empty_device(scene)
    scene.place.chmod(0o777)


def mounted_device(scene: Scene) -> None:
    device(scene)
    done = subprocess.run(["mkfs.ext4", "-q", scene.out], check=False, capture_output=True)
    (scene.place / "mnt").mkdir()
    if done.returncode or subprocess.run(["mount", scene.out, scene.place / "mnt"], check=False).returncode:
        pytest.skip("no filesystem can be made and mounted here")
    scene.stack.callback(lambda: subprocess.run(["umount", scene.place / "mnt"], check=True))


def device_held_by_qemu_nbd(scene: Scene) -> None:
    device(scene)
    scene.stack.enter_context(exported(scene.out, scene.place / "s", "raw"))


def device_under_a_loop_device(scene: Scene) -> None:
    device(scene)
    scene.stack.enter_context(looped(scene.out))


TARGETS: dict[Callable[[Scene], None], tuple[Outcome, Outcome]] = {
    # target: (without --force, with it)
    new: (None, None),
    plain: (EXISTS, None),
    held_by_qemu_nbd: (EXISTS, (Busy, r"qemu-nbd \(pid \d+\)")),
    behind_a_link_and_held_by_qemu_nbd: (EXISTS, (Busy, r"qemu-nbd \(pid \d+\)")),
    locked_by_a_reader: (EXISTS, (Busy, "has it open for reading")),
    written_without_a_lock: (EXISTS, (Busy, r"sh \(pid \d+\) has it open")),
    base_of_another: (EXISTS, (Conflict, r"other\.qcow2 depends on it")),
    base_of_a_clone_elsewhere: (EXISTS, (Conflict, r"clones/c\.qcow2 depends on it")),
    behind_a_link_and_base_of_another: (EXISTS, (Conflict, r"other\.qcow2 depends on it")),
    the_file_of_anothers_link: (EXISTS, (Conflict, r"their\.qcow2 is a symbolic link to it")),
    link: (EXISTS, None),
    link_to_a_link: (EXISTS, None),
    dangling_link: (EXISTS, None),
    link_to_itself: ((InvalidInput, "form a loop"),) * 2,
    hard_linked: (EXISTS, (Unsupported, "further hard links")),
    directory: ((InvalidInput, "this is a directory"),) * 2,
    link_to_a_directory: ((InvalidInput, "this is a directory"),) * 2,
    fifo: ((InvalidInput, "neither a regular file nor a block device"),) * 2,
    character_device: ((InvalidInput, "neither a regular file nor a block device"),) * 2,
    held: (EXISTS, (Conflict, "it is held and must stay as it is: audit")),
    given_away: (EXISTS, (Conflict, "this disk was given to ssh://kvm2/r::d, in epoch 2")),
    layer_of_a_replica: (EXISTS, (Unsupported, "a layer of a replica")),
}
ROOT_TARGETS: dict[Callable[[Scene], None], tuple[Outcome, Outcome]] = {
    under_a_loop_device: (EXISTS, (Busy, r"/dev/loop\d+ has it open")),
    of_another_owner: (EXISTS, None),
    planted_link: ((Unsupported, "another user made this symbolic link"),) * 2,
    empty_device: (None, None),
    device_with_a_first_byte: ((Conflict, "not empty: there is data at byte 0"), None),
    device_with_a_last_byte: ((Conflict, "not empty: there is data at byte 16777215"), None),
    device_with_data_in_the_middle: ((Conflict, "not empty: there is data at byte 5242880"), None),
    link_to_an_empty_device: ((Conflict, "a symbolic link leads to the device"), None),
    link_that_others_may_change_to_an_empty_device: ((Unsupported, "a symbolic link of everybody leads to /dev/loop"),)
    * 2,
    mounted_device: ((Busy, "the device is mounted at .*/mnt"),) * 2,
    device_held_by_qemu_nbd: ((Busy, r"qemu-nbd \(pid \d+\)"),) * 2,
    device_under_a_loop_device: ((Busy, r"/dev/loop\d+ has it open"),) * 2,
}


@contextmanager
def exported(image: Path, socket: Path | None = None, image_format: str = "qcow2") -> Iterator[None]:
    path = socket or image.with_name("s")
    options = ["-f", image_format, "-k", str(path), "--pid-file", str(path.with_name("pid"))]
    subprocess.run(["qemu-nbd", "-t", "--fork", *options, image], check=True)
    pid = int(path.with_name("pid").read_text())
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            gone = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            select.select([gone], [], [])
            os.close(gone)


@contextmanager
def looped(file: Path) -> Iterator[Path]:
    attached = subprocess.run(["losetup", "--find", "--show", file], capture_output=True, text=True, check=False)
    if attached.returncode:
        pytest.skip(f"no loop device: {attached.stderr.strip()}")
    try:
        yield Path(attached.stdout.strip())
    finally:
        subprocess.run(["losetup", "-d", attached.stdout.strip()], check=True)


def ended(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()


# ---- what is restored


@dataclass(frozen=True)
class Source:
    """A point, by either kind of destination, and what it shows."""

    destination: Destination
    shown: Path
    content_id: str


LAYERS = [Layer(SIZE, ["write -P 1 0 128k"]), Layer(SIZE, ["write -P 2 64k 4k"]), Layer(SIZE, ["write -P 3 900k 4k"])]


def delivered(kind: str, directory: Path, layers: Sequence[Layer]) -> Source:
    where: Destination = (
        RepositoryDestination(repository(MemoryStore(), block_size=64 * 1024))
        if kind == "repository"
        else open_destination(f"dir:{directory}/replica")
    )
    files = build(directory / "c", layers)
    for file in files:
        with delivery(where, file, DISK) as work:
            report = work.run()
    return Source(where, flat(files[-1], directory / "shown"), report.content_id)


@pytest.fixture(scope="module", params=["repository", "replica"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return delivered(request.param, tmp_path_factory.mktemp(request.param), LAYERS[:1])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """In memory, where every user can read it."""
    return delivered("repository", tmp_path_factory.mktemp("stored"), LAYERS[:1])


def others(scene: Scene) -> dict[str, object]:
    """Everything around OUT that is not OUT's own content."""
    found: dict[str, object] = {}
    for path in sorted(scene.place.parent.rglob("*")):
        name = str(path.relative_to(scene.place.parent))
        if path.is_symlink():
            found[name] = path.readlink()
        elif path.is_file():
            found[name] = (standing(path)[:6], path.read_bytes())
        else:
            found[name] = stat.S_IFMT(path.stat().st_mode)
    return found


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
@pytest.mark.parametrize(
    "target",
    [*TARGETS, *(pytest.param(each, marks=root_only) for each in ROOT_TARGETS)],
    ids=lambda each: each.__name__,
)
def test_every_target_has_its_outcome(
    source: Source, tmp_path: Path, target: Callable[[Scene], None], *, force: bool
) -> None:
    with ExitStack() as stack:
        scene = Scene(tmp_path / "d", stack)
        target(scene)
        expected = {**TARGETS, **ROOT_TARGETS}[target][force]
        before = others(scene)
        real = Path(os.path.realpath(scene.out))
        is_device = real.is_block_device()
        old = real.lstat() if real.is_file() else None
        attributes = {name: os.getxattr(real, name) for name in os.listxattr(real)} if old else {}

        def run() -> RestoreReport:
            kind: Format = "raw" if is_device else "qcow2"
            return Restoration(source.destination, DISK, scene.out, force=force, format=kind).run()

        if expected is not None:
            error, words = expected
            with pytest.raises(error, match=words) as raised:
                run()
            assert raised.value.subject in (str(scene.out), str(real))
            assert raised.value.hint
            assert others(scene) == before
            return
        report = run()
        assert report.content_id == source.content_id
        if is_device:
            data = source.shown.read_bytes()
            with real.open("rb") as device_file:
                assert device_file.read(len(data)) == data
            own = {"device"}
        else:
            assert same(scene.out, source.shown)
            assert clean(scene.out)
            own = {str(real.relative_to(tmp_path))}
        after = others(scene)
        assert {name: fact for name, fact in after.items() if name not in own} == {
            name: fact for name, fact in before.items() if name not in own
        }, "nothing else has changed, and links are still links"
        if old is not None:
            now = real.lstat()
            assert (now.st_uid, now.st_gid, now.st_mode) == (old.st_uid, old.st_gid, old.st_mode)
            assert {name: os.getxattr(real, name) for name in os.listxattr(real)} == attributes


def test_a_search_that_was_cut_off_is_told(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        scene = Scene(tmp_path / "d", stack)
        scene.image()
        assert Restoration(source.destination, DISK, scene.out, force=True).run().incomplete is None
        monkeypatch.setattr("snapchain.image.dependents.MOST_ENTRIES", 1)
        events: list[Event] = []
        report = Restoration(source.destination, DISK, scene.out, force=True).run(on_event=events.append)
    assert (report.incomplete or "").startswith("The search for other users of these files ended after ")
    assert report.incomplete in [event.message for event in events if isinstance(event, Notice)]


@pytest.mark.parametrize("kind", ["another file", "nothing", "a new name"])
def test_only_what_was_locked_is_replaced(source: Source, tmp_path: Path, kind: str) -> None:
    """While the restore is at work the name is given to a file of somebody who takes no locks."""
    with ExitStack() as stack:
        scene = Scene(tmp_path / "d", stack)
        if kind != "a new name":
            scene.image()

        def meanwhile(event: Event) -> None:
            if isinstance(event, Progress) and event.done:
                scene.out.unlink(missing_ok=True)
                if kind != "nothing":
                    scene.out.write_bytes(b"theirs")

        words = "exists already" if kind == "a new name" else "another file took its name meanwhile"
        with pytest.raises(Conflict, match=words) as raised:
            Restoration(source.destination, DISK, scene.out, force=True).run(on_event=meanwhile)
        assert raised.value.subject == str(scene.out)
        assert names(scene.place) == ([] if kind == "nothing" else ["out.qcow2"])
        assert kind == "nothing" or scene.out.read_bytes() == b"theirs"


def test_a_temporary_name_that_is_taken_is_left_alone(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that was guessed: neither what lies there nor what it leads to is written to."""
    monkeypatch.setattr(secrets, "token_hex", lambda count: "0" * (2 * count))
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    (tmp_path / "d").mkdir()
    planted = tmp_path / "d" / ".out.qcow2.snapchain-part-00000000"
    os.link(victim, planted)
    with pytest.raises(Conflict, match="exists already"):
        Restoration(source.destination, DISK, tmp_path / "d" / "out.qcow2").run()
    assert victim.read_bytes() == b"precious"
    assert planted.samefile(victim)


# ---- as somebody who is not root


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that any user can reach, as pytest's own cannot be."""
    directory = Path(tempfile.mkdtemp(dir="/var/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@contextmanager
def as_nobody() -> Iterator[None]:
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def in_a_directory_of_root(scene: Scene) -> None:
    scene.place.chmod(0o755)


def file_of_root(scene: Scene) -> None:
    scene.image().chmod(0o666)


def file_of_a_foreign_group(scene: Scene) -> None:
    os.chown(scene.image(), NOBODY, 4321)


def file_that_cannot_be_read(scene: Scene) -> None:
    scene.image().chmod(0o600)


FOREIGN: dict[Callable[[Scene], None], tuple[str, str]] = {
    in_a_directory_of_root: ("permission denied", "run as a user who may read and write it"),
    file_of_root: ("you cannot give the new file the owner 0 and the group 0", "run as root, or choose another name"),
    file_of_a_foreign_group: ("the owner 65534 and the group 4321", "run as root, or choose another name"),
    file_that_cannot_be_read: ("permission denied", "run as a user who may read and write it"),
}


@root_only
@pytest.mark.parametrize("target", FOREIGN, ids=lambda each: each.__name__)
def test_what_a_user_may_not_do_is_said_before_anything_is_read(
    stored: Source, shared: Path, target: Callable[[Scene], None]
) -> None:
    fact, hint = FOREIGN[target]
    with ExitStack() as stack:
        scene = Scene(shared / "d", stack)
        scene.place.chmod(0o777)
        target(scene)
        before = others(scene)
        done: list[Event] = []
        with as_nobody(), pytest.raises(InvalidInput, match=fact) as raised:
            Restoration(stored.destination, DISK, scene.out, force=True).run(on_event=done.append)
        assert (raised.value.subject, raised.value.hint) == (str(scene.out), hint)
        assert others(scene) == before
        assert sum(event.done for event in done if isinstance(event, Progress)) == 0


@root_only
def test_an_owner_that_a_user_cannot_give_is_refused_before_anything_is_read(stored: Source, shared: Path) -> None:
    with ExitStack() as stack:
        scene = Scene(shared / "d", stack)
        scene.place.chmod(0o777)
        before = others(scene)
        done: list[Event] = []
        standing = standing_of("root:games", None)
        with as_nobody(), pytest.raises(InvalidInput, match="you cannot give the new file to root:games") as raised:
            Restoration(stored.destination, DISK, scene.out, standing=standing).run(on_event=done.append)
        assert raised.value.subject == str(scene.out)
        assert others(scene) == before
        assert sum(event.done for event in done if isinstance(event, Progress)) == 0


@root_only
def test_a_user_replaces_what_is_his(stored: Source, shared: Path) -> None:
    with ExitStack() as stack:
        scene = Scene(shared / "d", stack)
        scene.place.chmod(0o777)
        os.chown(scene.image(), NOBODY, NOBODY)
        with as_nobody():
            Restoration(stored.destination, DISK, scene.out, force=True).run()
        assert same(scene.out, stored.shown)
        assert scene.out.stat().st_uid == NOBODY


# ---- a chain of files


@pytest.fixture(scope="module", params=["repository", "replica"])
def chain_source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return delivered(request.param, tmp_path_factory.mktemp(f"{request.param}-chain"), LAYERS)


def restored(source: Source, out: Path, *, force: bool = False) -> list[Path]:
    report = Restoration(source.destination, DISK, out, whole_chain=True, force=force).run()
    assert report.content_id == source.content_id
    return [Path(file) for file in report.files]


def test_a_chain_behind_a_link_opens_by_both_names(chain_source: Source, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "vm").mkdir()
    image = tmp_path / "d" / "img.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, str(SIZE))
    out = tmp_path / "vm" / "disk.qcow2"
    out.symlink_to("../d/img.qcow2")
    files = restored(chain_source, out, force=True)
    assert out.is_symlink()
    assert {file.parent for file in files} == {tmp_path / "d"}
    assert same(out, chain_source.shown)
    assert same(image, chain_source.shown)
    assert names(tmp_path / "vm") == ["disk.qcow2"]


def test_lower_files_of_others_are_nobodys_to_replace(chain_source: Source, tmp_path: Path) -> None:
    """Each of them is judged as OUT is: locked, standing under others, linked; and what has the same bytes stays."""
    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / "web.qcow2"
    lower, middle, _ = restored(chain_source, out)
    whole = lower.read_bytes()
    inodes = [file.stat().st_ino for file in (lower, middle)]
    other = tmp_path / "d" / "other.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", middle.name, "-F", "qcow2", other)
    restored(chain_source, out, force=True)
    assert [file.stat().st_ino for file in (lower, middle)] == inodes, "the same bytes are left, whoever stands on them"
    write(lower, "write -P 99 512k 64k")
    before = {path: path.read_bytes() for path in (tmp_path / "d").iterdir() if path.is_file()}
    with pytest.raises(Conflict, match=r"other\.qcow2 depends on it") as raised:
        restored(chain_source, out, force=True)
    assert raised.value.subject == str(middle)
    assert {path: path.read_bytes() for path in (tmp_path / "d").iterdir() if path.is_file()} == before
    other.unlink()
    with ImageLock(lower, LockMode.READ), pytest.raises(Busy, match="has it open for reading"):
        restored(chain_source, out, force=True)
    lower.chmod(0o640)
    restored(chain_source, out, force=True)
    assert lower.read_bytes() == whole
    assert stat.S_IMODE(lower.stat().st_mode) == 0o640
    os.link(lower, tmp_path / "d" / "second")
    write(lower, "write -P 99 512k 64k")
    with pytest.raises(Unsupported, match="further hard links"):
        restored(chain_source, out, force=True)


@root_only
def test_a_lower_file_that_somebody_else_may_have_planted_is_not_taken_up(chain_source: Source, tmp_path: Path) -> None:
    """The same bytes, and its owner could change them later."""
    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / "web.qcow2"
    lower = restored(chain_source, out)[0]
    out.unlink()
    os.chown(lower, NOBODY, NOBODY)
    restored(chain_source, out)
    out.unlink()
    (tmp_path / "d").chmod(0o777)
    with pytest.raises(Conflict, match="it exists already") as raised:
        restored(chain_source, out)
    assert raised.value.subject == str(lower)
    assert not out.exists()


@root_only
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("there", ["a file", "nothing", "a directory"])
def test_root_restores_nowhere_that_a_link_of_another_user_leads(open_host: Path, there: str, *, force: bool) -> None:
    """Where they may not write themselves; in a directory of their own a link is theirs to make."""
    alice = people.directory(open_host / "alice", uid=people.ALICE)
    roots = people.directory(open_host / "roots")
    if there == "a file":
        people.file(roots / "disk.raw", "of root")
    out = people.link(alice / "disk.raw", roots / "disk.raw", uid=people.ALICE)
    if there == "a directory":
        people.link(alice / "in", roots, uid=people.ALICE)
        out = alice / "in" / "disk.raw"
    before = sorted(roots.iterdir())
    with pytest.raises(Unsupported, match=f"a symbolic link of user {people.ALICE} leads to") as raised:
        Target(out, format="raw", whole_chain=False, force=force)
    assert (raised.value.subject, sorted(roots.iterdir())) == (str(out), before)
    assert "name the file itself" in str(raised.value.hint)
    own = people.link(alice / "own.raw", "there.raw", uid=people.ALICE)
    assert Target(own, format="raw", whole_chain=False, force=True).file == alice / "there.raw"
