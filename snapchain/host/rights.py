"""The rights of another user, with which root uses a directory that this user may write to.

A user with write access to a directory can swap its entries at any moment, also between a check and the use of the
checked file.  With that user's rights, a swapped name leads only to files that the user could reach anyway.

The kernel keeps the identity for file access per thread (setfsuid(2), setfsgid(2)), and the supplementary groups too.
The C library's setgroups changes the groups of all threads, so the system call is made directly.  An identity other
than root's also suspends the capabilities by which root ignores modes and owners.
"""

from __future__ import annotations

import errno
import functools
import grp
import os
import pwd
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapchain.errors import InvalidInput, Unsupported

if TYPE_CHECKING:
    from ctypes import CDLL

NOBODY = 65534
_SETGROUPS = {"x86_64": 116, "i686": 206, "armv7l": 206, "s390x": 206, "ppc64le": 81}
_SETGROUPS_GENERIC = 159
"""aarch64, riscv64, loongarch64: the numbers of all architectures that came after 2010."""
_GENERIC = {"aarch64", "riscv64", "loongarch64"}
_NO_CHANGE = 0xFFFFFFFF
"""An id that is never valid: setfsuid then just returns the current one."""
_PR_GET_SECUREBITS, _NO_SETUID_FIXUP = 27, 1 << 2
"""With this bit set, root keeps its capabilities under any identity."""


@dataclass(frozen=True, slots=True)
class Rights:
    """An identity for file access: a user, a group, and supplementary groups."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @staticmethod
    def of_user(uid: int) -> Rights:
        """The rights of a user with all groups of the account; no groups without an account."""
        return _of_user(uid)

    @staticmethod
    def of_group(gid: int) -> Rights:
        """The rights that every member of a group has."""
        return Rights(NOBODY, gid, (gid,))

    def __str__(self) -> str:
        """For a sentence: "user alice", "group kvm"."""
        if self.uid != NOBODY or self.gid == NOBODY:
            return "everybody" if self == EVERYBODY else f"user {user_name(self.uid)}"
        return f"group {group_name(self.gid)}"


EVERYBODY = Rights(NOBODY, NOBODY, (NOBODY,))
"""The rights that every user has."""


class DeniedToOther(PermissionError):
    """Access was denied to the user with whose rights root asked for it."""

    rights: Rights

    @staticmethod
    def of(error: PermissionError, rights: Rights) -> DeniedToOther:
        """The same error, with the rights."""
        made = DeniedToOther(error.errno, error.strerror, error.filename)
        made.rights = rights
        return made


@functools.cache
def _of_user(uid: int) -> Rights:
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        return Rights(uid, NOBODY, ())
    return Rights(uid, account.pw_gid, tuple(sorted(set(os.getgrouplist(account.pw_name, account.pw_gid)))))


def user_name(number: int) -> str:
    """The account's name, else the number."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group_name(number: int) -> str:
    """The group's name, else the number."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def user_number(name: str) -> int:
    """The number of an account, by its name or number. Raises InvalidInput."""
    return _number(name, "user", lambda: pwd.getpwnam(name).pw_uid)


def group_number(name: str) -> int:
    """The number of a group, by its name or number. Raises InvalidInput."""
    return _number(name, "group", lambda: grp.getgrnam(name).gr_gid)


def _number(name: str, kind: str, found: Callable[[], int]) -> int:
    try:
        return found()
    except (KeyError, ValueError):  # a name with a NUL
        if name.isascii() and name.isdecimal() and int(name) < _NO_CHANGE:
            return int(name)
        raise InvalidInput(f"there is no {kind} {name!a}", hint="name an account of this host, or its number") from None


@contextmanager
def acting_as(rights: Rights | None) -> Iterator[None]:
    """A block in which this thread accesses files with other rights. None: nothing changes.

    Only root can take on other rights. The block must start neither threads nor programs. Raises DeniedToOther where
    these rights do not allow an access; Unsupported where they cannot be taken on in full.
    """
    if rights is None:
        yield
        return
    before = Rights(_libc().setfsuid(_NO_CHANGE), _libc().setfsgid(_NO_CHANGE), tuple(os.getgroups()))
    try:
        _become(rights)
        yield
    except PermissionError as error:
        if isinstance(error, DeniedToOther):
            raise
        raise DeniedToOther.of(error, rights) from error
    finally:
        try:
            _become(before)
        except KeyboardInterrupt:
            _become(before)
            raise


def _become(rights: Rights) -> None:
    libc = _libc()
    if rights.uid != 0 and libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0) & _NO_SETUID_FIXUP:
        raise _refused(rights, "the securebit no_setuid_fixup is set")
    if tuple(os.getgroups()) != rights.groups:
        _set_groups(rights)
    libc.setfsgid(rights.gid)
    libc.setfsuid(rights.uid)
    # Neither call reports an error.
    now = (libc.setfsuid(_NO_CHANGE), libc.setfsgid(_NO_CHANGE), sorted(os.getgroups()))
    if now != (rights.uid, rights.gid, sorted(rights.groups)):
        raise _refused(rights, "the kernel did not change the identity of the thread")


def _set_groups(rights: Rights) -> None:
    import ctypes

    machine = os.uname().machine
    number = _SETGROUPS_GENERIC if machine in _GENERIC else _SETGROUPS.get(machine)
    if number is None:
        raise _refused(rights, f"the groups of a thread cannot be changed on {machine}")
    count = len(rights.groups)
    array = (ctypes.c_uint * count)(*rights.groups)
    if _libc().syscall(ctypes.c_long(number), ctypes.c_size_t(count), array) != 0:
        raise _refused(rights, os.strerror(ctypes.get_errno() or errno.EPERM).lower())


def _refused(rights: Rights, why: str) -> Unsupported:
    return Unsupported(
        f"snapchain cannot act with the rights of {rights}, who may write to a directory that it uses: {why}",
        hint="run snapchain as that user, or with the capabilities CAP_SETUID and CAP_SETGID",
    )


@functools.cache
def _libc() -> CDLL:
    import ctypes  # not at the start of every command

    libc = ctypes.CDLL(None, use_errno=True)
    for each in (libc.setfsuid, libc.setfsgid):
        each.argtypes, each.restype = [ctypes.c_uint], ctypes.c_uint
    return libc
