"""Give a finished file its final name, unless that name is taken: atomically.

link(2) does it on every POSIX file system.  Where hard links are unknown (FAT, exFAT, some FUSE and CIFS mounts) it is
renameat2(2) with RENAME_NOREPLACE, and where that is unknown too, nothing: a check before a rename would be a race.
"""

from __future__ import annotations

import ctypes
import errno
import os

from snapchain.errors import Unsupported

RENAME_NOREPLACE = 1
"""linux/fs.h"""
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_NO_RENAMEAT2 = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP}


def link_once(source_folder: int, source: str, folder: int, name: str) -> bool:
    """True: the file `source` is now (also) `name`.  False: `name` exists, and nothing changed.

    Folders are descriptors.  Raises Unsupported where the file system can do neither; OSError as it comes.
    """
    try:
        os.link(source, name, src_dir_fd=source_folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        # NFS may repeat a request whose reply was lost: then the name that is in the way is our own.
        return os.stat(source, dir_fd=source_folder, follow_symlinks=False).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return rename_once(source_folder, source, folder, name)
    return True


def rename_once(source_folder: int, source: str, folder: int, name: str) -> bool:
    """As link_once, by renameat2(RENAME_NOREPLACE); `source` is gone afterwards when it is True."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    number = errno.ENOSYS
    if renameat2 is not None:
        if renameat2(source_folder, os.fsencode(source), folder, os.fsencode(name), RENAME_NOREPLACE) == 0:
            return True
        number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    if number in _NO_RENAMEAT2:
        raise Unsupported(
            "this file system can neither link nor rename without replacing",
            subject=name,
            hint="put the repository on a file system with hard links (ext4, XFS, btrfs, ZFS, NFS)",
        )
    raise OSError(number, os.strerror(number))
