"""Where a replica on another host is: ssh://[user@]host[:port]/path, taken apart and judged. Pure.

    ssh://root@kvm2/srv/replica        as an alias of ssh's configuration, a name or an IPv4 address
    ssh://kvm2:2222/srv/replica
    ssh://[fd00::2%br0]/srv/replica    an IPv6 address

User and host end up on ssh's command line, and by a ProxyCommand of the user's configuration in a shell: so only
characters that mean nothing to either are taken.  The path goes through the stream, and is what is written: nothing
in it is decoded or expanded.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from snapchain.errors import InvalidInput

SCHEME = "ssh://"
_FORM = "write ssh://[user@]host[:port]/path, such as ssh://root@kvm2/srv/replica"
_ALIAS = "give the host an alias of plain letters in ssh's configuration, and write that"
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@-]{0,254}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")
_ZONE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")
_PORT = re.compile(r"[0-9]{1,5}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RemoteAddress:
    """host: name, alias or address, without brackets; user, port: None leaves them to ssh; path: absolute."""

    host: str
    path: str
    user: str | None = None
    port: int | None = None

    def __str__(self) -> str:
        return f"{SCHEME}{self.login}{'' if self.port is None else f':{self.port}'}{self.path}"

    @property
    def login(self) -> str:
        """[user@]host, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.user is None else f"{self.user}@{host}"


def is_remote(text: str) -> bool:
    """Whether that is meant as such an address, right or wrong."""
    return text[: len(SCHEME)].lower() == SCHEME


def parse_remote_address(text: str) -> RemoteAddress:
    """Take apart an address without ::DISK. Raises InvalidInput, which says what is wrong with it."""
    if not is_remote(text):
        raise InvalidInput("not an address of a host", subject=repr(text), hint=_FORM)
    authority, slash, path = text[len(SCHEME) :].partition("/")
    if not slash or path.strip("/") == "":
        raise InvalidInput("no folder is named", subject=repr(text), hint=_FORM)
    path = f"/{path}"
    if _UNPRINTABLE.search(path):
        raise InvalidInput("the path has a character that cannot be in one", subject=repr(text))
    if path.startswith("/~"):
        raise InvalidInput("a path is never expanded", subject=repr(text), hint="write the whole path of the folder")
    user, at, place = authority.rpartition("@")
    host, port = _host_and_port(place, text)
    return RemoteAddress(host, path, _user(user, text) if at else None, port)


def _user(user: str, text: str) -> str:
    if ":" in user:
        raise InvalidInput("a password does not belong in an address", subject=user.partition(":")[0], hint=_FORM)
    if not _USER.fullmatch(user):
        raise InvalidInput("not a user's name", subject=repr(text), hint="set User in ssh's configuration instead")
    return user


def _host_and_port(place: str, text: str) -> tuple[str, int | None]:
    if place.startswith("["):
        address, bracket, rest = place[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")) or not _is_ipv6(address):
            raise InvalidInput("not an IPv6 address in brackets", subject=repr(text), hint=_FORM)
        return address, _port(rest[1:], text) if rest else None
    host, colon, port = place.partition(":")
    if ":" in port:
        raise InvalidInput("an IPv6 address stands in brackets", subject=repr(text), hint=_FORM)
    if not _HOST.fullmatch(host):
        raise InvalidInput("not a host's name", subject=repr(text), hint=_ALIAS)
    return host, _port(port, text) if colon else None


def _is_ipv6(address: str) -> bool:
    plain, percent, zone = address.partition("%")
    try:
        ipaddress.IPv6Address(plain)
    except ValueError:
        return False
    return not percent or _ZONE.fullmatch(zone) is not None


def _port(port: str, text: str) -> int:
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise InvalidInput("not a port", subject=repr(text), hint="a port is a number from 1 to 65535")
    return int(port)
