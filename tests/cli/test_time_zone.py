"""Which calendar a merge keeps points by."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from snapchain.cli import quantities
from snapchain.cli.quantities import zone_name_of, zone_of
from snapchain.errors import InvalidInput
from tests.cli.conftest import Run

SUMMER, WINTER = (datetime(2026, month, 1, 12, tzinfo=UTC) for month in (7, 1))
BERLIN = [timedelta(hours=2), timedelta(hours=1)]


def offsets(name: str | None) -> list[timedelta | None]:
    return [moment.astimezone(zone_of(name)).utcoffset() for moment in (SUMMER, WINTER)]


def test_by_name() -> None:
    assert offsets("Europe/Berlin") == BERLIN
    assert offsets("UTC") == [timedelta(0)] * 2


@pytest.mark.parametrize("name", ["Mars/Base", "", "/etc/passwd", "../x", "Europe"])
def test_no_zone(name: str) -> None:
    with pytest.raises(InvalidInput, match="no time zone"):
        zone_of(name)


def test_the_machines_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    assert offsets(None) == BERLIN
    monkeypatch.delenv("TZ")
    monkeypatch.setattr(quantities, "_LOCALTIME", Path("/usr/share/zoneinfo/Europe/Berlin"))
    if quantities._LOCALTIME.exists():
        assert offsets(None) == BERLIN
    monkeypatch.setattr(quantities, "_LOCALTIME", tmp_path / "nothing")
    assert zone_of(None).utcoffset(SUMMER) is not None


def test_a_name_that_another_host_knows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert (zone_name_of("Europe/Berlin"), zone_name_of("UTC")) == ("Europe/Berlin", "UTC")
    with pytest.raises(InvalidInput, match="no time zone"):
        zone_name_of("Mars/Base")
    monkeypatch.setenv("TZ", ":Europe/Berlin")
    assert zone_name_of(None) == "Europe/Berlin"
    monkeypatch.setenv("TZ", "CET-1CEST")
    with pytest.raises(InvalidInput, match="has no name"):
        zone_name_of(None)
    monkeypatch.delenv("TZ")
    link = tmp_path / "localtime"
    monkeypatch.setattr(quantities, "_LOCALTIME", link)
    assert zone_name_of(None) == "UTC"
    link.write_bytes(b"rules that nobody has named")
    with pytest.raises(InvalidInput, match="has no name"):
        zone_name_of(None)
    link.unlink()
    link.symlink_to("/usr/share/zoneinfo/Europe/Berlin")
    if link.exists():
        assert zone_name_of(None) == "Europe/Berlin"


def test_a_merge_says_what_it_does_not_know(run: Run, disk: Path) -> None:
    assert run("merge", str(disk), "--keep-last", "1", "--time-zone", "Mars/Base").status == 2
    assert run("merge", str(disk), "--keep-last", "1", "--time-zone", "Europe/Berlin", "--dry-run").status == 0
