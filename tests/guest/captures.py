"""What tests of captures share: a monitor that speaks raw QMP, a guest's disks as its graph has them, a reference."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from snapchain.errors import InvalidInput, Unavailable
from snapchain.guest.capture_record import CaptureInFlight
from snapchain.guest.protocol import GuestDisk, Layer
from tests.guest.machine import Machine, Monitor


class RawMonitor:
    """A monitor of snapchain's own socket of a machine; `commands` has all that were sent.

    before: called with each command before it is sent
    """

    def __init__(self, machine: Machine, before: Callable[[str], None] = lambda _command: None) -> None:
        self._monitor, self._before = Monitor(machine.qmp), before
        self.commands: list[tuple[str, Mapping[str, Any]]] = []

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, /) -> Any:
        """See `capture_record.Monitor`."""
        self._before(command)
        self.commands.append((command, arguments or {}))
        try:
            return self._monitor.ask(command, **(arguments or {}))
        except OSError as error:
            raise Unavailable("the monitor is gone") from error
        except AssertionError as error:
            if "went away" in str(error):
                raise Unavailable("the monitor is gone") from error
            raise InvalidInput(str(error)) from error

    def close(self) -> None:
        self._monitor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def disks_of(machine: Machine, paths: Mapping[str, Path], image_format: str = "qcow2") -> list[GuestDisk]:
    """The disks of a machine, of one layer each, by the ids of their devices."""
    found = []
    for each in machine.ask("query-block"):
        name = (each.get("qdev") or "").split("/")[3:4]
        if not name or name[0] not in paths or "inserted" not in each:
            continue
        path = paths[name[0]]
        node = each["inserted"]["node-name"]
        status = path.stat()
        layer = Layer(
            node=node,
            path=path,
            identity=(status.st_dev, status.st_ino),
            image_format=image_format,
            virtual_size=each["inserted"]["image"]["virtual-size"],
        )
        found.append(GuestDisk(name[0], node, (), (layer,), read_only=False))
    return sorted(found, key=lambda disk: disk.name)


class Journal:
    """Remembers what was written to it, as the real one would on a disk."""

    def __init__(self) -> None:
        self.records: list[CaptureInFlight] = []

    def __call__(self, plan: CaptureInFlight) -> Callable[[], None]:
        self.records.append(plan)
        return lambda: self.records.remove(plan)


def make(path: Path, size: str = "64M", image_format: str = "qcow2") -> Path:
    """A new empty image."""
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, path, size], check=True)
    return path


def left_in(machine: Machine) -> list[str]:
    """Names of nodes, exports, jobs and bitmaps in a guest that are snapchain's, but for bitmaps that are kept."""
    nodes = machine.ask("query-named-block-nodes", flat=True)
    found = [each["node-name"] for each in nodes if each["node-name"].startswith("sc-")]
    found += [
        bitmap["name"]
        for each in nodes
        for bitmap in each.get("dirty-bitmaps", ())
        if bitmap.get("name", "").startswith(("snapchain-new-", "snapchain-copy-"))
    ]
    found += [each["id"] for each in machine.ask("query-block-exports")]
    found += [each["id"] for each in machine.ask("query-jobs")]
    groups = machine.ask("qom-list", path="/objects")
    found += [each["name"] for each in groups if each["name"].startswith("sc-")]
    return found


def bitmaps(machine: Machine, node: str) -> list[str]:
    """The names of the bitmaps of a node."""
    for each in machine.ask("query-named-block-nodes", flat=True):
        if each["node-name"] == node:
            return sorted(bitmap["name"] for bitmap in each.get("dirty-bitmaps", ()) if "name" in bitmap)
    raise AssertionError(node)


def nbd_url(path: Path, name: str) -> str:
    return f"nbd+unix:///{name}?socket={path}"


def as_json(words: list[str]) -> Any:
    return json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
