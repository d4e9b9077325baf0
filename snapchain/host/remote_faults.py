"""What a failed ssh means, and what to do: its exit status and its last words become one error of the tree. Pure.

ssh ends with 255 for faults of its own, and else with the status of the remote program, whose stderr comes through
the same pipe.  So the words decide, and they are those of OpenSSH in the C locale.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from snapchain.errors import NotFound, SnapchainError, ToolFailed, Unavailable
from snapchain.host.remote_address import RemoteAddress
from snapchain.host.terminal import printable

_OF_SSH = 255
_GO_ON = "run it again: it goes on where it stopped"


@dataclass(frozen=True, slots=True)
class _Fault:
    """words: what ssh says, any of it; kind: the error raised; message, hint: may use {host} and {login}."""

    words: str
    kind: type[SnapchainError]
    message: str
    hint: str


# The first one that fits. What cannot pass by itself comes before what may.
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
        r"|Bad local forwarding|missing argument|invalid quotes|unknown option|illegal option",
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
        r"UNKNOWN port 65535",  # what ssh calls the far end of a command's pipes
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
"""What a shell adds to a signal's number to make a status of it."""
_FROM_OUTSIDE = {signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM}
"""By people, a shutdown, or the kernel that has run out of memory; the same again may end well."""


def diagnosis(address: RemoteAddress, ssh: Sequence[str], status: int, stderr: str) -> SnapchainError:
    """The error that an end with this status (negative: the signal) and these last words is. status: not 0."""
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
