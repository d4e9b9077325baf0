"""A Linux on a served point: stopped when its server is gone for long, continued, and it has seen no error."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from snapchain.cli import main
from snapchain.ops.instant import record as records, server
from snapchain.ops.instant.record import record_of
from tests.guest.agent_guest import AgentGuest, Console, formatted
from tests.guest.machine import Monitor
from tests.ops.stacks import qemu_img
from tests.waiting import wait_until

_SUM = re.compile(r"^([0-9a-f]{32})  (f\d+)$", re.MULTILINE)


@pytest.mark.soak
def test_a_linux_sees_no_error_when_its_server_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RECONNECT_SECONDS", 2)
    files, repository, out = tmp_path / "files", str(tmp_path / "repository"), tmp_path / "out"
    files.mkdir()
    for number in range(20):
        (files / f"f{number}").write_bytes(os.urandom(1 << 20))
    disk = formatted(tmp_path / "vda.qcow2", files=files)
    assert main(["init", repository, "--no-encryption"]) == 0
    with AgentGuest(tmp_path / "vm", disks={"vda": disk}) as guest:
        sums = set(_SUM.findall(guest.sh("cd /mnt/vda && md5sum f*")))
        assert main(["ship", "--qmp", str(guest.qmp), repository]) == 0
    assert len(sums) == 20
    words = ["restore", f"{repository}::web1", str(out), "--instant", "--start"]
    console = Console()
    # QEMU waits for the console's client before it opens its disks.
    client = threading.Thread(target=console.connect, args=(out / "console",))
    client.start()
    assert main([*words, "--later"]) == 0
    client.join()
    console.read_until(b"AGENT GUEST READY")
    console.read_until(b"# ")
    found = record_of(out / "vda.qcow2")
    assert found is not None
    pid = server.process_of(found)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    console.begin("cd /mnt/vda && md5sum f* && echo written >new && sync")
    monitor = Monitor(out / "test.qmp")
    wait_until(lambda: monitor.ask("query-status")["status"] == "io-error")
    assert main(words) == 0
    assert set(_SUM.findall(console.ended())) == sums
    assert monitor.ask("query-status")["status"] == "running"
    assert "I/O error" not in console.sh("dmesg | grep -v APIC")
    assert "written" in console.sh("cat new; sync")
    monitor.quit()
    console.close()
    qemu_img("check", "-q", out / "vda.qcow2")
    raw = tmp_path / "checked.raw"
    qemu_img("convert", "-O", "raw", out / "vda.qcow2", raw)
    done = subprocess.run(["e2fsck", "-fy", raw], capture_output=True, text=True, check=False)
    assert done.returncode <= 1, done.stdout
