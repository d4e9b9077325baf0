"""Defining a restored domain in libvirt: by `virsh`, and never in the place of another domain."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from snapchain.errors import Conflict, SnapchainError, ToolFailed
from snapchain.host.files import make_directories, write_atomically
from snapchain.host.processes import Completed, run

_SECONDS = 60.0
_TPM_STATES = Path("/var/lib/libvirt/swtpm")
"""Where the system's libvirt keeps the states of emulated TPMs, by the UUID of the domain."""


def check_new(name: str, uuid: str | None, *, connect: str | None) -> None:
    """Raises Conflict where libvirt has a domain of this name or UUID, ToolFailed where it does not answer."""
    hint = "a clone beside it: --new-name NAME; or rename or undefine that domain first"
    if name in _names("--name", connect=connect):
        raise Conflict("libvirt has a domain of this name", subject=name, hint=hint)
    if uuid is not None and uuid.lower() in _names("--uuid", connect=connect):
        raise Conflict(f"libvirt has a domain with the UUID {uuid}", subject=name, hint=hint)


def define(definition: Path, *, name: str, connect: str | None) -> str:
    """Define a domain from a file; its name. Raises ToolFailed, naming the command to run by hand."""
    try:
        _virsh("define", "--file", str(definition), connect=connect)
    except ToolFailed as error:
        error.hint = f"all files are there; change the definition, then run: virsh define {definition}"
        raise
    return name


def place_tpm(files: Mapping[str, bytes], *, uuid: str | None, connect: str | None) -> Iterator[str]:
    """Put the state of an emulated TPM where the system's libvirt looks for it; what is left to do, as sentences.

    files: by their names below the domain's directory
    """
    if not files:
        return
    place = _TPM_STATES / (uuid or "UUID")
    is_here = connect in (None, "qemu:///system") and os.geteuid() == 0 and uuid is not None
    if is_here and _is_uuid(uuid) and not place.exists():
        try:
            for name, data in files.items():
                make_directories((place / name).parent, mode=0o711, whatever_the_umask=True)
                write_atomically(place / name, data, whatever_the_umask=True)
        except SnapchainError as error:
            yield f"the state of its TPM was not put in place: {error}"
        return
    yield f"copy the state of its TPM to {place} before its first start"


def _is_uuid(text: str | None) -> bool:
    return text is not None and all(character in "0123456789abcdefABCDEF-" for character in text)


def _names(option: str, *, connect: str | None) -> set[str]:
    done = _virsh("list", "--all", option, connect=connect)
    return {line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()}


def _virsh(*words: str, connect: str | None) -> Completed:
    uri = [] if connect is None else ["--connect", connect]
    return run(["virsh", "--quiet", *uri, *words], timeout=_SECONDS)
