"""What is needed to define a libvirt domain again: its XML, and the small files of its firmware and TPM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree as ET

from snapchain.errors import SnapchainError
from snapchain.guest import domain_xml
from snapchain.guest.protocol import Definition, DefinitionFile
from snapchain.host.files import read_small
from snapchain.host.os_errors import os_errors

_CAP = 64 << 20
_SYSTEM_TPM = Path("/var/lib/libvirt/swtpm")
_TPM_LEFT_OUT = "The state of its TPM: only an encrypted repository may have it."


def definition_of(
    name: str, uuid: str, *, live: str | None, inactive: str | None, with_secrets: bool, is_session: bool
) -> Definition:
    """live, inactive: XML; None where the domain does not run, or has no definition that lasts."""
    text = live or inactive
    assert text is not None
    domain = ET.fromstring(text.encode("utf-8", "surrogateescape"))  # noqa: S314 - libvirt's own words
    files: list[DefinitionFile] = []
    unreadable: list[str] = []
    if (nvram := domain_xml.nvram_of(domain)) is not None:
        _take("nvram", [(nvram.name, nvram)], files, unreadable, secret=False)
    if (tpm := domain_xml.tpm_of(domain)) is not None:
        version, folder = tpm
        state = folder or tpm_directory(uuid, version, is_session=is_session)
        if with_secrets:
            _take("tpm", _tree(state), files, unreadable, secret=True)
        else:
            unreadable.append(_TPM_LEFT_OUT)
    return Definition(
        kind="libvirt",
        name=name,
        uuid=uuid,
        machine=domain_xml.machine_of(domain),
        macs=domain_xml.macs_of(domain),
        live=live,
        inactive=inactive,
        files=tuple(files),
        media=domain_xml.media_of(domain),
        immovable=domain_xml.immovable_of(domain),
        unreadable=tuple(unreadable),
    )


def tpm_directory(uuid: str, version: str, *, is_session: bool) -> Path:
    """Where libvirt keeps the state of an emulated TPM, unless the domain names another place."""
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    base = config / "libvirt" / "qemu" / "swtpm" if is_session else _SYSTEM_TPM
    return base / uuid / ("tpm1.2" if version == "1.2" else "tpm2")


def _tree(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to it, path) of each file in a directory; the directory itself where it cannot be listed."""
    try:
        with os_errors(folder):
            names = sorted(folder.iterdir())
    except SnapchainError:
        yield folder.name, folder
        return
    for path in names:
        if path.is_file() and not path.is_symlink() and not path.name.startswith("."):
            yield path.name, path


def _take(
    role: Literal["nvram", "tpm"],
    found: Iterator[tuple[str, Path]] | list[tuple[str, Path]],
    files: list[DefinitionFile],
    unreadable: list[str],
    *,
    secret: bool,
) -> None:
    for name, path in found:
        try:
            data = read_small(path, cap=_CAP)
        except SnapchainError as error:
            unreadable.append(f"{path} ({role}): {error.message}")
        else:
            files.append(DefinitionFile(role, name, data, secret))
