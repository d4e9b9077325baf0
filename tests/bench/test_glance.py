"""What `status` costs where a destination has 10,000 disks of 365 points (docs/decisions/0143)."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from snapchain.destinations import open_destination
from snapchain.host.records import cache_dir
from snapchain.ops.status import Wanted, status
from snapchain.repository.catalogue import KIND, Catalogue, Point
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.envelope import seal
from snapchain.repository.format import generation_name
from snapchain.repository.opening import create_repository
from snapchain.repository.summaries import summaries

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]

DISKS = int(os.environ.get("SNAPCHAIN_BENCH_DISKS", "10000"))
POINTS, GENERATIONS = 365, 10
NOW = datetime(2026, 11, 30, 2, tzinfo=UTC)


def build(root: Path) -> None:
    """Disks whose layers do not exist: only catalogues are read."""
    repo = create_repository(str(root), passphrase=lambda: "x")
    for number in range(DISKS):
        disk, begin = f"vm{number}", NOW - timedelta(days=POINTS, minutes=number % 600)
        layers = [secrets.token_hex(16) for _ in range(POINTS)]
        catalogue = Catalogue(
            disk=disk,
            generation=POINTS,
            previous="0" * 64,
            nonce=secrets.token_hex(16),
            time=NOW,
            next_point=POINTS + 1,
            points=tuple(
                Point(
                    point=at,
                    time=begin + timedelta(days=at, microseconds=at),
                    labels=("nightly",),
                    layer=layer,
                    size=20 << 30,
                    content_id=secrets.token_hex(32),
                    made_by="snapchain 0.2.0",
                )
                for at, layer in enumerate(layers, 1)
            ),
            parents=dict(zip(layers, [None, *layers[:-1]], strict=True)),
        )
        key = repo.keys.disk_key(disk)
        name = generation_name(key, POINTS)
        (root / name).parent.mkdir(parents=True)
        (root / name).write_bytes(seal(repo.keys, KIND, name, catalogue.encode()))
        for older in range(POINTS - GENERATIONS + 1, POINTS):
            (root / generation_name(key, older)).write_bytes(b"?")


@contextmanager
def measured(what: str, show: Callable[[str], None]) -> Iterator[None]:
    began, cpu = time.monotonic(), time.process_time()
    yield
    show(f"{what}: {time.process_time() - cpu:.1f} s of processor, {time.monotonic() - began:.1f} s")


def test_ten_thousand_disks_at_a_glance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def show(text: str) -> None:
        with capsys.disabled():
            print(f"\n{DISKS} disks of {POINTS} points: {text}", end="")

    build(tmp_path / "repo")
    place = open_destination(tmp_path / "repo", passphrase=lambda: "x")
    assert isinstance(place, RepositoryDestination)
    with measured("listing", show):
        assert sum(1 for _ in place.repository.store.list("disks/")) == DISKS * GENERATIONS
    with measured("at a glance, nothing kept", show):
        first = summaries(place.repository, NOW)
    with measured("at a glance, all lines kept", show):
        assert summaries(place.repository, NOW) == first
    with measured("status, all lines kept", show):
        report = status([Wanted("repo", None, lambda: place)], now=NOW, max_age=26 * 3600)
    assert len(report.disks) == DISKS
    assert report.is_sound
    kept = sum(each.stat().st_size for each in (cache_dir() / "summaries").iterdir())
    show(f"the cache has {kept >> 10} KiB")
    some = place.repository.disk_keys()[: DISKS // 10]
    with measured("a tenth of the catalogues validated", show):
        assert all(place.repository.catalogue_of(key) for key in some)
