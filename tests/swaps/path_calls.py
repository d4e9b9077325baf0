"""The system calls of Linux that take a path, by number, and where their paths stand among the arguments."""

from __future__ import annotations

import os
from dataclasses import dataclass

AT_FDCWD = -100


@dataclass(frozen=True, slots=True)
class PathCall:
    """One system call. paths: for each path (argument of its directory's descriptor or None, argument of the path)."""

    name: str
    paths: tuple[tuple[int | None, int], ...]


_AT_0 = ((None, 0),)
_IN_DIRECTORY = ((0, 1),)

_X86_64: dict[int, PathCall] = {
    number: PathCall(name, paths)
    for number, name, paths in (
        (2, "open", _AT_0), (4, "stat", _AT_0), (6, "lstat", _AT_0), (21, "access", _AT_0), (59, "execve", _AT_0),
        (76, "truncate", _AT_0), (80, "chdir", _AT_0), (82, "rename", ((None, 0), (None, 1))), (83, "mkdir", _AT_0),
        (84, "rmdir", _AT_0), (85, "creat", _AT_0), (86, "link", ((None, 0), (None, 1))), (87, "unlink", _AT_0),
        (88, "symlink", ((None, 1),)), (89, "readlink", _AT_0), (90, "chmod", _AT_0), (92, "chown", _AT_0),
        (94, "lchown", _AT_0), (132, "utime", _AT_0), (133, "mknod", _AT_0), (137, "statfs", _AT_0),
        (161, "chroot", _AT_0), (163, "acct", _AT_0), (165, "mount", ((None, 1),)), (167, "swapon", _AT_0),
        (188, "setxattr", _AT_0), (189, "lsetxattr", _AT_0), (191, "getxattr", _AT_0), (192, "lgetxattr", _AT_0),
        (194, "listxattr", _AT_0), (195, "llistxattr", _AT_0), (197, "removexattr", _AT_0),
        (198, "lremovexattr", _AT_0), (235, "utimes", _AT_0), (254, "inotify_add_watch", ((None, 1),)),
        (257, "openat", _IN_DIRECTORY), (258, "mkdirat", _IN_DIRECTORY), (259, "mknodat", _IN_DIRECTORY),
        (260, "fchownat", _IN_DIRECTORY), (261, "futimesat", _IN_DIRECTORY), (262, "newfstatat", _IN_DIRECTORY),
        (263, "unlinkat", _IN_DIRECTORY), (264, "renameat", ((0, 1), (2, 3))), (265, "linkat", ((0, 1), (2, 3))),
        (266, "symlinkat", ((1, 2),)), (267, "readlinkat", _IN_DIRECTORY), (268, "fchmodat", _IN_DIRECTORY),
        (269, "faccessat", _IN_DIRECTORY), (280, "utimensat", _IN_DIRECTORY), (301, "fanotify_mark", ((3, 4),)),
        (303, "name_to_handle_at", _IN_DIRECTORY), (316, "renameat2", ((0, 1), (2, 3))),
        (322, "execveat", _IN_DIRECTORY), (332, "statx", _IN_DIRECTORY), (428, "open_tree", _IN_DIRECTORY),
        (429, "move_mount", ((0, 1), (2, 3))), (437, "openat2", _IN_DIRECTORY), (439, "faccessat2", _IN_DIRECTORY),
        (442, "mount_setattr", _IN_DIRECTORY), (452, "fchmodat2", _IN_DIRECTORY), (463, "setxattrat", _IN_DIRECTORY),
        (464, "getxattrat", _IN_DIRECTORY), (465, "listxattrat", _IN_DIRECTORY), (466, "removexattrat", _IN_DIRECTORY),
    )
}  # fmt: skip

# The generic table, which has no calls without a directory's descriptor.
_AARCH64: dict[int, PathCall] = {
    number: PathCall(name, paths)
    for number, name, paths in (
        (5, "setxattr", _AT_0), (6, "lsetxattr", _AT_0), (8, "getxattr", _AT_0), (9, "lgetxattr", _AT_0),
        (11, "listxattr", _AT_0), (12, "llistxattr", _AT_0), (14, "removexattr", _AT_0), (15, "lremovexattr", _AT_0),
        (27, "inotify_add_watch", ((None, 1),)), (33, "mknodat", _IN_DIRECTORY), (34, "mkdirat", _IN_DIRECTORY),
        (35, "unlinkat", _IN_DIRECTORY), (36, "symlinkat", ((1, 2),)), (37, "linkat", ((0, 1), (2, 3))),
        (38, "renameat", ((0, 1), (2, 3))), (40, "mount", ((None, 1),)), (43, "statfs", _AT_0),
        (45, "truncate", _AT_0), (48, "faccessat", _IN_DIRECTORY), (49, "chdir", _AT_0), (51, "chroot", _AT_0),
        (53, "fchmodat", _IN_DIRECTORY), (54, "fchownat", _IN_DIRECTORY), (56, "openat", _IN_DIRECTORY),
        (78, "readlinkat", _IN_DIRECTORY), (79, "newfstatat", _IN_DIRECTORY), (88, "utimensat", _IN_DIRECTORY),
        (221, "execve", _AT_0), (263, "fanotify_mark", ((3, 4),)), (264, "name_to_handle_at", _IN_DIRECTORY),
        (276, "renameat2", ((0, 1), (2, 3))), (281, "execveat", _IN_DIRECTORY), (291, "statx", _IN_DIRECTORY),
        (428, "open_tree", _IN_DIRECTORY), (429, "move_mount", ((0, 1), (2, 3))), (437, "openat2", _IN_DIRECTORY),
        (439, "faccessat2", _IN_DIRECTORY), (442, "mount_setattr", _IN_DIRECTORY), (452, "fchmodat2", _IN_DIRECTORY),
        (463, "setxattrat", _IN_DIRECTORY), (464, "getxattrat", _IN_DIRECTORY), (465, "listxattrat", _IN_DIRECTORY),
        (466, "removexattrat", _IN_DIRECTORY),
    )
}  # fmt: skip

TABLES: dict[str, tuple[int, int, dict[int, PathCall]]] = {
    "x86_64": (0xC000003E, 317, _X86_64),
    "aarch64": (0xC00000B7, 277, _AARCH64),
}
"""By os.uname().machine: the audit architecture, the number of seccomp(2), the calls."""

OPENS = {"open", "openat", "openat2", "creat"}
NO_FOLLOW = {
    "open": (1, os.O_NOFOLLOW), "openat": (2, os.O_NOFOLLOW), "newfstatat": (3, 0x100), "fchownat": (4, 0x100),
    "fchmodat2": (3, 0x100), "faccessat2": (3, 0x100), "utimensat": (3, 0x100), "statx": (2, 0x100),
}  # fmt: skip
"""By name: the argument of flags, and the flag by which a link at the end is not followed."""
NEVER_FOLLOW = {
    "lstat", "lchown", "lsetxattr", "lgetxattr", "llistxattr", "lremovexattr", "unlink", "unlinkat", "rmdir", "rename",
    "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "readlink", "readlinkat", "mkdir", "mkdirat",
    "mknod", "mknodat",
}  # fmt: skip
LOOKS = {
    "stat", "lstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat", "statfs",
    "getxattr", "lgetxattr", "getxattrat", "listxattr", "llistxattr", "listxattrat",
}  # fmt: skip
"""Calls that neither change anything nor give a descriptor."""
