"""The ranges of a restored disk that are zero because their bytes are lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from snapchain.destination.reading import Sink, leave
from snapchain.errors import Corrupt, InvalidInput
from snapchain.host.batches import Buffer

Write = Callable[[Sequence[tuple[int, Buffer]]], None]


class DamagedRange(BaseModel):
    """Guest bytes that were lost, and are zeroes now. reason: what is wrong where they begin, a sentence."""

    model_config = ConfigDict(frozen=True)

    offset: int
    length: int
    reason: str


class Damage:
    """Collects lost ranges, or lets the first one end the restore.

    allowed: whether they are collected
    """

    def __init__(self, *, allowed: bool) -> None:
        self.allowed = allowed
        self._ranges: list[DamagedRange] = []

    @property
    def ranges(self) -> tuple[DamagedRange, ...]:
        """Ascending; neighbours are one."""
        return tuple(self._ranges)

    def sink(self, write: Write, zero: Callable[[int, int], None] = leave, *, is_proven: bool = False) -> Sink:
        """A sink whose lost ranges are collected here. zero, is_proven: as of Sink"""
        return Sink(write, zero, self._add if self.allowed else None, is_proven)

    def _add(self, start: int, stop: int, error: Corrupt) -> None:
        last = self._ranges[-1] if self._ranges else None
        if last is not None and start <= last.offset + last.length:
            self._ranges[-1] = last.model_copy(update={"length": max(last.length, stop - last.offset)})
        else:
            self._ranges.append(DamagedRange(offset=start, length=stop - start, reason=str(error)))


def check_allowed(*, names_damage: bool, kind: str, whole_chain: bool) -> None:
    """Raises InvalidInput where lost ranges cannot be left out. names_damage, kind: as of Traits"""
    if not names_damage:
        raise InvalidInput(
            f"--allow-damaged is for repositories: a {kind} does not name the ranges that are damaged",
            hint="copy what can be read of its files with `qemu-img convert --salvage`",
        )
    if whole_chain:
        raise InvalidInput(
            "--allow-damaged writes one file that shows the whole point", hint="leave out --chain, or --allow-damaged"
        )


__all__ = ["Damage", "DamagedRange", "check_allowed"]
