"""From what QEMU tells of its block devices to the disks of a guest. Pure: the answers go in, disks come out.

    query-block        each device, and its images from the top down (`image`, `backing-image`, ...), filters too
    query-blockstats   the node names of the same images, from the top down (`node-name`, `backing`, ...)
    query-named-block-nodes
                       what the two lack: the bitmaps of lower layers. Left out beside a stream job (qmp.py)

Nodes are matched by their place in a device's chain.  Names of files would not do: two disks may share a base, which
QEMU then has open twice, and only one of the two nodes belongs to a disk.

        device vda
          |
        throttle       filters, which store nothing
          |
        web1.3.qcow2   active layer
          |
        web1.2.qcow2
          |
        web1.qcow2     root of the chain
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from snapchain.guest.protocol import Bitmap, GuestDisk, Layer
from snapchain.model.disk_name import is_disk_name

FILTERS = frozenset({
    "throttle", "copy-on-read", "copy-before-write", "compress", "preallocate", "blkdebug", "blklogwrites", "blkreplay",
    "mirror_top", "commit_top", "backup-top", "replication",
})  # fmt: skip
_FILES = frozenset({"file", "host_device", "host_cdrom"})
_READABLE = frozenset({"qcow2", "raw"})
_PASSED_THROUGH = frozenset({"scsi-block", "scsi-generic"})
_CD_DEVICES = frozenset({"ide-cd", "scsi-cd"})
_MOST_LAYERS = 1000
_MOST_NESTING = 64
_PERIPHERAL = re.compile(r"/machine/peripheral/([^/]+)")
_LONGEST_SHOWN = 200


class Misread(ValueError):
    """QEMU's answer is not what this module reads."""


class Inconsistent(Exception):
    """The graph changed between two of the answers: ask again."""

    def __init__(self, where: str) -> None:
        super().__init__(f"the block graph changed at {where}")


class Location(Protocol):
    """As qemu_files.Located."""

    @property
    def path(self) -> Any: ...
    @property
    def identity(self) -> tuple[int, int] | None: ...
    @property
    def is_block_device(self) -> bool: ...
    @property
    def problem(self) -> str | None: ...


Locate = Callable[[str], Location]
"""Where the file is that QEMU has open under a name."""


@dataclass(frozen=True, slots=True)
class DiskView:
    """A disk, and how QEMU has it open. device, qdev: by which QEMU tells its statistics

    filter_drivers: of the disk's filters; direct, no_flush: the cache mode; detect_zeroes: off, on or unmap
    """

    disk: GuestDisk
    device: str
    qdev: str
    filter_drivers: tuple[str, ...] = ()
    direct: bool = False
    no_flush: bool = False
    detect_zeroes: str = "off"


@dataclass(frozen=True, slots=True)
class Source:
    """What a node reads. path: None where it is no file; says: in words, for messages; is_cut: QEMU cut its name."""

    path: str | None
    says: str
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class _Node:
    """A node of a chain, from both answers."""

    name: str
    driver: str
    image: Mapping[str, Any]
    storage: str
    """The node that reads its file; "" for none."""


def disks(
    block: Sequence[Mapping[str, Any]],
    stats: Sequence[Mapping[str, Any]],
    nodes: Sequence[Mapping[str, Any]] | None,
    *,
    locate: Locate,
    types: Mapping[str, str] | None = None,
) -> tuple[DiskView, ...]:
    """All disks of a guest, in QEMU's order.

    nodes: None where they could not be listed; then only the bitmaps of active layers are known
    types: of the guest's devices, by their QOM paths: virtio-blk-pci, ide-cd, ...
    Raises Inconsistent, and Misread for what is no answer of QEMU.
    """
    listed = None if nodes is None else {_text(each, "node-name"): each for each in nodes}
    by_device = {_key(each): each for each in stats}
    inactive = {_text(each, "node-name") for each in nodes or () if each.get("active") is False}
    found: list[DiskView] = []
    taken: set[str] = set()
    for number, each in enumerate(block):
        counted = by_device.get(_key(each))
        if counted is None:
            raise Inconsistent(_text(each, "qdev"))
        name = _unique(name_of(_text(each, "qdev"), _text(each, "device"), number), taken)
        view = _view(each, counted, name, listed, locate, _kind(_text(each, "qdev"), types or {}))
        if view.disk.left_out is None and view.disk.obstacle is None and view.disk.active.node in inactive:
            view = _obstructed(view, "its image is inactive: the guest is being migrated")
        found.append(view)
    return tuple(_without_shared(found))


def name_of(qdev: str, device: str, number: int) -> str:
    """The name of a disk: the id of its device, else of its drive, else by its number."""
    inside = _PERIPHERAL.match(qdev)
    if inside is not None:
        name = inside[1]
    elif qdev and "/" not in qdev:
        name = qdev
    else:
        name = device or f"disk{number}"
    name = re.sub(r"[^A-Za-z0-9._-]", "-", name[:100]).lstrip(".-")
    return name if is_disk_name(name) else f"disk{number}"


def roots(block: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The name of each disk's root node, by the disk's name; what is empty is left out."""
    taken: set[str] = set()
    found = {}
    for number, each in enumerate(block):
        name = _unique(name_of(_text(each, "qdev"), _text(each, "device"), number), taken)
        if isinstance(inserted := each.get("inserted"), Mapping):
            found[name] = _text(inserted, "node-name")
    return found


def _kind(qdev: str, types: Mapping[str, str]) -> str:
    """The type of a disk's device."""
    return types.get(device_path(qdev), "")


def _unique(name: str, taken: set[str]) -> str:
    number, unique = 1, name
    while unique in taken:
        number += 1
        unique = f"{name}.{number}"
    taken.add(unique)
    return unique


def _key(device: Mapping[str, Any]) -> tuple[str, str]:
    return _text(device, "qdev"), _text(device, "device")


def _view(
    device: Mapping[str, Any],
    counted: Mapping[str, Any],
    name: str,
    listed: Mapping[str, Mapping[str, Any]] | None,
    locate: Locate,
    kind: str,
) -> DiskView:
    inserted = device.get("inserted")
    qdev, drive = _text(device, "qdev"), _text(device, "device")
    if inserted is None:
        return DiskView(GuestDisk(name, "", (), (), read_only=True, left_out="empty"), drive, qdev)
    if not isinstance(inserted, Mapping):
        raise Misread("inserted is not an object")
    chain = list(_chain(inserted, counted))
    read_only = inserted.get("ro") is True
    above = list(_until_format(chain))
    images = [each for each in chain if each.driver not in FILTERS]
    known = listed if listed is not None else {chain[0].name: inserted}
    layers, problems = [], []
    for node, upper in zip(images, [None, *images], strict=False):
        source = _source(node, upper, known)
        layer, problem = _layer(node, source, _bitmaps(known.get(node.name, {})), locate, is_active=upper is None)
        layers.append(layer)
        problems += [problem] if problem is not None else []
    problems += [problem for problem in [_mismatch(images, layers, locate)] if problem is not None]
    if not images:
        problems.append("it has filters only, and no image")
    if inserted.get("encrypted") is True:
        problems.insert(0, "it is encrypted; a new overlay would not be")
    if kind in _PASSED_THROUGH:
        problems.insert(0, f"the guest has the device itself ({kind})")
    disk = GuestDisk(
        name,
        root=chain[0].name,
        filters=tuple(each.name for each in above),
        chain=tuple(reversed(layers)),
        read_only=read_only,
        obstacle=problems[0] if problems else None,
        left_out=_left_out(device, qdev, kind, read_only=read_only),
    )
    cache = inserted.get("cache")
    cache = cache if isinstance(cache, Mapping) else {}
    zeroes = _text(inserted, "detect_zeroes")
    return DiskView(
        disk,
        drive,
        qdev,
        tuple(each.driver for each in above),
        direct=cache.get("direct") is True,
        no_flush=cache.get("no-flush") is True,
        detect_zeroes=zeroes if zeroes in {"on", "unmap"} else "off",
    )


def _left_out(device: Mapping[str, Any], qdev: str, kind: str, *, read_only: bool) -> str | None:
    if not qdev:
        return "unattached"
    if kind in _CD_DEVICES or (device.get("removable") is True and read_only):
        return "CD-ROM"
    if device.get("removable") is True:
        return "removable"
    if qdev.startswith("/machine/system.flash"):
        return "firmware"
    return "read-only" if read_only else None


def _until_format(chain: Sequence[_Node]) -> Iterator[_Node]:
    for each in chain:
        if each.driver not in FILTERS:
            return
        yield each


def _chain(inserted: Mapping[str, Any], counted: Mapping[str, Any]) -> Iterator[_Node]:
    """The nodes of a device, from its root down. Raises Inconsistent where the two answers differ."""
    image: Any = inserted.get("image")
    stat: Any = counted
    if _text(inserted, "node-name") != _text(counted, "node-name"):
        raise Inconsistent(_text(inserted, "node-name"))
    for _ in range(_MOST_LAYERS):
        if not isinstance(image, Mapping) or not isinstance(stat, Mapping):
            raise Misread("an image is not an object")
        name = _text(stat, "node-name")
        if not name:
            raise Misread("a node has no name")
        yield _Node(name, _text(image, "format"), image, _storage(stat))
        image, stat = image.get("backing-image"), stat.get("backing")
        if (image is None) != (stat is None):
            raise Inconsistent(name)
        if image is None:
            return
    raise Misread(f"a chain has more than {_MOST_LAYERS} images")


def _storage(stat: Mapping[str, Any]) -> str:
    below = stat.get("parent")
    for _ in range(_MOST_NESTING):
        if not isinstance(below, Mapping) or not isinstance(below.get("parent"), Mapping):
            break
        below = below["parent"]
    return _text(below, "node-name") if isinstance(below, Mapping) else ""


def _source(node: _Node, above: _Node | None, listed: Mapping[str, Mapping[str, Any]]) -> Source:
    """What a node reads. listed: all nodes by name, where they could be listed

    QEMU cuts a name in JSON at 4095 bytes, and a snapshot with a relative backing name nests the whole chain in it: it
    is cut from some forty layers on. Without the list of nodes, the header above names the file.
    """
    named = source_of(_text(node.image, "filename"))
    if named.path is not None or not named.is_cut:
        return named
    if node.storage in listed:
        return source_of(_text(listed[node.storage], "file"))
    recorded = above.image.get("full-backing-filename") if above is not None else None
    return source_of(recorded) if isinstance(recorded, str) else named


def _layer(
    node: _Node, source: Source, bitmaps: tuple[Bitmap, ...], locate: Locate, *, is_active: bool
) -> tuple[Layer, str | None]:
    """A layer, and what keeps it from a live snapshot."""
    image = node.image
    size = image.get("virtual-size")
    if not isinstance(size, int) or size < 0:
        raise Misread("virtual-size is not a number of bytes")
    image_format = "raw" if node.driver in _FILES else node.driver
    found = locate(source.path) if source.path is not None else None
    layer = Layer(
        node.name,
        path=None if found is None else found.path,
        identity=None if found is None else found.identity,
        image_format=image_format,
        virtual_size=size,
        bitmaps=bitmaps,
        is_block_device=found is not None and found.is_block_device,
    )
    return layer, _problem(image, image_format, source, found, is_active=is_active)


def _problem(
    image: Mapping[str, Any], image_format: str, source: Source, found: Location | None, *, is_active: bool
) -> str | None:
    which = "its active layer" if is_active else "a layer below"
    if image.get("encrypted") is True or image_format == "luks":
        return "it is encrypted; a new overlay would not be"
    if image_format not in _READABLE:
        return f"{which} is {_shown(image_format)}; snapchain handles qcow2 and raw"
    if source.is_cut:
        return f"{which} has a name too long for QEMU beside a stream job; wait until that has ended"
    if found is None:
        return f"{which} is {source.says}, not a file; only chains of files can be sealed"
    if found.problem is not None:
        return f"{which} is {_shown(str(found.path))}: {found.problem}"
    if found.is_block_device and is_active:
        return f"it is on the block device {_shown(str(found.path))}; an overlay needs a directory beside it"
    if _data_file(image):
        return f"{_shown(str(found.path))} has an external data file"
    return None


def _data_file(image: Mapping[str, Any]) -> bool:
    special = image.get("format-specific")
    data = special.get("data") if isinstance(special, Mapping) else None
    return isinstance(data, Mapping) and "data-file" in data


def _mismatch(images: Sequence[_Node], layers: Sequence[Layer], locate: Locate) -> str | None:
    """Whether a header names another backing file than the one that QEMU has open. Both from the top down."""
    for node, layer, below in zip(images, layers, [*layers[1:], None], strict=True):
        named = node.image.get("full-backing-filename") or node.image.get("backing-filename")
        if layer.path is None or (below is not None and below.identity is None):
            continue
        shown = _shown(str(layer.path))
        if not isinstance(named, str):
            if below is not None:
                return f"the header of {shown} names no backing file, but QEMU has {_shown(str(below.path))} below it"
            continue
        if below is None:
            return f"the header of {shown} names a backing file, and QEMU has none below it"
        source = source_of(named)
        if source.path is None or locate(source.path).identity != below.identity:
            return f"the header of {shown} names {_shown(named)}, but QEMU has {_shown(str(below.path))} below it"
    return None


def _without_shared(views: Sequence[DiskView]) -> Iterator[DiskView]:
    """A layer that one disk writes to can be no layer of another one."""
    users: dict[object, set[str]] = {}
    for view in views:
        for layer in view.disk.chain:
            users.setdefault(layer.identity or layer.node, set()).add(view.disk.name)
    for view in views:
        others: set[str] = set()
        if view.disk.left_out is None and view.disk.chain:
            others = users[view.disk.active.identity or view.disk.active.node] - {view.disk.name}
        words = f"its active layer is also used by {', '.join(sorted(others))}"
        yield _obstructed(view, words) if others else view


def with_sharing(view: DiskView) -> DiskView:
    """Of a disk that other guests may write to, too."""
    return _obstructed(view, "it is shared with other guests (share-rw=on), which write to it too")


def device_path(qdev: str) -> str:
    """The QOM path of a disk's device. qdev: its id, or a path such as /machine/peripheral/vda/virtio-backend"""
    return "/".join(qdev.split("/")[:4]) if "/" in qdev else f"/machine/peripheral/{qdev}"


def _obstructed(view: DiskView, obstacle: str) -> DiskView:
    return replace(view, disk=replace(view.disk, obstacle=view.disk.obstacle or obstacle))


def _bitmaps(node: Mapping[str, Any]) -> tuple[Bitmap, ...]:
    """Of a node; those without a name are QEMU's own, of a job."""
    listed = node.get("dirty-bitmaps")
    return tuple(
        Bitmap(
            name=_text(each, "name"),
            granularity=granularity if isinstance(granularity := each.get("granularity"), int) else 0,
            recording=each.get("recording") is True,
            persistent=each.get("persistent") is True,
            inconsistent=each.get("inconsistent") is True,
            busy=each.get("busy") is True,
        )
        for each in (listed if isinstance(listed, list) else ())
        if isinstance(each, Mapping) and _text(each, "name")
    )


def source_of(filename: str) -> Source:
    """What QEMU's name of an image means: a path, another protocol's name, or a description in JSON."""
    if filename.startswith("json:"):
        return _described(filename)
    if filename.startswith("file:"):
        return Source(filename.removeprefix("file:"), "a file")
    protocol, colon, _ = filename.partition(":")
    if colon and "/" not in protocol:
        return Source(None, f"at {_shown(filename)}")
    return Source(filename, "a file") if filename else Source(None, "without a name")


def _described(filename: str) -> Source:
    try:
        at = json.loads(filename.removeprefix("json:"))
    except (ValueError, RecursionError):
        return Source(None, "described by unreadable JSON", is_cut=filename.endswith("..."))
    for _ in range(_MOST_NESTING):
        if not isinstance(at, Mapping):
            break
        driver = str(at.get("driver"))
        if driver in _FILES and isinstance(at.get("filename"), str):
            return Source(at["filename"], "a file")
        if driver == "raw" and ("offset" in at or "size" in at):
            return Source(None, "a part of another image")
        if driver not in _READABLE and driver not in FILTERS and driver not in {"luks", "vmdk", "vdi", "qed", "vpc"}:
            return Source(None, _shown(driver))
        at = at.get("file")
    return Source(None, f"described as {_shown(filename)}")


def _text(row: Mapping[str, Any], name: str) -> str:
    """A field that is text; "" where it is not there. Raises Misread."""
    value = row.get(name, "")
    if not isinstance(value, str):
        raise Misread(f"{name} is not text")
    return value


def _shown(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
