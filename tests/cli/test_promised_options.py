"""What every verb has: --json everywhere, --dry-run where something is changed, --quiet that hides no failure."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from snapchain.cli.app import command
from snapchain.cli.verbs import VERBS
from tests.cli.conftest import MiB, Run, qemu_img, write

LOOKING = {"log", "stats", "status", "guests", "inspect", "diff", "verify"}
"""Verbs that change nothing."""


def options(name: str) -> set[str]:
    return {parameter.name for parameter in command(name).params}


def verbs() -> list[str]:
    return [name for name, verb in VERBS.items() if verb.group]


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_speaks_json_and_those_that_change_something_have_a_plan(verb: str) -> None:
    assert "json" in options(verb)
    assert ("dry_run" in options(verb)) is (verb not in LOOKING)


def test_a_dry_run_of_a_hold_changes_nothing(run: Run, disk: Path) -> None:
    run("init", "repo", "--no-encryption")
    run("ship", str(disk), "repo::web1")
    for address in ("repo::web1@1", str(disk)):
        plan = run("hold", address, "--tag", "a", "--reason", "why", "--dry-run", "--json").json
        assert plan["dry_run"] is True
        assert [(each["tag"], each["reason"]) for each in plan["plan"]["holds"]] == [("a", "why")]
        assert "would be held" in run("hold", address, "--tag", "a", "--dry-run").out
        assert run("release", address, "--tag", "a").status == 3, "nothing was held"
        run("hold", address, "--tag", "a")
        assert run("release", address, "--tag", "a", "--dry-run", "--json").json["plan"]["holds"] == []
        assert "would not be held" in run("release", address, "--tag", "a", "--dry-run").out
        assert run("release", address, "--tag", "b", "--dry-run").status == 3
        assert run("release", address, "--tag", "a").status == 0, "it was still held"


def test_a_dry_run_of_a_take_back_changes_nothing(run: Run, disk: Path, tmp_path: Path) -> None:
    words = ["migrate", str(disk), f"dir:{tmp_path}/replica::web1/vda"]
    assert run(*words, "--take-back", "--dry-run").status == 3, "it was not given away"
    moved = run(*words, "--offline", "--json").json
    plan = run(*words, "--take-back", "--dry-run", "--json").json["plan"]
    assert (plan["disks"], plan["epochs"], plan["asked"]) == (["web1/vda"], [moved["disks"][0]["epoch"] + 1], True)
    assert "would be this host's again" in run(*words, "--take-back", "--dry-run").out
    assert run("snapshot", str(disk)).status == 4, "it is given away still"
    overlay = Path(moved["disks"][0]["overlay"])
    write(overlay, "write -P 7 0 64k")
    refused = run(*words, "--take-back", "--dry-run")
    assert (refused.status, "a guest has written to the disk" in refused.err) == (4, True)
    assert run(*words, "--take-back", "--dry-run", "--destination-is-gone").status == 0
    assert run(*words, "--take-back").status == 4


def test_quiet_hides_no_finding_of_verify(run: Run, disk: Path, tmp_path: Path) -> None:
    run("init", "repo", "--no-encryption")
    (tmp_path / "noise").write_bytes(os.urandom(MiB))
    write(disk, f"write -s {tmp_path / 'noise'} 0 1M")
    run("ship", str(disk), "repo::web1")
    assert run("verify", "repo", "--quiet") == run("verify", "repo", "--quiet").__class__(0, "", "")
    for pack in (tmp_path / "repo" / "packs").rglob("*"):
        if pack.is_file():
            pack.unlink()
    assert run("verify", "repo", "--quiet").status == 5  # it records what it finds, which an index tells but once
    quiet = run("verify", "repo", "--quiet")
    assert (quiet.status, quiet.out) == (5, "")
    assert "packs/" in quiet.err
    loud = run("verify", "repo")
    assert "damaged: " in loud.out
    assert "packs/" in loud.err, "in a log file of stderr alone as well"
    as_json = run("verify", "repo", "--quiet", "--json")
    assert (as_json.status, as_json.err) == (5, "")
    assert as_json.json["findings"]


@pytest.mark.parametrize("verb", ["merge", "ship"])
def test_quiet_hides_no_finding_of_a_merge_or_a_shipment(run: Run, disk: Path, tmp_path: Path, verb: str) -> None:
    """Without snapshots between them, the image no longer has the data of the first two points."""
    run("init", "repo", "--no-encryption")
    for _ in range(3):
        (tmp_path / "noise").write_bytes(os.urandom(MiB))
        write(disk, f"write -s {tmp_path / 'noise'} 0 1M")
        run("ship", str(disk), "repo::web1")
        if verb == "merge":
            run("snapshot", str(disk))
    for pack in (tmp_path / "repo" / "packs").rglob("*"):
        if pack.is_file():
            pack.unlink()
    if verb == "merge":
        said, status, words = run("merge", "repo::web1", "--keep-last", "1", "--quiet"), 5, "packs/"
    else:
        said, status, words = run("ship", str(disk), "repo::web1", "--quiet"), 0, "still damaged: points 1, 2"
    assert (said.status, said.out) == (status, "")
    assert words in said.err


def test_quiet_hides_no_failure_of_a_night(run: Run, disk: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.qcow2").write_bytes(b"no image")
    run("init", "repo", "--no-encryption")
    (tmp_path / "n.toml").write_text(
        f'time_zone = "UTC"\nstate = "{tmp_path}/state"\n[[disks]]\nglob = "{tmp_path}/*.qcow2"\n'
        f'[[destinations]]\nname = "vault"\nurl = "{tmp_path}/repo"\n'
    )
    for more in (["--dry-run"], []):
        quiet = run("nightly", "n.toml", "--quiet", *more)
        assert (quiet.status, quiet.out) == (10, "")
        assert "bad.qcow2: not a qcow2 image" in quiet.err
        loud = run("nightly", "n.toml", *more)
        assert "bad.qcow2: not a qcow2 image" in loud.out


def test_quiet_hides_not_what_is_missing_for_a_migration(run: Run, disk: Path, tmp_path: Path) -> None:
    run("snapshot", str(disk))
    said = run("sync", str(disk), f"dir:{tmp_path}/replica::web1/vda", "--check", "--quiet")
    assert (said.status, said.out) == (4, "")
    assert "missing: " in said.err


def test_quiet_hides_not_what_the_doctor_could_not_treat(run: Run, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from snapchain.ops import doctor

    finding = doctor.Finding(
        path=disk, image=disk, kind=next(iter(doctor.Kind)), says="is half done", remedy="undoes it"
    )
    treated = doctor.Treated(finding=finding, done=False, error="somebody has it open", hint="stop it", removed=())
    monkeypatch.setattr(doctor, "run", lambda _planned, **_: doctor.DoctorReport(directories=(), treated=(treated,)))
    said = run("doctor", ".", "--quiet")
    assert (said.status, said.out) == (10, "")
    assert "somebody has it open" in said.err


def test_an_image_may_have_the_name_of_an_address(run: Run, disk: Path) -> None:
    disk.rename("a::b.qcow2")
    run("init", "repo", "--no-encryption")
    for name in ("a::b.qcow2", "./a::b.qcow2"):
        assert run("inspect", name, "--json").json["virtual_size"] == 16 * MiB
        assert run("ship", name, "repo::web1").status == 0
    assert run("inspect", "./repo::web1", "--json").json["content_id"], "a directory is a destination"
    assert run("snapshot", "a::b.qcow2").status == 0
    assert run("merge", "a::b.qcow2", "--flatten", "--json").json["layers_after"] == 1
    missing = run("inspect", "./a::c.qcow2")
    assert (missing.status, "no such file" in missing.err) == (3, True)


def test_a_line_break_in_a_name_breaks_no_line(run: Run) -> None:
    name = "a\nsnapchain: error: all is lost\x1b[2J.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "plain.qcow2", "1M")
    Path("plain.qcow2").rename(name)
    run("init", "repo", "--no-encryption")
    assert run("ship", name, "repo::web1").status == 0
    shown = run("inspect", name)
    assert r"a\nsnapchain: error: all is lost\x1b[2J.qcow2" in shown.out
    assert "\x1b" not in shown.out
    assert run("inspect", name, "--json").json["layers"][0]["path"].endswith(name)
    gone = run("inspect", f"gone{name}")
    assert (gone.status, len(gone.err.splitlines())) == (3, 1)
    refused = run("ship", name, "repo::web1\nx", "--json")
    assert (refused.status, refused.json["error"]["kind"]) == (2, "invalid-input")
    assert "cannot name a disk" in json.dumps(refused.json)
    replica = run("send", name, f"dir:{Path.cwd()}/replica::web1\nx")
    assert (replica.status, len(replica.err.splitlines())) == (2, 2)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--fence", ["failover", "dir:/r::web1"]),
        ("--start-hook", ["migrate", "a.qcow2", "dir:/r::web1", "--offline"]),
        ("--start-hook", ["failback", "a.qcow2", "dir:/r::web1"]),
    ],
)
def test_a_program_that_is_none_is_named_by_its_option(option: str, words: list[str], run: Run) -> None:
    ended = run(*words, option, "")
    assert (ended.status, f"{option} is empty" in ended.err) == (2, True), ended.err
    ended = run(*words, option, "'")
    assert (ended.status, "not a command" in ended.err) == (2, True), ended.err
