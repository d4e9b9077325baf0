"""What ssh says, and what that means: its words as OpenSSH 9.2 says them."""

from __future__ import annotations

import pytest

from snapchain.errors import NotFound, SnapchainError, ToolFailed, Unavailable
from snapchain.host.ssh import RemoteAddress, diagnosis

KVM2 = RemoteAddress("kvm2", "/srv", "root")
CHANGED = """\
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Host key for kvm2 has changed and you have requested strict checking.
Host key verification failed.
"""


def of(status: int, stderr: str) -> SnapchainError:
    return diagnosis(KVM2, ("ssh",), status, stderr)


@pytest.mark.parametrize(
    ("stderr", "kind", "message"),
    [
        (CHANGED, ToolFailed, "another machine may be answering"),
        ("No ED25519 host key is known for kvm2 and you have requested strict checking.\nHost key verification failed.",
         ToolFailed, "not known here"),
        ("root@kvm2: Permission denied (publickey,password).", ToolFailed, "login was refused"),
        ("Received disconnect from 192.0.2.1 port 22:2: Too many authentication failures",
         ToolFailed, "login was refused"),
        ("/root/.ssh/config: terminating, 1 bad configuration options", ToolFailed, "as it is configured"),
        ("Bad owner or permissions on /root/.ssh/config", ToolFailed, "as it is configured"),
        ("ssh: Could not resolve hostname kvm2: Name or service not known", NotFound, "no such host"),
        ("ssh: Could not resolve hostname kvm2: Temporary failure in name resolution", Unavailable, "looked up now"),
        ("ssh: connect to host kvm2 port 22: Connection refused", Unavailable, "no ssh connections"),
        ("ssh: connect to host kvm2 port 22: Connection timed out", Unavailable, "does not answer"),
        ("ssh: connect to host kvm2 port 22: No route to host", Unavailable, "does not answer"),
        ("Connection timed out during banner exchange", Unavailable, "does not answer"),
        ("Timeout, server kvm2 not responding.", Unavailable, "was lost"),
        ("client_loop: send disconnect: Broken pipe", Unavailable, "was lost"),
        ("Connection to kvm2 closed by remote host.", Unavailable, "was lost"),
        ("kex_exchange_identification: Connection closed by remote host", Unavailable, "was lost"),
        ("Connection reset by 192.0.2.1 port 22", Unavailable, "was lost"),
        ("Connection closed by UNKNOWN port 65535", Unavailable, "ProxyCommand"),
        ("mux_client_request_session: read from master failed: Broken pipe", Unavailable, "was lost"),
        ("", Unavailable, "was lost"),
        ("something new", ToolFailed, "ssh failed: something new"),
    ],
)  # fmt: skip
def test_words_of_ssh(stderr: str, kind: type[SnapchainError], message: str) -> None:
    error = of(255, f"{stderr}\n")
    assert type(error) is kind
    assert message in error.message
    assert error.subject == "root@kvm2"
    assert error.hint
    assert "{" not in error.hint


@pytest.mark.parametrize(
    ("status", "stderr"),
    [
        (127, "bash: line 1: snapchain: command not found\n"),
        (127, "sh: 1: snapchain: not found\n"),
        (126, "bash: line 1: /opt/snapchain: Permission denied\n"),
    ],
)
def test_snapchain_is_not_there(status: int, stderr: str) -> None:
    error = of(status, stderr)
    assert isinstance(error, ToolFailed)
    assert "not installed there" in error.message
    assert "kvm2" in (error.hint or "")
    assert "SNAPCHAIN_REMOTE" in (error.hint or "")


def test_the_remote_program_failed() -> None:
    error = of(5, "a warning\nsnapchain: web1.qcow2: damaged\n\n")
    assert isinstance(error, ToolFailed)
    assert error.message == "snapchain over there ended with status 5: snapchain: web1.qcow2: damaged"
    assert (error.status, error.argv) == (5, ("ssh", "root@kvm2"))


def test_ssh_was_killed() -> None:
    error = of(-15, "")
    assert isinstance(error, Unavailable)
    assert "SIGTERM" in error.message


def test_words_of_a_hostile_host_are_harmless() -> None:
    error = of(1, "\x1b]0;owned\x07\x1b[2J\u202eevil\u009b31m" + "x" * 100_000 + "\n")
    assert len(error.message) < 400
    assert error.message.isprintable()
    assert "\u202e" not in error.message


def test_a_host_may_have_braces_or_brackets() -> None:
    error = diagnosis(RemoteAddress("fe80::2%br0", "/srv"), ("ssh",), 255, "Connection refused")
    assert error.subject == "[fe80::2%br0]"
