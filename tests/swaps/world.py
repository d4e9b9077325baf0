"""A directory of another user, root's own things, and what lies outside of both: made, put back, and judged.

WORLD/u/       everything in it is the user's: images and whatever else a verb finds there
WORLD/root/    0700: repositories, replicas, configurations, home and state of root
WORLD/out/     root's: secrets, images of others, a device, a file that all may write; nothing here may change
WORLD/aside/   the user's: where a file goes that was swapped
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import secrets
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.ops.stacks import qemu_img, write

USER, GROUP = 61234, 61235
"""The attacker, who needs no account, and a group of theirs."""
_libc = ctypes.CDLL(None, use_errno=True)
_OPEN, _ACCESS, _MODIFY = 0x20, 0x1, 0x2
_EVENT = struct.Struct("=iIII")


@dataclass(frozen=True, slots=True)
class Fact:
    """What was found. harm: what the user could not have done alone; without it, what deserves a look."""

    harm: bool
    what: str


@contextmanager
def place_of_its_own() -> Iterator[Path]:
    """A directory in memory that everybody can reach.

    Below /run, where no other test keeps images: a search for users of theirs would open files here, and be seen.
    """
    place = Path(tempfile.mkdtemp(prefix="swaps-", dir="/run"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "swaps", place], check=False, capture_output=True).returncode == 0
    try:
        yield place
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)
        shutil.rmtree(place)


class Access(Enum):
    """How the user may write to the directory of the images: their own, their group's, everybody's."""

    OWN = (USER, USER, 0o755)
    GROUP = (0, GROUP, 0o2775)
    ALL = (0, 0, 0o777)
    STICKY = (0, 0, 0o1777)


@contextmanager
def as_user() -> Iterator[None]:
    """This process acts with the rights of the user."""
    groups = os.getgroups()
    os.setgroups([GROUP])
    os.setegid(USER)
    os.seteuid(USER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


class World:
    def __init__(self, place: Path, access: Access = Access.OWN) -> None:
        self.place = place
        self._access = access
        self.user = place / "u"
        self.images = self.user / "images"
        self.root = place / "root"
        self.out = place / "out"
        self.aside = place / "aside"
        self.logs = place / "logs"
        self._kept = place / "kept"
        self._device: str | None = None
        self.token = secrets.token_bytes(32)
        place.chmod(0o755)
        for directory, mode in (
            (self.user, 0o755), (self.images, 0o755), (self.root, 0o700), (self.out, 0o755), (self._kept, 0o700),
            (self.logs, 0o700), (self.root / "home", 0o700), (self.root / "tmp", 0o700),
        ):  # fmt: skip
            directory.mkdir(mode)
        self.disk = self.images / "disk.qcow2"

    # What lies outside.

    def make_outside(self, images: list[str]) -> None:
        """images: names that the user's directory has; others' images of the same names lie outside."""
        secret = self.token * 2048
        for name, mode in (("etc", 0o755), ("images", 0o711), ("private", 0o700), ("dev", 0o755), ("public", 0o755)):
            (self.out / name).mkdir(mode)
        for path, mode in (
            ("etc/shadow", 0o600),
            ("etc/hosts", 0o644),
            ("etc/shared.log", 0o666),
            ("private/key", 0o600),
        ):
            (self.out / path).write_bytes(secret)
            (self.out / path).chmod(mode)
        raw = self.logs / "raw"
        raw.write_bytes(secret * 16)
        model = self.logs / "model.qcow2"
        qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, model)
        for name in {"disk.qcow2", "root.qcow2", *images}:
            target = self.out / "images" / name
            target.write_bytes(model.read_bytes() if name.endswith(".qcow2") else raw.read_bytes())
            target.chmod(0o600)
            os.setxattr(target, "user.mark", b"root's")
            public = self.out / "public" / name
            # Empty overlays, as of a disk of which nothing is left to be sealed.
            kind = ["qcow2", "-u", "-b", "root.qcow2", "-F", "qcow2"] if name.endswith(".qcow2") else ["raw"]
            qemu_img("create", "-q", "-f", *(kind[:1] if name == "root.qcow2" else kind), public, "1M")
            public.chmod(0o644)
        block = self.logs / "block"
        block.write_bytes(model.read_bytes())
        done = subprocess.run(["losetup", "-f", "--show", block], check=False, capture_output=True, text=True)
        node = self.out / "dev" / "disk"
        if done.returncode == 0:
            self._device = done.stdout.strip()
            os.mknod(node, stat.S_IFBLK | 0o600, Path(self._device).stat().st_rdev)
        else:  # the null device has the one thing that matters, being none of the user's
            os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        shutil.copytree(self.out / "etc", self._kept / "out-etc")
        self._was = self._outside()
        self._watch()

    def _outside(self) -> dict[str, tuple[object, ...]]:
        found: dict[str, tuple[object, ...]] = {}
        for path in sorted([self.out, *self.out.rglob("*")]):
            status = path.lstat()
            attributes = tuple((name, os.getxattr(path, name)) for name in sorted(os.listxattr(path)))
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else None
            found[str(path.relative_to(self.place))] = (
                oct(status.st_mode), status.st_uid, status.st_gid, status.st_rdev, attributes, content, status.st_nlink,
            )  # fmt: skip
        if self._device is not None:
            found["the device"] = (hashlib.sha256((self.logs / "block").read_bytes()).hexdigest(),)
        return found

    def _watch(self) -> None:
        self._notify = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._watched: dict[int, Path] = {}
        for path in [self.out, *self.out.rglob("*")]:
            number = _libc.inotify_add_watch(self._notify, os.fsencode(path), _OPEN | _ACCESS | _MODIFY)
            assert number > 0
            self._watched[number] = path
        self._modes = {path: path.lstat().st_mode for path in self._watched.values()}

    def drain(self) -> dict[Path, int]:
        """What was done to files outside since the last time: a mask of events for each."""
        found: dict[Path, int] = {}
        with suppress(BlockingIOError):
            while data := os.read(self._notify, 1 << 16):
                at = 0
                while at < len(data):
                    number, mask, _, length = _EVENT.unpack_from(data, at)
                    name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
                    at += _EVENT.size + length
                    # A file is told by its directory too, under its name there.
                    if number in self._watched and not name:
                        found[self._watched[number]] = found.get(self._watched[number], 0) | mask
        return found

    def close(self) -> None:
        if self._device is not None:
            subprocess.run(["losetup", "-d", self._device], check=True)

    # Before and after each run.

    def keep(self) -> None:
        """What there is now is what each run begins with."""
        subprocess.run(["cp", "-a", self.user, self.root, self._kept], check=True)

    def reset(self) -> None:
        subprocess.run(["rm", "-rf", self.user, self.root, self.aside], check=True)
        subprocess.run(["cp", "-a", self._kept / "u", self._kept / "root", self.place], check=True)
        self.aside.mkdir(0o700)
        os.chown(self.aside, USER, USER)
        self.drain()

    def give(self) -> None:
        """Everything in the user's directory becomes the user's, but the directories that are shared."""
        uid, gid, mode = self._access.value
        subprocess.run(
            ["chown", "-R", f"{USER}:{gid if self._access is Access.GROUP else USER}", self.user], check=True
        )
        os.chown(self.images, uid, gid)
        self.images.chmod(mode)
        if self._access is not Access.OWN:
            os.chown(self.user, 0, 0)

    def judge(self, *, by_hard_link: bool) -> Iterator[Fact]:
        """Everything but the verb's own result."""
        yield from self._judge_opened(by_hard_link=by_hard_link)
        yield from self._judge_outside(by_hard_link=by_hard_link)
        yield from self._judge_inside()

    def _judge_opened(self, *, by_hard_link: bool) -> Iterator[Fact]:
        for path, mask in self.drain().items():
            name = path.relative_to(self.place)
            mode = self._modes[path]
            if mask & _MODIFY:
                yield Fact(True, f"written: {name}")
            is_readable = mode & 0o004 and self._modes.get(path.parent, 0o001) & 0o001
            did = "read" if mask & _ACCESS else "opened"
            # Judged by what was opened, a hard link has been opened; nothing more.
            yield Fact(not is_readable and not (by_hard_link and did == "opened"), f"{did}: {name}")

    def _judge_outside(self, *, by_hard_link: bool) -> Iterator[Fact]:
        now = self._outside()
        self.drain()
        planted = self._links_of_ours() if by_hard_link else {}
        changed = False
        for name in sorted({*self._was, *now}):
            before, after = self._was.get(name), now.get(name)
            if before is not None and after is not None and len(after) > 1:
                after = (*after[:-1], int(str(after[-1])) - planted.get(name, 0))
            if before == after:
                continue
            changed = True
            if before is None or after is None:
                yield Fact(True, f"{'made' if before is None else 'removed'}: {name}")
            else:
                words = ("mode", "owner", "group", "device", "xattrs", "content", "links")
                differ = [word for word, one, other in zip(words, before, after, strict=False) if one != other]
                yield Fact(True, f"changed: {name}: {', '.join(differ) or 'content'}")
        if changed:
            self._mend_outside()

    def _links_of_ours(self) -> dict[str, int]:
        """How many names outside of WORLD/out each file there has."""
        inodes = {
            path.lstat().st_ino: str(path.relative_to(self.place)) for path in self.out.rglob("*") if path.is_file()
        }
        found: dict[str, int] = {}
        for top in (self.user, self.aside, self.root):
            for directory, _, names in os.walk(top):
                for name in names:
                    with suppress(FileNotFoundError):
                        inode = os.lstat(f"{directory}/{name}").st_ino
                        if inode in inodes:
                            found[inodes[inode]] = found.get(inodes[inode], 0) + 1
        return found

    def _mend_outside(self) -> None:
        """Make all of it anew: the next run must not be blamed."""
        os.close(self._notify)
        names = [path.name for path in (self._kept / "u" / "images").iterdir()]
        self.close()
        subprocess.run(["rm", "-rf", self.out, self._kept / "out-etc"], check=True)
        self.out.mkdir(0o755)
        self._device = None
        self.make_outside([name for name in names if not name.startswith(".")])

    def _judge_inside(self) -> Iterator[Fact]:
        for top in (self.user, self.root, self.aside, self.logs):
            for directory, _, names in os.walk(top):
                for name in names:
                    path = Path(directory, name)
                    relative = path.relative_to(self.place)
                    status = path.lstat()
                    if top == self.logs and name not in ("stdout", "stderr"):
                        continue
                    if stat.S_ISREG(status.st_mode):
                        if status.st_nlink > 1 and self._is_outside(status):
                            continue  # one of the links that were planted
                        if status.st_mode & 0o6000:
                            yield Fact(True, f"a set-id file: {relative} {oct(status.st_mode)}")
                        if self.token in path.read_bytes():
                            yield Fact(True, f"secret bytes in {relative} of {status.st_uid}, {oct(status.st_mode)}")
                        if top == self.user and status.st_uid != USER and status.st_mode & 0o022:
                            yield Fact(True, f"others may write {relative} of {status.st_uid}, {oct(status.st_mode)}")
                    elif stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
                        yield Fact(True, f"a device node: {relative}")

    def problem(self, path: Path, reference: Path, image_format: str = "qcow2") -> str | None:
        """Why this image does not read as the raw file does; None when it does."""
        try:
            status = path.lstat()
        except FileNotFoundError:
            return f"{path.name} is gone"
        if not stat.S_ISREG(status.st_mode) or self._is_outside(status):
            return f"{path.name} is what was planted"
        argv = ["qemu-img", "compare", "-U", "-f", image_format, "-F", "raw", str(path), str(reference)]
        done = subprocess.run(argv, check=False, capture_output=True, text=True)
        if done.returncode == 0 and "mismatch" not in done.stdout + done.stderr:
            return None
        return f"{path.name} does not read as it did: {(done.stdout + done.stderr).strip().splitlines()[-1]}"

    def _is_outside(self, status: os.stat_result) -> bool:
        return any(path.lstat().st_ino == status.st_ino for path in self.out.rglob("*"))


def make_chain(world: World, layers: int = 4, *, size: str = "1M") -> None:
    """root.qcow2 <- 1.qcow2 <- ... <- disk.qcow2 in the user's images, and what each reads in WORLD/kept-truths."""
    names = ["root.qcow2", *(f"{number}.qcow2" for number in range(1, layers - 1)), "disk.qcow2"]
    for number, name in enumerate(names):
        path = world.images / name
        link = ["-b", names[number - 1], "-F", "qcow2"] if number else []
        qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", *link, path, size)
        write(path, f"write -P {number + 1} {number * 64}k 128k", f"write -P {number + 65} {640 + number * 4}k 16k")
    for path in world.images.iterdir():
        path.chmod(0o600)


def truth(world: World, path: Path, image_format: str = "qcow2") -> Path:
    """What this image reads now, in a raw file of its own."""
    target = world.logs / f"{path.name}.truth"
    qemu_img("convert", "-f", image_format, "-O", "raw", path, target)
    return target
