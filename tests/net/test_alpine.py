"""A real Linux that was altered between snapshots boots at the replica, from the chain that is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.verification import verify_replica
from tests.net import alpine
from tests.net.sshd import SshHost
from tests.net.test_many_over_ssh import ended, holds, start
from tests.ops.stacks import qemu_img

GETTY = "ttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100"


@pytest.mark.soak
def test_a_linux_boots_at_the_replica(there: SshHost, tmp_path: Path) -> None:
    images, root = tmp_path / "images", tmp_path / "replica"
    images.mkdir()
    files = [images / f"{name}.qcow2" for name in ("root", "monday", "tuesday", "web1")]
    shutil.copyfile(alpine.part(".qcow2"), files[0])
    to = f"ssh://there{root}::web1/vda"

    sent = []
    for number, command in ((1, f"echo '{GETTY}' >>/etc/inittab; echo altered on monday >>/etc/issue"),
                            (2, "echo altered on tuesday >>/etc/issue")):  # fmt: skip
        snapshot(files[number - 1], files[number])
        alpine.alter(files[number], command)
        status, report, err = ended(start(there, "send", files[number], to))
        assert status == 0, err
        sent.append(report["bytes_sent"])
    assert sent[1] < sent[0] / 10, "only what changed goes over"
    holds(root / "web1%2Fvda", files[:3], tmp_path)

    snapshot(files[2], files[3])
    status, report, err = ended(start(there, "sync", files[3], to))
    assert (status, report["ready"]) == (0, True), err
    before = json.loads((root / "web1%2Fvda" / "catalogue.json").read_text())
    said = alpine.run(Path(report["overlay"]), until="login:")
    assert "altered on monday" in said
    assert "altered on tuesday" in said
    found = verify_replica(DirectoryEndpoint(root), share=1.0)
    assert found.ok, found.findings
    assert json.loads((root / "web1%2Fvda" / "catalogue.json").read_text()) == before


def snapshot(below: Path, top: Path) -> None:
    qemu_img("create", "-q", "-f", "qcow2", "-b", below.name, "-F", "qcow2", top)
