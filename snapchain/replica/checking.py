"""Everything that is wrong with a disk at a replica, as values: what is recorded of it, and on request its data.

A disk may be sent to, merged or cut meanwhile: what is found wrong counts only where the catalogue still is the one
that it was looked at with; else it is looked at again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snapchain.errors import Busy, NotFound, SnapchainError
from snapchain.replica.arrival import opened_chain
from snapchain.replica.catalogue import Catalogue
from snapchain.replica.merge_journal import Engine, is_under_way, wait_for_merge
from snapchain.replica.store import ReplicaDisk
from snapchain.replica.stream.messages import Finding, Verdict
from snapchain.replica.verifying import verify_disk

_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found of one disk."""

    verdict: Verdict
    findings: tuple[Finding, ...]


def check_disk(
    disk: ReplicaDisk, *, data: bool, on_bytes: Callable[[int], None], engine: Engine | None = None
) -> Checked:
    """Look at a disk. data: read all layers too, and compare what they show with what was recorded.

    on_bytes: told how much was read since it was last told; engine: for a merge that was killed
    Raises NotFound for a disk that has no catalogue, Busy when it changes all the time.
    """
    for _ in range(_ATTEMPTS):
        wait_for_merge(disk, engine=engine)
        try:
            catalogue = disk.read()
        except SnapchainError as error:
            finding = _finding(disk, error.kind, error.subject, error.message, ())
            return Checked(Verdict(disk=disk.name, points=0, layers=0, checked_bytes=0), (finding,))
        if catalogue is None:
            raise NotFound(f"there is no disk {disk.name!r} here", subject=disk.directory)
        read = 0

        def counted(count: int) -> None:
            nonlocal read
            read += count
            on_bytes(count)

        findings = _findings(disk, catalogue, data=data, on_bytes=counted)
        if not findings or (not is_under_way(disk) and disk.read() == catalogue):
            layers = len(catalogue.layers)
            verdict = Verdict(disk=disk.name, points=len(catalogue.points), layers=layers, checked_bytes=read)
            return Checked(verdict, tuple(findings))
    raise Busy("the disk changes while it is looked at", subject=disk.directory, hint="run it again")


def _findings(disk: ReplicaDisk, catalogue: Catalogue, *, data: bool, on_bytes: Callable[[int], None]) -> list[Finding]:
    if catalogue.tip is None:
        return []
    try:
        if not data:
            opened_chain(disk, catalogue, catalogue.tip).close()
            return []
        wrong = verify_disk(disk, on_bytes=on_bytes)
    except SnapchainError as error:
        return [_finding(disk, error.kind, error.subject, error.message, _points_from(catalogue, None))]
    return [
        _finding(
            disk,
            "corrupt",
            str(disk.path(each.file)),
            each.message,
            _points_from(catalogue, each.file),
        )
        for each in wrong
    ]


def _points_from(catalogue: Catalogue, file: str | None) -> tuple[int, ...]:
    """The points whose chains have that file; all of them where none is named."""
    files = [layer.file for layer in catalogue.layers]
    first = 0 if file is None or file not in files else files.index(file)
    above = {layer.id for layer in catalogue.layers[first:]}
    return tuple(point.point for point in catalogue.points if point.layer in above)


def _finding(disk: ReplicaDisk, kind: str, subject: str | None, message: str, points: tuple[int, ...]) -> Finding:
    return Finding(
        disk=disk.name,
        kind=kind,
        subject=None if subject is None else subject[:1000],
        message=message[:4000],
        points=points,
    )
