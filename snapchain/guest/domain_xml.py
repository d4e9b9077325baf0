"""What a libvirt domain's XML says of its disks and devices. Pure: an element goes in, values come out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

AGENT_CHANNEL = "org.qemu.guest_agent.0"


@dataclass(frozen=True, slots=True)
class XmlLayer:
    """One image of a disk's chain.

    kind: file, block, volume, network, ...; path: where kind is file or block; volume: (pool, name) where it is volume
    index: libvirt's number of the node while the domain runs; image_format: of its driver, None where it is not said
    is_encrypted: QEMU decrypts it
    """

    kind: str
    path: Path | None
    volume: tuple[str, str] | None
    index: str | None
    image_format: str | None
    is_encrypted: bool


@dataclass(frozen=True, slots=True)
class XmlDisk:
    """A disk of a domain.

    target: vda, sda, ...; device: disk, cdrom, floppy, lun; layers: active layer first, empty where no medium is in it
    is_whole: the chain is described to its end; mirror: (job, whether it is ready) of a copy or an active commit
    filters: throttle groups, uppermost first
    """

    target: str
    device: str
    layers: tuple[XmlLayer, ...]
    is_whole: bool
    read_only: bool
    shareable: bool
    transient: bool
    mirror: tuple[str, bool] | None
    filters: tuple[str, ...]


def disks_of(domain: ET.Element) -> list[XmlDisk]:
    """All disks, in the domain's order."""
    return [_disk(each) for each in domain.iterfind("devices/disk")]


def _disk(disk: ET.Element) -> XmlDisk:
    driver, target, mirror = disk.find("driver"), disk.find("target"), disk.find("mirror")
    layers: list[XmlLayer] = []
    source = disk.find("source")
    if source is not None:
        layers.append(_layer(disk, source, None if driver is None else driver.get("type")))
    store = disk.find("backingStore")
    while store is not None and (source := store.find("source")) is not None:
        recorded = store.find("format")
        layers.append(_layer(store, source, None if recorded is None else recorded.get("type")))
        store = store.find("backingStore")
    return XmlDisk(
        target="" if target is None else target.get("dev", ""),
        device=disk.get("device", "disk"),
        layers=tuple(layers),
        is_whole=store is not None,
        read_only=disk.find("readonly") is not None,
        shareable=disk.find("shareable") is not None,
        transient=disk.find("transient") is not None,
        mirror=None if mirror is None else (mirror.get("job", "copy"), mirror.get("ready") == "yes"),
        filters=tuple(each.get("group", "") for each in disk.iterfind("throttlefilters/throttlefilter")),
    )


def _layer(element: ET.Element, source: ET.Element, image_format: str | None) -> XmlLayer:
    kind = element.get("type", "file")
    path = source.get({"file": "file", "block": "dev"}.get(kind, ""))
    volume = (source.get("pool", ""), source.get("volume", "")) if kind == "volume" else None
    return XmlLayer(
        kind=kind,
        path=Path(path) if path else None,
        volume=volume,
        index=source.get("index") or element.get("index"),
        image_format=image_format,
        is_encrypted=source.find("encryption") is not None or element.find("encryption") is not None,
    )


def left_out(disk: XmlDisk) -> str | None:
    """Why a disk is none to protect: a word; None where it is one."""
    if disk.device in {"cdrom", "floppy"}:
        return {"cdrom": "CD-ROM", "floppy": "floppy"}[disk.device]
    if not disk.layers:
        return "empty"
    if disk.read_only:
        return "read-only"
    return "transient" if disk.transient else None


def obstacle(disk: XmlDisk) -> str | None:
    """Why a disk can have no live snapshot, by its description alone: a sentence; None where it can."""
    active = disk.layers[0]
    if disk.device == "lun":
        return "It is a SCSI device passed through to the guest; use the storage's own snapshots."
    if disk.shareable:
        return "It is shared with other guests (<shareable/>), which write to it too."
    if any(layer.is_encrypted for layer in disk.layers):
        return "QEMU encrypts its image, and an overlay would hold the guest's data in plain text."
    if active.kind == "network":
        return "It is on the network, not in a file; use the storage's own snapshots."
    if active.kind == "block":
        return "It is on a block device, beside which no overlay can be made."
    if active.kind not in {"file", "volume"}:
        return f"Its source is of the type {active.kind!r}, which snapchain does not support."
    if active.image_format not in {"qcow2", "raw"}:
        return f"Its format is {active.image_format or 'not recorded'}; snapchain supports qcow2 and raw."
    return None


def persistent_obstacle(live: XmlDisk, lasting: Sequence[XmlDisk], *, is_same_file: bool) -> str | None:
    """Why libvirt would not write a new path into the definition by which the domain starts the next time.

    libvirt changes that definition only where it names the disk by the same target and the same path. Where it names
    the same file in another way, the next start would use the sealed layer, and lose what was written since.
    is_same_file: whether some disk of `lasting` names the file that is the active layer now
    """
    there = next((disk for disk in lasting if disk.target == live.target), None)
    if (
        there is not None
        and there.layers
        and (there.layers[0].path, there.layers[0].volume)
        == (
            live.layers[0].path,
            live.layers[0].volume,
        )
    ):
        return None
    if not is_same_file:
        return None
    return (
        "The definition for the next start names its file in another way than the running one. "
        "Make both the same by `virsh edit`, or shut the guest down and start it once."
    )


# --- devices


def machine_of(domain: ET.Element) -> str | None:
    """Such as pc-q35-7.2."""
    found = domain.find("os/type")
    return None if found is None else found.get("machine")


def macs_of(domain: ET.Element) -> tuple[str, ...]:
    """Of its network cards."""
    return tuple(each.get("address", "") for each in domain.iterfind("devices/interface/mac"))


def media_of(domain: ET.Element) -> tuple[str, ...]:
    """Paths in removable drives."""
    removable = [disk for disk in disks_of(domain) if disk.device in {"cdrom", "floppy"} and disk.layers]
    return tuple(str(disk.layers[0].path) for disk in removable if disk.layers[0].path is not None)


def nvram_of(domain: ET.Element) -> Path | None:
    """File of its firmware variables."""
    found = domain.find("os/nvram")
    if found is None:
        return None
    source = found.find("source")
    path = (found.text or "").strip() or (None if source is None else source.get("file"))
    return Path(path) if path else None


def tpm_of(domain: ET.Element) -> tuple[str, Path | None] | None:
    """(version, directory of its state where the XML names it) of an emulated TPM; None without one."""
    backend = domain.find("devices/tpm/backend[@type='emulator']")
    if backend is None:
        return None
    source = backend.find("source")
    path = None if source is None else source.get("path")
    return backend.get("version", "2.0"), Path(path) if path else None


def has_agent(domain: ET.Element) -> bool:
    """Whether it has a channel for the guest agent."""
    return domain.find(f"devices/channel/target[@name='{AGENT_CHANNEL}']") is not None


def immovable_of(domain: ET.Element) -> tuple[str, ...]:
    """Devices of this host that cannot go with the guest."""
    return tuple(dict.fromkeys(_immovable(domain)))


def _immovable(domain: ET.Element) -> Iterator[str]:
    for device in domain.iterfind("devices/hostdev"):
        yield f"{device.get('type') or device.get('mode', 'host')} device {_host_address(device)}".strip()
    for card in domain.iterfind("devices/interface[@type='hostdev']"):
        yield f"network device {_host_address(card)}".strip()
    for disk in disks_of(domain):
        if disk.device == "lun" and disk.layers:
            yield f"SCSI device {disk.layers[0].path}"
    for shared in domain.iterfind("devices/filesystem/source"):
        yield f"directory {shared.get('dir') or shared.get('socket') or shared.get('file') or ''}".strip()
    for backend in domain.iterfind("devices/tpm/backend[@type='passthrough']/device"):
        yield f"TPM {backend.get('path', '')}"


def _host_address(device: ET.Element) -> str:
    source = device.find("source")
    if source is None:
        return ""
    address, adapter = source.find("address"), source.find("adapter")
    if address is None:
        vendor, product = source.find("vendor"), source.find("product")
        names = [each.get("id", "").removeprefix("0x") for each in (vendor, product) if each is not None]
        return ":".join(names) or ("" if adapter is None else adapter.get("name", ""))
    if uuid := address.get("uuid"):
        return uuid
    if "slot" in address.attrib:
        part = {name: int(address.get(name, "0"), 0) for name in ("domain", "bus", "slot", "function")}
        return f"{part['domain']:04x}:{part['bus']:02x}:{part['slot']:02x}.{part['function']}"
    return ":".join(value for _, value in sorted(address.attrib.items()))
