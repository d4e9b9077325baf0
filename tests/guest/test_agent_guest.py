"""The small guest with an agent does what tests of freezing rely on."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

from tests.guest.agent_guest import AgentGuest, formatted


def test_it_mounts_its_disks_and_its_agent_freezes_them(tmp_path: Path) -> None:
    disks = {name: formatted(tmp_path / f"{name}.qcow2") for name in ("vda", "vdb")}
    with AgentGuest(tmp_path / "guest", disks=disks) as guest:
        guest.sh("echo one >/mnt/vda/file && sync")
        assert "/mnt/vdb" in guest.sh("mount")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as agent:
            agent.settimeout(120)
            agent.connect(str(guest.agent))
            lines = agent.makefile("rb")

            def ask(command: str) -> object:
                agent.sendall(json.dumps({"execute": command}).encode() + b"\n")
                return json.loads(lines.readline())["return"]

            assert ask("guest-fsfreeze-freeze") == 2
            assert ask("guest-fsfreeze-status") == "frozen"
            assert ask("guest-fsfreeze-thaw") == 2
        guest.sh("umount /mnt/vda && sync")
        guest.quit()
    subprocess.run(["qemu-img", "convert", "-O", "raw", disks["vda"], tmp_path / "raw"], check=True)
    subprocess.run(["e2fsck", "-fn", tmp_path / "raw"], check=True, capture_output=True)
    found = subprocess.run(["debugfs", "-R", "cat /file", tmp_path / "raw"], check=True, capture_output=True, text=True)
    assert found.stdout == "one\n"
