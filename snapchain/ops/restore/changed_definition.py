"""What is changed in the definition of a guest whose disks were restored elsewhere.

Values for both kinds: domain_xml.py changes libvirt's XML, qemu_argv.py a command line of QEMU.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from uuid import uuid4


@dataclass(frozen=True, slots=True)
class NewDisk:
    """A restored disk. path: absolute, of the file that the guest opens."""

    path: Path
    format: Literal["qcow2", "raw"]


@dataclass(frozen=True, slots=True)
class NewIdentity:
    """A clone: a guest that may run beside the one that was recorded. name: None keeps the old one."""

    name: str | None = None
    uuid: str = field(default_factory=lambda: str(uuid4()))

    @staticmethod
    def mac() -> str:
        """A new address, in the range that QEMU and libvirt use."""
        return ":".join(["52", "54", "00", *(f"{byte:02x}" for byte in secrets.token_bytes(3))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """disks: by their names in the guest; old_paths: of their active layers, where the guest ran
    left_out: disks that were not recorded, each with the reason

    nvram: by the recorded file's name, where its variables were restored to
    tpm: the directory with the restored state of its TPM, None where none was recorded
    directory: of the restored files, for sockets that the old guest may still have
    identity: None for the recorded one
    console: a new file that gets what the guest writes to its first serial port, which it gets where it has none
    without_network: leave its network cards out, and the ports, logs and devices of this host, for a clone that must
    reach nobody, and may run beside the recorded guest
    stops_on_errors: an I/O error of a disk stops the guest, which then sees none
    """

    disks: Mapping[str, NewDisk]
    old_paths: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    nvram: Mapping[str, Path] = field(default_factory=dict)
    tpm: Path | None = None
    directory: Path
    identity: NewIdentity | None = None
    console: Path | None = None
    without_network: bool = False
    stops_on_errors: bool = False


@dataclass(frozen=True, slots=True)
class Changed:
    """A changed definition. lacking: what it lacks on this host, or now leaves out: sentences."""

    text: str
    lacking: tuple[str, ...]


def is_missing(path: str) -> bool:
    """Whether an absolute path names nothing here. path: of a record, so it may be any text."""
    if not path.startswith("/"):
        return False
    try:
        return not Path(path).exists()
    except (OSError, ValueError):
        return True
