"""What an OSError means below a repository's root, where every name is ours and none the user's.

So it differs from host.os_errors: a refusal concerns the whole store (Refused: retrying is no use), not a wrong
argument, and each says what an operator does about it.  What is not in the table means the same as there.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NamedTuple

from snapchain.errors import SnapchainError, Unavailable, Unsupported
from snapchain.host.os_errors import REMEDIES, translated
from snapchain.objects.store import Refused


class Meaning(NamedTuple):
    """The error to raise for an errno, and its hint."""

    error: type[SnapchainError]
    hint: str


_PERMISSION = Meaning(
    Refused,
    "run as its owner, or share the repository with a group: chgrp -R and chmod -R g+rwX on all of it, and chmod g+s "
    "on its directories",
)
_DEVICE = Meaning(Unavailable, "look at the kernel log and the state of the mount, then run the command again")

MEANINGS: dict[int, Meaning] = {
    errno.ENOSPC: Meaning(Refused, REMEDIES[errno.ENOSPC]),
    errno.EDQUOT: Meaning(Refused, REMEDIES[errno.EDQUOT]),
    errno.EFBIG: Meaning(Refused, REMEDIES[errno.EFBIG]),
    errno.EROFS: Meaning(Refused, REMEDIES[errno.EROFS]),
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EIO: _DEVICE,
    errno.EREMOTEIO: _DEVICE,
    errno.ENODEV: _DEVICE,
    errno.ENXIO: _DEVICE,
    errno.ESTALE: _DEVICE,
    errno.ENOTCONN: _DEVICE,
    errno.ETIMEDOUT: _DEVICE,
    errno.EXDEV: Meaning(Unsupported, "tmp/ and all else of a repository must lie on one file system"),
    errno.ELOOP: Meaning(Unsupported, "a repository holds no symbolic links: use a bind mount to spread it over disks"),
}


def from_os_error(error: OSError, subject: object) -> SnapchainError:
    """The error of our tree for `error`, in the system's own words.

    A permission concerns what is there: a file, or the directory in which a new one has no place. So the subject is the
    nearest path that exists, and never the random name of an object to be.
    """
    meaning = MEANINGS.get(error.errno or 0)
    if meaning is None:
        return translated(error, subject)
    if meaning is _PERMISSION:
        subject = _nearest(str(subject))
    return meaning.error(os.strerror(error.errno or 0).lower(), subject=subject, hint=meaning.hint)


def _nearest(path: str) -> str:
    """The path, or the nearest directory above it that exists, as far as this user can see."""
    if not path.startswith("/"):
        return path
    return next(str(each) for each in (Path(path), *Path(path).parents) if os.path.lexists(each))
