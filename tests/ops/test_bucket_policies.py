"""The policies of the guide, enforced by a server: each key can do its work, and nothing else."""

from __future__ import annotations

import json
import os
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from snapchain.errors import Unavailable
from tests.ops.stacks import Layer, build
from tests.ops.test_traffic import run
from tests.servers import ACCESS_KEY, SECRET_KEY, S3Server, admin_client, moto_s3

GUIDE = Path(__file__).parents[2] / "docs/guide/security.md"
MiB = 1 << 20
URL = "s3://my-bucket/snapchain"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_s3(tmp_path_factory.mktemp("moto")) as server:
        admin_client(server.endpoint).create_bucket(Bucket="my-bucket")
        yield server


@pytest.fixture(scope="module")
def keys(server: S3Server) -> dict[str, tuple[str, str]]:
    """Role -> an access key with the policy that the guide has for it."""
    session = boto3.session.Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
    iam = session.client("iam", endpoint_url=server.endpoint)
    made = {}
    for role, policy in re.findall(r"```json (\w+)\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        json.loads(policy)
        iam.create_user(UserName=role)
        iam.put_user_policy(UserName=role, PolicyName="guide", PolicyDocument=policy)
        key = iam.create_access_key(UserName=role)["AccessKey"]
        made[role] = key["AccessKeyId"], key["SecretAccessKey"]
    # From here on the server looks at policies.
    request = urllib.request.Request(
        f"{server.endpoint}/moto-api/reset-auth", data=b"0", headers={"Content-Type": "text/plain"}
    )
    urllib.request.urlopen(request).close()
    return made


@pytest.fixture
def act_as(
    server: S3Server, keys: dict[str, tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[str], None]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def as_role(role: str) -> None:
        os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"] = keys[role]

    return as_role


def test_each_key_does_its_work_and_nothing_else(
    act_as: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = [Layer(MiB, ["write -P 1 0 512k"]), Layer(MiB, ["write -P 2 256k 512k"])]
    files = build(tmp_path / "chain", layers)
    act_as("collector")
    run(capsys, "init", URL, "--no-encryption", "--quiet")
    act_as("writer")
    for number, path in enumerate(files, 1):
        assert run(capsys, "ship", path, f"{URL}::web1", "--json")["point"] == number
    run(capsys, "merge", f"{URL}::web1", "--keep-last", "1", "--quiet")
    assert "s3:DeleteObject" in _refused(capsys, "gc", URL)
    act_as("reader")
    assert run(capsys, "verify", URL, "--read-data", "--json")["findings"] == []
    run(capsys, "restore", f"{URL}::web1", tmp_path / "out.qcow2", "--quiet")
    assert "s3:PutObject" in _refused(capsys, "ship", files[-1], f"{URL}::web2")
    assert "s3:PutObject" in _refused(capsys, "hold", f"{URL}::web1@latest", "--tag", "mine")
    act_as("collector")
    assert run(capsys, "gc", URL, "--json")["objects_deleted"] > 0


def _refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The error of a command that the server does not allow."""
    from snapchain.cli import main

    assert main([*map(str, words), "--json"]) == Unavailable.exit_code, words
    error = json.loads(capsys.readouterr().out)["error"]
    assert "AccessDenied" in error["message"]
    return f"{error['message']} {error['hint']}"
