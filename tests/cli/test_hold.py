"""snapchain hold and release, as a user says them."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_a_layer(run: Run, disk: Path) -> None:
    said = run("hold", str(disk), "--tag", "audit", "--reason", "until May")
    assert (said.status, "is held" in said.out, "until May" in said.out) == (0, True, True)
    assert "held under audit: until May" in run("inspect", str(disk)).out
    assert run("inspect", str(disk), "--json").json["layers"][0]["holds"][0]["tag"] == "audit"
    assert run("release", str(disk), "-t", "other").status == 3
    assert run("release", str(disk), "-t", "audit", "--json").json == {"address": str(disk), "holds": []}


def test_a_point(run: Run, disk: Path) -> None:
    assert run("init", "repo").status == 0
    assert run("ship", str(disk), "repo::web1").status == 0
    unnamed = run("hold", "repo::web1", "--tag", "audit")
    assert unnamed.status == 2
    assert f"such as {disk.parent}/repo::web1@latest" in unnamed.err
    assert run("hold", "repo::web1@9", "--tag", "audit").status == 3
    assert [each["tag"] for each in run("hold", "repo::web1@1", "-t", "audit", "--json").json["holds"]] == ["audit"]
    assert "audit" in run("log", "repo").out
    assert run("log", "repo", "--json").json["disks"][0]["points"][0]["holds"][0]["tag"] == "audit"
    assert "not held any more" in run("release", "repo::web1@latest", "-t", "audit").out


def test_holds_are_listed(run: Run, disk: Path) -> None:
    run("init", "repo")
    run("ship", str(disk), "repo::web1", "--label", "golden")
    run("ship", str(disk), "repo::db")
    assert "no point of repo is held" in run("hold", "repo", "--list").out
    run("hold", "repo::db@1", "-t", "audit")
    run("hold", "repo::web1@1", "-t", "legal", "--reason", "case 7")
    run("hold", "repo::web1@1", "-t", "audit")
    found = run("hold", "repo", "--list", "--json").json
    assert [(each["name"], each["point"], each["tag"], each["reason"]) for each in found["holds"]] == [
        ("db", 1, "audit", ""),
        ("web1", 1, "legal", "case 7"),
        ("web1", 1, "audit", ""),
    ]
    assert found["holds"][1]["labels"] == ["golden"]
    assert [each["name"] for each in run("hold", "repo", "--list", "-t", "legal", "--json").json["holds"]] == ["web1"]
    shown = run("hold", "repo::web1", "--list").out
    assert all(word in shown for word in ("web1@1", "legal", "case 7", "golden"))
    assert "db@1" not in shown
    assert run("hold", "repo::gone", "--list").status == 3
    assert run("hold", "repo::web1@1", "--list").status == 2
    assert run("hold", "repo", "--list", "--reason", "x").status == 2
    nameless = run("hold", "repo::web1@1")
    assert (nameless.status, "--tag TAG" in nameless.err) == (2, True)
