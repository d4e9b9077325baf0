"""How long a merge takes: by the rate of earlier ones on the same filesystem, remembered in one small file.

Nothing is measured for a plan.  Where no merge has been seen yet, COPIED and SHARED are assumed: slow for a disk of
today, so that a budget of seconds is kept.  A merge of few bytes is no measure of a rate.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import SnapchainError
from snapchain.host.private import read_record, write_record
from snapchain.host.records import state_dir
from snapchain.merge.step import MergeStep

COPIED = 200_000_000
"""Bytes a second, copied and compared with what they were."""
SHARED = 5_000_000_000
"""Bytes a second, when a filesystem shares blocks of files: no data is read or written."""
FIXED_SECONDS = 0.2
"""Of each merge: tables, checks, fsync."""
_TELLING = 16 << 20
_WEIGHT = 0.5
"""Of the newest merge in the mean."""


class Rates(BaseModel):
    """Bytes a second by filesystem and way of merging."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = 1
    rates: dict[str, float] = {}

    @classmethod
    def remembered(cls) -> Rates:
        """What is known; nothing where the file is missing or damaged."""
        with suppress(SnapchainError, RuntimeError):
            return read_record(_path(), cls, cap=1 << 20)
        return cls()

    def rate(self, directory: Path, way: str, *, shared: bool) -> float:
        """Bytes a second. way: a strategy's name."""
        found = self.rates.get(_key(directory, way, shared=shared), 0.0)
        return found if found > 0 else float(SHARED if shared else COPIED)

    def seconds(self, directory: Path, way: str, *, moved: int, shared: bool) -> float:
        """How long a merge of so many bytes will take."""
        return FIXED_SECONDS + moved / self.rate(directory, way, shared=shared)


def seconds_of(step: MergeStep, rates: Rates) -> float:
    """How long one merge will take."""
    return rates.seconds(step.result.parent, step.strategy.value, moved=step.bytes_to_move, shared=step.shares_extents)


def remember(directory: Path, way: str, *, moved: int, seconds: float, shared: bool) -> None:
    """Note what a merge took. Where nothing can be remembered (no home directory), nothing is."""
    if moved < _TELLING:
        return
    measured = moved / max(seconds - FIXED_SECONDS, seconds / 4, 1e-3)
    known = Rates.remembered()
    key = _key(directory, way, shared=shared)
    before = known.rates.get(key, measured)
    rates = {**known.rates, key: before + (measured - before) * _WEIGHT}
    with suppress(SnapchainError, RuntimeError):
        write_record(_path(), known.model_copy(update={"rates": rates}))


def _key(directory: Path, way: str, *, shared: bool) -> str:
    """The filesystem by its id, or by its device number where it has none: that changes at a reboot."""
    try:
        found = os.statvfs(directory).f_fsid or directory.stat().st_dev
    except OSError:
        found = 0
    return f"{found:x} {way}{' shared' if shared else ''}"


def _path() -> Path:
    return state_dir() / "merge-rates.json"
