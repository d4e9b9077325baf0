"""Addresses as the design has them, and what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from snapchain.destination.address import (
    DestinationAddress,
    ImageAddress,
    PointAddress,
    located,
    parse_address,
    parse_destination,
    parse_disk_address,
    parse_point_address,
)
from snapchain.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("/images/web1.qcow2", ImageAddress(Path("/images/web1.qcow2"))),
        ("a:b@c", ImageAddress(Path("a:b@c"))),
        ("/backup::web1/vda", PointAddress("/backup", "web1/vda")),
        ("/backup::web1/vda@7", PointAddress("/backup", "web1/vda", "7")),
        ("s3://bucket/prefix::vda@latest", PointAddress("s3://bucket/prefix", "vda", "latest")),
        ("/b::d@2026-01-02T03:04:05Z", PointAddress("/b", "d", "2026-01-02T03:04:05Z")),
        ("ssh://[fe80::1]/srv::vda", PointAddress("ssh://[fe80::1]/srv", "vda")),
        ("ssh://u@[fe80::1%br0]:22/srv::d/a@7", PointAddress("ssh://u@[fe80::1%br0]:22/srv", "d/a", "7")),
        ("ssh://[fe80::1]/srv", ImageAddress(Path("ssh://[fe80::1]/srv"))),
        ("ssh://[fe80::1/srv", ImageAddress(Path("ssh://[fe80::1/srv"))),
        ("ssh://host/a[b::vda", PointAddress("ssh://host/a[b", "vda")),
        ("/mail@home::vda", PointAddress("/mail@home", "vda")),
    ],
)
def test_addresses(text: str, address: ImageAddress | PointAddress) -> None:
    assert parse_address(text) == address
    assert str(address).replace("ssh:/[", "ssh://[") == text


@pytest.mark.parametrize("text", ["", "::", "::vda", "/backup::", "/backup::@7", "/backup::vda@"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"not an address|an empty address"):
        parse_address(text)


def test_a_command_gets_the_kind_of_address_that_it_wants() -> None:
    assert parse_destination("/backup") == DestinationAddress("/backup")
    assert parse_destination("ssh://[::1]/srv") == DestinationAddress("ssh://[::1]/srv")
    assert parse_destination("/backup::vda") == PointAddress("/backup", "vda")
    with pytest.raises(InvalidInput, match="no disk is named"):
        parse_point_address("/backup")
    with pytest.raises(InvalidInput, match="not a point"):
        parse_disk_address("/backup::vda@7")


_words = st.text(st.characters(exclude_characters=":@", exclude_categories=["C"]), min_size=1, max_size=20)


@given(_words, _words, st.none() | _words)
def test_what_is_written_is_read_back(dest: str, disk: str, point: str | None) -> None:
    address = PointAddress(dest, disk, point)
    assert parse_address(str(address)) == address


def test_a_destination_may_be_a_path_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert located("backup") == f"{tmp_path}/backup"
    for dest in ("/backup", "file:///backup", "s3://bucket/prefix", "ssh://host/path", "dir:/images"):
        assert located(dest) == dest


def test_text_that_is_a_file_here_is_that_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One way, where a command takes either; where only a disk can be meant, it is one."""
    monkeypatch.chdir(tmp_path)
    Path("repo").mkdir()
    for text in ("a::b.qcow2", "./a::b.qcow2", f"{tmp_path}/a::b.qcow2"):
        Path("a::b.qcow2").unlink(missing_ok=True)
        is_marked = text.startswith("./")
        assert isinstance(parse_address(text), ImageAddress if is_marked else PointAddress)
        Path("a::b.qcow2").touch()
        assert parse_address(text) == ImageAddress(Path(text))
        assert isinstance(parse_point_address(text), PointAddress)
    assert parse_address("./repo::web1/vda") == PointAddress("./repo", "web1/vda")
    assert isinstance(parse_address("x" * 5000 + "::d"), PointAddress)
    assert isinstance(parse_address("a\0::d"), PointAddress)
