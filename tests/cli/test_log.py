"""log, as a user sees it: few points one by one, many disks a line each."""

from __future__ import annotations

from pathlib import Path

from snapchain.destinations import open_destination
from snapchain.repository.catalogue import generation_names
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.repository import Repository
from tests.cli.conftest import Run
from tests.repository.test_summaries import publish


def made(run: Run) -> Repository:
    assert run("init", "repo", "--no-encryption").status == 0
    place = open_destination("repo", writing=True)
    assert isinstance(place, RepositoryDestination)
    return place.repository


def test_few_points_are_listed(run: Run) -> None:
    repo = made(run)
    publish(repo, "web1/vda", [3, 2])
    publish(repo, "web2/vda", [1])
    said = run("log", "repo")
    assert said.status == 0
    assert said.out.count("1.0 MiB") == 2
    assert "--all" not in said.out


def test_many_points_are_a_line_a_disk(run: Run) -> None:
    repo = made(run)
    publish(repo, "web1/vda", range(30, 0, -1))
    publish(repo, "web2/vda", range(20, 0, -1))
    publish(repo, "web3/.guest", [1])
    said = run("log", "repo")
    assert said.status == 0
    rows = [line.split() for line in said.out.splitlines()[1:4]]
    assert [row[:2] for row in rows] == [["web1/vda", "30"], ["web2/vda", "20"], ["web3", "(guest"]]
    assert rows[0][2] == "30"
    assert "snapchain log repo::DISK" in said.out
    assert "snapchain log repo --all" in said.out
    assert len(run("log", "repo", "--all").out.splitlines()) > 50
    assert len(run("log", "repo::web1/vda").out.splitlines()) > 30
    assert len(run("log", "repo", "--json").json["disks"][0]["points"]) == 30


def test_points_of_the_future_are_named(run: Run) -> None:
    repo = made(run)
    publish(repo, "web1/vda", [*range(50, 0, -1), -100_000])
    said = run("log", "repo")
    assert said.out.splitlines()[1].split()[:3] == ["web1/vda", "51", "50"]
    assert "point 51 is dated in the future" in said.out


def test_a_damaged_catalogue_ends_with_what_to_do(run: Run, tmp_path: Path) -> None:
    repo = made(run)
    publish(repo, "web1/vda", range(50, 0, -1))
    (name,) = generation_names(repo.store, repo.keys.disk_key("web1/vda"))
    (tmp_path / "repo" / name).write_bytes(b"?")
    said = run("log", "repo")
    assert (said.status, "is not the snapchain object" in said.err) == (5, True)
