"""A year of daily points of a terabyte is merged to twelve: by records alone, in seconds, on a disk and on S3."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapchain.repository.opening import open_repository
from tests.bench.days import record
from tests.bench.measure import Cost, GiB, MiB, run, snapchain
from tests.bench.test_promises import MOST_MEMORY, tell
from tests.servers import S3Server, rclone_s3

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

DAYS = 365
MOST_SECONDS = 60.0
"""On two cores that others use as well; about 10 were measured."""


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk of 1 TiB, a quarter of it used, 4000 writes a day."""
    folder = tmp_path_factory.mktemp("year")
    snapchain(folder, "init", "repo")
    repository = open_repository(str(folder / "repo"), passphrase=lambda: "x", writing=True)
    record(repository, "year", 1024 * GiB, DAYS, used=256 * GiB, writes=4000)
    return folder / "repo"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_s3(tmp_path_factory.mktemp("rclone") / "s3") as running:
        yield running


def ids(repository: Path) -> dict[int, str]:
    opened = open_repository(str(repository), passphrase=lambda: "x")
    return {point.point: point.content_id for point in opened.catalogue("year").points}


def judge(what: str, cost: Cost, before: dict[int, str], after: dict[int, str]) -> None:
    report = json.loads(cost.out.splitlines()[-1])
    tell(what, cost, also=f"{report['layers_before']} layers to {report['layers_after']}")
    assert (report["layers_before"], report["layers_after"], report["bytes_moved"]) == (DAYS, 12, 0)
    assert len(after) == 12
    assert all(before[point] == content for point, content in after.items())
    assert cost.seconds < MOST_SECONDS
    assert cost.peak < MOST_MEMORY


def test_on_a_local_disk(year: Path, tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    shutil.copytree(year, repository)
    before = ids(repository)
    words = ("merge", "repo::year", "--keep-monthly", "12", "--json")
    judge("merge of 365 days of 1 TiB", snapchain(tmp_path, *words), before, ids(repository))
    grown = sum(path.stat().st_size for path in repository.glob("packs/*/*")) // MiB
    print(
        f"\n  records before and after it: {sum(p.stat().st_size for p in year.glob('packs/*/*')) // MiB}, {grown} MiB"
    )


def test_on_s3(year: Path, tmp_path: Path, server: S3Server) -> None:
    bucket = server.new_bucket()
    place = server.log.parent / "data" / bucket / "repo"
    shutil.copytree(year, place)
    before = ids(year)
    program = Path(sys.executable).with_name("snapchain")
    words: list[str | Path] = [program, "merge", f"s3://{bucket}/repo::year", "--keep-monthly", "12", "--json"]
    cost = run(words, tmp_path, XDG_CACHE_HOME=str(tmp_path / "cache"), **server.environment)
    judge("the same over rclone serve s3", cost, before, ids(place))
