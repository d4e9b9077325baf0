"""One libvirtd for all tests of this directory in a process: it is started when the first of them needs it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.libvirtd import LibvirtHost, libvirtd


@pytest.fixture(scope="session")
def libvirt_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LibvirtHost]:
    """A host with libvirt; who kills its daemon starts it again."""
    with libvirtd(tmp_path_factory.mktemp("libvirt") / "host") as host:
        yield host
