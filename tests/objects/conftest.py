"""The S3 servers, one of each a worker."""

from collections.abc import Iterator

import pytest

from tests.servers import S3Server, given_s3, moto_s3, rclone_s3

# Failing asserts of the shipped contract suite shall show their values, as those of the tests do.
pytest.register_assert_rewrite("snapchain.testing.object_contract")


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with given_s3() or moto_s3(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with given_s3() or rclone_s3(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture
def moto(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in moto_server.environment.items():
        monkeypatch.setenv(name, value)
    return moto_server


@pytest.fixture
def rclone(rclone_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in rclone_server.environment.items():
        monkeypatch.setenv(name, value)
    return rclone_server
