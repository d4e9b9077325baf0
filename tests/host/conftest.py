"""A host to talk to."""

from tests.net.conftest import far, hosts, there

__all__ = ["far", "hosts", "there"]
