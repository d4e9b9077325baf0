"""Guests of a real libvirtd, without an operating system, by TCG: half a second each.

    with libvirtd(folder) as host:
        domain = Domain.started(host, folder, {"vda": chain_top})
        domain.write("vda", 0, 65536, 7)            as the guest would

The test writes through `qemu-monitor-command --hmp qemu-io`, as the guest's device does; snapchain may not do that.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape, quoteattr

from snapchain.guest.address import GuestAddress
from tests.libvirtd import LibvirtHost
from tests.waiting import gone, wait_until


def disk_xml(target: str, path: Path, *, driver: str = "type='qcow2' discard='unmap'", more: str = "") -> str:
    """A virtio disk on a file."""
    return (
        f"<disk type='file' device='disk'><driver name='qemu' {driver}/><source file={quoteattr(str(path))}/>"
        f"<target dev='{target}' bus='virtio'/>{more}</disk>"
    )


def definition(
    name: str,
    disks: Mapping[str, Path],
    *,
    more: str = "",
    agent: Path | None = None,
    os_more: str = "",
    memory: int = 32,
    argv: Sequence[str] = (),
) -> str:
    """XML of a domain. more: further devices; agent: the socket of an agent's channel, which libvirt listens on

    argv: further arguments of QEMU
    """
    if agent is not None:
        more += (
            f"<channel type='unix'><source mode='bind' path={quoteattr(str(agent))}/>"
            "<target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        )
    words = "".join(f"<qemu:arg value={quoteattr(word)}/>" for word in argv)
    commandline = f"<qemu:commandline>{words}</qemu:commandline>" if argv else ""
    return f"""<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
      <name>{escape(name)}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>
      <os><type arch='x86_64' machine='q35'>hvm</type>{os_more}</os>
      <devices>
        <emulator>/usr/bin/qemu-system-x86_64</emulator>
        {"".join(disk_xml(target, path) for target, path in disks.items())}{more}
        <memballoon model='none'/>
      </devices>{commandline}</domain>"""


@dataclass(frozen=True)
class Domain:
    """A domain of a host of the test."""

    host: LibvirtHost
    name: str

    @classmethod
    def started(
        cls, host: LibvirtHost, folder: Path, disks: Mapping[str, Path], *, name: str = "web1", transient: bool = False,
        off: bool = False, **more: Any,
    ) -> Domain:  # fmt: skip
        """Defined and started. transient: without a definition that lasts; off: only defined

        more: as `definition` takes it
        """
        folder.mkdir(parents=True, exist_ok=True)
        xml = folder / "domain.xml"
        xml.write_text(definition(name, disks, **more))
        domain = cls(host, name)
        if transient:
            host.virsh("create", xml)
        else:
            host.virsh("define", xml)
            if not off:
                domain.virsh("start")
        return domain

    @property
    def address(self) -> GuestAddress:
        """As snapchain is told of it."""
        return GuestAddress(domain=self.name, connect=self.host.uri)

    @property
    def pid(self) -> int:
        """Of its QEMU."""
        return self.host.guest_pid(self.name)

    def virsh(self, command: str, *words: str | Path) -> str:
        """A command on this domain."""
        return self.host.virsh(command, "--domain", self.name, *words)

    def xml(self, *words: str) -> ET.Element:
        return ET.fromstring(self.virsh("dumpxml", *words))

    def source(self, target: str, *words: str) -> Path:
        """The active layer, by a definition (`--inactive`: by which it starts the next time)."""
        found = self.xml(*words).find(f"devices/disk/target[@dev='{target}']/../source")
        assert found is not None
        return Path(found.attrib["file"])

    def ask(self, command: str, **arguments: object) -> Any:
        """QEMU's own answer."""
        line = json.dumps({"execute": command, "arguments": arguments})
        answer = json.loads(self.virsh("qemu-monitor-command", line))
        assert "error" not in answer, answer
        return answer["return"]

    def io(self, target: str, command: str) -> str:
        """A qemu-io command on the device of a disk, as its guest would do it."""
        said = self._command(target, command)
        assert not re.search("failed|error", said, re.IGNORECASE), said
        return said

    def _command(self, target: str, command: str) -> str:
        """What qemu-io says. It writes to QEMU's own standard output, and not into the answer."""
        log = self.host.folder / "var" / "log" / "qemu" / f"{self.name}.log"
        before = log.stat().st_size
        alias = f"virtio-disk{ord(target[-1]) - ord('a')}"  # as libvirt names vda, vdb, ...
        device = f"/machine/peripheral/{alias}/virtio-backend"
        answer = self.virsh("qemu-monitor-command", "--hmp", f'qemu-io -d {device} "{command}"')
        with log.open("rb") as opened:
            opened.seek(before)
            return answer + opened.read().decode(errors="replace")

    def write(self, target: str, offset: int, length: int, pattern: int) -> None:
        """Bytes of one value, as the guest writes them."""
        self.io(target, f"write -P {pattern} {offset} {length}")

    def reads(self, target: str, offset: int, length: int, pattern: int) -> bool:
        """Whether the guest reads that value there."""
        said = self._command(target, f"read -P {pattern} {offset} {length}")
        assert f"read {length}/{length} bytes" in said, said
        return "Pattern verification failed" not in said

    def state(self) -> str:
        return self.virsh("domstate").strip()

    def kill(self) -> None:
        """SIGKILL to its QEMU, and wait until libvirt has seen it."""
        pid = self.pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: gone(pid))
        wait_until(lambda: self.name not in self.host.virsh("list", "--name").splitlines())

    def remove(self) -> None:
        """Kill it, and forget its definition. `destroy` would wait for QEMU to end by itself."""
        if self.name in self.host.virsh("list", "--name").splitlines():
            self.kill()
        if self.name in self.host.virsh("list", "--all", "--name").splitlines():
            self.virsh("undefine", "--managed-save")
