"""The definition of a guest on new disk files: domain XML or a command line, and the small files beside it.

    DIR/web1.xml                 libvirt: the definition with the new paths; web1.sh for a guest that QEMU ran alone
    DIR/web1.live.xml            as it ran; web1.recorded.xml as it was defined
    DIR/web1.VARS.fd, web1.tpm/  firmware variables, and the state of its TPM

The record may be written by others: names become plain file names, and texts are bounded (domain_xml.py, qemu_argv.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from snapchain.destination.guest_record import GuestRecord
from snapchain.errors import InvalidInput, Unsupported
from snapchain.guest.domain_xml import tpm_of
from snapchain.host.directory import Directory
from snapchain.host.files import make_directories, write_in
from snapchain.host.os_errors import os_errors
from snapchain.ops.restore import define, domain_xml, qemu_argv
from snapchain.ops.restore.changed_definition import Changed, Changes, NewDisk, NewIdentity, is_missing

_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]")
LONGEST_NAME = 100
_MOST_DISKS = 1000


class GuestDefinition:
    """How a recorded guest is defined on new files.

    name: of the files; disks: by their names in the guest; directory: of the files of the definition
    files: what to write there, by names that may have directories: the definition is the last
    """

    def __init__(
        self,
        record: GuestRecord,
        *,
        name: str,
        disks: Mapping[str, NewDisk],
        directory: Path,
        identity: NewIdentity | None,
        address: str,
        without_network: bool = False,
        stops_on_errors: bool = False,
        console: Path | None = None,
    ) -> None:
        """address: of the guest point, for errors; without_network, stops_on_errors, console: as in Changes

        Raises Corrupt, Unsupported for a disk that cannot stop its guest on errors.
        """
        self._record, self._disks, self._identity, self._address = record, disks, identity, address
        self._without_network, self._stops_on_errors, self._console = without_network, stops_on_errors, console
        self.name, self.directory = name, directory
        self.changed, self.files = self._definition()

    @property
    def path(self) -> Path | None:
        """Of the file that defines or starts the guest; None where the record has no definition."""
        return None if self.changed is None else self.directory / self._definition_name

    def write(self) -> None:
        """Write all files, those that others may read to nobody but the owner."""
        for name, data in self.files.items():
            path = self.directory / name
            if path.parent != self.directory:
                make_directories(path.parent, mode=0o700, whatever_the_umask=True)
            with os_errors(path), Directory.open(path.parent) as directory:
                write_in(directory, path.name, data, mode=0o600, whatever_the_umask=True)

    def domain(self) -> tuple[str, str | None]:
        """Name and UUID of the domain that would be defined."""
        assert self.changed is not None, "checked by check_definable"
        return domain_xml.identity_of(self.changed.text, subject=self._address)

    def check_definable(self) -> None:
        """Raises InvalidInput for a guest that libvirt did not manage, Unsupported where nothing defines it."""
        if self._record.kind != "libvirt":
            raise InvalidInput(
                "the guest was not managed by libvirt, so there is nothing to define",
                subject=self._address,
                hint=f"leave out --define; {self.name}.sh will start it",
            )
        if (self._record.inactive or self._record.live) is None:
            raise Unsupported("the record has no definition of the domain", subject=self._address)

    def place_tpm(self, uuid: str | None, *, connect: str | None) -> tuple[str, ...]:
        """Put the state of the TPM where libvirt looks for it; what is left to do."""
        top = f"{self.name}.tpm/"
        files = {name.removeprefix(top): data for name, data in self.files.items() if name.startswith(top)}
        assert self.changed is not None, "checked by check_definable"
        found = tpm_of(domain_xml.parse(self.changed.text, subject=self._address))
        if not files or found is None or found[1] is not None:
            return ()
        return tuple(define.place_tpm(files, version=found[0], uuid=uuid, connect=connect))

    def lacking(self) -> tuple[str, ...]:
        """What cannot come back, or is missing on this host: sentences."""
        record = self._record
        found = [] if self.changed is None else list(self.changed.lacking)
        if self.changed is None:
            found.append("the record has no definition of the guest: define it by hand")
        if record.kind == "qmp":
            found += [f"a medium is missing here: {path}" for path in record.media if is_missing(path)]
            if any(file.role == "tpm" for file in record.files):
                found.append(f"start its TPM with the restored state: swtpm socket --tpmstate dir={self.name}.tpm")
        found += [f"it cannot be moved: {each}" for each in record.immovable]
        found += [f"it was not recorded: {each}" for each in record.unreadable]
        return tuple(dict.fromkeys(found))

    @property
    def _definition_name(self) -> str:
        return f"{self.name}.xml" if self._record.kind == "libvirt" else f"{self.name}.sh"

    def _definition(self) -> tuple[Changed | None, dict[str, bytes]]:
        """The changed definition, and its files by their names, which may have directories: that one is the last."""
        record, base = self._record, f"{self.name}."
        taken = {each.path.name for each in self._disks.values()}
        nvram: dict[str, Path] = {}
        files: dict[str, bytes] = {}
        for file in record.files:
            if file.role == "nvram":
                old = Path(file.name).name or "VARS.fd"
                name = unique_name(base + safe_name(old, "VARS.fd"), "", taken)
                nvram[old] = self.directory / name
                files[name] = file.data
            else:
                parts = [safe_name(part, "part") for part in Path(file.name).parts if part not in ("/", "..", ".")]
                files["/".join([f"{base}tpm", *(parts[-4:] or ["state"])])] = file.data
        changes = Changes(
            disks=self._disks,
            old_paths={each.name: each.path for each in record.disks},
            left_out=dict(record.left_out),
            nvram=nvram,
            tpm=self.directory / f"{base}tpm" if any(file.role == "tpm" for file in record.files) else None,
            directory=self.directory,
            identity=self._identity,
            without_network=self._without_network,
            stops_on_errors=self._stops_on_errors,
            console=self._console,
        )
        changed: Changed | None = None
        if record.kind == "libvirt":
            for name, text in ((f"{base}live.xml", record.live), (f"{base}recorded.xml", record.inactive)):
                if text is not None:
                    files[name] = text.encode("utf-8", "replace")
            if (text := record.inactive or record.live) is not None:
                changed = domain_xml.change(text, changes, subject=self._address)
        elif record.argv is not None:
            changed = qemu_argv.change(record.argv, changes, subject=self._address)
        if changed is not None:
            files[self._definition_name] = changed.text.encode("utf-8", "surrogateescape")  # a directory's own bytes
        return changed, files


def safe_name(text: str, otherwise: str) -> str:
    """Text of a record as the name of a file: no slashes, no dot in front, no blanks."""
    return _UNSAFE.sub("_", text)[:LONGEST_NAME].lstrip(".") or otherwise


def unique_name(stem: str, suffix: str, taken: set[str]) -> str:
    """A name that is not taken yet, and is from now on."""
    names: Iterable[str] = (f"{stem}{suffix}", *(f"{stem}.{number}{suffix}" for number in range(2, _MOST_DISKS + 2)))
    name = next(each for each in names if each not in taken)
    taken.add(name)
    return name
