"""A domain's XML, changed for disks that were restored elsewhere.

The XML comes from a record, which others may have written: it is bounded, holds no document type (so no entities), and
is parsed without namespaces, so that prefixes such as `qemu:` come out as they went in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from xml.etree import ElementTree as ET
from xml.parsers import expat

from snapchain.errors import Corrupt
from snapchain.ops.restore.changed_definition import Changed, Changes, NewDisk, NewIdentity, is_missing

LARGEST = 4 << 20
_DEEPEST = 100
_MOST_ELEMENTS = 100_000


class _Refused(Exception):
    """What makes XML unacceptable, a sentence."""


def parse(text: str, *, subject: object) -> ET.Element:
    """The domain element. Raises Corrupt for what is no XML of a domain, or too large, too deep, or with entities."""
    raw = text.encode("utf-8", "surrogatepass")
    if len(raw) > LARGEST:
        raise Corrupt(f"the domain's XML has more than {LARGEST} bytes", subject=subject)
    builder = ET.TreeBuilder()
    depth = count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > _DEEPEST or count > _MOST_ELEMENTS:
            raise _Refused("it is nested too deeply, or has too many elements")
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def doctype(*_: object) -> None:
        raise _Refused("it declares a document type")

    parser = expat.ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = doctype
    try:
        parser.Parse(raw, True)
        root = builder.close()
    except (_Refused, expat.ExpatError) as error:
        raise Corrupt(f"the domain's XML cannot be read: {error}", subject=subject) from error
    if root.tag != "domain":
        raise Corrupt("the record has XML that defines no domain", subject=subject)
    return root


def change(text: str, changes: Changes, *, subject: object) -> Changed:
    """The XML of the restored guest.

    Disks that were restored name their new files, without backing chains: libvirt finds these out itself. Disks that
    were not recorded, and devices of the host that it came from, are left out, since no guest could start with them.
    Raises Corrupt.
    """
    root = parse(text, subject=subject)
    lacking: list[str] = []
    devices = root.find("devices")
    if devices is None:
        devices = ET.SubElement(root, "devices")
    unseen = dict(changes.disks)
    for disk in list(devices.findall("disk")):
        target = disk.find("target")
        name = (target.get("dev") if target is not None else None) or ""
        restored = unseen.pop(name, None)
        if restored is not None:
            _set_disk(disk, restored)
            if changes.stops_on_errors:
                _stop_on_errors(disk)
        elif disk.get("device") in ("cdrom", "floppy") or disk.find("readonly") is not None:
            lacking += _missing_source(disk, f"the medium in {name}")
        else:
            devices.remove(disk)
            reason = changes.left_out.get(name, "the guest point has no such disk")
            lacking.append(f"{name} is left out of the definition, since it was not recorded: {reason}")
    lacking += [f"{name} is not in the definition; its file is {disk.path}" for name, disk in unseen.items()]
    lacking += _without_devices_of_the_host(devices)
    if changes.without_network:
        _isolate(devices)
    if changes.console is not None:
        _log_console(devices, str(changes.console))
    lacking += _set_firmware(root, changes)
    for source in devices.iterfind("tpm/backend/source"):
        if source.get("path") is not None and changes.tpm is not None:
            source.set("path", str(changes.tpm))
    if changes.identity is not None:
        _set_identity(root, devices, changes.identity)
    lacking += [
        f"{words} is missing here: {path}"
        for words, place in _FILES_OF_THE_HOST.items()
        for element in root.iterfind(place)
        if is_missing(path := (element.text or "").strip())
    ]
    return Changed(ET.tostring(root, encoding="unicode") + "\n", tuple(lacking))


def change_for_migration(text: str, disks: Mapping[str, NewDisk], *, subject: object) -> str:
    """The XML of a domain that migrates: its disks have other files there, and all else is as it is. disks: by target

    What the domain has of a disk in this definition is all that is changed: one that it lacks is not added.
    Raises Corrupt.
    """
    root = parse(text, subject=subject)
    for disk in root.iterfind("devices/disk"):
        target = disk.find("target")
        moved = None if target is None else disks.get(target.get("dev", ""))
        if moved is not None:
            _set_disk(disk, moved)
    return ET.tostring(root, encoding="unicode") + "\n"


def identity_of(text: str, *, subject: object) -> tuple[str, str | None]:
    """Name and UUID of the domain that some XML defines. Raises Corrupt."""
    root = parse(text, subject=subject)
    name = (root.findtext("name") or "").strip()
    if not name:
        raise Corrupt("the record has a domain without a name", subject=subject)
    return name, (root.findtext("uuid") or "").strip() or None


_FILES_OF_THE_HOST = {
    "the firmware": "os/loader",
    "the kernel": "os/kernel",
    "the initial ramdisk": "os/initrd",
    "the emulator": "devices/emulator",
}
_OF_THE_HOST: dict[str, Callable[[ET.Element], bool]] = {
    "hostdev": lambda _: True,
    "interface": lambda each: each.get("type") == "hostdev",
    "input": lambda each: each.get("type") in ("passthrough", "evdev"),
    "tpm": lambda each: any(backend.get("type") == "passthrough" for backend in each.findall("backend")),
}


def _set_disk(disk: ET.Element, restored: NewDisk) -> None:
    for name in ("source", "backingStore", "mirror", "auth"):
        for element in disk.findall(name):
            disk.remove(element)
    disk.set("type", "file")
    driver = disk.find("driver")
    if driver is None:
        driver = ET.Element("driver", {"name": "qemu"})
        disk.insert(0, driver)
    driver.set("type", restored.format)
    for element in driver.findall("metadata_cache") if restored.format == "raw" else ():
        driver.remove(element)
    disk.insert(list(disk).index(driver) + 1, ET.Element("source", {"file": str(restored.path)}))


def _stop_on_errors(disk: ET.Element) -> None:
    driver = disk.find("driver")
    assert driver is not None, "set by _set_disk"
    driver.set("error_policy", "stop")
    driver.set("rerror_policy", "stop")


def _missing_source(disk: ET.Element, words: str) -> list[str]:
    source = disk.find("source")
    path = "" if source is None else source.get("file") or source.get("dev") or ""
    return [f"{words} is missing here: {path}"] if is_missing(path) else []


def _without_devices_of_the_host(devices: ET.Element) -> list[str]:
    gone = []
    for tag, is_one in _OF_THE_HOST.items():
        for element in list(devices.findall(tag)):
            if is_one(element):
                devices.remove(element)
                source = element.find("source/address")
                where = "" if source is None else " " + " ".join(f"{key}={value}" for key, value in source.items())
                gone.append(f"a device of the host that it ran on is left out of the definition: {tag}{where}")
    return gone


def _isolate(devices: ET.Element) -> None:
    """Leave its network cards out, and let it share no port, log or device with the guest that may run here."""
    for card in devices.findall("interface"):
        devices.remove(card)
    for graphics in devices.findall("graphics"):
        for name in ("port", "tlsPort", "websocket", "socket"):
            graphics.attrib.pop(name, None)
        if graphics.get("type") in ("vnc", "spice"):
            graphics.set("autoport", "yes")
    for tag in ("serial", "console", "parallel"):
        for console in devices.findall(tag):
            if console.get("type") in ("file", "pipe", "dev", "tcp", "udp"):
                console.set("type", "null")
                for child in [each for each in console if each.tag in ("source", "protocol")]:
                    console.remove(child)
    for cid in devices.iterfind("vsock/cid"):
        cid.attrib.clear()
        cid.set("auto", "yes")


def _log_console(devices: ET.Element, path: str) -> None:
    """Let libvirt write what comes out of the first serial port, or console, to a file too."""
    port = devices.find("serial")
    if port is None:
        port = devices.find("console")
    if port is None:
        port = ET.SubElement(devices, "serial", {"type": "null"})
    for log in port.findall("log"):
        port.remove(log)
    ET.SubElement(port, "log", {"file": path, "append": "off"})
    # libvirt takes the first console for the first serial port, and wants both alike.
    for console in devices.findall("console"):
        target = console.find("target")
        if port.tag == "serial" and (target is None or target.get("type", "serial") == "serial"):
            devices.remove(console)


def _set_firmware(root: ET.Element, changes: Changes) -> list[str]:
    nvram = root.find("os/nvram")
    if nvram is None:
        return []
    for child in list(nvram):
        nvram.remove(child)
    nvram.attrib.pop("type", None)
    restored = next(iter(changes.nvram.values()), None)
    # Without a name libvirt makes a new file; under the old name a second guest would share the first one's.
    nvram.text = None if restored is None else str(restored)
    return [] if restored else ["its firmware variables were not recorded: the guest starts with new ones"]


def _set_identity(root: ET.Element, devices: ET.Element, identity: NewIdentity) -> None:
    if identity.name is not None:
        _text(root, "name", identity.name)
    _text(root, "uuid", identity.uuid)
    for entry in root.iterfind("sysinfo/system/entry"):
        if entry.get("name") == "uuid":  # libvirt wants it equal to the domain's
            entry.text = identity.uuid
    for genid in root.findall("genid"):  # libvirt makes a new one
        genid.text = None
    for mac in devices.iterfind("interface/mac"):
        mac.set("address", identity.mac())
    for target in devices.iterfind("interface/target"):
        target.attrib.pop("dev", None)
    for source in devices.iterfind("channel/source"):
        if source.get("mode") == "bind":  # the first guest's socket; libvirt chooses another
            source.attrib.pop("path", None)


def _text(root: ET.Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        element = ET.Element(tag)
        root.insert(0, element)
    element.text = text
