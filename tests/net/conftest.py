"""Hosts to talk to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.namespaces import Cable, Host, two_hosts
from tests.net.sshd import SshHost, sshd

# Failing asserts of the shipped contract suite shall show their values, as those of the tests do.
pytest.register_assert_rewrite("snapchain.testing.destination_contract", "snapchain.testing.destination_faults")


@pytest.fixture(scope="session")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHost]:
    """An sshd on loopback."""
    with sshd(tmp_path_factory.mktemp("sshd")) as host:
        yield host


@pytest.fixture
def hosts(request: pytest.FixtureRequest) -> Iterator[tuple[Host, Host, Cable]]:
    """Two hosts with a perfect cable between them. For tests marked root; a parameter is the cable's MTU."""
    with two_hosts(mtu=getattr(request, "param", 1500)) as both:
        yield both


@pytest.fixture
def far(hosts: tuple[Host, Host, Cable], tmp_path: Path) -> Iterator[tuple[SshHost, Cable]]:
    """The second host's sshd, as the first reaches it, and the cable. For tests marked root."""
    near, other, cable = hosts
    with sshd(tmp_path / "sshd", alias="far", address=other.address, there=other.inside, here=near.inside) as host:
        yield host, cable
