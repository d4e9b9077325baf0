"""What is needed to start a bare QEMU again elsewhere: its command line, and the small files that belong to it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from snapchain.errors import SnapchainError
from snapchain.guest.graph import source_of
from snapchain.guest.protocol import Definition, DefinitionFile
from snapchain.guest.qemu_files import QemuFiles
from snapchain.guest.qmp import Monitor, Refused
from snapchain.host.files import read_small

_LARGEST_FILE = 16 << 20
"""Bytes. Firmware variables take at most 4 MiB, the state of a TPM some hundred KiB."""
_MOST_TPM_FILES = 32
_NO_UUID = "00000000-0000-0000-0000-000000000000"
_HOST_DEVICES = re.compile(
    r"vfio-|usb-host$|host-|scsi-block$|scsi-generic$|vhost-vdpa|igd-|ccid-card-passthru|virtio-9p|usb-mtp$"
)
_NETWORK = re.compile(r"net|e1000|rtl8139|ne2k|pcnet|tulip|eepro|i8255|igb|vmxnet")
_SOCKET = re.compile(r"(?:disconnected:)?unix:([^@].*?)(?:,server(?:=\w+)?)?(?: <-> .*)?$")
_STATE_DIRECTORY = re.compile(r"(?:^|,)dir=((?:[^,]|,,)*)")


def definition(
    monitor: Monitor, name: str, process: QemuFiles, devices: Mapping[str, str], *, with_secrets: bool
) -> Definition:
    """See `Guest.definition`. devices: QOM path -> type, of the devices of the command line and hot-plugged ones."""
    block = monitor.rows("query-block")
    unreadable: list[str] = []
    files = [*_firmware(block, process, unreadable), *_tpm(monitor, process, unreadable, with_secrets=with_secrets)]
    if process.argv is None:
        unreadable.append("the command line of QEMU cannot be read: run it on QEMU's host, as its user or root")
    uuid = monitor.fields("query-uuid").get("UUID")
    machine = _property(monitor, "/machine", "type")
    return Definition(
        kind="qmp",
        name=name,
        uuid=uuid if isinstance(uuid, str) and uuid != _NO_UUID else None,
        machine=machine.removesuffix("-machine") if machine else None,
        macs=tuple(_macs(monitor, devices)),
        argv=process.argv,
        files=tuple(files),
        media=tuple(_media(block, process)),
        immovable=tuple(
            f"{path.rpartition('/')[2]} ({kind}) is a device or a directory of this host"
            for path, kind in devices.items()
            if _HOST_DEVICES.match(kind)
        ),
        unreadable=tuple(unreadable),
    )


def _property(monitor: Monitor, path: str, name: str) -> str | None:
    with suppress(Refused):
        value = monitor.execute("qom-get", {"path": path, "property": name})
        return value if isinstance(value, str) else None
    return None


def _macs(monitor: Monitor, devices: Mapping[str, str]) -> Iterator[str]:
    for path, kind in devices.items():
        if _NETWORK.search(kind) and (mac := _property(monitor, path, "mac")):
            yield mac.lower()


def _media(block: Sequence[Mapping[str, Any]], process: QemuFiles) -> Iterator[str]:
    for device in block:
        inserted = device.get("inserted")
        if device.get("removable") is True and device.get("qdev") and isinstance(inserted, Mapping):
            named = str(inserted.get("file", ""))
            source = source_of(named)
            path = process.absolute(source.path) if source.path is not None else None
            yield str(path) if path is not None else named


def _firmware(
    block: Sequence[Mapping[str, Any]], process: QemuFiles, unreadable: list[str]
) -> Iterator[DefinitionFile]:
    """The variables: what of the flash memory the guest can write. The code is the host's package."""
    for device in block:
        inserted = device.get("inserted")
        is_flash = str(device.get("qdev", "")).startswith("/machine/system.flash")
        if not is_flash or not isinstance(inserted, Mapping) or inserted.get("ro") is True:
            continue
        path = source_of(str(inserted.get("file", ""))).path
        found = process.locate(path) if path is not None else None
        if found is None or found.problem is not None:
            unreadable.append(f"firmware variables: {'not a file' if found is None else found.problem}")
        elif (data := _content(found.path, "firmware variables", unreadable)) is not None:
            yield DefinitionFile("nvram", found.path.name, data, secret=False)


def _tpm(
    monitor: Monitor, process: QemuFiles, unreadable: list[str], *, with_secrets: bool
) -> Iterator[DefinitionFile]:
    for tpm in monitor.rows("query-tpm") if monitor.has("query-tpm") else ():
        options = tpm.get("options")
        kind = options.get("type") if isinstance(options, Mapping) else None
        if kind != "emulator" or not isinstance(options, Mapping):
            unreadable.append("the TPM is the host's own (passthrough)")
            continue
        if not with_secrets:
            unreadable.append("the state of the TPM is a secret; only an encrypted repository takes it")
            continue
        data = options.get("data")
        directory = _state_directory(monitor, process, str(data.get("chardev")) if isinstance(data, Mapping) else "")
        if directory is None:
            unreadable.append("the state of the TPM: no swtpm of this host was found at its socket")
            continue
        yield from _tree(directory, unreadable)


def _state_directory(monitor: Monitor, process: QemuFiles, chardev: str) -> Path | None:
    """Where the swtpm at the other end of a character device keeps its state, by its command line."""
    socket = socket_of(monitor, process, chardev)
    for found in Path("/proc").glob("[0-9]*/cmdline") if socket is not None else ():
        with suppress(OSError):
            words = [os.fsdecode(word) for word in found.read_bytes().split(b"\0")]
            if not words[0].endswith("swtpm") or not any(_names_socket(word, str(socket)) for word in words):
                continue
            for word in words:
                if named := _STATE_DIRECTORY.search(word):
                    return QemuFiles(int(found.parent.name)).absolute(named[1].replace(",,", ","))
    return None


def _names_socket(word: str, socket: str) -> bool:
    return any(field == f"path={socket}" for field in word.split(","))


def _tree(directory: Path, unreadable: list[str]) -> Iterator[DefinitionFile]:
    try:
        names = sorted(each for each in directory.rglob("*") if each.is_file() and not each.is_symlink())
    except OSError as error:
        unreadable.append(f"the state of the TPM: {directory}: {(error.strerror or 'unreadable').lower()}")
        return
    for path in names[:_MOST_TPM_FILES]:
        if path.name != ".lock" and (data := _content(path, "the state of the TPM", unreadable)) is not None:
            yield DefinitionFile("tpm", str(path.relative_to(directory)), data, secret=True)


def _content(path: Path, what: str, unreadable: list[str]) -> bytes | None:
    try:
        return read_small(path.resolve(), cap=_LARGEST_FILE)
    except (SnapchainError, OSError) as error:
        unreadable.append(f"{what}: {error}")
        return None


def socket_of(monitor: Monitor, process: QemuFiles, chardev: str) -> Path | None:
    """The unix socket of a character device; None where it is something else."""
    for each in monitor.rows("query-chardev"):
        if each.get("label") == chardev:
            named = _SOCKET.match(str(each.get("filename")))
            return process.absolute(named[1]) if named else None
    return None
