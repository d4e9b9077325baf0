"""S3 against real servers: the contract, and what only S3 can get wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from snapchain.errors import InvalidInput, Unavailable
from snapchain.objects import open_store
from snapchain.objects.s3 import S3Store
from snapchain.objects.s3_client import new_client
from snapchain.objects.store import ObjectStore
from snapchain.testing.object_contract import ObjectStoreContract
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server

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


def test_a_profile_has_credentials_and_an_endpoint_of_its_own(
    rclone: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command may read from one account and write to another."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "another")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    keys, config = tmp_path / "credentials", tmp_path / "config"
    keys.write_text(f"[old]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    config.write_text(f"[profile old]\nregion = us-east-1\nendpoint_url = {rclone.endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    url = f"s3://{rclone.new_bucket()}/x"
    open_store(url, profile="old").put("a", b"1")
    assert open_store(url, profile="old", endpoint=rclone.endpoint).get("a") == b"1"
    with pytest.raises(Unavailable, match="does not accept the access key"):
        open_store(url, endpoint=rclone.endpoint).get("a")
    with pytest.raises(InvalidInput, match="none-such"):
        open_store(url, profile="none-such")
