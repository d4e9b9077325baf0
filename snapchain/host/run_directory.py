"""Directories for sockets: short paths, since the kernel takes 107 bytes of one, gone after a boot like what uses them.

/run/snapchain/web1-5f3a9c01/          of root
$XDG_RUNTIME_DIR/snapchain/...         of other users, and of whoever sets it; /tmp/snapchain-UID where it is unset
/run/libvirt/qemu/snapchain-5f3a9c01/  for a domain of libvirt: the same path on both hosts, where QEMU may use it
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound, Unsupported
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
from snapchain.host.private import PrivateDirectory

LONGEST_SOCKET = 107
"""Bytes of a path that the kernel takes for a unix socket."""
OF_LIBVIRT = Path("/run/libvirt/qemu")
"""libvirt's own directory for what runs: SELinux and AppArmor let the QEMUs of its domains have sockets there."""
_OF_LIBVIRT_PREFIX = "snapchain-"
_LONGEST_NAME = 24
_LONGEST_FILE = 32
_MADE = re.compile(r"-[0-9a-f]{8}\Z")


def base() -> Path:
    """Where this user's are."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    if Path(given).is_absolute():  # another is void, says its specification
        return Path(given) / "snapchain"
    return Path("/run/snapchain") if os.geteuid() == 0 else Path(f"/tmp/snapchain-{os.geteuid()}")  # noqa: S108


def make(name: str, token: str) -> Path:
    """A new directory for this user alone, or the one that is there. Raises Unsupported for a path that is too long."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:_LONGEST_NAME].lstrip(".")
    path = base() / f"{plain}-{token[:8]}"
    if len(os.fsencode(path)) + 1 + _LONGEST_FILE > LONGEST_SOCKET:
        raise Unsupported(
            f"its path is too long for sockets, of which the kernel takes {LONGEST_SOCKET} bytes",
            subject=path,
            hint="set XDG_RUNTIME_DIR to a directory with a short path",
        )
    for each in (base(), path):
        with PrivateDirectory(each, make=True):
            pass
    return path


def for_libvirt(token: str) -> Path:
    """The path of the directory for a domain that moves, on either host."""
    return OF_LIBVIRT / f"{_OF_LIBVIRT_PREFIX}{token[:8]}"


def make_for_libvirt(token: str) -> Path:
    """Make it. Raises Unsupported for users who may not, and where no libvirt runs."""
    path = for_libvirt(token)
    if os.geteuid() != 0 or not path.parent.is_dir():
        why = "only root may" if os.geteuid() != 0 else "libvirt's daemon for QEMU has never run here"
        raise Unsupported(
            f"the directory for the sockets of a migration cannot be made: {why}",
            subject=path,
            hint="the guest is one of qemu:///system: run this as root, and log in as root on the other host",
        )
    with PrivateDirectory(path, make=True):
        pass
    return path


def remove(path: Path) -> None:
    """Remove such a directory with the sockets and small files in it. Idempotent; what is none is left alone."""
    if path.parent != base() and not (path.parent == OF_LIBVIRT and path.name.startswith(_OF_LIBVIRT_PREFIX)):
        return
    with suppress(NotFound, InvalidInput), os_errors(path.parent), Directory.open(path.parent) as above:
        if not above.has(path.name):
            return
        with Directory.open(path) as here:
            for name in here.names():
                here.remove(name)
        above.remove_directory(path.name)


def remove_of(socket: Path) -> None:
    """Remove the directory that `make` made for a QEMU, which has ended. socket: its monitor, wherever that is."""
    if _MADE.search(socket.parent.name):
        remove(socket.parent)


def give_to(path: Path, uid: int) -> None:
    """Let another user into such a directory: the one that runs QEMU. Only root can, and root needs to."""
    if os.geteuid() == 0 and uid != 0:
        with Directory.open(path) as here:
            os.fchown(here.opened(), uid, -1)


def give_socket(path: Path, uid: int) -> None:
    """Let another user connect to a socket of this process. Only root can, and root needs to."""
    if os.geteuid() == 0 and uid != 0:
        with os_errors(path), Directory.open(path.parent) as here:
            here.give(path.name, uid)
