"""A guest that is only its files: what a use case asks of one, without a QEMU.

guest = FileGuest("web1", {"vda": top_of_chain})
with sealing(guest): ...        snapshots of it put an overlay on each chain, as a live one does: under a new name
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pytest

from snapchain.errors import NotFound
from snapchain.guest import snapshot
from snapchain.guest.protocol import Definition, DefinitionFile, GuestDisk, Layer, State
from snapchain.guest.snapshot import DiskToSeal, GuestSnapshot, GuestSnapshotPlan, LeftOut, SnapshotRequest
from snapchain.model.consistency import Consistency
from snapchain.source.lineage import seal
from tests.ops.stacks import qemu_img

PASSWORD = "<graphics passwd='secret-of-vnc'/>"


@dataclass
class FileGuest:
    """disks: name -> the layer that it writes to now; left_out: name -> why it is no disk to protect"""

    name: str
    disks_now: dict[str, Path]
    left_out: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[DefinitionFile] = ()
    kind: Literal["libvirt", "qmp"] = "libvirt"
    option: str = "--domain web1"
    streams: bool = False
    consistency: Consistency = Consistency.CRASH
    snapshots: int = 0
    is_off: bool = False
    backing: dict[Path, Path] = field(default_factory=dict)

    def state(self) -> State:
        return State.OFF if self.is_off else State.RUNNING

    def process(self) -> None:
        return None

    def disks(self) -> Sequence[GuestDisk]:
        return [
            GuestDisk(name, name, (), tuple(map(_layer, self._chain(path))), read_only=False)
            for name, path in self.disks_now.items()
        ]

    def _chain(self, top: Path) -> list[Path]:
        """Root first: what snapshots have put on each other, on `root.qcow2` where there is one beside."""
        chain = [top]
        while (below := self.backing.get(chain[0])) is not None:
            chain.insert(0, below)
        root = chain[0].with_name("root.qcow2")
        return [root, *chain] if root.exists() else chain

    def definition(self, *, with_secrets: bool) -> Definition:
        live = f"<domain><name>{self.name}</name>{PASSWORD if with_secrets else ''}</domain>"
        files = tuple(each for each in self.files if with_secrets or not each.secret)
        return Definition(
            self.kind, self.name, "5a1e", "pc-q35-7.2", ("52:54:00:12:34:56",), live=live, files=files,
            unreadable=("the swtpm's lock",),
        )  # fmt: skip

    def plan(self, request: SnapshotRequest) -> GuestSnapshotPlan:
        missing = set(request.disks) - set(self.disks_now)
        if missing:
            raise NotFound(f"the guest has no disk {min(missing)}", subject=self.name)
        chosen = [name for name in self.disks_now if name in (request.disks or self.disks_now)]
        return GuestSnapshotPlan(
            guest=self.name,
            option=self.option,
            disks=tuple(self._to_seal(name) for name in chosen),
            left_out=tuple(LeftOut(disk=name, reason=why) for name, why in self.left_out.items()),
            quiesces=False,
            labels=tuple(request.labels),
        )

    def _to_seal(self, name: str) -> DiskToSeal:
        path = self.disks_now[name]
        stem, number = path.name.split(".")[0], self.snapshots + 1
        size = json.loads(qemu_img("info", "--output=json", path))["virtual-size"]
        overlay = path.with_name(f"{stem}.{number}.qcow2")
        return DiskToSeal(
            disk=name, sealed=path, sealed_format=path.suffix[1:], overlay=overlay, virtual_size=size, layers=2
        )

    def run(self, planned: GuestSnapshotPlan, request: SnapshotRequest) -> GuestSnapshot:
        self.snapshots += 1
        now = datetime.now(UTC)
        for disk in planned.disks:
            qemu_img(
                "create", "-q", "-f", "qcow2", "-b", disk.sealed.name, "-F", disk.sealed_format, disk.overlay,
                str(disk.virtual_size),
            )  # fmt: skip
            seal(disk.sealed.resolve(), labels=request.labels, time=now)
            self.disks_now[disk.disk] = disk.overlay
            self.backing[disk.overlay] = disk.sealed
        return GuestSnapshot(
            guest=self.name,
            instant=secrets.token_hex(16),
            time=now,
            consistency=self.consistency,
            disks=planned.disks,
            left_out=planned.left_out,
        )


def _layer(path: Path) -> Layer:
    status = path.stat()
    return Layer(path.name, path, (status.st_dev, status.st_ino), path.suffix[1:], 0)


@contextmanager
def sealing(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Snapshots of FileGuests; one that is off is sealed by the real thing."""
    real_plan, real_run = snapshot.plan, snapshot.run

    def plan(guest: Any, request: SnapshotRequest) -> GuestSnapshotPlan:
        if guest.is_off:
            return real_plan(guest, request)
        return guest.plan(request)  # type: ignore[no-any-return]

    def run(guest: Any, planned: GuestSnapshotPlan, request: SnapshotRequest, **_: Callable[..., Any]) -> GuestSnapshot:
        if guest.is_off:
            return real_run(guest, planned, request)
        return guest.run(planned, request)  # type: ignore[no-any-return]

    with patch.context() as context:
        context.setattr(snapshot, "plan", plan)
        context.setattr(snapshot, "run", run)
        yield
