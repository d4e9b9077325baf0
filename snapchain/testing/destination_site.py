"""A place at which a destination is tried, and the small steps of the suites that try it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Protocol

import pytest

from snapchain.destination.protocol import Destination
from snapchain.destination.records import PointRecord
from snapchain.model.events import Event
from snapchain.ops.log import log
from snapchain.ops.ship.request import ShipReport
from snapchain.ops.ship.run import ShipRequest, opened
from snapchain.testing.history import Moment, build_history

DISK = "web1/vda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """In what kinds differ.

    one_chain: a disk is one chain of files, so an image that does not lie on it is Diverged
    merges: points can be let go by a policy
    any_offset: points can be read at any offset, and not in one go alone
    damages, every: where each step takes long: how many of the stored files are tried with a flipped byte, and of
    other things that are alike every so manieth
    """

    one_chain: bool
    merges: bool
    damages: int = 1000
    every: int = 1
    any_offset: bool = True


class Site(Protocol):
    """A place for one destination."""

    @property
    def traits(self) -> Traits: ...

    def open(self, *, writing: bool = False) -> Destination:
        """The destination, as a process that was just started opens it."""
        ...

    def stored(self) -> Sequence[str]:
        """Names of all files or objects there that hold anything."""
        ...

    def read(self, name: str) -> bytes:
        """What one holds."""
        ...

    def write(self, name: str, whole: bytes) -> None:
        """Put other bytes in its place, behind everybody's back."""
        ...

    def vital(self, name: str, whole: bytes) -> Sequence[int]:
        """Places of bytes in it that count: a flip there must be found. Others are padding, or written anew by need."""
        ...


@dataclass(frozen=True, slots=True)
class Delivered:
    """A history at a site. reports, and the moment right after each: one a moment of the history."""

    site: Site
    history: Sequence[Moment]
    reports: Sequence[ShipReport]
    after: Sequence[datetime]
    begun: datetime

    @property
    def points(self) -> Sequence[PointRecord]:
        return log(self.site.open(), DISK).disks[0].points


class OnSites:
    """Subclasses give a fixture `sites`, for the whole class: a function that makes an empty Site."""

    @pytest.fixture(scope="class")
    @classmethod
    def history(cls, tmp_path_factory: pytest.TempPathFactory) -> list[Moment]:
        return _built(tmp_path_factory.getbasetemp())

    @pytest.fixture(scope="class")
    @classmethod
    def delivered(cls, sites: Callable[[], Site], history: list[Moment]) -> Delivered:
        """Only looked at by tests: one that changes it has a site of its own."""
        site, begun = sites(), datetime.now(UTC)
        reports, after = [], []
        for number, moment in enumerate(history):
            reports.append(deliver(site, moment.image, labels=[moment.name, "even" if number % 2 == 0 else "odd"]))
            after.append(datetime.now(UTC))
        return Delivered(site, history, reports, after, begun)

    @pytest.fixture
    def site(self, sites: Callable[[], Site]) -> Site:
        return sites()

    @pytest.fixture
    def out(self, tmp_path: Path) -> Path:
        """A directory for outputs and nothing else."""
        (tmp_path / "out").mkdir()
        return tmp_path / "out"


@cache
def _built(directory: Path) -> list[Moment]:
    """Once for all kinds: nobody changes it."""
    (directory / "history").mkdir()
    return build_history(directory / "history")


def deliver(
    site: Site,
    image: Path,
    *,
    disk: str = DISK,
    labels: Sequence[str] = (),
    on_event: Callable[[Event], None] | None = None,
) -> ShipReport:
    """By a destination opened afresh."""
    with opened(ShipRequest(image=image, disk=disk, labels=labels), site.open(writing=True)) as work:
        return work.run() if on_event is None else work.run(on_event=on_event)
