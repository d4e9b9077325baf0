"""S3 against real servers: the contract, and what only S3 can get wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import pytest

from snapchain.objects.s3 import S3Store
from snapchain.objects.s3_client import new_client
from snapchain.objects.store import ObjectStore
from snapchain.testing.object_contract import ObjectStoreContract
from tests.servers import S3Server

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@cache
def shared_client(endpoint: str) -> S3Client:
    return new_client(endpoint)


def new_store(server: S3Server, prefix: str = "Some Prefix+%/x", *, conditional: bool) -> S3Store:
    store = S3Store(server.new_bucket(), prefix, client=shared_client(server.endpoint))
    store.properties = replace(store.properties, conditional_put=conditional)
    store._page = 3  # pages are S3's own affair; every listing here crosses some
    return store


class TestMoto(ObjectStoreContract):
    @pytest.fixture
    def store(self, moto: S3Server) -> ObjectStore:
        return new_store(moto, conditional=True)


class TestRclone(ObjectStoreContract):
    @pytest.fixture
    def store(self, rclone: S3Server) -> ObjectStore:
        return new_store(rclone, conditional=False)
