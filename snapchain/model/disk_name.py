"""The name of a disk: the same rules at every kind of destination, and on every host."""

from __future__ import annotations

from snapchain.errors import InvalidInput

LONGEST_DISK_NAME = 200
"""In bytes."""


def is_disk_name(name: str) -> bool:
    """Whether `name` is printable text of at most LONGEST_DISK_NAME bytes that an address can hold.

    That is: without ':', '@' and '//', and with neither blanks nor slashes at its ends.
    """
    return (
        bool(name)
        and len(name.encode(errors="replace")) <= LONGEST_DISK_NAME
        and name.isprintable()
        and name == name.strip()
        and not any(mark in name for mark in (":", "@", "//"))
        and not name.startswith("/")
        and not name.endswith("/")
    )


def check_disk_name(name: str) -> str:
    """Return `name`. Raises InvalidInput where it cannot name a disk."""
    if not is_disk_name(name):
        raise InvalidInput(
            f"{name[:250]!a} cannot name a disk",
            hint=f"use printable text of at most {LONGEST_DISK_NAME} bytes, without ':' and '@', such as web1/vda",
        )
    return name


# --- Epochs: the number that says which host may write a disk.

LARGEST_EPOCH = 1 << 31
"""An epoch is a number from 1 to this one."""
