"""Where a server listens: a unix socket of this user alone, or TCP; and the certificates for TLS.

    /run/snapchain/serve-4711.sock       mode 0600: the file rights say who may connect
    127.0.0.1:10809                      whoever is on this host
    0.0.0.0:10809                        with TLS only: the server shows a certificate, and wants one of the client

A directory with certificates has the names that QEMU and libnbd use:

    ca-cert.pem   server-cert.pem   server-key.pem   [ca-crl.pem]
"""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from snapchain.errors import Busy, Conflict, InvalidInput, NotFound, SnapchainError
from snapchain.host.directory import Directory
from snapchain.host.os_errors import os_errors
from snapchain.host.private import PrivateDirectory, read_own
from snapchain.host.run_directory import LONGEST_SOCKET, base

PORT = 10809
"""That of NBD, as IANA has it."""
_BACKLOG = 1024
"""A client that does not wait is refused when so many are waiting."""
_MOST_PEM = 1 << 20
_TLS_FILES = "--tls DIR has ca-cert.pem, server-cert.pem and server-key.pem without a passphrase, as QEMU takes them"


def default_socket(*, of: str | None = None) -> Path:
    """Of this process: below /run/snapchain for root, below $XDG_RUNTIME_DIR for others. of: in place of its number"""
    return base() / f"serve-{of or os.getpid()}.sock"


def unix_uri(path: Path, export: str) -> str:
    """Of an export behind a unix socket, as QEMU and libnbd take it."""
    return f"nbd+unix:///{quote(export)}?socket={quote(str(path))}"


def tcp_uri(host: str, port: int, export: str, *, tls: bool) -> str:
    """Of an export behind TCP."""
    name = f"[{host}]" if ":" in host else host
    at = "" if port == PORT else f":{port}"
    return f"nbd{'s' if tls else ''}://{name}{at}/{quote(export)}"


def parse_place(text: str) -> tuple[str, int]:
    """(host, port) of HOST[:PORT] or [ADDRESS]:PORT. Raises InvalidInput."""
    if text.startswith("["):
        host, mark, rest = text[1:].partition("]")
        port = rest.removeprefix(":") if mark and (not rest or rest.startswith(":")) else "?"
    elif text.count(":") > 1:
        host, port = text, ""
    else:
        host, _, port = text.partition(":")
    if not host or not (port == "" or (port.isdecimal() and len(port) <= 5 and int(port) <= 65535)):
        raise InvalidInput("not an address to listen on", subject=text, hint="write HOST:PORT, such as 127.0.0.1:10809")
    return host, int(port or PORT)


_SUFFIX = ".new"
_LONGEST = LONGEST_SOCKET - len(_SUFFIX)


@contextmanager
def unix_listener(path: Path) -> Iterator[socket.socket]:
    """A unix socket of mode 0600 that listens, and is removed at the end.

    Raises Busy where another server listens there, Conflict where the name is not that of a socket, NotFound for a
    missing directory, InvalidInput.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > _LONGEST:
        raise InvalidInput(
            f"the path of a socket has at most {_LONGEST} bytes", subject=path, hint="name a shorter one"
        )
    if path.parent == base():
        with PrivateDirectory(base(), make=True):
            pass
    with os_errors(path.parent):
        is_there = path.parent.exists()
    if not is_there:
        raise NotFound(
            "there is no such directory", subject=path.parent, hint="make it, or name a path in another directory"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        with os_errors(path), Directory.open(path.parent) as directory:
            if directory.rights is not None:
                raise InvalidInput(
                    f"root makes no socket in a directory that {directory.rights} can change",
                    subject=path.parent,
                    hint="name a path in another directory, such as /run",
                )
            _check_free(directory, path)
            new = path.name + _SUFFIX
            directory.remove(new)
            os.fchmod(listening.fileno(), 0o600)  # the file that `bind` makes gets the mode of the socket
            listening.bind(f"/proc/self/fd/{directory.opened()}/{new}")
            listening.listen(_BACKLOG)
            ours = directory.status(new)
            directory.rename(new, path.name)
        try:
            yield listening
        finally:
            with suppress(SnapchainError), os_errors(path), Directory.open(path.parent) as directory:
                directory.remove(path.name, only=ours)


def _check_free(directory: Directory, path: Path) -> None:
    if not directory.has(path.name):
        return
    if not stat.S_ISSOCK(directory.status(path.name).st_mode):
        raise Conflict("the path exists, and is no socket", subject=path, hint="name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as visitor:
        visitor.settimeout(2.0)
        try:
            visitor.connect(str(path))
        except ConnectionRefusedError:
            return  # left by a server that was killed
    raise Busy("another server listens on this socket", subject=path, hint="stop it, or name another path")


@contextmanager
def tcp_listener(host: str, port: int, *, has_tls: bool) -> Iterator[socket.socket]:
    """A TCP socket that listens. port: 0 for any that is free

    Raises InvalidInput without TLS for an address that is not this host's alone, Busy for a port that is taken.
    """
    subject = f"{host}:{port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise NotFound(f"the address is not known: {error.strerror or error}", subject=subject) from error
    if not has_tls and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise InvalidInput(
            "without TLS everybody on the network could read the disks",
            subject=subject,
            hint="give --tls DIR with certificates, or listen on 127.0.0.1 or a unix socket",
        )
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            with os_errors(subject):
                listening.bind(address)
                listening.listen(_BACKLOG)
        except SnapchainError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EADDRINUSE:
                raise Busy(
                    "another program listens on this port",
                    subject=subject,
                    hint="stop it, or name another port; port 0 takes a free one",
                ) from error
            raise
        yield listening


def tls_context(directory: Path) -> ssl.SSLContext:
    """Shows the certificate of the directory, and wants one of the client that the same authority has signed.

    Raises NotFound for a file that is missing, InvalidInput for one that another user may have written, or that is no
    certificate or key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    authority, certificate, key = (directory / name for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"))
    revoked = directory / "ca-crl.pem"
    try:
        for each in (authority, certificate, key):
            read_own(each, cap=_MOST_PEM)
    except NotFound as error:
        error.hint = _TLS_FILES
        raise
    if key.stat().st_mode & 0o077:
        raise InvalidInput("other users may read the key", subject=key, hint=f"chmod 600 {key}")
    try:
        context.load_verify_locations(cafile=str(authority))
        context.load_cert_chain(str(certificate), str(key), password=lambda: "")
        if revoked.exists():
            read_own(revoked, cap=_MOST_PEM)
            context.load_verify_locations(cafile=str(revoked))
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (ssl.SSLError, OSError) as error:
        raise InvalidInput(
            f"not the certificates and the key of a TLS server: {error}",
            subject=directory,
            hint=_TLS_FILES,
        ) from error
    return context
