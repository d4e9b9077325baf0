"""snapchain on another host, over the system's ssh.

    channel = open_ssh(parse_remote_address("ssh://root@kvm2/srv/replica"))

The user's own ssh makes the connection, with its configuration, keys, agent, jump hosts and ControlMaster. A user who
can type `ssh HOST snapchain` needs no set-up.  The remote command is one constant; paths, names and all other text
from the user or the address go through the stream, never through the remote shell.

Only two environment variables change the command, as RSYNC_RSH and --rsync-path do:
SNAPCHAIN_SSH          the ssh program and its first options, split like a shell's words      ssh
SNAPCHAIN_REMOTE       the command that the remote shell runs as snapchain                    snapchain
The user sets them, and may run anything on that host anyway; no address and no stored data can set them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound, SnapchainError, ToolFailed, Unavailable
from snapchain.host.channel import Channel
from snapchain.host.lanes import join_lanes
from snapchain.host.process_channel import ProcessChannel
from snapchain.host.terminal import printable

SERVE = "serve-replica --stdio"
"""The one remote command: the words after the program's name."""
ALIVE_INTERVAL, ALIVE_COUNT = 15, 4
"""ssh probes the host every 15 seconds, and gives up after four missing answers. It detects a cut link within 75
seconds; a link that recovers within 45 seconds goes unnoticed."""
CONNECT_TIMEOUT = 30
PATIENCE = 90.0
"""Seconds without a byte. Longer than ssh needs to detect a cut link, since ssh reports the reason; needed where a
ControlMaster without these settings carries the connection."""

_OPTIONS = {
    "RequestTTY": "no",
    "EscapeChar": "none",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",  # its output would corrupt the stream
    "RemoteCommand": "none",
    "Compression": "no",  # the stream is compressed already
    "LogLevel": "INFO",  # a QUIET ssh does not report why it fails
    "ConnectTimeout": str(CONNECT_TIMEOUT),
    "ServerAliveInterval": str(ALIVE_INTERVAL),
    "ServerAliveCountMax": str(ALIVE_COUNT),
    "TCPKeepAlive": "yes",
}


@dataclass(frozen=True, slots=True)
class SshProgram:
    """The programs on both hosts. ssh: argument list up to the host; remote: shell text that names snapchain."""

    ssh: tuple[str, ...] = ("ssh",)
    remote: str = "snapchain"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> SshProgram:
        """From SNAPCHAIN_SSH and SNAPCHAIN_REMOTE. Raises InvalidInput."""
        said, remote = environ.get("SNAPCHAIN_SSH", ""), environ.get("SNAPCHAIN_REMOTE", "")
        try:
            ssh = tuple(shlex.split(said))
        except ValueError as error:
            raise InvalidInput(f"not a command: {error}", subject="SNAPCHAIN_SSH") from error
        if "\n" in remote:
            raise InvalidInput("not a command: it has more than one line", subject="SNAPCHAIN_REMOTE")
        return cls(ssh or cls().ssh, remote or cls().remote)


def open_ssh(
    address: RemoteAddress,
    *,
    program: SshProgram | None = None,
    patience: float = PATIENCE,
) -> ProcessChannel:
    """Start snapchain on the other host and return the channel to it without waiting: the first read reports a failure.

    program: from the environment by default
    patience: as of a Channel
    The errors of the channel describe a fault of host, login or installation (`diagnosis`).  With a terminal, ssh may
    ask for a passphrase, or whether to trust a new host.
    """
    program = program or SshProgram.from_environment(os.environ)
    return _opened(address, program=program, patience=patience, terminal=_at_a_terminal())


def open_ssh_lanes(
    address: RemoteAddress, connections: int, *, program: SshProgram | None = None, patience: float = PATIENCE
) -> Channel:
    """As `open_ssh`, over several connections at once, for links on which one is too slow; see lanes.py.

    Waits for the other side, which must call `accept_lanes`, and uses the connections that succeed.  Only the first
    one may ask at a terminal: the others log in by an agent, a key or a ControlMaster, or fail.
    """
    program = program or SshProgram.from_environment(os.environ)
    terminal = _at_a_terminal()
    channels: list[Channel] = [_opened(address, program=program, patience=patience, terminal=terminal)]
    try:
        for _ in range(connections - 1):
            channels.append(_opened(address, program=program, patience=patience, terminal=False))  # noqa: PERF401
    except BaseException:
        for channel in channels:
            channel.abort()
        raise
    return join_lanes(channels, peer=address.login, patience=patience)


_FORWARD_SECONDS = CONNECT_TIMEOUT + 15.0
_FORWARD_POLL = 0.02
_FORWARDING = {
    "ClearAllForwardings": "no",
    "ExitOnForwardFailure": "yes",
    "StreamLocalBindUnlink": "yes",
    "StreamLocalBindMask": "0000",  # the directory keeps others out, and QEMU may be another user
    "ControlMaster": "no",
    "ControlPath": "none",  # a master would keep the sockets when we are gone
    "BatchMode": "yes",
}


@contextmanager
def open_forward(
    address: RemoteAddress, pairs: Sequence[tuple[Path, Path]], *, program: SshProgram | None = None
) -> Iterator[None]:
    """Let unix sockets of the other host be reached here, through an ssh that runs as long as the block.

    pairs: a path of this host, which ssh makes, and the socket of the other host behind it
    Raises Unavailable, and as the channel of `open_ssh`.
    """
    program = program or SshProgram.from_environment(os.environ)
    for path in (path for pair in pairs for path in pair):
        if not path.is_absolute() or ":" in str(path) or _UNPRINTABLE.search(str(path)):
            raise InvalidInput("ssh cannot forward a socket of this name", subject=path)
    argv = forwarding_line(address, pairs, program)
    channel = ProcessChannel(
        argv,
        peer=address.login,
        diagnose=lambda status, stderr: diagnosis(address, program.ssh, status, stderr),
        env=_environment(os.environ),
        patience=PATIENCE,
    )
    try:
        until = time.monotonic() + _FORWARD_SECONDS
        while not all(near.exists() for near, _ in pairs):
            if channel.has_ended(_FORWARD_POLL):
                raise channel.end_error()
            if time.monotonic() >= until:
                raise Unavailable("ssh did not forward the sockets in time", subject=address.login)
        yield
    finally:
        channel.abort()
        with suppress(SnapchainError):
            channel.close(patience=5.0)


def forwarding_line(address: RemoteAddress, pairs: Sequence[tuple[Path, Path]], program: SshProgram) -> list[str]:
    """ssh's argument list for `open_forward`."""
    options = {**_OPTIONS, **_FORWARDING}
    words = [*program.ssh, *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    for near, far in pairs:
        words += ["-L", f"{near}:{far}"]
    if address.user is not None:
        words += ["-l", address.user]
    if address.port is not None:
        words += ["-p", str(address.port)]
    # The command waits for a word that never comes. It is there because sshd sets TCP_NODELAY only for a login that
    # runs one: without it (-N), a small answer of QEMU's waits for the acknowledgement of the one before, 40 ms.
    return [*words, "--", address.host, f"{program.remote} {SERVE}"]


def _opened(address: RemoteAddress, *, program: SshProgram, patience: float, terminal: bool) -> ProcessChannel:
    return ProcessChannel(
        command_line(address, program=program, ask=terminal),
        peer=address.login,
        diagnose=lambda status, stderr: diagnosis(address, program.ssh, status, stderr),
        env=_environment(os.environ),
        patience=patience,
        terminal=terminal,
    )


def command_line(address: RemoteAddress, *, program: SshProgram, ask: bool) -> list[str]:
    """ssh's argument list. It holds host, user and port of the address, whose characters have been checked."""
    options = {**_OPTIONS, "BatchMode": "no" if ask else "yes"}
    words = [*program.ssh, *(word for name, value in options.items() for word in ("-o", f"{name}={value}"))]
    if address.user is not None:
        words += ["-l", address.user]
    if address.port is not None:
        words += ["-p", str(address.port)]
    return [*words, "--", address.host, f"{program.remote} {SERVE}"]


def _at_a_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty() and sys.stderr is not None and sys.stderr.isatty()


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The user's environment without snapchain's variables, which may hold a passphrase.

    ssh's configuration, agents and jump hosts may need the others.  LC_ALL=C: snapchain parses ssh's messages.
    """
    return {name: value for name, value in environ.items() if not name.startswith("SNAPCHAIN_")} | {"LC_ALL": "C"}


# --- The address ssh://[user@]host[:port]/path, parsed and checked. Pure.
#
#     ssh://root@kvm2/srv/replica        as an alias of ssh's configuration, a name or an IPv4 address
#     ssh://kvm2:2222/srv/replica
#     ssh://[fd00::2%br0]/srv/replica    an IPv6 address
#
# User and host go into ssh's command line and, through a ProxyCommand in the user's configuration, into a shell. Only
# characters without a meaning for either are accepted. The path goes through the stream; nothing in it is decoded or
# expanded.

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
    """Whether the text begins like an address of this form, valid or not."""
    return text[: len(SCHEME)].lower() == SCHEME


def parse_remote_address(text: str) -> RemoteAddress:
    """Parse an address without ::DISK. Raises InvalidInput."""
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


# --- The cause of a failed ssh: exit status and end of stderr become one error with a remedy. Pure.
#
# ssh exits with 255 for its own errors, otherwise with the status of the remote program, whose stderr arrives through
# the same pipe. So the text decides; it is OpenSSH's in the C locale.

_OF_SSH = 255
_GO_ON = "run it again: it resumes where it stopped"


@dataclass(frozen=True, slots=True)
class _Fault:
    """words: a pattern of ssh's messages; kind: the error to raise; message, hint: may use {host} and {login}."""

    words: str
    kind: type[SnapchainError]
    message: str
    hint: str


# The first match counts. Permanent faults come before transient ones.
_FAULTS = (
    _Fault(
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key for .* has changed",
        ToolFailed,
        "the host key is not the one known for it: another machine may be answering in its name",
        "find out whether it was set up anew; if so, forget the old key with ssh-keygen -R {host}",
    ),
    _Fault(
        r"Host key verification failed|No .* host key is known",
        ToolFailed,
        "the host key is not known here",
        "log in once by hand with ssh {login}, compare the fingerprint and accept it",
    ),
    _Fault(
        r"Permission denied \(|Too many authentication failures|sign_and_send_pubkey|no such identity",
        ToolFailed,
        "the login was refused",
        "ssh {login} must work without a password: give a key to ssh-agent, or name one in ssh's configuration",
    ),
    _Fault(
        r"Bad configuration option|Bad owner or permissions|Can't open user config|terminating, .* bad configuration"
        r"|Bad local forwarding|Could not request local forwarding|unix_listener|missing argument|invalid quotes"
        r"|unknown option|illegal option",
        ToolFailed,
        "ssh cannot be run as it is configured",
        "see that ssh {login} works",
    ),
    _Fault(
        r"Could not resolve hostname .*: (Temporary failure|Try again|System error)",
        Unavailable,
        "the name of the host cannot be looked up now",
        "see whether name service works",
    ),
    _Fault(
        r"Could not resolve hostname",
        NotFound,
        "no such host",
        "check its name, or give it an entry in ssh's configuration",
    ),
    _Fault(
        r"Connection refused",
        Unavailable,
        "the host takes no ssh connections",
        "see whether sshd runs there, and on which port",
    ),
    _Fault(
        r"Connection timed out during banner exchange|Operation timed out|Connection timed out|No route to host"
        r"|Network is (unreachable|down)|Host is (unreachable|down)",
        Unavailable,
        "the host does not answer",
        "see whether it is up and the way to it open",
    ),
    _Fault(
        r"UNKNOWN port 65535",  # ssh's name for the far end of a command's pipes
        Unavailable,
        "the ProxyCommand, or the host to jump over, gave no connection, or ended it",
        "see that ssh {login} works",
    ),
    _Fault(
        r"Timeout, server .* not responding|client_loop: send disconnect|Connection (reset|closed|to .* closed)"
        r"|kex_exchange_identification|ssh_dispatch_run_fatal|Broken pipe|Control socket|mux_client"
        r"|Received disconnect",
        Unavailable,
        "the connection was lost",
        _GO_ON,
    ),
)
_SAID_CAP = 300
_BY_SHELL = 128
"""A shell adds this to a signal's number to form an exit status."""
_FROM_OUTSIDE = {signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM}
"""Sent by people, a shutdown, or a kernel that is out of memory; a retry may succeed."""


def diagnosis(address: RemoteAddress, ssh: Sequence[str], status: int, stderr: str) -> SnapchainError:
    """The error for an exit status and the end of stderr. status: not 0; negative: a signal."""
    said = _last_words(stderr)
    facts = _Facts(address, (*ssh, address.login), status, stderr)
    if status == _OF_SSH:
        for fault in _FAULTS:
            if re.search(fault.words, stderr):
                return facts.error(fault.kind, f"{fault.message}{said}", hint=fault.hint)
        if not said:
            return facts.error(Unavailable, "the connection was lost", hint=_GO_ON)
        return facts.error(ToolFailed, f"ssh failed{said}", hint="see that ssh {login} works")
    if status < 0:
        return facts.error(Unavailable, f"ssh was ended by {_signal_name(-status)}", hint=_GO_ON)
    if status - _BY_SHELL in _FROM_OUTSIDE:
        name = _signal_name(status - _BY_SHELL)
        return facts.error(Unavailable, f"snapchain over there was ended by {name}", hint=_GO_ON)
    if status == 127 or (status == 126 and "ermission denied" in stderr):
        return facts.error(
            ToolFailed,
            f"snapchain is not installed there, or not where its shell looks for programs{said}",
            hint="install snapchain on {host}, or set SNAPCHAIN_REMOTE to where it is there",
        )
    return facts.error(ToolFailed, f"snapchain over there ended with status {status}{said}", hint=None)


@dataclass(frozen=True, slots=True)
class _Facts:
    address: RemoteAddress
    argv: tuple[str, ...]
    status: int
    stderr: str

    def error(self, kind: type[SnapchainError], message: str, *, hint: str | None) -> SnapchainError:
        login = self.address.login
        said = hint and hint.format(host=self.address.host, login=login)
        if issubclass(kind, ToolFailed):
            return kind(message, argv=self.argv, status=self.status, stderr=self.stderr, subject=login, hint=said)
        return kind(message, subject=login, hint=said)


def _last_words(stderr: str) -> str:
    """The last line that says something, fit for a terminal: the other side may be hostile."""
    told = [line for line in stderr.splitlines() if re.search(r"\w", line)]
    if not told:
        return ""
    return f": {' '.join(printable(told[-1]).split())[:_SAID_CAP].rstrip('.')}"


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
