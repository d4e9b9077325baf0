"""snapchain on another host, over the system's ssh.

    channel = open_ssh(parse_remote_address("ssh://root@kvm2/srv/replica"))

The user's own ssh does it, with its configuration, keys, agent, jump hosts and ControlMaster: whoever can type
`ssh HOST snapchain` needs to set up nothing.  The remote command is one constant; paths, names and whatever else a
user or an address says go through the stream, and never through the shell over there.

Two environment variables change what is run, as RSYNC_RSH and --rsync-path do, and nothing else does:
SNAPCHAIN_SSH          the ssh program and first options of it, split like a shell's words    ssh
SNAPCHAIN_REMOTE       what the shell over there runs as snapchain                            snapchain
They belong to the user, who may run anything over there in any case; no address and no stored thing can set them.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from snapchain.errors import InvalidInput
from snapchain.host.remote_address import RemoteAddress
from snapchain.host.remote_channel import Channel
from snapchain.host.remote_faults import diagnosis
from snapchain.host.remote_lanes import join_lanes
from snapchain.host.remote_process import ProcessChannel

SERVE = "serve-replica --stdio"
"""The one remote command: what stands after the program's name."""
ALIVE_INTERVAL, ALIVE_COUNT = 15, 4
"""ssh asks every 15 seconds whether the host is there, and gives up after four answers that did not come: a cut link
is noticed within 75 seconds, and one that heals within 45 is not even noticed."""
CONNECT_TIMEOUT = 30
PATIENCE = 90.0
"""Seconds without a byte: longer than ssh takes to notice, since it can say why; needed where a ControlMaster without
these settings carries us."""

_OPTIONS = {
    "RequestTTY": "no",
    "EscapeChar": "none",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "PermitLocalCommand": "no",  # its output would get into the stream
    "RemoteCommand": "none",
    "Compression": "no",  # what goes over is compressed
    "LogLevel": "INFO",  # a QUIET ssh would not say why it fails
    "ConnectTimeout": str(CONNECT_TIMEOUT),
    "ServerAliveInterval": str(ALIVE_INTERVAL),
    "ServerAliveCountMax": str(ALIVE_COUNT),
    "TCPKeepAlive": "yes",
}


@dataclass(frozen=True, slots=True)
class SshProgram:
    """What is run here and there. ssh: argument list up to the host; remote: shell text that names snapchain."""

    ssh: tuple[str, ...] = ("ssh",)
    remote: str = "snapchain"

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> SshProgram:
        """As SNAPCHAIN_SSH and SNAPCHAIN_REMOTE say. Raises InvalidInput."""
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
    """Start snapchain over there and return the channel to it, at once: a failure comes with the first bytes.

    program: by default what the environment says; patience: as of a Channel.  The errors of the channel say
    what is wrong with host, login or installation (`diagnosis`).  With a terminal, ssh may ask there for a passphrase
    or whether to trust a new host.
    """
    program = program or SshProgram.from_environment(os.environ)
    return _opened(address, program=program, patience=patience, terminal=_at_a_terminal())


def open_ssh_lanes(
    address: RemoteAddress, connections: int, *, program: SshProgram | None = None, patience: float = PATIENCE
) -> Channel:
    """As `open_ssh`, over several connections at once, for links on which one is too slow; see remote_lanes.

    Waits for the other side, which must `accept_lanes`, and does with those connections that come.  Only the first of
    them may ask at a terminal: the others log in by an agent, a key or a ControlMaster, or do not come.
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
    """ssh's argument list. Of the address, host, user and port are in it, whose characters have been judged."""
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
    """All of the user's, since configuration, agents and jump hosts may want any of it, less what is ours.

    That may be a passphrase.  LC_ALL=C: ssh's messages are read here.
    """
    return {name: value for name, value in environ.items() if not name.startswith("SNAPCHAIN_")} | {"LC_ALL": "C"}
