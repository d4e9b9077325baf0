"""snapchain retire, as an operator says it whose old backup is gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def places(run: Run, disk: Path) -> tuple[str, Path]:
    """A replica and a repository to both of which a guest was shipped; the repository is deleted then."""
    replica, repository = f"dir:{disk.parent}/replica", disk.parent / "old"
    run("init", str(repository), "--no-encryption")
    for place in (str(repository), replica):
        assert run("ship", str(disk), f"{place}::web1/vda").status == 0
    shutil.rmtree(repository)
    return replica, repository


def test_a_move_waits_for_a_backup_that_is_gone_until_it_is_retired(
    run: Run, disk: Path, places: tuple[str, Path]
) -> None:
    replica, repository = places
    words = ["retire", f"{replica}::web1", str(repository)]
    move = ["migrate", str(disk), f"{replica}::web1/vda", "--offline"]
    refused = run(*move)
    assert (refused.status, f"--without {repository}" in refused.err) == (7, True)
    unasked = run(*words)
    assert unasked.status == 2
    assert "nobody can be asked whether the guest web1 was taken over there" in unasked.err
    plan = run(*words, "--dry-run", "--json").json
    assert (plan["plan"]["destination"], plan["plan"]["undo"]) == (str(repository), False)
    assert "would be gone for good" in run(*words, "--dry-run").out
    assert run(*move).status == 7, "nothing was changed"
    assert "is gone for good, as " in run(*words, "--yes").out
    assert f"{repository}: " in run("status", f"{replica}::web1").out
    assert run(*words, "--undo").status == 0
    assert run(*move).status == 7
    (told,) = run(*words, "--yes", "--json").json["told"]
    assert told.startswith(replica)
    assert run(*move).status == 0


def test_what_is_no_destination_of_the_guest(run: Run, places: tuple[str, Path]) -> None:
    replica, repository = places
    typo = run("retire", f"{replica}::web1", f"{repository}x", "--yes")
    assert (typo.status, str(repository) in typo.err) == (2, True)
    assert run("retire", f"{replica}::web2", str(repository), "--yes").status == 3
    assert run("retire", f"{replica}::web1", str(repository), "--undo").status == 2
