"""snapchain rename, as a user says it."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run


def test_a_disk_gets_another_name(run: Run, disk: Path, tmp_path: Path) -> None:
    assert run("init", "repo").status == 0
    assert run("ship", str(disk), "repo::web1/vda", "--label", "golden").status == 0
    assert run("ship", str(disk), "repo::db").status == 0
    words = ("rename", "repo::web1/vda", "repo::www/vda")
    assert run(*words, "--dry-run", "--json").json["plan"]["points"] == 1
    assert "would rename web1/vda to www/vda" in run(*words, "--dry-run").out
    assert run("log", "repo::web1/vda").status == 0, "it has its name still"
    done = run(*words, "--json").json
    assert (done["old"], done["new"], done["points"], done["finishes"]) == ("web1/vda", "www/vda", 1, False)
    assert [each["name"] for each in run("log", "repo", "--json").json["disks"]] == ["db", "www/vda"]
    assert run("restore", "repo::www/vda@golden", "out.raw").status == 0
    refused = run("ship", str(disk), "repo::web1/vda")
    assert (refused.status, "was renamed to www/vda" in refused.err) == (4, True)
    for gone in (("log", "repo::web1/vda"), ("forget", "repo::web1/vda@1"), words):
        said = run(*gone)
        assert (said.status, "was renamed to" in said.err) == (3, True), gone
    said = run("restore", "repo::web1/vda", "again.raw")
    assert (said.status, "use the new name: DEST::www/vda" in said.err) == (3, True)
    assert run("ship", str(disk), "repo::www/vda").status == 0
    assert run("gc", "repo").status == 0
    assert run("verify", "repo", "--read-data", "--json").json["disks"] == 2
    assert run("rename", "repo::www/vda", "repo::db").status == 2
    assert run("rename", "repo::www/vda", "other::web1/vda").status == 2
    assert run("rename", "repo::gone", "repo::x").status == 3
    assert run("ship", str(disk), f"dir:{tmp_path}/replica::web1/vda").status == 0
    unable = run("rename", f"dir:{tmp_path}/replica::web1/vda", f"dir:{tmp_path}/replica::x")
    assert (unable.status, "cannot be renamed" in unable.err) == (6, True)
