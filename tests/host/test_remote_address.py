"""ssh://[user@]host[:port]/path: what is taken, and what is refused before ssh or a shell could see it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.host.remote_address import RemoteAddress, is_remote, parse_remote_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("ssh://kvm2/srv/replica", RemoteAddress("kvm2", "/srv/replica")),
        ("ssh://root@kvm2.example.com/srv", RemoteAddress("kvm2.example.com", "/srv", "root")),
        ("ssh://kvm2:2222/srv", RemoteAddress("kvm2", "/srv", port=2222)),
        ("ssh://ann@corp.example@kvm_2/srv", RemoteAddress("kvm_2", "/srv", "ann@corp.example")),
        ("ssh://192.0.2.7/srv", RemoteAddress("192.0.2.7", "/srv")),
        ("ssh://[fd00::2]/srv", RemoteAddress("fd00::2", "/srv")),
        ("ssh://root@[fe80::2%br0]:22/srv", RemoteAddress("fe80::2%br0", "/srv", "root", 22)),
        ("ssh://kvm2/a b/$(id);%41@x:1/-o/é", RemoteAddress("kvm2", "/a b/$(id);%41@x:1/-o/é")),
        ("ssh://kvm2//srv/", RemoteAddress("kvm2", "//srv/")),
    ],
)
def test_addresses(text: str, address: RemoteAddress) -> None:
    assert parse_remote_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "ssh://-oProxyCommand=id/srv",
        "ssh://-oProxyCommand=id@kvm2/srv",
        "ssh://root@-v/srv",
        "ssh://kvm2;id/srv",
        "ssh://$(id)/srv",
        "ssh://`id`@kvm2/srv",
        "ssh://a b/srv",
        "ssh://kvm2\n/srv",
        "ssh://kvm2/srv\nx",
        "ssh://kvm2/srv\0x",
        "ssh://kvm2/srv\udcff",
        "ssh://ro'ot@kvm2/srv",
        "ssh://kvm%h/srv",
        "ssh://kvé/srv",
        "ssh:///srv",
        "ssh://@kvm2/srv",
        "ssh://kvm2",
        "ssh://kvm2/",
        "ssh://kvm2//",
        "ssh://kvm2/~/srv",
        "ssh://kvm2/~ann/srv",
        "ssh://kvm2:/srv",
        "ssh://kvm2:0/srv",
        "ssh://kvm2:65536/srv",
        "ssh://kvm2:-1/srv",
        "ssh://kvm2:2２/srv",
        "ssh://kvm2:22:22/srv",
        "ssh://fd00::2/srv",
        "ssh://[fd00::2/srv",
        "ssh://[fd00::2]22/srv",
        "ssh://[kvm2]/srv",
        "ssh://[192.0.2.7]/srv",
        "ssh://[fe80::2%]/srv",
        "ssh://[fe80::2%a%b]/srv",
        "ssh://[fe80::2%-x]/srv",
        "ssh://root:secret@kvm2/srv",
        "kvm2:/srv",
        "",
    ],
)
def test_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_remote_address(text)
    assert "secret" not in f"{caught.value}{caught.value.hint}"
    assert "\n" not in str(caught.value)


@given(st.text() | st.text(alphabet="ab-@:[]%/.1 ;$'\n"))
def test_what_reaches_a_command_line_means_nothing_to_it(rest: str) -> None:
    try:
        address = parse_remote_address(f"ssh://{rest}")
    except InvalidInput:
        return
    assert str(address) == f"ssh://{rest}" or address.port is not None
    for word in (address.host, address.user):
        assert word is None or re.fullmatch(r"[A-Za-z0-9_:][A-Za-z0-9_.+@:%-]*", word)
    assert address.path.startswith("/")


def test_a_scheme_in_capitals_is_meant_as_an_address() -> None:
    assert is_remote("SSH://kvm2/srv")
    assert parse_remote_address("SSH://kvm2/srv") == RemoteAddress("kvm2", "/srv")
    assert not is_remote("/ssh://kvm2")
