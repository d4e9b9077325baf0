"""ssh://[user@]host[:port]/path: what is taken, and what is refused before ssh or a shell could see it."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, strategies as st

from snapchain.errors import InvalidInput
from snapchain.host.ssh import RemoteAddress, is_remote, parse_remote_address


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


HOST, USER, PORT = "not a host's name", "not a user's name", "not a port"
FOLDER, EXPANDED, LETTER = "no folder is named", "never expanded", "a character that cannot be in one"
BRACKETS, IPV6 = "stands in brackets", "not an IPv6 address in brackets"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ssh://-oProxyCommand=id/srv", HOST),
        ("ssh://-oProxyCommand=id@kvm2/srv", USER),
        ("ssh://root@-v/srv", HOST),
        ("ssh://kvm2;id/srv", HOST),
        ("ssh://$(id)/srv", HOST),
        ("ssh://`id`@kvm2/srv", USER),
        ("ssh://a b/srv", HOST),
        ("ssh://kvm2\n/srv", HOST),
        ("ssh://kvm2/srv\nx", LETTER),
        ("ssh://kvm2/srv\0x", LETTER),
        ("ssh://kvm2/srv\udcff", LETTER),
        ("ssh://ro'ot@kvm2/srv", USER),
        ("ssh://kvm%h/srv", HOST),
        ("ssh://kvé/srv", HOST),
        ("ssh:///srv", HOST),
        ("ssh://@kvm2/srv", USER),
        ("ssh://kvm2", FOLDER),
        ("ssh://kvm2/", FOLDER),
        ("ssh://kvm2//", FOLDER),
        ("ssh://kvm2/~/srv", EXPANDED),
        ("ssh://kvm2/~ann/srv", EXPANDED),
        ("ssh://kvm2:/srv", PORT),
        ("ssh://kvm2:0/srv", PORT),
        ("ssh://kvm2:65536/srv", PORT),
        ("ssh://kvm2:-1/srv", PORT),
        ("ssh://kvm2:2２/srv", PORT),
        ("ssh://kvm2:22:22/srv", BRACKETS),
        ("ssh://fd00::2/srv", BRACKETS),
        ("ssh://[fd00::2/srv", IPV6),
        ("ssh://[fd00::2]22/srv", IPV6),
        ("ssh://[kvm2]/srv", IPV6),
        ("ssh://[192.0.2.7]/srv", IPV6),
        ("ssh://[fe80::2%]/srv", IPV6),
        ("ssh://[fe80::2%a%b]/srv", IPV6),
        ("ssh://[fe80::2%-x]/srv", IPV6),
        ("ssh://root:secret@kvm2/srv", "a password does not belong"),
        ("kvm2:/srv", "not an address of a host"),
        ("", "not an address of a host"),
    ],
)
def test_refused(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
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
