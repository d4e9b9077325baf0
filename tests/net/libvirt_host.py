"""A libvirtd of its own on a host of a test: its own directories, its own name, guests without KVM.

with two_hosts() as (near, far, _), libvirt_host(near, folder / "near") as here: here.virsh("list")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.libvirtd import LibvirtHost, libvirtd
from tests.net.namespaces import Host


@contextmanager
def libvirt_host(host: Host, folder: Path, name: str) -> Iterator[LibvirtHost]:
    """libvirtd in the host's network. name: of the host, as its guests' other homes know it."""
    migration = f'migration_host = "{host.address}"\nmigration_address = "0.0.0.0"\n'
    with libvirtd(folder, name=name, inside=host.inside, qemu_conf=migration) as there:
        yield there
