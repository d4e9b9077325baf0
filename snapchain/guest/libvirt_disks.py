"""The disks of a domain: what its XML names, looked at in the storage pools and the files of this host."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from snapchain.errors import SnapchainError
from snapchain.guest import domain_xml
from snapchain.guest.domain_xml import XmlDisk, XmlLayer
from snapchain.guest.protocol import GuestDisk, Layer
from snapchain.host.files import identity_of
from snapchain.host.os_errors import os_errors
from snapchain.host.virsh import Virsh
from snapchain.image import scan
from snapchain.image.backing import Place
from snapchain.image.opening import open_image
from snapchain.image.pread import file_bytes
from snapchain.image.qcow2.header import read_header

AGAIN = "another program changed the chain meanwhile: run it again"
"""The hint for a chain that is not as it was when the command began."""


class DomainDisks:
    """Looks at them. name: of the domain, for errors"""

    def __init__(self, virsh: Virsh, name: str) -> None:
        self._virsh, self._name = virsh, name

    def look(
        self,
        shown: Sequence[XmlDisk],
        lasting: Sequence[XmlDisk],
        opened: dict[tuple[int, int], bool] | None,
        *,
        is_off: bool,
    ) -> list[GuestDisk]:
        """The disks as they are now.

        shown: of the live XML; lasting: of the definition for the next start, none where that is the live one
        opened: the images that QEMU has open, None where they cannot be seen
        """
        return _with_common_files([self._disk(each, lasting, opened, is_off=is_off) for each in shown])

    def path_of(self, layer: XmlLayer) -> Path | None:
        """None where it is no file or block device of this host. Raises as `Virsh.text`."""
        if layer.volume is None:
            return layer.path
        pool, volume = layer.volume
        said = self._virsh.text("vol-path", "--pool", pool, "--vol", volume, subject=self._name).strip("\n")
        return Path(said) if said else None

    def _disk(
        self, shown: XmlDisk, lasting: Sequence[XmlDisk], opened: dict[tuple[int, int], bool] | None, *, is_off: bool
    ) -> GuestDisk:
        left_out = domain_xml.left_out(shown)
        why = None if left_out else domain_xml.obstacle(shown)
        layers, fault = self._layers(shown, is_off=is_off)
        if not left_out and why is None:
            why = (None if is_off else _not_as_opened(layers, opened)) or fault
        if not left_out and why is None and layers and lasting:
            mine = {layer.identity for layer in layers}
            same = any(identity_of(self.path_of(disk.layers[0])) in mine for disk in lasting if disk.layers)
            why = domain_xml.persistent_obstacle(shown, lasting, is_same_file=same)
        node = layers[-1].node if layers else ""
        filters = tuple(f"throttle:{group}" for group in shown.filters)
        return GuestDisk(
            name=shown.target,
            root=filters[0] if filters else node,
            filters=filters,
            chain=layers,
            read_only=shown.read_only,
            obstacle=why,
            left_out=left_out,
        )

    def _layers(self, shown: XmlDisk, *, is_off: bool) -> tuple[tuple[Layer, ...], str | None]:
        """Root first, and what hinders, as a sentence."""
        fault: str | None = None
        layers: list[Layer] = []
        for each in reversed(shown.layers):
            layer, why = self._layer(each)
            layers.append(layer)
            fault = why or fault
        if layers and layers[-1].path is not None and not shown.is_whole and fault is None:
            if not is_off:
                return tuple(layers), "libvirt does not describe its chain to the end; start the guest again."
            return _scanned(layers[-1])
        return tuple(layers), fault

    def _layer(self, shown: XmlLayer) -> tuple[Layer, str | None]:
        path, image_format = self.path_of(shown), shown.image_format or "unknown"
        node = f"libvirt-{shown.index}-format" if shown.index else ""
        is_block = shown.kind == "block"
        if path is None:
            return Layer(node, None, None, image_format, 0), None
        try:
            size, is_block = size_of(path, image_format)
        except SnapchainError as error:
            return Layer(node, path, identity_of(path), image_format, 0, (), is_block), f"{path}: {error.message}."
        return Layer(node, path, identity_of(path), image_format, size, (), is_block), None


def size_of(path: Path, image_format: str) -> tuple[int, bool]:
    """(virtual size, whether it is a block device). Raises what opening an image and reading its header raise."""
    place = Place.of(path)
    fd = open_image(place.real, subject=place.path, named_by=place.named_by)
    try:
        with os_errors(path):
            is_block = path.is_block_device()
            size = file_bytes(fd) if image_format != "qcow2" else read_header(fd, subject=path).size
    finally:
        os.close(fd)
    return size, is_block


def _scanned(top: Layer) -> tuple[tuple[Layer, ...], str | None]:
    """The chain of an image at rest, by its headers."""
    assert top.path is not None
    try:
        with scan(top.path, format=top.image_format) as chain:
            return tuple(
                Layer("", file.path, file.device, file.format, file.size, (), file.real_path.is_block_device())
                for file in chain.files
            ), None
    except SnapchainError as error:
        return (top,), f"{error}."


def _not_as_opened(layers: Sequence[Layer], opened: dict[tuple[int, int], bool] | None) -> str | None:
    """What hinders where a path names another file than QEMU has open."""
    for layer in layers:
        if layer.path is not None and layer.identity is None:
            return f"{layer.path} was renamed or removed while the guest has it open."
        is_file = layer.identity is not None and not layer.is_block_device
        if opened is not None and is_file and layer.identity not in opened:
            return f"{layer.path} was replaced by another file while the guest had it open."
    return None


def _with_common_files(disks: Sequence[GuestDisk]) -> list[GuestDisk]:
    """With a word where the active layer of one disk is part of another's chain."""
    found = []
    for disk in disks:
        others = [
            other.name
            for other in disks
            if other is not disk and disk.chain and disk.active.identity is not None
            and disk.active.identity in {layer.identity for layer in other.chain}
        ]  # fmt: skip
        why = f"Its image is part of the disk {others[0]} too." if others else None
        found.append(hindered(disk, why) if why else disk)
    return found


def hindered(disk: GuestDisk, why: str) -> GuestDisk:
    return disk if disk.left_out or disk.obstacle else replace(disk, obstacle=why)
