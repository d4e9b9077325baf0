"""nightly with domains of a real libvirt: by pattern, running and off, started and shut down between nights, gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from snapchain.guest.protocol import State
from snapchain.model.consistency import Consistency
from snapchain.ops.nightly.report import Outcome
from tests.guest.libvirt import Domain
from tests.guest.nights import PIECE, Host
from tests.libvirtd import libvirtd
from tests.ops.stacks import qemu_img, write

pytestmark = [pytest.mark.root, pytest.mark.soak]


def test_domains_by_pattern_running_off_and_gone(tmp_path: Path) -> None:
    host = Host(tmp_path)
    with libvirtd(tmp_path / "libvirt") as daemon:
        uri = daemon.uri
        for name in ("web1", "web2", "db1"):
            qemu_img("create", "-q", "-f", "qcow2", host.images / f"{name}.qcow2", "4M")
        domains = {
            name: Domain.started(daemon, tmp_path / name, {"vda": host.images / f"{name}.qcow2"}, name=name)
            for name in ("web1", "web2", "db1")
        }
        host.configure(
            f"""
            [[guests]]
            pattern = "*"
            exclude = ["db*"]
            connect = "{uri}"
            merge_above = 4
            """
        )
        domains["web1"].write("vda", 0, PIECE, 1)
        domains["web2"].virsh("destroy")
        first = {each.guest: each for each in host.night(0).guests}
        assert set(first) == {"web1", "web2"}
        assert first["web1"].state is State.RUNNING
        assert (first["web1"].outcome, first["web1"].consistency) == (Outcome.OK, Consistency.CRASH)
        assert first["web2"].state is State.OFF
        assert (first["web2"].outcome, first["web2"].consistency) == (Outcome.OK, Consistency.OFFLINE)
        assert (first["web2"].snapshot, host.files("web2")) == ("made", 2)

        # The other way round: web1 is shut down, web2 starts and writes.
        domains["web1"].virsh("destroy")
        domains["web2"].virsh("start")
        domains["web2"].write("vda", 0, PIECE, 2)
        for night in range(1, 4):
            found = {each.guest: each for each in host.night(night).guests}
            assert all(each.outcome is Outcome.OK for each in found.values()), found
        assert found["web1"].snapshot == "unchanged"
        assert host.files("web2") <= 4
        assert domains["web2"].reads("vda", 0, PIECE, 2)

        # Started after it was sealed at rest and live, it reads what it wrote.
        domains["web1"].virsh("start")
        assert domains["web1"].reads("vda", 0, PIECE, 1)

        domains["web2"].virsh("destroy")
        domains["web2"].virsh("undefine")
        report = host.night(5)
        assert report.guests_gone == ("web2",)
        assert report.outcome is Outcome.FAILED
        assert {each.guest: each.outcome for each in report.guests} == {"web1": Outcome.OK}
    from snapchain.cli import main

    out = tmp_path / "out"
    shutil.rmtree(out, ignore_errors=True)
    assert main(["restore", f"{host.folder / 'repo'}::web2@latest", str(out), "--quiet"]) == 0
    truth = tmp_path / "truth.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", truth, "4M")
    write(truth, f"write -P 2 0 {PIECE}")
    (restored,) = out.rglob("*vda*.qcow2")
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", truth, restored)
