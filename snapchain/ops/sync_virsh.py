"""The commands with which an operator moves a guest whose lower layers are at the destination already.

libvirt copies the top alone (`--copy-storage-inc`), and writes nothing but what `--migrate-disks` names: without that
list it would take all writable disks, shared ones included, and damage them.  The files have other paths over there, so
the definition is rewritten by sed, which both `--xml` and `--persistent-xml` then get.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from snapchain.errors import InvalidInput
from snapchain.host.remote_address import RemoteAddress

_DOMAIN = re.compile(r"[^/\s'\"\\-][^/\n\0]*")
_TARGET = re.compile(r"[a-z][a-z0-9]{0,15}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Guest:
    """domain: libvirt's name of it; target: of the disk in it, such as vda; uri: of the destination's libvirt."""

    domain: str
    target: str
    uri: str

    def __post_init__(self) -> None:
        if not _DOMAIN.fullmatch(self.domain) or not self.domain.isprintable():
            raise InvalidInput("not the name of a domain", subject=ascii(self.domain))
        if not _TARGET.fullmatch(self.target):
            raise InvalidInput("not the target of a disk, such as vda", subject=ascii(self.target))
        if not self.uri or self.uri.startswith("-") or not self.uri.isprintable():
            raise InvalidInput("not an URI of libvirt", subject=ascii(self.uri))


def guest_of(
    disk: str, address: RemoteAddress | None, *, domain: str | None, target: str | None, uri: str | None
) -> Guest | None:
    """The guest that is meant: web1/vda is disk vda of web1, unless told otherwise. None when that is not enough.

    address: of the replica, whose host is the destination. Raises InvalidInput for names that libvirt would not take.
    """
    first, _, last = disk.rpartition("/")
    domain = domain or first.replace("/", "-") or None
    target = target or (last if first and _TARGET.fullmatch(last) else None)
    if uri is None and address is not None:
        uri = f"qemu+ssh://{address.login}{'' if address.port is None else f':{address.port}'}/system"
    if domain is None or target is None or uri is None:
        return None
    return Guest(domain, target, uri)


def migrate_commands(guest: Guest, paths: Mapping[str, str], *, targets: Sequence[str] = ()) -> tuple[str, str]:
    """For a shell on the source: write the definition for the destination, then migrate.

    paths: from each file's path here to the one over there; must not be empty
    targets: of all disks that are copied; that of `guest` where there are no others
    """
    edits = [part for old, new in paths.items() if old != new for part in ("-e", _edit(old, new))]
    definition = shlex.quote(f"{guest.domain}.snapchain.xml")
    dump = ["virsh", "dumpxml", "--migratable", guest.domain]
    sed = ["sed", *(edits or ["-n", "p"])]
    move = [
        "virsh", "migrate", "--live", "--persistent", "--verbose",
        "--copy-storage-inc", "--copy-storage-synchronous-writes",
        "--migrate-disks", ",".join(targets or [guest.target]),
    ]  # fmt: skip
    given = f"--xml {definition} --persistent-xml {definition} {shlex.join([guest.domain, guest.uri])}"
    return f"{shlex.join(dump)} | {shlex.join(sed)} > {definition}", f"{shlex.join(move)} {given}"


def _edit(old: str, new: str) -> str:
    """A command of sed that changes one path where libvirt writes it: file='/images/web1.qcow2'."""
    pattern = re.sub(r"([][\\.*^$|])", r"\\\1", _in_xml(old))
    replacement = re.sub(r"([\\&|])", r"\\\1", _in_xml(new))
    return f"s|file='{pattern}'|file='{replacement}'|g"


def _in_xml(path: str) -> str:
    return escape(path, {"'": "&apos;", '"': "&quot;"})
