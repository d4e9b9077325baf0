"""QEMU's command line, changed for disks that were restored elsewhere.

    -drive file=/old/a.qcow2,if=virtio,backing.file.filename=...      if=virtio,format=qcow2,file=/new/vda.qcow2
    -blockdev driver=qcow2,node-name=a,file=f,backing=b               driver=qcow2,node-name=a,file.driver=file,
    -blockdev driver=file,node-name=f,filename=/old/a.qcow2             file.filename=/new/vda.qcow2
    -blockdev driver=qcow2,node-name=b,...                            gone: nothing refers to it any more

The active layer's file has another name after each live snapshot, so a disk is found by the device that reads it.
Both forms of -blockdev and -device are read: key=value, and JSON.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snapchain.errors import Corrupt, Unsupported
from snapchain.host.qemu_options import split
from snapchain.ops.restore.changed_definition import Changed, Changes, NewDisk, is_missing

Node = dict[str, Any]
Words = list[tuple[str, str | None]]
"""Parts of a key=value argument; a part without '=' has no value."""

_FILTERS = frozenset({"throttle", "copy-on-read", "copy-before-write", "preallocate", "compress", "blkdebug"})
_ANY_NODE = frozenset({"node-name", "read-only", "auto-read-only", "discard", "detect-zeroes", "force-share", "cache"})
_FILE_NODE = _ANY_NODE | {"aio", "locking", "drop-cache"}
_CHILDREN = frozenset({"file", "backing", "data-file", "encrypt"})
_PLAIN_DISKS = {"hda": 0, "hdb": 1, "hdc": 2, "hdd": 3}
_UNITS_OF_A_BUS = {"ide": 2, "scsi": 7}
_SOCKETS = frozenset({"qmp", "qmp-pretty", "monitor", "serial", "parallel"})
_SOCKET_KINDS = ("unix:", "tcp:", "telnet:", "websocket:")
_WAITS = ("wait", "nowait")
_CONSOLES = _SOCKETS | {"debugcon"}
_SHARED_CONSOLES = ("tcp:", "telnet:", "websocket:", "udp:", "file:", "pipe:", "/dev/")
_SHARED_BACKENDS = frozenset({"file", "pipe", "udp", "serial", "tty", "parallel", "parport"})
_DESCRIPTORS = frozenset({"fd", "fds", "vhostfd", "vhostfds"})
_MAC = {"device": "mac", "nic": "mac", "net": "macaddr"}
_STOPS_ON_ERRORS = re.compile(r"virtio-blk|scsi-hd$|ide-hd$|usb-storage$")
"""Devices that QEMU can stop the guest for. Others pass I/O errors on."""
_DRIVES_THAT_STOP = frozenset({"ide", "scsi", "virtio"})
_ON_ERROR = {"rerror": "stop", "werror": "stop"}
_FILES_OF_THE_HOST = frozenset({"kernel", "initrd", "bios", "dtb", "readconfig"})
_NETWORK = frozenset({"netdev", "nic", "net"})
_IMPLIED = {"blockdev": "driver", "device": "driver", "name": "guest", "chardev": "backend"}
_OF_THE_HOST = re.compile(r"vfio-|usb-host$|scsi-block$|scsi-generic$|vhost-vdpa|host-|igd-|ccid-card-passthru")
_CONSOLE = "snapchain-console"
_MOST_ARGUMENTS = 10_000


def change(argv: Sequence[str], changes: Changes, *, subject: object) -> Changed:
    """A shell script that starts the restored guest.

    Disks that were not recorded, and devices of the host that the guest came from, are left out.
    Raises Corrupt for what is no command line.
    """
    line = _changed(argv, changes, subject)
    return Changed(_script([argv[0], *line.words()]), tuple(line.lacking))


@dataclass(frozen=True, slots=True)
class IncomingCommand:
    """A command line of a QEMU that awaits a guest. qmp: path of its monitor; lacking: what it leaves out, sentences"""

    argv: tuple[str, ...]
    qmp: Path
    lacking: tuple[str, ...]


def change_for_incoming(argv: Sequence[str], changes: Changes, *, monitor: Path, subject: object) -> IncomingCommand:
    """The command line with which the QEMU at the destination of a live migration is started.

    monitor: the QMP socket by which the guest is known here; where it is none of the command line's, the first counts
    Raises Corrupt as `change`, and Unsupported for a command line without a QMP socket.
    """
    old = _CommandLine(argv[1:], changes).qmp_sockets()
    line = _changed(argv, changes, subject)
    new = line.qmp_sockets()
    if not new:
        raise Unsupported(
            "its command line has no QMP socket, by which the guest could be reached at the destination",
            subject=subject,
            hint="start QEMU with -qmp unix:PATH,server=on,wait=off",
        )
    line.wait_for_nobody()
    place = old.index(monitor) if monitor in old else 0
    words = [word for word in line.words() if word not in ("-S", "--S", "-daemonize", "--daemonize")]
    return IncomingCommand((argv[0], *words, "-S", "-incoming", "defer"), new[place], tuple(line.lacking))


def _changed(argv: Sequence[str], changes: Changes, subject: object) -> _CommandLine:
    if not argv or len(argv) > _MOST_ARGUMENTS or any("\0" in word for word in argv):
        raise Corrupt("the record has no usable command line", subject=subject)
    try:
        line = _CommandLine(argv[1:], changes)
        for name, disk in changes.disks.items():
            if changes.stops_on_errors and not line.stop_on_errors(name):
                raise Unsupported(
                    f"QEMU cannot stop the guest at an I/O error of {name}, so the guest would see the error",
                    subject=subject,
                    hint="restore it whole: leave --instant out",
                )
            if not line.set_disk(name, disk):
                line.lacking.append(f"{name} is not in the command line; its file is {disk.path}")
        for name, reason in changes.left_out.items():
            if line.leave_out(name):
                line.lacking.append(f"{name} is left out of the command line, since it was not recorded: {reason}")
        line.set_the_rest()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Corrupt(f"the recorded command line cannot be read: {error}", subject=subject) from error
    return line


def _script(words: Sequence[str]) -> str:
    """A command as a shell script, an option a line."""
    lines: list[list[str]] = []
    for word in words:
        if not lines or word.startswith("-") or len(lines[-1]) > 1 or not lines[-1][0].startswith("-"):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    head = "#!/bin/sh\n# Starts a restored guest. The command is the recorded one: read it before you run it.\n"
    return head + "exec " + " \\\n    ".join(map(" ".join, lines)) + "\n"


class _Option:
    """An argument with its value. name: without dashes; node: of -blockdev, its block nodes."""

    def __init__(self, word: str, value: str | None) -> None:
        self.word, self._value = word, value
        self.name = word.lstrip("-") if word.startswith("-") else ""
        self.is_json = value is not None and value.lstrip().startswith("{")
        self.node: Node | None = None
        if self.name == "blockdev" and value is not None:
            self.node = json.loads(value) if self.is_json else _nested(self.parts)
        self.is_changed = False

    @property
    def value(self) -> str | None:
        """As it is now."""
        if self.node is None or not self.is_changed:
            return self._value
        return json.dumps(self.node) if self.is_json else _join(list(_flat(self.node)))

    @value.setter
    def value(self, value: str | None) -> None:
        self._value = value

    @property
    def parts(self) -> Words:
        """Of key=value. The first part may lack its key."""
        words: Words = []
        for part in split(self._value or ""):
            key, equals, value = part.partition("=")
            words.append((key, value if equals else None))
        implied = _IMPLIED.get(self.name)
        if implied and words and words[0][1] is None:
            words[0] = implied, words[0][0]
        return words

    @parts.setter
    def parts(self, words: Words) -> None:
        self._value = _join(words)

    @property
    def values(self) -> Mapping[str, str]:
        """By key, as text; `on` for a part without a value."""
        if self.is_json:
            found = json.loads(self._value or "")
            return {str(key): value for key, value in found.items() if isinstance(value, str)}
        return {key: "on" if value is None else value for key, value in self.parts}

    def set(self, key: str, value: str) -> None:
        """Give a key another value."""
        if self.is_json:
            self._value = json.dumps({**json.loads(self._value or ""), key: value})
        else:
            self.parts = [(each, value if each == key else old) for each, old in self.parts]

    def put(self, values: Mapping[str, str]) -> None:
        """Give keys their only values, whether they are there or not."""
        if self.is_json:
            self._value = json.dumps({**json.loads(self._value or ""), **values})
        else:
            self.parts = [*(each for each in self.parts if each[0] not in values), *values.items()]

    def nodes(self) -> Iterator[Node]:
        """All block nodes of a -blockdev, outer ones first."""
        return iter(()) if self.node is None else _nodes(self.node)

    def references(self) -> Iterator[str]:
        """Text that may name a block node."""
        if self.node is not None:
            for node in self.nodes():
                yield from (value for key, value in node.items() if isinstance(value, str) and key != "node-name")
        elif self._value is not None:
            yield from self.values.values()


class _CommandLine:
    def __init__(self, words: Sequence[str], changes: Changes) -> None:
        self._changes = changes
        self.lacking: list[str] = []
        self._variables: set[Path] = set()
        self._places: dict[str, str] = {}
        self._options: list[_Option] = []
        rest = list(reversed(words))
        while rest:
            word = rest.pop()
            has_value = word.startswith("-") and rest and (rest[-1] == "-" or not rest[-1].startswith("-"))
            self._options.append(_Option(word, rest.pop() if has_value else None))
        self._referred_to = self._references()

    def words(self) -> Iterator[str]:
        for option in self._options:
            yield option.word
            if (value := option.value) is not None:
                yield value

    def qmp_sockets(self) -> list[Path]:
        """The unix sockets at which it serves QMP, in their order."""
        found = []
        chardevs = {
            option.values.get("id"): option.values.get("path")
            for option in self._options
            if option.name == "chardev" and option.values.get("backend") == "socket"
        }
        for option in self._options:
            if option.name in ("qmp", "qmp-pretty") and (option.value or "").startswith("unix:"):
                found.append(Path(split((option.value or "").removeprefix("unix:"))[0]))
            elif option.name == "mon" and option.values.get("mode") == "control":
                path = chardevs.get(option.values.get("chardev"))
                found += [Path(path)] if path else []
        return found

    def wait_for_nobody(self) -> None:
        """No socket of it keeps QEMU from starting until somebody connects, which is what QEMU does by default."""
        for option in self._options:
            if option.name == "chardev" and option.values.get("backend") == "socket" and not option.is_json:
                if option.values.get("server", "off") not in ("off", "no", "false"):
                    option.parts = [*(each for each in option.parts if each[0] not in _WAITS), ("wait", "off")]
            elif option.name in _SOCKETS and (option.value or "").startswith(_SOCKET_KINDS):
                parts = split(option.value or "")
                if any(part.partition("=")[0] == "server" for part in parts):
                    kept = [part for part in parts if part.partition("=")[0] not in _WAITS]
                    option.value = ",".join(part.replace(",", ",,") for part in [*kept, "wait=off"])

    def set_disk(self, name: str, disk: NewDisk) -> bool:
        """Let a disk name its new file. Returns whether it was found."""
        found = self._source_of(name)
        if found is None:
            return False
        option, node_name = found
        if option.node is None:
            _set_drive(option, disk)
            return True
        format_node = self._format_node(node_name)
        if format_node is None:
            return False
        owner, node = format_node
        new = self._new_node(node, disk)
        node.clear()
        node.update(new)
        owner.is_changed = True
        self._drop_unreferenced()
        return True

    def stop_on_errors(self, name: str) -> bool:
        """Let an I/O error of a disk stop the guest, by its options. Returns whether it has any that can do that."""
        found = self._source_of(name)
        if found is None or found[0].name in _PLAIN_DISKS:
            return False
        option, node_name = found
        drive = node_name if option.node is not None else option.values.get("id")
        devices = [
            each
            for each in self._options
            if each.name == "device" and drive is not None and each.values.get("drive") == drive
        ]
        if option.node is None:
            option.put(_ON_ERROR)
        for each in devices:
            each.put(_ON_ERROR)
        if devices:
            return all(_STOPS_ON_ERRORS.match(each.values.get("driver", "")) for each in devices)
        return option.node is None and option.values.get("if", "ide") in _DRIVES_THAT_STOP

    def leave_out(self, name: str) -> bool:
        """Remove a disk, and its device, unless it is only read. Returns whether it was removed."""
        found = self._source_of(name)
        if found is None:
            return False
        option, node_name = found
        values = option.values if option.node is None else option.node
        is_read = values.get("media") == "cdrom" or any(
            values.get(key) in (True, "on") for key in ("readonly", "read-only")
        )
        if is_read:
            return False
        drive = node_name if option.node is not None else option.values.get("id")
        self._options = [
            each
            for each in self._options
            if each is not option and not (each.name == "device" and drive and each.values.get("drive") == drive)
        ]
        self._drop_unreferenced()
        return True

    def set_the_rest(self) -> None:
        """Firmware variables, sockets, identity; and without what makes sense only where the guest came from."""
        kept = [_Option("-nic", "none")] if self._changes.without_network else []
        for option in self._options:
            if option.name in ("incoming", "loadvm"):
                continue
            if self._changes.without_network and not self._isolated(option):
                continue
            if option.name == "device" and _OF_THE_HOST.match(option.values.get("driver", "")):
                self.lacking.append(f"a device of the host that it ran on is left out: {option.value}")
                continue
            if option.name == "add-fd" or _DESCRIPTORS & option.values.keys():
                self.lacking.append(f"an open descriptor, which QEMU got at its start: -{option.name} {option.value}")
            self._set_firmware(option)
            self._move_sockets(option)
            self._set_identity(option)
            if option.name in _FILES_OF_THE_HOST and is_missing(option.value or ""):
                self.lacking.append(f"the file of -{option.name} is missing here: {option.value}")
            kept.append(option)
        self._options = kept
        if self._changes.without_network:
            self.wait_for_nobody()
        if self._changes.console is not None:
            self._log_console(str(self._changes.console))
        self.lacking += [
            f"{name} is not in the command line; its file is {path}"
            for name, path in self._changes.nvram.items()
            if path not in self._variables
        ]

    def _isolated(self, option: _Option) -> bool:
        """Let an option share no port, log or device with the guest that may run here. False where it has to go."""
        value = option.value or ""
        if _is_network(option) or option.name in ("s", "gdb", "D"):
            return False
        if option.name == "vnc":
            option.word, option.name, option.value = "-display", "display", "none"
        elif option.name == "spice":
            option.value = f"unix=on,addr={self._moved('spice').replace(',', ',,')},disable-ticketing=on"
        elif option.name in _CONSOLES and value.startswith(_SHARED_CONSOLES):
            option.value = "null"
        elif option.name == "chardev":
            values = option.values
            if values.get("backend") in _SHARED_BACKENDS or values.keys() & {"host", "port"}:
                option.parts = [("null", None), ("id", values.get("id", ""))]
        return True

    def _log_console(self, path: str) -> None:
        """Let what comes out of the first serial port, or console, go to a file too."""
        port = next((each for each in self._options if each.name == "serial"), None)
        if port is None:
            port = next((each for each in self._options if each.name == "device" and _is_console(each)), None)
            name = None if port is None else port.values.get("chardev")
        else:
            value = port.value or ""
            name = value.removeprefix("chardev:") if value.startswith("chardev:") else None
        for option in self._options:
            if name is not None and option.name == "chardev" and option.values.get("id") == name:
                parts = [each for each in option.parts if each[0] not in ("logfile", "logappend")]
                option.parts = [*parts, ("logfile", path), ("logappend", "off")]
                return
        value = "" if port is None else port.value or ""
        if port is None or port.name != "serial":
            port = _Option("-serial", None)
            self._options.append(port)
        if value.startswith("unix:"):
            backend = f"socket,id={_CONSOLE},path={value.removeprefix('unix:')}"
        else:
            backend = f"null,id={_CONSOLE}"
        port.value = f"chardev:{_CONSOLE}"
        log = f",logfile={path.replace(',', ',,')},logappend=off"
        self._options.insert(self._options.index(port), _Option("-chardev", backend + log))

    def _source_of(self, name: str) -> tuple[_Option, str] | None:
        """The -drive, -blockdev or -hda of a disk, and the name of the node or drive.

        Where the name tells nothing, the recorded path of its file does.
        """
        wanted = name
        for option in self._options:
            if option.name == "device" and option.values.get("id") == name:
                wanted = option.values.get("drive", name)
        counts: dict[str, int] = {}
        for option in self._options:
            if any(node.get("node-name") == wanted for node in option.nodes()):
                return option, wanted
            if option.name == "drive":
                values = option.values
                automatic = _automatic_name(values, counts)
                if values.get("id", automatic) == wanted:
                    return option, wanted
            elif option.name in _PLAIN_DISKS and wanted in (option.name, _ide_name(_PLAIN_DISKS[option.name])):
                return option, wanted
        return self._source_at(self._changes.old_paths.get(name) or None)

    def _source_at(self, path: str | None) -> tuple[_Option, str] | None:
        """Of a file's old path; the lowest node that has a name."""
        for option in self._options:
            named = [node["node-name"] for node in option.nodes() if isinstance(node.get("node-name"), str)]
            if path is not None and named and any(node.get("filename") == path for node in option.nodes()):
                return option, named[0]
            if option.name == "drive" and path is not None:
                values = option.values
                if path in (values.get("file"), values.get("file.filename")):
                    return option, values.get("id", "")
            if option.name in _PLAIN_DISKS and path is not None and option.value == path:
                return option, option.name
        return None

    def _format_node(self, name: object) -> tuple[_Option, Node] | None:
        """The node that is replaced, which lies below filters, and its option."""
        for _ in self._options:
            found = self._node(name)
            if found is None:
                return None
            option, node = found
            while node.get("driver") in _FILTERS and isinstance(node.get("file"), dict):
                node = node["file"]
            if node.get("driver") not in _FILTERS:
                return option, node
            name = node.get("file")
        return None

    def _node(self, name: object) -> tuple[_Option, Node] | None:
        for option in self._options:
            for node in option.nodes():
                if name is not None and node.get("node-name") == name:
                    return option, node
        return None

    def _new_node(self, node: Node, disk: NewDisk) -> Node:
        """The same node on the new file, without a backing chain: the file itself names that."""
        below = node.get("file")
        if isinstance(below, str):
            found = self._node(below)
            below = None if found is None else found[1]
        options = below if isinstance(below, dict) else {}
        is_file = options.get("driver") in ("file", "host_device")
        file = {key: value for key, value in options.items() if key in (_FILE_NODE if is_file else _ANY_NODE)}
        is_same = node.get("driver") == disk.format
        kept = {key: value for key, value in node.items() if key in _ANY_NODE or (is_same and key not in _CHILDREN)}
        return {**kept, "driver": disk.format, "file": {**file, "driver": "file", "filename": str(disk.path)}}

    def _drop_unreferenced(self) -> None:
        """Remove nodes that only the old chain of a disk referred to: they would open files of another guest."""
        while True:
            now = self._references()
            kept = [
                option
                for option in self._options
                if not any(node.get("node-name") in self._referred_to - now for node in option.nodes())
                or any(node.get("node-name") in now for node in option.nodes())
            ]
            if len(kept) == len(self._options):
                return
            self._options = kept

    def _references(self) -> set[str]:
        return {word for option in self._options for word in option.references()}

    def _set_firmware(self, option: _Option) -> None:
        if option.name == "drive" and option.values.get("if") == "pflash":
            if (path := self._variables_at(option.values.get("file"))) is not None:
                option.set("file", str(path))
        elif option.name == "pflash" and (path := self._variables_at(option.value)) is not None:
            option.value = str(path)
        for node in option.nodes():
            if (path := self._variables_at(node.get("filename"))) is not None:
                node["filename"] = str(path)
                option.is_changed = True

    def _variables_at(self, old: object) -> Path | None:
        """The new file of firmware variables, by the name of the old one."""
        path = self._changes.nvram.get(Path(old).name) if isinstance(old, str) else None
        if path is not None:
            self._variables.add(path)
        return path

    def _move_sockets(self, option: _Option) -> None:
        """Into the directory of the new files: a second guest would take its sockets away from the first one."""
        value = option.value or ""
        if option.name == "pidfile":
            option.value = self._moved(value)
        elif option.name in _SOCKETS and value.startswith("unix:"):
            socket, *rest = split(value.removeprefix("unix:")) or [""]
            if any(part.partition("=")[0] == "server" for part in rest):
                parts = [f"unix:{self._moved(socket)}", *rest]
                option.value = ",".join(part.replace(",", ",,") for part in parts)
        elif option.name == "chardev" and option.values.get("backend") == "socket":
            path, listens = option.values.get("path"), option.values.get("server", "off")
            if path and listens not in ("off", "no", "false"):
                option.set("path", self._moved(path))

    def _moved(self, old: str) -> str:
        """A path of its own: two sockets of one name would be one, and the first could not be reached."""
        name, number = Path(old).name, 1
        while self._places.setdefault(name, old) != old:
            number += 1
            name = f"{number}-{Path(old).name}"
        return str(self._changes.directory / name)

    def _set_identity(self, option: _Option) -> None:
        identity = self._changes.identity
        if identity is None:
            return
        if option.name == "uuid":
            option.value = identity.uuid
        elif option.name == "name" and identity.name is not None:
            option.set("guest", identity.name)
        elif option.name in _MAC and _MAC[option.name] in option.values:
            option.set(_MAC[option.name], identity.mac())


def _set_drive(option: _Option, disk: NewDisk) -> None:
    """Of -drive or -hda: the new file, without what told of the old one's chain."""
    parts = option.parts
    if option.name in _PLAIN_DISKS:
        parts = [("index", str(_PLAIN_DISKS[option.name])), ("media", "disk")]
        option.word, option.name = "-drive", "drive"
    kept = [
        (key, value)
        for key, value in parts
        if key not in ("format", "driver")
        and (key.partition(".")[0] not in _CHILDREN or key in ("file.locking", "file.node-name"))
    ]
    option.parts = [*kept, ("format", disk.format), ("file", str(disk.path))]


def _is_console(option: _Option) -> bool:
    values = option.values
    return values.get("driver") in ("isa-serial", "pci-serial", "virtconsole", "sclpconsole") and "chardev" in values


def _is_network(option: _Option) -> bool:
    return option.name in _NETWORK or (option.name == "device" and "netdev" in option.values)


def _automatic_name(values: Mapping[str, str], counts: dict[str, int]) -> str:
    """As QEMU names a -drive without an id. counts: of each interface, the next free index"""
    kind = values.get("if", "ide")
    given = values.get("index", values.get("unit", ""))
    index = int(given) if given.isascii() and given.isdecimal() and len(given) < 5 else counts.get(kind, 0)
    counts[kind] = index + 1
    units = _UNITS_OF_A_BUS.get(kind)
    medium = "cd" if values.get("media") == "cdrom" else "hd"
    return f"{kind}{index}" if units is None else f"{kind}{index // units}-{medium}{index % units}"


def _ide_name(index: int) -> str:
    return f"ide{index // 2}-hd{index % 2}"


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for value in node.values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, dict):
                yield from _nodes(each)


def _nested(words: Words) -> Node:
    """{"file": {"driver": ...}} of file.driver=... Raises ValueError for keys that contradict each other."""
    root: Node = {}
    for key, value in words:
        *above, last = key.split(".")
        node = root
        for name in above:
            below = node.setdefault(name, {})
            if not isinstance(below, dict):
                raise TypeError(f"{key} contradicts {name}")
            node = below
        node[last] = "on" if value is None else value
    return root


def _flat(node: Node, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def _join(words: Sequence[tuple[str, str | None]]) -> str:
    return ",".join((key if value is None else f"{key}={value}").replace(",", ",,") for key, value in words)
