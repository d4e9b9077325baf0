"""What is found at a place that holds no repository.

nothing        a repository may be made
a beginning    of an `init` that was interrupted, or is at work: it may be made all the same
a loss         objects of a repository whose `config` is gone: without that very object none of them can be read
other things   files or objects of something else, which must not be mixed with those of a repository
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol, runtime_checkable

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.terminal import encodable, shell_word
from snapchain.objects.store import ObjectStore, innermost

_STORED = {
    "disks": re.compile(r"disks/[0-9a-f]{32,64}/[0-9]{20}"),
    "guests": re.compile(r"guests/[0-9a-f]{32,64}/([0-9]{20}|checks)"),
    "layers": re.compile(r"layers/[0-9a-f]{32}"),
    "packs": re.compile(r"packs/[0-9a-f]{2}/[0-9a-f]{32}"),
    "index": re.compile(r"index/[0-9]{10}-[0-9a-f]{32}"),
}
"""Names that only a repository in use has, by their folders."""
_BEGINNING = re.compile(r"keys/[0-9a-f]{32}|slots/[0-9]{20}|witness|probe/[0-9a-f]+/.+|config\.claim\.[0-9a-f]+")
_OWN_TOPS = {"keys", "slots", "witness", "probe", "tmp", ".reserve"}
_MOST = 1000


@runtime_checkable
class ShowsAll(Protocol):
    """A store that can tell what else lies in its place, under names that no object has."""

    def top_names(self) -> Sequence[str]: ...


def check_vacant(store: ObjectStore) -> None:
    """Raises Conflict where other things lie, Corrupt where a repository has lost its `config`."""
    lost = _loss(store)
    if lost is not None:
        raise lost
    others = _others(store)
    if others:
        raise Conflict(
            f"the place is not empty: {_some(others)}",
            subject=store.url,
            hint="name a place that is empty, or does not exist yet",
        )


def nothing_here(store: ObjectStore) -> SnapchainError:
    """The error for a place that has no `config`: NotFound, or Corrupt where that was lost."""
    lost = _loss(store)
    if lost is not None:
        return lost
    others = _others(store)
    if others:
        return NotFound(
            f"there is no snapchain repository here, only other objects: {_some(others)}",
            subject=store.url,
            hint="check the name: a repository has an object `config` at its top",
        )
    return NotFound(
        "there is no snapchain repository here", subject=store.url, hint=f"snapchain init {shell_word(store.url)}"
    )


def _loss(store: ObjectStore) -> Corrupt | None:
    found = {folder: _count(store, folder) for folder in _STORED}
    if not any(found.values()):
        return None
    names = ", ".join(
        f"{count} in {folder}/" if count < _MOST else f"{_MOST} or more in {folder}/"
        for folder, count in found.items()
        if count
    )
    return Corrupt(
        f"the object `config` of this repository is missing; its other objects are here: {names}",
        subject=store.url,
        hint="put `config` back from a copy of the repository, or from an older version of the object; no other "
        "one fits its keys. Change nothing else until then",
    )


def _count(store: ObjectStore, folder: str) -> int:
    """Objects of a repository in a folder; counted up to _MOST."""
    try:
        found = list(islice(store.list(f"{folder}/"), _MOST))
    except (InvalidInput, Unsupported):  # a link or a file of that name: no folder of ours
        return 0
    return sum(_STORED[folder].fullmatch(info.name) is not None for info in found)


def _others(store: ObjectStore) -> list[str]:
    """Names of objects and files that no interrupted `init` leaves."""
    bottom = innermost(store)
    tops = bottom.top_names() if isinstance(bottom, ShowsAll) else []
    strange = [name for name in tops if name not in _OWN_TOPS and not _BEGINNING.fullmatch(name)]
    return list(dict.fromkeys([*strange, *_unknown(store)]))


def _unknown(store: ObjectStore) -> Iterator[str]:
    try:
        for info in islice(store.list(""), _MOST):
            if not _BEGINNING.fullmatch(info.name):
                yield info.name
    except (InvalidInput, Unsupported) as error:
        yield error.subject or store.url


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(encodable, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and more"
