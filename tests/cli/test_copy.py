"""snapchain copy, as a user says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run, qemu_img, write


@pytest.fixture
def source(run: Run, disk: Path) -> Path:
    """A repository with two points of web1/vda, one of db."""
    assert run("init", "source").status == 0
    assert run("ship", str(disk), "source::web1/vda", "-l", "one").status == 0
    write(disk, "write -P 3 64k 64k")
    assert run("ship", str(disk), "source::web1/vda").status == 0
    assert run("ship", str(disk), "source::db").status == 0
    return disk


def test_to_another_passphrase(run: Run, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "another secret")
    assert run("init", "dest").status == 0
    refused = run("copy", "source", "dest")
    assert (refused.status, "wrong passphrase" in refused.err) == (2, True)
    Path("key").write_text("secret\n")
    Path("key").chmod(0o600)
    options = ("source", "dest", "web*", "--source-password-file", "key")
    would = run("copy", *options, "--dry-run", "--json").json
    assert (would["dry_run"], would["plan"]["points"]) == (True, 2)
    assert [each["data_bytes"] > 0 for each in would["plan"]["disks"][0]["points"]] == [True, True]
    assert "would copy 2 points" in run("copy", *options, "--dry-run").out
    said = run("copy", *options)
    assert (said.status, "copied 2 points" in said.out, "1, 2" in said.out) == (0, True, True)
    monkeypatch.setenv("SNAPCHAIN_SOURCE_PASSWORD", "secret")
    report = run("copy", "source", "dest", "--limit-rate", "100M", "--json").json
    assert [(each["disk"], len(each["points"]), each["present"]) for each in report["disks"]] == [
        ("db", 1, 0),
        ("web1/vda", 0, 2),
    ]
    assert run("restore", "dest::web1/vda", "out.qcow2").status == 0
    qemu_img("compare", source, "out.qcow2")
    assert run("copy", "source", "dest", "--source-password-command", "false").status == 8


def test_a_source_without_encryption(run: Run, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("init", "plain", "--no-encryption").status == 0
    assert run("init", "dest").status == 0
    monkeypatch.setenv("SNAPCHAIN_SOURCE_PASSWORD", "")
    assert run("copy", "plain", "dest").status == 0
    _ = disk


def test_what_cannot_be_copied_makes_a_status_of_its_own(run: Run, source: Path) -> None:
    assert run("init", "dest").status == 0
    lost = next(iter(sorted(Path("source/packs").rglob("*/*"), key=lambda path: -path.stat().st_size)))
    lost.unlink()
    said = run("copy", "source", "dest", "--quiet")
    assert (said.status, said.out, "@1: not copied: packs/" in said.err) == (10, "", True), said.err
    _ = source


REFUSED = [
    ("source::db dest", "a whole destination is wanted here"),
    ("source source", "both have the id"),
    ("source dir:/replica", "this is a replica"),
    ("source dest mail", "names no disk and no guest"),
    ("source dest --newest --since 1", "both given"),
    ("dir:/replica dest --source-profile x", "only s3:// has"),
    ("dir:/replica dest --source-password-file x", "is not encrypted"),
    ("source dest --source-endpoint http://x", "only s3:// has an endpoint"),
    ("source dest --source-profile x", "only s3:// has a profile"),
    ("source dest --source-password-file x --source-password-command y", "are both given"),
]


def test_what_is_refused(run: Run, source: Path) -> None:
    assert run("init", "dest").status == 0
    for words, error in REFUSED:
        said = run("copy", *words.split())
        assert (said.status in {2, 3, 6}, error in said.err) == (True, True), (words, said.err)
    assert run("log", "dest", "--json").json["disks"] == []
    _ = source
