"""The rights of somebody else, with which root uses a directory that this somebody may write to.

Whoever may write to a directory can swap what lies there at any moment, also between a check and the use of what was
checked.  Used with their own rights, a swapped name leads to nothing that they could not have reached by themselves.

The kernel keeps the identity by which it judges access to files per thread (setfsuid(2), setfsgid(2)), and so are the
supplementary groups, but the C library's setgroups changes those of all threads: hence the system call itself.  An
identity other than root's also suspends the capabilities by which root passes over modes and owners.
"""

from __future__ import annotations

import errno
import functools
import grp
import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from snapchain.errors import Unsupported

if TYPE_CHECKING:
    from ctypes import CDLL

NOBODY = 65534
_SETGROUPS = {"x86_64": 116, "i686": 206, "armv7l": 206, "s390x": 206, "ppc64le": 81}
_SETGROUPS_GENERIC = 159
"""aarch64, riscv64, loongarch64: the numbers of all architectures that came after 2010."""
_GENERIC = {"aarch64", "riscv64", "loongarch64"}
_NO_CHANGE = 0xFFFFFFFF
"""An id that is never valid: setfsuid then only returns the current one."""
_PR_GET_SECUREBITS, _NO_SETUID_FIXUP = 27, 1 << 2
"""With that bit set, the kernel would leave root its capabilities whatever the identity."""


@dataclass(frozen=True, slots=True)
class Rights:
    """Whose access to files counts: a user, a group, and further groups."""

    uid: int
    gid: int
    groups: tuple[int, ...]

    @staticmethod
    def of_user(uid: int) -> Rights:
        """Those of a user with all groups of their account; without an account there are none."""
        return _of_user(uid)

    @staticmethod
    def of_group(gid: int) -> Rights:
        """Those that every member of a group has, whoever it is."""
        return Rights(NOBODY, gid, (gid,))

    def __str__(self) -> str:
        """For a sentence: "user alice", "group kvm"."""
        if self.uid != NOBODY or self.gid == NOBODY:
            return "everybody" if self == EVERYBODY else f"user {user_name(self.uid)}"
        return f"group {group_name(self.gid)}"


EVERYBODY = Rights(NOBODY, NOBODY, (NOBODY,))
"""What any user may do."""


class DeniedToOther(PermissionError):
    """Access was denied to somebody else, with whose rights root had asked for it."""

    rights: Rights

    @staticmethod
    def of(error: PermissionError, rights: Rights) -> DeniedToOther:
        """The same error with the rights."""
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
    """Of an account, else its number."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def group_name(number: int) -> str:
    """Of a group, else its number."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


@contextmanager
def acting_as(rights: Rights | None) -> Iterator[None]:
    """This thread's access to files is judged by other rights during the block. None: nothing changes.

    Only root can do so. The block must start neither threads nor programs. It raises DeniedToOther where the kernel
    denies what those rights do not cover.
    Raises Unsupported where the rights cannot be taken on, or not wholly.
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
