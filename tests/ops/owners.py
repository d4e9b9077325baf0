"""Image directories with the owners and modes that libvirt, OpenNebula, nova, Proxmox and people give them.

Owners are numbers: no account is needed, and none of this machine's can get in the way.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.ops.stacks import flat, qemu_img, write

USER, OTHER, QEMU, KVM, LIBVIRT, ONEADMIN, NOVA = 61234, 61235, 61064, 61065, 61066, 61067, 61068
_ACCESS_LIST = "system.posix_acl_access"


@dataclass(frozen=True, slots=True)
class Standing:
    """Who may do what with a file. access: its list, as the kernel stores it."""

    uid: int
    gid: int
    mode: int
    access: bytes | None
    mark: bytes | None

    @classmethod
    def of(cls, path: Path) -> Standing:
        status = path.stat()
        names = os.listxattr(path)
        return cls(
            status.st_uid, status.st_gid, status.st_mode & 0o7777,
            os.getxattr(path, _ACCESS_LIST) if _ACCESS_LIST in names else None,
            os.getxattr(path, "user.mark") if "user.mark" in names else None,
        )  # fmt: skip


@dataclass
class Host:
    """A tree with one disk. disk: as a guest opens it; layers: root first; owner: whose images they are, as (uid, gid)

    image_dirs: what a command must be told to follow the chain; truth: what the disk reads, in a raw file
    """

    tree: Path
    disk: Path
    layers: list[Path]
    owner: tuple[int, int]
    image_dirs: Sequence[Path] = ()
    truth: Path = field(init=False)

    @property
    def options(self) -> list[str]:
        directories = [word for directory in self.image_dirs for word in ("--image-dir", str(directory))]
        return [*directories, "--format", "qcow2"]


def chain(*paths: Path, links: Sequence[str]) -> None:
    """qcow2 files, root first. links: what each but the root records as its backing file."""
    for number, path in enumerate(paths):
        backing = ["-b", links[number - 1], "-F", "qcow2"] if number else []
        qemu_img("create", "-q", "-f", "qcow2", "-u" if number else "-q", *backing, path, "1M")
        write(path, f"write -P {number + 1} {number * 64}k 128k")


def own(path: Path, uid: int, gid: int, mode: int) -> None:
    os.chown(path, uid, gid)
    path.chmod(mode)


def marked(path: Path) -> None:
    """An access list that lets one more user in, and an attribute."""
    entries = (
        (0x01, 6, 0xFFFFFFFF),
        (0x02, 6, OTHER),
        (0x04, 0, 0xFFFFFFFF),
        (0x10, 6, 0xFFFFFFFF),
        (0x20, 0, 0xFFFFFFFF),
    )
    os.setxattr(path, _ACCESS_LIST, struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *each) for each in entries))
    os.setxattr(path, "user.mark", b"kept")


def _plain(tree: Path, directory: Path, owner: tuple[int, int], mode: int) -> Host:
    """Four files in one directory."""
    names = ["root.qcow2", "one.qcow2", "two.qcow2", "disk.qcow2"]
    paths = [directory / name for name in names]
    chain(*paths, links=names)
    for path in paths:
        own(path, *owner, mode)
    return Host(tree, paths[-1], paths, owner)


def libvirt(tree: Path) -> Host:
    """/var/lib/libvirt/images: root's, 0711; the images belong to the user that QEMU runs as."""
    images = tree / "images"
    images.mkdir()
    host = _plain(tree, images, (QEMU, KVM), 0o600)
    marked(host.disk)
    images.chmod(0o711)
    return host


def group(tree: Path) -> Host:
    """Images of one of several administrators, in root's directory, which their group may write to."""
    images = tree / "images"
    images.mkdir()
    own(images, 0, LIBVIRT, 0o2775)
    return _plain(tree, images, (USER, LIBVIRT), 0o660)


def opennebula(tree: Path) -> Host:
    """A cloned disk: a link to its newest snapshot; the chain refers to itself by a directory's link to itself."""
    vm, store = tree / "datastores" / "0" / "7", tree / "datastores" / "1"
    snapshots = vm / "disk.0.snap"
    snapshots.mkdir(parents=True)
    store.mkdir()
    (snapshots / "disk.0.snap").symlink_to(".")
    disk = vm / "disk.0"
    disk.symlink_to("disk.0.snap/1")
    files = [store / "0f3c", snapshots / "0", snapshots / "1"]
    chain(*files, links=[str(files[0]), "disk.0.snap/0"])
    return _oneadmin(tree, disk, files)


def opennebula_persistent(tree: Path) -> Host:
    """A disk that is a link into the datastore."""
    vm, store = tree / "datastores" / "0" / "7", tree / "datastores" / "1"
    snapshots = store / "0f3c.snap"
    vm.mkdir(parents=True)
    snapshots.mkdir(parents=True)
    (snapshots / "0f3c.snap").symlink_to(".")
    files = [store / "0f3c", snapshots / "1", snapshots / "2"]
    chain(*files, links=list(map(str, files)))
    (snapshots / "0").symlink_to(files[0])
    disk = vm / "disk.0"
    disk.symlink_to(files[-1])
    return _oneadmin(tree, disk, files)


def _oneadmin(tree: Path, disk: Path, files: list[Path]) -> Host:
    subprocess.run(["chown", "-hR", f"{ONEADMIN}:{ONEADMIN}", tree / "datastores"], check=True)
    for path in files:
        path.chmod(0o660)
    return Host(tree, disk, files, (ONEADMIN, ONEADMIN), sorted({path.parent for path in files}))


def nova(tree: Path, mode: int = 0o644) -> Host:
    """instances/<uuid>/disk on _base/<sum>: nova's directories, the images are QEMU's."""
    base, instance = tree / "instances" / "_base", tree / "instances" / "9f7e"
    base.mkdir(parents=True)
    instance.mkdir()
    files = [base / "5f8a2c", instance / "disk.1", instance / "disk"]
    chain(*files, links=[str(files[0]), str(files[1])])
    for path in files:
        own(path, QEMU, KVM, mode)
    for path in (tree / "instances", base, instance):
        own(path, NOVA, NOVA, 0o755)
    return Host(tree, files[-1], files, (QEMU, KVM), [base])


def nova_private(tree: Path) -> Host:
    """As nova, with images that nova itself cannot read."""
    return nova(tree, 0o600)


def proxmox(tree: Path) -> Host:
    """/var/lib/vz/images/100: everything is root's."""
    images = tree / "images" / "100"
    images.mkdir(parents=True)
    return _plain(tree, images, (0, 0), 0o640)


def home(tree: Path) -> Host:
    """A user's own, below a home that nobody else may enter."""
    images = tree / "user" / "images"
    images.mkdir(parents=True)
    host = _plain(tree, images, (USER, USER), 0o600)
    marked(host.disk)
    own(images, USER, USER, 0o755)
    own(images.parent, USER, USER, 0o700)
    return host


def shared(tree: Path) -> Host:
    """A user's images in /tmp."""
    images = tree / "tmp"
    images.mkdir()
    images.chmod(0o1777)
    return _plain(tree, images, (USER, USER), 0o600)


LAYOUTS: dict[str, Callable[[Path], Host]] = {
    "libvirt": libvirt, "group": group, "opennebula": opennebula,
    "opennebula-persistent": opennebula_persistent, "nova": nova, "nova-private": nova_private,
    "proxmox": proxmox, "home": home, "tmp": shared,
}  # fmt: skip


def make(layout: str, tree: Path, scratch: Path) -> Host:
    """scratch: where nobody looks for images."""
    host = LAYOUTS[layout](tree)
    host.truth = flat(host.disk, scratch / "truth.raw")
    return host
