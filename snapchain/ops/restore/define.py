"""Defining a restored domain in libvirt: by `virsh`, and never in the place of another domain."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from snapchain.errors import Conflict, SnapchainError
from snapchain.guest.libvirt_definition import tpm_directory
from snapchain.host.files import make_directories, write_atomically
from snapchain.host.terminal import shell_line
from snapchain.host.virsh import Virsh

_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


def check_new(name: str, uuid: str | None, *, connect: str | None) -> None:
    """Raises Conflict where libvirt has a domain of this name or UUID, and as `Virsh.text`."""
    hint = "a clone beside it: --new-name NAME; or rename or undefine that domain first"
    virsh = Virsh(connect)
    if name in virsh.names("list", "--all", "--name"):
        raise Conflict("libvirt has a domain of this name", subject=name, hint=hint)
    if uuid is not None and uuid.lower() in virsh.names("list", "--all", "--uuid"):
        raise Conflict(f"libvirt has a domain with the UUID {uuid}", subject=name, hint=hint)


def define(definition: Path, *, name: str, connect: str | None) -> str:
    """Define a domain from a file; its name. Raises as `Virsh.text`, naming the command to run by hand."""
    virsh = Virsh(connect)
    try:
        virsh.text("define", "--file", str(definition), subject=name)
    except SnapchainError as error:
        by_hand = shell_line(["virsh", "--connect", virsh.uri, "define", definition])
        error.hint = f"all files are there; change the definition, then run: {by_hand}"
        raise
    return name


def place_tpm(files: Mapping[str, bytes], *, version: str, uuid: str | None, connect: str | None) -> Iterator[str]:
    """Put the state of an emulated TPM where libvirt of this host looks for it; what is left to do, as sentences.

    files: by their names in the directory; version: of the TPM
    libvirt gives the files to the TPM's user when the domain starts. Raises as `Virsh.text`.
    """
    uri = Virsh(connect).text("uri").strip()
    if uuid is None or not _UUID.fullmatch(uuid) or uri not in ("qemu:///system", "qemu:///session"):
        yield "copy the state of its TPM to where its libvirt keeps it before its first start"
        return
    place = tpm_directory(uuid.lower(), version, is_session=uri.endswith("session"))
    try:
        if place.exists():
            yield f"the state of its TPM was not put in place: {place} exists"
            return
        make_directories(place.parent, mode=0o711, whatever_the_umask=True)
        for name, data in files.items():
            make_directories((place / name).parent, mode=0o700, whatever_the_umask=True)
            write_atomically(place / name, data, whatever_the_umask=True)
    except (OSError, SnapchainError) as error:
        yield f"copy the state of its TPM to {place} before its first start: {error}"
