"""Guest points on the command line: the same verbs as for disks, with GUEST in the place of DISK."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from snapchain.cli import completion
from snapchain.destinations import open_destination
from snapchain.ops.ship.run import ShipRequest, run as ship
from snapchain.repository.opening import create_repository
from tests.cli.conftest import Run
from tests.ops.guest_points import Guest


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository and a replica with three guest points of web1, and a disk that is no guest's."""
    folder = tmp_path_factory.mktemp("history")
    guest = Guest(folder / "g")
    create_repository(str(folder / "repo"), passphrase=lambda: None, encryption="none")
    for number in (1, 2, 3):
        guest.grow(number)
        for url in (str(folder / "repo"), f"dir:{folder}/replica"):
            place = open_destination(url, writing=True)
            guest.ship(place, number, labels=["first"] if number == 1 else [])
            if number == 3:
                ship(ShipRequest(image=guest.images["vda"], disk="alone"), place)
    return folder


@pytest.fixture(params=["repo", "replica"])
def dest(
    request: pytest.FixtureRequest, run: Run, history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """A copy of it; `run` stands beside it."""
    _ = run
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")  # not encrypted
    shutil.copytree(history / request.param, tmp_path / request.param)
    return "repo" if request.param == "repo" else f"dir:{tmp_path}/replica"


def test_no_disk_gets_the_name_of_a_guest(run: Run, history: Path, dest: str) -> None:
    image = history / "g" / "vda.3.qcow2"
    said = run("ship", str(image), f"{dest}::web1", "--json")
    assert (said.status, said.json["error"]["message"]) == (4, "'web1' is a guest there, and no disk")
    assert run("log", f"{dest}::web1", "--json").json["guest"] == "web1"
    assert run("ship", str(image), f"{dest}::web2").status == 0


def test_restore(run: Run, dest: str, tmp_path: Path) -> None:
    planned = run("restore", f"{dest}::web1@first", "out", "--dry-run")
    assert (planned.status, "guest point 1" in planned.out, (tmp_path / "out").exists()) == (0, True, False)
    plan = run("restore", f"{dest}::web1@first", "out", "-n", "--json").json["plan"]
    assert [each["name"] for each in plan["disks"]] == ["vda", "vdb"]
    report = run("restore", f"{dest}::web1@first", "out", "--json").json
    assert (report["guest"], report["guest_point"], report["consistency"]) == ("web1", 1, "crash")
    assert report["bytes_written"] == plan["bytes_to_write"] > 0
    assert [Path(each["output"]).name for each in report["disks"]] == ["vda.qcow2", "vdb.qcow2"]
    assert all(each["content_id"] for each in report["disks"])
    assert (tmp_path / "out" / "web1.xml").exists()
    again = run("restore", f"{dest}::web1", "out")
    assert (again.status, "replaces no file" in again.err) == (4, True)
    (tmp_path / "there").mkdir()
    said = run("restore", f"{dest}::web1@2", "there", "--new-name", "web2")
    assert (said.status, "guest point 2" in said.out) == (0, True), said.err
    assert (tmp_path / "there" / "web2.xml").exists()
    # A disk stays a disk.
    assert run("restore", f"{dest}::web1/vda@1", "vda.qcow2").status == 0
    assert run("restore", f"{dest}::alone", "there").status == 2


def test_restore_is_told_what_is_not_there(run: Run, dest: str, tmp_path: Path) -> None:
    for words in (
        ["restore", f"{dest}::web9", "out"],
        ["restore", f"{dest}::web1@9", "out"],
        ["restore", f"{dest}::alone", "out", "--define"],
        ["verify", f"{dest}::web9"],
        ["hold", f"{dest}::web9@1", "--tag", "a"],
        ["release", f"{dest}::web1@1", "--tag", "a"],
        ["merge", f"{dest}::web9", "--keep-last", "1"],
        ["diff", f"{dest}::web1@1", f"{dest}::web9"],
    ):
        assert run(*words).status == 3, words
    for words in (
        ["restore", f"{dest}::web1", "out", "--force"],
        ["restore", f"{dest}::web1", "out", "--connect", "qemu:///system"],
        ["restore", f"{dest}::web1", "out", "--chain", "--format", "raw"],
        ["restore", f"{dest}::web1", "out", "--new-name", "a/b"],
        ["hold", f"{dest}::web1", "--tag", "a"],
        ["diff", f"{dest}::web1", f"{dest}::web1/vda"],
        ["merge", f"{dest}::web1"],
    ):
        assert run(*words).status == 2, words
    assert not (tmp_path / "out").exists()


def test_merge_hold_and_release(run: Run, dest: str) -> None:
    for disk in ("vda", ".guest"):
        refused = run("merge", f"{dest}::web1/{disk}", "--keep-last", "1")
        assert (refused.status, "DEST::web1" in refused.err) == (2, True)
    held = run("hold", f"{dest}::web1@2", "--tag", "audit", "--json").json
    assert [each["disk"] for each in held["disks"]] == ["web1/vda", "web1/vdb"]
    plan = run("merge", f"{dest}::web1", "--keep-last", "1", "--dry-run", "--json").json["plan"]
    assert [(each["point"], each["kept"]) for each in plan["points"]] == [(1, False), (2, True), (3, True)]
    assert "held: audit" in run("merge", f"{dest}::web1", "--keep-last", "1", "--dry-run").out
    report = run("merge", f"{dest}::web1", "--keep-last", "1", "--json").json
    assert (report["points_kept"], report["points_dropped"]) == ([2, 3], [1])
    for field in ("layers_before", "layers_after", "bytes_moved", "bytes_freed", "strategy", "findings"):
        assert field in report
    assert "is not held" in run("release", f"{dest}::web1@2", "--tag", "audit").out
    said = run("merge", f"{dest}::web1", "--keep-last", "1")
    assert (said.status, "dropped" in said.out) == (0, True)
    assert run("merge", f"{dest}::alone", "--keep-last", "1").status == 0


def test_verify_and_diff(run: Run, dest: str) -> None:
    assert run("verify", dest).status == 0
    found = run("verify", f"{dest}::web1", "--read-data", "--json").json
    assert (found["ok"], found["disks"], found["points"], found["data_read"]) == (True, 3, 9, True)
    assert found["checked_bytes"] > 0
    report = run("diff", f"{dest}::web1@1", f"{dest}::web1@3", "--json").json
    assert (report["identical"], [each["disk"] for each in report["disks"]]) == (False, ["vda", "vdb"])
    assert "vdb" in run("diff", f"{dest}::web1@1", f"{dest}::web1@3").out
    assert "no difference" in run("diff", f"{dest}::web1@1", f"{dest}::web1@1").out
    # A disk that is missing makes the guest point a finding.
    assert run("diff", f"{dest}::web1/vda@1", f"{dest}::web1/vda@1").status == 0


def test_completion_offers_guests(dest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_SNAPCHAIN_COMPLETE", "complete_zsh")
    monkeypatch.setattr(completion, "SECONDS", 60.0)
    offered = [each if isinstance(each, str) else each[0] for each in completion.addresses(f"{dest}::")]
    assert offered == [f"{dest}::{name}" for name in ("web1", "alone", "web1/vda", "web1/vdb")]
    points = [each if isinstance(each, str) else each[0] for each in completion.addresses(f"{dest}::web1@")]
    assert points == [f"{dest}::web1@{name}" for name in ("latest", "3", "2", "1", "first")]
