"""snapchain forget, as a user says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, write


@pytest.fixture
def shipped(request: pytest.FixtureRequest, run: Run, disk: Path, tmp_path: Path) -> str:
    """A destination with three points of web1/vda, labelled p1 to p3, and one of db."""
    where: str = getattr(request, "param", "repo")
    if where == "replica":
        where = f"dir:{tmp_path}/replica"
    else:
        assert run("init", where, "--no-encryption").status == 0
    for number in (1, 2, 3):
        write(disk, f"write -P {number} {number}M 64k")
        assert run("snapshot", str(disk)).status == 0
        assert run("ship", str(disk), f"{where}::web1/vda", "--label", f"p{number}").status == 0
    assert run("ship", str(disk), f"{where}::db").status == 0
    return where


def points(run: Run, where: str) -> dict[str, list[int]]:
    return {
        each["name"]: [point["point"] for point in each["points"]] for each in run("log", where, "--json").json["disks"]
    }


@pytest.mark.parametrize("shipped", ["repo", "replica"], indirect=True)
def test_a_dry_run_changes_nothing(run: Run, shipped: str) -> None:
    before = points(run, shipped)
    for words in (["@2"], ["@latest"], ["", "--all-points"], ["", "--keep-last", "1"]):
        address = f"{shipped}::web1/vda{words[0]}"
        plan = run("forget", address, *words[1:], "--dry-run", "--json").json
        assert plan["dry_run"] is True
        dropped = [point["point"] for point in plan["plan"]["disks"][0]["points"] if not point["kept"]]
        assert plan["plan"]["points_dropped"] == len(dropped) > 0
        said = run("forget", address, *words[1:], "--dry-run")
        assert (said.status, f"would forget {len(dropped)} point" in said.out) == (0, True)
        assert points(run, shipped) == before
        if words[0] == "@latest":
            assert plan["plan"]["bytes_dropped"] > 0 or plan["plan"]["disks"][0]["shadowed_bytes"] > 0


@pytest.mark.parametrize("shipped", ["repo", "replica"], indirect=True)
def test_points_go(run: Run, shipped: str) -> None:
    report = run("forget", f"{shipped}::web1/vda@2", f"{shipped}::web1/vda@p3", "--json").json
    assert report["disks"][0]["points_dropped"] == [2, 3]
    assert (report["points_dropped"], report["failed"], report["staying"]) == (2, [], [])
    assert report["needs_collecting"] is (shipped == "repo")
    assert points(run, shipped) == {"db": [1], "web1/vda": [1]}
    said = run("forget", f"{shipped}::web1/vda", "--all-points")
    assert "forgot 1 point" in said.out
    assert ("snapchain gc" in said.out) is (shipped == "repo")
    assert points(run, shipped) == {"db": [1], "web1/vda": []}
    assert run("restore", f"{shipped}::web1/vda", "out.raw").status == 3
    assert run("verify", shipped, "--read-data").status == 0


def test_rules_over_all_disks_and_those_of_a_pattern(run: Run, shipped: str) -> None:
    assert run("forget", shipped, "--disks", "d*", "--keep-last", "1").status == 0
    assert points(run, shipped) == {"db": [1], "web1/vda": [1, 2, 3]}
    assert run("forget", shipped, "--keep-label", "p1").status == 0
    assert points(run, shipped) == {"db": [1], "web1/vda": [1, 3]}
    assert run("forget", shipped, "--disks", "x*", "--keep-last", "1").status == 3


def test_held_points_are_refused(run: Run, shipped: str) -> None:
    run("hold", f"{shipped}::web1/vda@2", "--tag", "legal")
    for words in (["@2"], ["", "--all-points"]):
        refused = run("forget", f"{shipped}::web1/vda{words[0]}", *words[1:])
        assert (refused.status, "held points are never forgotten: web1/vda@2 (legal)" in refused.err) == (4, True)
        assert run("forget", f"{shipped}::web1/vda{words[0]}", *words[1:], "--dry-run").status == 4
    assert points(run, shipped)["web1/vda"] == [1, 2, 3]
    assert run("forget", shipped, "--keep-last", "1").status == 0
    assert points(run, shipped)["web1/vda"] == [2, 3]


def test_what_is_unclear_is_refused(run: Run, shipped: str) -> None:
    before = points(run, shipped)
    for words in (
        [f"{shipped}::db"],
        [shipped],
        [shipped, "--all-points"],
        [shipped, f"{shipped}::db@1"],
        [f"{shipped}::db@1", "other::db@1"],
        [f"{shipped}::db@1", "--keep-last", "1"],
        [f"{shipped}::db", "--keep-last", "1", "--all-points"],
        [f"{shipped}::db@today"],
        [f"{shipped}::db", "--disks", "d*", "--all-points"],
    ):
        refused = run("forget", *words)
        assert (refused.status, "hint:" in refused.err) == (2, True), words
    assert points(run, shipped) == before
