"""snapchain repair, as a user says it: a second site with a passphrase of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_a_second_site_with_its_own_passphrase(run: Run, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("init", "repo").status == 0
    assert run("ship", str(disk), "repo::web1/vda").status == 0
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "another one")
    assert run("init", "second").status == 0
    monkeypatch.setenv("SNAPCHAIN_SOURCE_PASSWORD", "secret")
    assert run("copy", "repo", "second").status == 0
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "secret")
    monkeypatch.delenv("SNAPCHAIN_SOURCE_PASSWORD")
    largest = max(Path("repo/packs").rglob("*/*"), key=lambda path: path.stat().st_size)
    largest.unlink()
    assert run("repair", "repo").status == 5
    wrong = run("repair", "repo", "--from", "second::web1/vda")
    assert (wrong.status, "wrong passphrase" in wrong.err) == (2, True)
    assert "SNAPCHAIN_SOURCE_PASSWORD, --source-password-file" in wrong.err
    monkeypatch.setenv("SNAPCHAIN_SOURCE_PASSWORD", "another one")
    before = {path: path.read_bytes() for path in Path("repo").rglob("*") if path.is_file()}
    assert run("repair", "repo", "--from", "second::web1/vda", "--dry-run").status == 0
    assert {path: path.read_bytes() for path in Path("repo").rglob("*") if path.is_file()} == before
    assert run("repair", "repo", "--from", "second::web1/vda").status == 0
    assert run("verify", "repo", "--read-data").status == 0
    assert run("gc", "repo").status == 0
    assert run("verify", "repo", "--read-data").status == 0
