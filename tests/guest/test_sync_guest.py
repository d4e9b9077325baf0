"""sync of a running guest: its disks are sealed at one instant, sent, and the overlay for its migration is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snapchain.cli import main
from tests.guest.nights import DISKS, PIECE, Host
from tests.ops.stacks import qemu_img


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_rounds_of_a_running_guest(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    qmp, replica = str(host.folder / "run" / "qmp"), f"dir:{host.folder}/replica"
    with host.machine() as machine:
        for number, disk in enumerate(DISKS):
            host.write(machine, disk, number, number + 1)
        assert main(["sync", "--qmp", qmp, replica, "--rounds", "2", "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["ready"]
        assert [each["disk"] for each in said["disks"]] == ["web1/vda", "web1/vdb"]
        assert said["commands"] == [], "libvirt does not know this guest"
        assert machine.status() == "running"
        for disk, each in zip(DISKS, said["disks"], strict=True):
            assert each["image"] == str(host.top(disk))
            assert Path(each["overlay"]).name == f"{disk}.qcow2"
            host.write(machine, disk, 5, 9)
        assert main(["sync", "--qmp", qmp, f"{replica}::web1", "--disk", "vda", "--rounds", "1", "--json"]) == 0
        again = json.loads(capsys.readouterr().out)
        assert again["overlay"] == said["disks"][0]["overlay"], "no overlay is left over from the first time"
        assert main(["sync", "--qmp", qmp, replica, "--check", "--disk", "vda"]) == 0
        assert machine.reads("vda", 5 * PIECE, PIECE, 9)
    truth = host.folder / "vda.truth"
    truth.write_bytes(host.now["vda"])
    qemu_img("compare", "-f", "raw", "-F", "qcow2", truth, again["overlay"])


def test_wrong_requests(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    qmp, replica = str(host.folder / "run" / "qmp"), f"dir:{host.folder}/replica"
    image = str(host.images / "vda.qcow2")
    with host.machine():
        assert main(["sync", "--qmp", qmp, replica, "--disk", "vdz", "--rounds", "1"]) == 3
        err = capsys.readouterr().err
        assert "the guest has no disk vdz" in err
        assert "its disks are: vda, vdb" in err
        assert main(["sync", "--qmp", qmp, image, f"{replica}::web1/vda"]) == 2
        assert "--qmp" in capsys.readouterr().err
        assert main(["sync", "--qmp", qmp, replica, "--guest-disk", "vda"]) == 2
        assert main(["sync", image, f"{replica}::web1/vda", "--disk", "vda"]) == 2
        assert host.files("vda") == 1
