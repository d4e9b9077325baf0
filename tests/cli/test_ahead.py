"""When ssh is started before the command line has been read, and what becomes of it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from snapchain.cli import main
from snapchain.cli.preconnect import endpoint_at, logging_in
from snapchain.errors import Unavailable
from snapchain.host.ssh import parse_remote_address
from snapchain.replica import endpoint as ssh_endpoint
from snapchain.replica.endpoint import SshEndpoint
from tests.waiting import gone, wait_until

DEST = "ssh://kvm2/srv/replica"


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that says nothing and lasts. The file in which it notes its process id."""
    noted, script = tmp_path / "noted", tmp_path / "ssh.py"
    script.write_text(f"import os, time; open({str(noted)!r}, 'a').write(f'{{os.getpid()}}\\n'); time.sleep(1000)\n")
    monkeypatch.setenv("SNAPCHAIN_SSH", shlex.join([sys.executable, "-S", str(script)]))
    return noted


def begun(words: list[str]) -> bool:
    with logging_in(words):
        known = endpoint_at(DEST) is endpoint_at(DEST)
        assert endpoint_at(DEST, connections=2) is not endpoint_at(DEST, connections=2)
    assert endpoint_at(DEST) is not endpoint_at(DEST)
    return known


@pytest.mark.usefixtures("ssh")
def test_only_plain_command_lines_are_ahead_of_themselves(tmp_path: Path) -> None:
    image = str(tmp_path / "a.qcow2")
    Path(image).touch()
    target = f"{DEST}::web1/vda"
    assert begun(["send", image, target])
    assert begun(["sync", image, target, "--json"])
    assert not begun(["send", "--help", image, target])
    assert not begun(["send", image, target, "--dry-run"])
    assert not begun(["send", image, target, "--connections=3"])
    assert not begun(["send", image, DEST])
    assert not begun(["send", image, target, target])
    assert not begun(["send", f"{image}2", target])
    assert not begun(["send", image, "dir:/srv/replica::web1/vda"])
    assert not begun(["log", image, target])
    assert not begun(["send", image, "ssh://-o/x::web1/vda"])
    assert not begun([])


def test_a_wrong_command_line_ends_the_login(tmp_path: Path, ssh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "a.qcow2"
    image.write_bytes(os.urandom(512))
    assert main(["send", str(image), f"{DEST}::web1/vda", "--no-such-option"]) == 2
    assert "no-such-option" in capsys.readouterr().err
    assert main(["send", str(image), f"{DEST}::web1/vda", "--format", "qcow2", "--json"]) == 5
    assert "not a qcow2 image" in capsys.readouterr().out
    for process in ssh.read_text().split() if ssh.exists() else ():
        wait_until(partial(gone, int(process)))


def test_a_login_that_waited_too_long_is_not_used(ssh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = SshEndpoint(parse_remote_address(DEST))

    def use() -> None:
        with endpoint.connect() as channel:
            wait_until(lambda: len(ssh.read_text().split()) == 3)  # the first, that in use, and one ahead
            channel.abort()

    with endpoint.ahead(2):
        wait_until(lambda: ssh.exists() and ssh.read_text() != "")
        monkeypatch.setattr(ssh_endpoint, "_FRESH", 0.0)
        with pytest.raises(Unavailable, match="ended here"):
            use()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("snapchain.destinations", ["numpy", "pydantic", "typer", "sh", "snapchain.replica.receiver"]),
        ("snapchain.cli.preconnect", ["numpy", "pydantic", "typer", "sh"]),
        ("snapchain.ops.receive", ["typer", "sh", "snapchain.replica.merging", "snapchain.testing.qemu_img"]),
    ],
)
def test_what_is_waited_for_loads_little(module: str, unwanted: list[str]) -> None:
    script = f"import sys, {module}; print(*sorted(set({unwanted!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert not done.stdout.split()
