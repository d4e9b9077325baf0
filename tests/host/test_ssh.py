"""Over a real ssh to a real sshd: what is run there, what each fault is called, how a connection ends."""

from __future__ import annotations

import os
import pty
import pwd
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput, NotFound, SnapchainError, ToolFailed, Unavailable
from snapchain.host.process_channel import ProcessChannel
from snapchain.host.ssh import (
    RemoteAddress,
    SshProgram,
    command_line,
    forwarding_line,
    open_ssh,
    parse_remote_address,
)
from tests.net.namespaces import Cable
from tests.net.sshd import SshHost
from tests.waiting import gone, wait_until

MiB = 1 << 20
# The one remote command has two more words, which these take for names of shell parameters.
CAT = "sh -c 'exec cat'"
SINK = "sh -c 'exec dd bs=64k of=/dev/null status=none'"


def opened(
    host: SshHost, remote: str, *options: str, user: str | None = None, patience: float = 30.0
) -> ProcessChannel:
    """A channel to a command of the test's own. options: of ssh, which count before all others."""
    first = tuple(word for option in options for word in ("-o", option))
    program = SshProgram((*host.ssh, *first), remote)
    return open_ssh(RemoteAddress(host.alias, "/srv", user), program=program, patience=patience)


def everything(channel: ProcessChannel) -> bytes:
    return b"".join(iter(lambda: channel.read(1 << 16), b""))


def fault(host: SshHost, remote: str, *options: str) -> SnapchainError:
    """What reading from such a channel raises."""
    channel = opened(host, remote, *options)
    try:
        channel.read(1)
    except SnapchainError as caught:
        error = caught
    else:
        pytest.fail("it worked")
    finally:
        channel.abort()
    assert error.subject == host.alias
    return error


def test_the_remote_command_is_one_constant(there: SshHost) -> None:
    with opened(there, "printf '%s\\n' the-shell-here:$0", user=pwd.getpwuid(os.geteuid()).pw_name) as channel:
        assert everything(channel).decode().splitlines()[1:] == ["serve-replica", "--stdio"]


def test_the_login_that_forwards_runs_a_command() -> None:
    """sshd sets TCP_NODELAY for no other: with -N, small answers through it wait 40 ms for an acknowledgement."""
    address = parse_remote_address("ssh://root@kvm2:2222/srv")
    words = forwarding_line(address, [(Path("/run/a"), Path("/run/b"))], SshProgram())
    assert "-N" not in words
    assert words[-3:] == ["--", "kvm2", "snapchain serve-replica --stdio"]
    assert words[words.index("-L") + 1] == "/run/a:/run/b"


def test_nothing_of_an_address_but_the_host_is_on_the_command_line() -> None:
    address = RemoteAddress("kvm2", "/srv/$(id)/-o", "ann", 2222)
    words = command_line(address, program=SshProgram(), ask=False)
    assert not any("id" in word for word in words)
    assert words[-7:] == ["-l", "ann", "-p", "2222", "--", "kvm2", "snapchain serve-replica --stdio"]
    assert "BatchMode=yes" in words


def test_bytes_of_every_value_go_both_ways(there: SshHost) -> None:
    sent = bytes(range(256)) * 256 + b"\n~.\n~?\n" + os.urandom(2 * MiB)
    with opened(there, CAT) as channel:
        channel.write(sent[:MiB])
        got = channel.read(MiB)
        while len(got) < MiB:
            got += channel.read(MiB - len(got))
        channel.write(sent[MiB:])
        channel.finish_writing()
        assert got + everything(channel) == sent


def test_what_the_configuration_has_for_terminals_is_off(there: SshHost) -> None:
    noisy = ["PermitLocalCommand=yes", "LocalCommand=echo spam", "RemoteCommand=echo spam", "RequestTTY=force"]
    config = there.folder / "noisy_config"
    config.write_text("\n".join(noisy).replace("=", " ") + f"\nLogLevel QUIET\nInclude {there.config}\n")
    program = SshProgram(("ssh", "-F", str(config)), CAT)
    with open_ssh(RemoteAddress("there", "/srv"), program=program) as channel:
        channel.write(b"a\n")
        channel.finish_writing()
        assert everything(channel) == b"a\n"


def test_the_environment_names_other_programs() -> None:
    chosen = SshProgram.from_environment({"SNAPCHAIN_SSH": "ssh -F '/a b'", "SNAPCHAIN_REMOTE": "sudo snapchain"})
    assert chosen == SshProgram(("ssh", "-F", "/a b"), "sudo snapchain")
    assert SshProgram.from_environment({"SNAPCHAIN_SSH": ""}) == SshProgram()
    for wrong in ({"SNAPCHAIN_SSH": "ssh '"}, {"SNAPCHAIN_REMOTE": "a\nb"}):
        with pytest.raises(InvalidInput, match="not a command"):
            SshProgram.from_environment(wrong)


def test_ssh_does_not_see_our_secrets(there: SshHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/nonexistent")
    with opened(there, CAT) as channel:
        environment = Path(f"/proc/{channel.pid}/environ").read_bytes().split(b"\0")
    assert b"SSH_AUTH_SOCK=/nonexistent" in environment
    assert not any(b"SNAPCHAIN" in entry for entry in environment)


# ---- faults


def test_snapchain_is_not_installed_there(there: SshHost) -> None:
    error = fault(there, "no-such-snapchain")
    assert isinstance(error, ToolFailed)
    assert "not installed there" in str(error)
    assert "install snapchain on there" in (error.hint or "")


def test_an_unknown_host_key(there: SshHost) -> None:
    error = fault(there, CAT, "UserKnownHostsFile=/dev/null")
    assert isinstance(error, ToolFailed)
    assert "host key is not known here" in str(error)


def test_a_changed_host_key(there: SshHost, tmp_path: Path) -> None:
    other = (there.folder / "user_key.pub").read_text().split()[1]
    (tmp_path / "known").write_text(f"there-key ssh-ed25519 {other}\n")
    error = fault(there, CAT, f"UserKnownHostsFile={tmp_path}/known")
    assert isinstance(error, ToolFailed)
    assert "another machine may be answering" in str(error)


def test_a_refused_login(there: SshHost) -> None:
    error = fault(there, CAT, "PubkeyAuthentication=no")
    assert isinstance(error, ToolFailed)
    assert "login was refused" in str(error)


def test_an_unknown_host(there: SshHost) -> None:
    error = fault(there, CAT, "HostName=no-such-host.invalid")
    assert isinstance(error, NotFound | Unavailable)  # the latter where there is no name service to know it
    assert "no such host" in str(error) or "looked up" in str(error)


def test_no_sshd(there: SshHost) -> None:
    error = fault(there, CAT, "Port=1")
    assert isinstance(error, Unavailable)
    assert "no ssh connections" in str(error)


def test_a_bad_configuration(there: SshHost) -> None:
    assert "as it is configured" in str(fault(there, CAT, "NoSuchOption=1"))


def test_the_remote_program_fails(there: SshHost) -> None:
    error = fault(there, "sh -c 'echo it broke >&2; exit 7'")
    assert isinstance(error, ToolFailed)
    assert (error.status, error.message) == (7, "snapchain over there ended with status 7: it broke")


@pytest.mark.parametrize("victim", ["ssh", "the server's session"])
def test_a_connection_that_breaks(there: SshHost, victim: str) -> None:
    known = set(there.sessions())
    channel = opened(there, CAT)
    channel.write(b"x")
    assert channel.read(1) == b"x"
    pids = [channel.pid] if victim == "ssh" else list(set(there.sessions()) - known)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    words = "there: (ssh was ended by SIGKILL|the connection was lost)"
    with pytest.raises(Unavailable, match=words):
        channel.read(1)
    with pytest.raises(Unavailable, match=words):
        channel.write(bytes(MiB))
    channel.abort()


def test_a_silent_program_ends_patience(there: SshHost) -> None:
    channel = opened(there, "sh -c 'exec sleep 1000'", patience=1.0)
    with pytest.raises(Unavailable, match="there: nothing came from it for 1 seconds"):
        channel.read(1)
    channel.abort()
    wait_until(lambda: gone(channel.pid))


# ---- ends


def test_ssh_dies_with_us_and_the_remote_program_with_ssh(there: SshHost) -> None:
    script = textwrap.dedent(f"""
        import time
        from snapchain.host.ssh import RemoteAddress
        from snapchain.host.ssh import SshProgram, open_ssh
        program = SshProgram({there.ssh!r}, "sh -c 'echo $$; exec cat'")
        channel = open_ssh(RemoteAddress("there", "/srv"), program=program)
        print(channel.pid, channel.read(100).decode(), flush=True)
        time.sleep(1000)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        ssh, remote = map(int, parent.stdout.readline().split())
        parent.kill()
    wait_until(lambda: gone(ssh))
    wait_until(lambda: gone(remote))


def test_a_control_master_carries_it_and_stays(there: SshHost, tmp_path: Path) -> None:
    master = ["ControlMaster=auto", f"ControlPath={tmp_path}/master", "ControlPersist=60"]
    try:
        for _ in range(3):
            with opened(there, CAT, *master) as channel:
                channel.write(b"x")
                assert channel.read(1) == b"x"
        channel = opened(there, CAT, *master)
        channel.write(b"x")
        assert channel.read(1) == b"x"
        channel.abort()
        assert "running" in control(there, tmp_path, "check")
    finally:
        control(there, tmp_path, "exit")
    assert there.log.count("Starting session") > 3


def control(host: SshHost, folder: Path, word: str) -> str:
    argv = [*host.ssh, "-o", f"ControlPath={folder}/master", "-O", word, "there"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stderr


def at_a_terminal(script: str, answer: Callable[[str], bytes]) -> str:
    """Run a script with a terminal and answer what it asks there; all that the terminal showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", textwrap.dedent(script)])
    shown = ""
    answered = False
    while True:
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        shown += piece.decode("utf-8", "replace")
        if not answered and (said := answer(shown)):
            answered = True
            os.write(terminal, said)
    os.waitpid(pid, 0)
    os.close(terminal)
    return shown


def test_at_a_terminal_ssh_may_ask(there: SshHost, tmp_path: Path) -> None:
    options = ("-o", "StrictHostKeyChecking=ask", "-o", f"UserKnownHostsFile={tmp_path}/known")
    script = f"""
        from snapchain.host.ssh import RemoteAddress
        from snapchain.host.ssh import SshProgram, open_ssh
        program = SshProgram({(*there.ssh, *options)!r}, {CAT!r})
        with open_ssh(RemoteAddress("there", "/srv"), program=program) as channel:
            channel.write(b"it came through")
            print(channel.read(100))
    """
    shown = at_a_terminal(script, lambda shown: b"yes\n" if "(yes/no" in shown else b"")
    assert "it came through" in shown
    assert (tmp_path / "known").read_text().startswith("there-key")


# ---- links


@pytest.mark.root
def test_a_host_that_does_not_answer(far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    with cable.cut():
        error = fault(host, CAT, "ConnectTimeout=1")
    assert isinstance(error, Unavailable)
    assert "does not answer" in str(error)


@pytest.mark.root
def test_a_dead_link_is_noticed(far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    channel = opened(host, CAT, "ServerAliveInterval=1", "ServerAliveCountMax=2")
    channel.write(b"x")
    assert channel.read(1) == b"x"
    with cable.cut(), pytest.raises(Unavailable, match="far: the connection was lost"):
        channel.read(1)
    channel.abort()


@pytest.mark.root
def test_a_short_cut_is_waited_out(far: tuple[SshHost, Cable]) -> None:
    host, cable = far
    cable.set(delay=0.005)
    with opened(host, CAT) as channel:
        channel.write(b"x")
        assert channel.read(1) == b"x"
        with cable.cut():
            channel.write(b"y")
            time.sleep(2)
        assert channel.read(1) == b"y"
