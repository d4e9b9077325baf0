"""The commands with which an operator moves a guest whose lower layers are at the destination already.

libvirt copies the top alone (`--copy-storage-inc`), and writes nothing but what `--migrate-disks` names: without that
list it would take all writable disks, shared ones included, and damage them.  The disk has another path over there, so
the definition is rewritten by sed, which both `--xml` and `--persistent-xml` then get; grep shows the line, and fails
where the definition names the disk in a way that nobody has foreseen.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from snapchain.errors import InvalidInput
from snapchain.host.ssh import RemoteAddress
from snapchain.host.terminal import shell_line, shell_word

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


def migrate_commands(disks: Sequence[tuple[Guest, Collection[str], str]]) -> tuple[str, str]:
    """For a shell on the source: write the definition for the destination, then migrate.

    disks: of one guest, each with the paths by which its definition may name the disk here, and the overlay over there
    """
    guest = disks[0][0]
    edits = [part for _, names, overlay in disks for name in sorted(names) for part in _edits(name, overlay)]
    definition = shell_word(f"{guest.domain}.snapchain.xml")
    dump = ["virsh", "dumpxml", "--migratable", guest.domain]
    found = [["grep", "-F", f"file='{_in_xml(overlay)}'"] for _, _, overlay in disks]
    move = [
        "virsh", "migrate", "--live", "--persistent", "--verbose",
        "--copy-storage-inc",
        "--migrate-disks", ",".join(each.target for each, _, _ in disks),
    ]  # fmt: skip
    given = f"--xml {definition} --persistent-xml {definition} {shell_line([guest.domain, guest.uri])}"
    seen = " && ".join(f"{shell_line(words)} {definition}" for words in found)
    write = f"{shell_line(dump)} | {shell_line(['sed', *edits])} > {definition} && {seen}"
    return write, f"{shell_line(move)} {given}"


def _edits(top: str, overlay: str) -> list[str]:
    """Commands of GNU sed for one path of the disk, where libvirt writes it: <source file='/images/web1.qcow2'.

    The chain below it, which libvirt writes down in some definitions, goes: over there it is read from the files, whose
    formats may be other ones: a raw root is qcow2 there, and a guest must not see it as raw.
    """
    pattern = re.sub(r"([][\\.*^$|])", r"\\\1", _in_xml(top))
    replacement = re.sub(r"([\\&|])", r"\\\1", _in_xml(overlay))
    disk = rf"\|<source file='{pattern}'|,\|</disk>|"
    chain = r"\|<backingStore type=|,\|<target |"
    without_chain = rf"{disk}{{{chain}{{\|<target |!d}}}}"
    return ["-e", without_chain, "-e", f"s|file='{pattern}'|file='{replacement}'|g"]


def _in_xml(path: str) -> str:
    return escape(path, {"'": "&apos;", '"': "&quot;"})
