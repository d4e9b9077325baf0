"""virsh, the one way to libvirt: argument lists in, text or XML out, each call with a deadline.

    virsh = Virsh()                      # the daemon that the environment names, else the system's
    virsh.names("list", "--all", "--name")
    virsh.xml("dumpxml", "--domain", name)

A name never stands where an option could: it follows its option (`--domain NAME`), so a domain called `--all` is only a
domain.  virsh runs in the C locale, so its words of failure are the ones that are matched here.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree as ET

from snapchain.errors import Busy, InvalidInput, NotFound, SnapchainError, ToolFailed, Unavailable, Unsupported
from snapchain.host.processes import run
from snapchain.host.terminal import shell_line

SECONDS = 40.0
"""Deadline of a command. libvirt itself gives up after 30, where something else holds its lock on the domain."""
SECONDS_TO_CHANGE = 120.0
"""Deadline of a command that changes the block graph."""
SYSTEM, SESSION = "qemu:///system", "qemu:///session"
_SOCKETS = ("libvirt-sock", "virtqemud-sock", "libvirt-sock-ro", "virtqemud-sock-ro")
_OUTPUT_CAP = 16 << 20
_INHERITED = ("XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "LIBVIRT_AUTH_FILE")
_PLAIN = re.compile(r"[A-Za-z0-9_.:/=-]+")
"""Words that mean themselves in a line of virsh."""
_NOT_THERE = re.compile(r"(?:failed to get domain|Domain not found|no domain with matching)", re.IGNORECASE)
_NOT_RUNNING = re.compile(r"domain is not running|domain .* is not running", re.IGNORECASE)
_NO_DAEMON = re.compile(
    r"failed to connect to the hypervisor|Failed to connect socket|Cannot (?:recv|write) data|client socket is closed"
    r"|End of file while reading|internal error: client socket|Connection reset|keepalive"
    r"|Disconnected from",
    re.IGNORECASE,
)
_FORBIDDEN = re.compile(r"authentication (?:failed|unavailable)|access denied|Permission denied", re.IGNORECASE)
_LOCKED = re.compile(
    r"cannot acquire state change lock|already (?:in an )?active block job|another .*block job"
    r"|is busy: |in use by block job|disk .* already in active|blockjob|operation .* already in progress"
    r"|domain .*(?:being|is) (?:being )?(?:migrated|backed up)|another backup",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Virsh:
    """A libvirt daemon of this host.

    connect: its URI; None: LIBVIRT_DEFAULT_URI or VIRSH_DEFAULT_CONNECT_URI, else the system's daemon
    read_only: ask only; anybody may, while more needs rights
    elsewhere: it may be another host's, where nothing is asked about its files
    """

    connect: str | None = None
    read_only: bool = False
    seconds: float = SECONDS
    elsewhere: bool = False

    @property
    def uri(self) -> str:
        """The URI that is asked."""
        return self.connect or default_uri()

    def texts(self, *commands: Sequence[str], subject: str | None = None) -> list[str]:
        """What several commands print, by one virsh where all of them succeed: half of a call is the connection.

        Raises as `text`.
        """
        mark = secrets.token_hex(16)
        if all(_PLAIN.fullmatch(word) for words in commands for word in words):
            line = f"; echo {mark}; ".join(" ".join(words) for words in commands)
            try:
                done = run(self.argv(line), env=environment(), timeout=self.seconds, output_cap=_OUTPUT_CAP)
            except ToolFailed as error:
                if _is_late(error):  # asking again would take as long
                    raise explained(error, commands[0], uri=self.uri, name=subject) from error
                done = None
            if done is not None and not done.stderr:
                # virsh's `echo` ends its line, or with --quiet does not: libvirt 9.0.
                parts = re.split(f"{mark}\n?", done.stdout.decode("utf-8", "surrogateescape"))
                if len(parts) == len(commands):
                    return parts
        return [self.text(*words, subject=subject) for words in commands]

    def argv(self, *words: str) -> list[str]:
        """virsh and its options. Raises as `check_local`."""
        if not self.elsewhere:
            check_local(self.uri)
        return ["virsh", *(["--readonly"] if self.read_only else []), "--connect", self.uri, "--quiet", *words]

    def text(self, *words: str, timeout: float | None = None, subject: str | None = None) -> str:
        """What a command prints. subject: of errors, such as the name of the domain; by default what --domain says

        Raises NotFound for a domain that is not there, Busy for one that something else is at work on, Unavailable
        when libvirt does not answer in time or is not there, ToolFailed with libvirt's words for the rest.
        """
        seconds = self.seconds if timeout is None else timeout
        try:
            done = run(self.argv(*words), env=environment(), timeout=seconds, output_cap=_OUTPUT_CAP)
        except ToolFailed as error:
            raise explained(error, words, uri=self.uri, name=subject or named_domain(words)) from error
        return done.stdout.decode("utf-8", "surrogateescape")

    def names(self, *words: str) -> list[str]:
        """The lines that are not blank."""
        return [line.strip() for line in self.text(*words).splitlines() if line.strip()]

    def xml(self, *words: str, subject: str | None = None) -> ET.Element:
        """A document. Raises Unavailable for what is none, and what `text` raises."""
        return parsed(self.text(*words, subject=subject), words)


def parsed(text: str, words: Sequence[str]) -> ET.Element:
    """XML that a command printed. Raises Unavailable."""
    try:
        return ET.fromstring(text.encode("utf-8", "surrogateescape"))  # noqa: S314 - libvirt's own words
    except ET.ParseError as error:
        raise Unavailable(f"`{shell_line(['virsh', *words])}` printed no XML: {error}") from error


def default_uri() -> str:
    """The URI that is asked where none is given: of the environment, else of the system's daemon."""
    return os.environ.get("LIBVIRT_DEFAULT_URI") or os.environ.get("VIRSH_DEFAULT_CONNECT_URI") or SYSTEM


def reachable() -> list[str]:
    """The URIs of the daemons of this user: the chosen one, else the system's and the user's own where they run."""
    if os.environ.get("LIBVIRT_DEFAULT_URI") or os.environ.get("VIRSH_DEFAULT_CONNECT_URI"):
        return [default_uri()]
    # To start a virsh for nothing takes longer than many a command; and asking for a session would start its daemon.
    return [uri for uri in (SYSTEM, SESSION) if has_daemon(uri) and (uri == SYSTEM or os.geteuid() != 0)]


def is_installed() -> bool:
    """Whether this host has virsh: without it, it has no libvirt to ask."""
    return which("virsh") is not None


def has_daemon(uri: str) -> bool:
    """Whether a daemon's socket is where the URI says. True where that cannot be told."""
    parts = urlsplit(uri)
    if "socket=" in parts.query or parts.path not in {"/system", "/session"}:
        return True
    return any(socket.exists() for socket in (_system_sockets() if parts.path == "/system" else _session_sockets()))


def socket_of(uri: str) -> Path:
    """The socket of the daemon that a local URI names; of several the one that libvirt itself would take."""
    if given := parse_qs(urlsplit(uri).query).get("socket"):
        return Path(given[0])
    paths = [Path("/run/libvirt") / name for name in ("virtqemud-sock", "libvirt-sock")]
    return next((path for path in paths if path.exists()), paths[-1])


def has_any_daemon() -> bool:
    """Whether a libvirt daemon has a socket here."""
    return any(socket.exists() for socket in (*_system_sockets(), *_session_sockets()))


def check_local(uri: str) -> None:
    """Raises Unsupported for a daemon of another host: its paths are not those of this one; InvalidInput for no URI."""
    parts = urlsplit(uri)
    if not parts.scheme:
        raise InvalidInput("not a URI of libvirt", subject=uri, hint="such as qemu:///system")
    driver, _, transport = parts.scheme.partition("+")
    if parts.netloc or transport not in {"", "unix"}:
        raise Unsupported(
            "the URI names a libvirt of another host, whose files are not here",
            subject=uri,
            hint="run snapchain on that host",
        )
    if driver not in {"qemu", "test"}:
        raise Unsupported(
            f"snapchain supports QEMU guests only, not {driver}", subject=uri, hint="such as qemu:///system"
        )


def explained(error: ToolFailed, words: Sequence[str], *, uri: str, name: str | None) -> SnapchainError:
    """libvirt's failure as the error that tells the caller what to do."""
    said = " ".join(line.strip() for line in error.stderr.splitlines() if line.strip()).removeprefix("error: ")
    if error.status == 127:  # virsh is not installed
        return error
    if _is_late(error):
        return Unavailable(
            f"libvirt did not answer `{words[0]}` in time", subject=name or uri, hint="see `systemctl status libvirtd`"
        )
    if _FORBIDDEN.search(said):
        return Unavailable(f"libvirt refused access: {said}", subject=uri, hint="run it as root")
    if error.status == -signal.SIGPIPE:  # it wrote to a daemon that had just ended, and has no words for that
        said = "the connection was closed"
    if error.status == -signal.SIGPIPE or _NO_DAEMON.search(said):
        return Unavailable(f"libvirt is not reachable: {said}", subject=uri, hint="see `systemctl status libvirtd`")
    if _NOT_THERE.search(said):
        return NotFound("libvirt has no such domain", subject=name, hint="`snapchain guests` lists them")
    if _LOCKED.search(said):
        return Busy(
            f"libvirt is at work on the domain: {said}", subject=name, hint="wait until that is done, then run it again"
        )
    return ToolFailed(
        f"libvirt refused `{words[0]}`: {said or error.message}",
        argv=error.argv,
        status=error.status,
        stderr=error.stderr,
        subject=name,
    )


def _is_late(error: ToolFailed) -> bool:
    return "did not end within" in error.message


def is_not_running(error: SnapchainError) -> bool:
    """Whether libvirt refused because the domain does not run."""
    return bool(_NOT_RUNNING.search(error.message))


def named_domain(words: Sequence[str]) -> str | None:
    """The domain that a command is about."""
    return words[words.index("--domain") + 1] if "--domain" in words[:-1] else None


def _system_sockets() -> list[Path]:
    return [Path("/run/libvirt") / name for name in _SOCKETS]


def _session_sockets() -> list[Path]:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return [Path(runtime) / "libvirt" / name for name in _SOCKETS] if runtime else []


def environment() -> dict[str, str]:
    """What virsh gets of ours, beside the minimum."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ}
