"""Names, ranges and buffers: decided in one place; and which URL opens what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput, NotFound
from snapchain.objects import open_store
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.s3 import S3Store
from snapchain.objects.store import (
    LONGEST_NAME,
    LONGEST_SEGMENT,
    buffers,
    directory_prefix,
    is_segment,
    joined,
    valid_name,
    valid_prefix,
)
from tests.servers import S3Server, _running, free_port

segments = st.from_regex(r"[a-z0-9_-][a-z0-9._-]{0,20}", fullmatch=True)
names = st.lists(segments, min_size=1, max_size=5).map("/".join).filter(lambda name: not name.startswith("tmp/"))


@given(names)
def test_every_beginning_of_a_name_is_a_prefix(name: str) -> None:
    assert valid_name(name) == name
    for end in range(len(name) + 1):
        assert valid_prefix(name[:end]) == name[:end]
    assert all(is_segment(segment) for segment in name.split("/"))


@given(st.text(max_size=30))
def test_a_name_never_leads_out(text: str) -> None:
    try:
        valid_name(text)
    except InvalidInput:
        return
    path = Path("/root") / text
    assert path.resolve().is_relative_to("/root")
    assert str(path) == f"/root/{text}"
    assert not text.startswith("tmp/")
    assert text == text.lower()
    assert text.isascii()


def test_the_longest_names() -> None:
    valid_name("x" * LONGEST_SEGMENT)
    valid_name("/".join(["abc"] * (LONGEST_NAME // 4)))
    for name in ["x" * (LONGEST_SEGMENT + 1), "/".join(["abc"] * (LONGEST_NAME // 4)) + "/xy"]:
        with pytest.raises(InvalidInput, match="at most"):
            valid_name(name)


def test_directories_end_with_one_slash() -> None:
    assert directory_prefix("") == ""
    assert directory_prefix("a") == directory_prefix("a/") == "a/"
    for bad in ["/", "a//", ".", "A"]:
        with pytest.raises(InvalidInput, match="not the beginning of an object name"):
            directory_prefix(bad)


def test_bytes_are_not_copied() -> None:
    body = b"12345"
    assert joined(body) is body
    view = memoryview(bytearray(10))
    (flat,) = buffers([b"", view, b""])
    view[0] = 7
    assert flat[0] == 7


@pytest.mark.parametrize("url", ["{}", "file://{}", "file://localhost{}"])
def test_directories(url: str, tmp_path: Path) -> None:
    store = open_store(url.format(tmp_path / "new"), make=True)
    assert isinstance(store, LocalStore)
    store.put("a", b"1")
    assert (tmp_path / "new" / "a").read_bytes() == b"1"
    assert open_store(store.url).get("a") == b"1", "its url opens it again"


def test_a_url_may_be_quoted_and_a_path_is_not(tmp_path: Path) -> None:
    for url, name in [(f"file://{tmp_path}/a%20b", "a b"), (f"{tmp_path}/a%20c", "a%20c")]:
        store = open_store(url, make=True)
        assert store.url == str(tmp_path / name)
    with pytest.raises(NotFound, match="none: there is no such directory"):
        open_store(f"{tmp_path}/none")


@pytest.mark.parametrize("make", [False, True])
def test_a_file_is_no_directory(make: bool, tmp_path: Path) -> None:
    (tmp_path / "web1.qcow2").touch()
    with pytest.raises(NotFound, match="this is a file, not a directory") as raised:
        open_store(f"{tmp_path}/web1.qcow2", make=make)
    assert raised.value.subject == str(tmp_path / "web1.qcow2")


def test_memory() -> None:
    assert isinstance(open_store("memory:"), MemoryStore)
    assert open_store("memory:") is not open_store("memory:")
    assert open_store("memory:x") is open_store("memory:x")


def test_s3(moto: S3Server) -> None:
    bucket = moto.new_bucket()
    for url in [f"s3://{bucket}/a/b", f"s3://{bucket}/a/b/", f"s3://{bucket}//a/b//"]:
        store = open_store(url)
        assert isinstance(store, S3Store)
        assert store.url == f"s3://{bucket}/a/b"
        store.put("x", url.encode())
        store.close()
    whole = open_store(f"s3://{bucket}")
    assert [info.name for info in whole.list("")] == ["a/b/x"]
    assert list(whole.list_dirs("")) == ["a"]
    assert whole.url == f"s3://{bucket}"
    whole.close()


@pytest.mark.parametrize(
    "url",
    ["", "relative/path", "ftp://host/x", "s3:bucket", "s3:/bucket", "s3://", "s3:///x", "file://host/x", "file:x",
     "s3://bucket/x?versionId=1", "s3://bucket/x#y", "http://x", "memory", "C:/x"],
)  # fmt: skip
def test_what_opens_nothing(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"not the address of a destination|has no '\?' or '#'|no bucket is named"):
        open_store(url)


def test_only_s3_has_an_endpoint(tmp_path: Path) -> None:
    for url in (str(tmp_path), "memory:"):
        with pytest.raises(InvalidInput, match="endpoint"):
            open_store(url, endpoint="http://x")


def test_boto3_waits_until_a_bucket_is_opened() -> None:
    program = (
        "import sys, snapchain.objects.s3, snapchain.objects.s3_errors, snapchain.objects.exclusive\n"
        "from snapchain.objects import open_store\n"
        "open_store('memory:').put('a', b'')\n"
        "sys.exit(bool({'boto3', 'botocore', 'urllib3', 'pytest', 'numpy', 'pydantic'} & set(sys.modules)))\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_server_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="ended with 3: no luck"),
        _running(
            [sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"], free_port(), tmp_path / "log", "x"
        ),
    ):
        pass
