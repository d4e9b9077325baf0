"""sync, as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import MiB, Run
from tests.ops.stacks import Layer, build, write
from tests.replica.conftest import Place


@pytest.fixture
def chain(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "c", [Layer(4 * MiB, ["write -P 1 0 2M"]), Layer(4 * MiB, ["write -P 2 1M 64k"])])


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "replica")


URI = ("--dest-uri", "qemu+ssh://kvm2/system")


def test_check_and_dry_run_change_nothing(run: Run, chain: list[Path], place: Place) -> None:
    words = ("sync", str(chain[-1]), f"dir:{place.root}::web1/vda")
    said = run(*words, "--check", "--json")
    assert said.status == 4
    assert (said.json["ready"], said.json["bytes_to_send"], said.json["bytes_left"]) == (False, 2 * MiB, 65536)
    plainly = run(*words, "--check")
    assert plainly.status == 4
    assert "is not ready" in plainly.out
    assert "missing: 0.qcow2 is not there" in plainly.out
    planned = run(*words, "--dry-run", "--json")
    assert planned.status == 0
    assert planned.json["dry_run"] is True
    assert len(planned.json["plan"]["layers_to_send"]) == 1
    assert not place.root.exists()


def test_it_becomes_ready(run: Run, chain: list[Path], place: Place) -> None:
    words = ("sync", str(chain[-1]), f"dir:{place.root}::web1/vda")
    said = run(*words, "--json", *URI)
    assert said.status == 0
    report = said.json
    assert {
        "ready", "missing", "disk", "point", "layers_sent", "layers_present", "bytes_left", "wire_bytes_left", "rate",
        "predicted_cutover_seconds", "rounds", "outcome", "on_target", "overlay", "layers", "commands", "virsh_command",
    } <= set(report)  # fmt: skip
    assert (report["ready"], report["layers_sent"], report["bytes_left"]) == (True, 1, 65536)
    assert " --migrate-disks vda " in report["virsh_command"]
    assert report["virsh_command"].endswith(" web1 qemu+ssh://kvm2/system")
    again = run(*words, *URI)
    assert again.status == 0
    assert "is ready" in again.out
    assert "virsh migrate --live" in again.out
    assert "not measured" in again.out
    assert run(*words, "--check").status == 0


def test_without_a_guest_no_command_is_printed(run: Run, chain: list[Path], place: Place) -> None:
    said = run("sync", str(chain[-1]), f"dir:{place.root}::web1/vda", "--json")
    assert said.status == 0
    assert (said.json["commands"], said.json["virsh_command"]) == ([], None)


def test_rounds_seal_what_is_left(run: Run, chain: list[Path], place: Place) -> None:
    said = run("sync", str(chain[-1]), f"dir:{place.root}::web1/vda", "--rounds", "2", "--json")
    assert said.status == 0
    assert (said.json["outcome"], said.json["bytes_left"], len(said.json["rounds"])) == ("enough", 0, 2)
    assert chain[-1].with_name("disk.1.qcow2").exists()


def test_an_overlay_that_was_used_is_an_error(run: Run, chain: list[Path], place: Place) -> None:
    words = ("sync", str(chain[-1]), f"dir:{place.root}::web1/vda", "--json")
    write(Path(run(*words).json["overlay"]), "write 0 64k")
    said = run(*words)
    assert (said.status, said.json["error"]["kind"]) == (4, "conflict")
    assert said.json["error"]["hint"]


def test_one_file_needs_rounds(run: Run, chain: list[Path], place: Place) -> None:
    said = run("sync", str(chain[0]), f"dir:{place.root}::web1/vda")
    assert said.status == 2
    assert "--rounds 1" in said.err
