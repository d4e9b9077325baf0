"""The commands that sync prints, run as they are: two hosts, a libvirtd on each, and a guest that moves."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import pytest

from tests.libvirtd import LibvirtHost
from tests.net.libvirt_host import libvirt_host
from tests.net.namespaces import two_hosts
from tests.net.sshd import SshHost, sshd
from tests.net.test_replica_over_ssh import remote
from tests.ops.stacks import Layer, MiB, build, clean, flat, qemu_img, same

pytestmark = [pytest.mark.root, pytest.mark.soak, pytest.mark.serial]
SIZE = 64 * MiB


@dataclass
class Guest:
    """A guest as it is defined. chain: of its disk; image: by which path; explicit: whether it names the chain too.

    second: chain of a second disk, vdb, that moves with it
    """

    chain: list[Path]
    image: Path
    explicit: bool = False
    more: str = ""
    cache: str = "none"
    before: list[str] = field(default_factory=list)
    second: list[Path] = field(default_factory=list)

    def disk(self, target: str) -> str:
        store = self._store(len(self.chain) - 2) if self.explicit else ""
        source = quoteattr(str(self.image))
        return f"""<disk type='file' device='disk'>
              <driver name='qemu' type='qcow2' cache='{self.cache}'/><source file={source}/>{store}
              <target dev='{target}' bus='virtio'/>
            </disk>"""

    def definition(self) -> str:
        return f"""<domain type='qemu'>
          <name>web1</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>
          <os><type arch='x86_64' machine='pc'>hvm</type></os>
          <devices>
            <emulator>/usr/bin/qemu-system-x86_64</emulator>
            {self.disk("vda")}{self.more}<memballoon model='none'/>
          </devices></domain>"""

    def _store(self, number: int) -> str:
        if number < 0:
            return "<backingStore/>"
        file = self.chain[number]
        kind = "raw" if file.suffix == ".raw" else "qcow2"
        source = quoteattr(str(file))
        return (
            f"<backingStore type='file'><format type='{kind}'/><source file={source}/>"
            f"{self._store(number - 1)}</backingStore>"
        )


def chain_in(directory: Path, root: str = "qcow2") -> list[Path]:
    """With names that mean something to shells, to sed and to XML."""
    layers = [
        Layer(SIZE, ["write -P 1 0 8M"], image_format=root),
        Layer(SIZE, ["write -P 2 4M 8M"]),
        Layer(SIZE, ["write -P 3 1M 1M"]),
    ]
    return build(directory / "source images", layers, names=[f"root.{root}", "a&b 'q'.qcow2", "web1.qcow2"])


def plain(directory: Path) -> Guest:
    chain = chain_in(directory)
    return Guest(chain, chain[-1], cache="writeback")


def a_raw_root_and_the_chain_defined(directory: Path) -> Guest:
    chain = chain_in(directory, "raw")
    return Guest(chain, chain[-1], explicit=True)


def a_link_to_the_image(directory: Path) -> Guest:
    chain = chain_in(directory)
    for lower, upper in ((0, 1), (1, 2)):  # libvirt follows relative names from where the link is
        qemu_img("rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", chain[lower], chain[upper])
    link = directory / "disk.qcow2"
    link.symlink_to(chain[-1])
    return Guest(chain, link)


def a_link_to_the_directory(directory: Path) -> Guest:
    chain = chain_in(directory)
    (directory / "by link").symlink_to(chain[0].parent)
    chain = [directory / "by link" / path.name for path in chain]
    return Guest(chain, chain[-1], explicit=True)


def other_disks(directory: Path) -> Guest:
    chain = chain_in(directory)
    for name in ("vdb", "sda"):
        (directory / name).write_bytes(bytes(MiB))
    more = "".join(
        f"<disk type='file' device='{kind}'><driver name='qemu' type='raw' cache='none'/>"
        f"<source file={quoteattr(str(directory / name))}/><target dev='{name}' bus='{bus}'/><readonly/></disk>"
        for name, bus, kind in (("vdb", "virtio", "disk"), ("sda", "sata", "cdrom"))
    )
    return Guest(chain, chain[-1], more=more)


def two_disks(directory: Path) -> Guest:
    chain = chain_in(directory)
    layers = [Layer(SIZE, ["write -P 5 0 2M"], image_format="raw"), Layer(SIZE, ["write -P 6 1M 2M"])]
    second = build(directory / "second disk", layers, names=["data.raw", "data.qcow2"])
    more = Guest(second, second[-1], explicit=True).disk("vdb")
    return Guest(chain, chain[-1], explicit=True, more=more, second=second)


def a_snapshot_by_libvirt(directory: Path) -> Guest:
    chain = chain_in(directory, "raw")
    snapshot = chain[-1].with_name("snap 1.qcow2")
    taken = f"snapshot-create-as web1 --disk-only --no-metadata --diskspec {shlex.quote(f'vda,file={snapshot}')}"
    guest = Guest([*chain, snapshot], chain[-1])
    guest.before.append(taken)
    return guest


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[tuple[LibvirtHost, LibvirtHost, SshHost]]:
    """The guest's host, the one that it moves to, and that one's sshd."""
    with (
        two_hosts() as (near, far, _),
        libvirt_host(near, tmp_path / "kvm1", "kvm1") as here,
        libvirt_host(far, tmp_path / "kvm2", "kvm2") as there,
        sshd(tmp_path / "sshd", address=far.address, there=there.inside, here=here.inside) as server,
    ):
        yield here, there, server


def synced(here: LibvirtHost, server: SshHost, images: list[Path], root: Path, uri: str) -> dict[str, Any]:
    environment = {
        **os.environ,
        "SNAPCHAIN_SSH": shlex.join(("ssh", "-F", str(server.config))),
        "SNAPCHAIN_REMOTE": remote(),
    }
    pairs = [
        word
        for image, disk in zip(images, ("vda", "vdb"), strict=False)
        for word in (str(image), f"ssh://there{root}::web1/{disk}")
    ]
    argv = [sys.executable, "-m", "snapchain", "sync", *pairs]
    words = [*here.inside, "env", f"--chdir={Path.cwd()}", *argv, "--json", "--dest-uri", uri]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize(
    "made",
    [
        plain,
        a_raw_root_and_the_chain_defined,
        a_link_to_the_image,
        a_link_to_the_directory,
        other_disks,
        a_snapshot_by_libvirt,
        two_disks,
    ],
)
def test_a_guest_moves(
    hosts: tuple[LibvirtHost, LibvirtHost, SshHost], tmp_path: Path, made: Callable[[Path], Guest]
) -> None:
    here, there, server = hosts
    guest = made(tmp_path)
    (tmp_path / "web1.xml").write_text(guest.definition())
    here.virsh("define", tmp_path / "web1.xml")
    here.virsh("start", "web1")
    for command in guest.before:
        here.virsh(*shlex.split(command))
    image = guest.chain[-1] if guest.before else guest.image
    ssh = tmp_path / "ssh.sh"
    ssh.write_text(f'#!/bin/sh\nexec ssh -F {server.config} "$@"\n')
    ssh.chmod(0o755)
    images = [image, *guest.second[-1:]]
    report = synced(here, server, images, tmp_path / "replica", f"qemu+ssh://there/system?command={ssh}")
    assert len(report["commands"]) == 2
    for command in report["commands"]:
        here.run("bash", "-c", f"cd {shlex.quote(str(tmp_path))} && {command}", timeout=200)

    assert here.virsh("list", "--name").split() == []
    assert there.virsh("domstate", "web1").strip() == "running"
    running = there.virsh("dumpxml", "web1").split("</disk>")
    overlays = [Path(disk["overlay"]) for disk in report.get("disks", [report])]
    there.virsh("destroy", "web1")
    for disk, overlay, chain in zip(running, overlays, (guest.chain, guest.second), strict=False):
        assert str(overlay) in disk
        assert disk.count("<source file=") == len(chain)
        assert disk.count("<format type='qcow2'/>") == len(chain) - 1
        assert same(overlay, flat(chain[-1], tmp_path / "shown"))
        assert clean(overlay)
    there.virsh("start", "web1")  # by the definition that stays
    there.virsh("destroy", "web1")
