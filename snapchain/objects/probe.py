"""Find out what a store really guarantees, before anything is stored there.

Servers that speak S3 differ, and the worst say nothing: rclone serve s3 takes `If-None-Match: *` and overwrites.  So
`init` tries it, on keys under `probe/<random>/` that it deletes again, and the repository records the answer.
What no repository could live with (other bytes than were written, unlisted objects) is refused outright.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, Unavailable, Unsupported
from snapchain.objects.store import NoConditions, ObjectStore, Refused, innermost

RACERS = 8
MOST_DRIFT = 180.0
"""Seconds between the clocks that leases bear; S3 itself refuses requests at 900."""
FOLDERS = ("disk", "disk-x", "disk.y")
ASKED_AGAIN = 3
"""A retried request may take the 412 about an object of equal bytes for its own success."""


class ProbeResult(BaseModel):
    """What a probe found; part of a repository's stored configuration.

    conditional_put: exactly one of many creates of a name succeeds
    refuses_damage: a PUT with the wrong Content-MD5 is refused; None where there is no such thing
    clock_drift: seconds by which the store's clock is ahead of ours; None when it shows none
    findings: sentences for the operator about what is not as it should be
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    conditional_put: bool
    refuses_damage: bool | None = None
    clock_drift: float | None = None
    findings: tuple[str, ...] = ()


@runtime_checkable
class ListsInPages(Protocol):
    """A store whose listings come in pages."""

    def list_in_pages(self, prefix: str, page: int) -> Sequence[str]: ...

    def list_dirs_in_pages(self, prefix: str, page: int) -> Sequence[str]: ...


@runtime_checkable
class ChecksUploads(Protocol):
    """A store that can send damaged bytes on purpose."""

    def refuses_damage(self, name: str) -> bool: ...


def probe(store: ObjectStore) -> ProbeResult:
    """Some 50 small requests.  Cleans up after itself, as far as the store lets it.

    Raises Unsupported for a store that cannot hold a repository, and the store's own errors (no bucket, no access).
    """
    folder = f"probe/{secrets.token_hex(8)}"
    findings: list[str] = []
    try:
        drift = _reads_and_lists(store, folder)
        conditional = _is_conditional(store, folder, findings)
        checks = _refuses_damage(store, f"{folder}/damaged")
        _pages_are_whole(store, f"{folder}/")
    finally:
        findings += _cleaned_up(store, folder)
    if not conditional:
        findings.append(
            "conditional writes are not honoured (If-None-Match): concurrent writers are kept apart by claims, "
            "which is slower and rests on nobody stalling for minutes"
        )
    if checks is False:
        findings.append("damaged uploads are not refused (Content-MD5): damage shows when the object is read")
    if drift is not None and abs(drift) > MOST_DRIFT:
        findings.append(f"the store's clock is {abs(drift):.0f} s {'ahead of' if drift > 0 else 'behind'} this one")
    return ProbeResult(conditional_put=conditional, refuses_damage=checks, clock_drift=drift, findings=tuple(findings))


def still_conditional(store: ObjectStore, name: str, data: bytes) -> bool:
    """Whether creating the existing object `name` is refused, as the probe once found; one request.

    `data` must be exactly its bytes, so that a store which overwrites (say, after a proxy was put before it that drops
    the header) does no harm.
    """
    with _believed(store), suppress(NoConditions):
        return any(not store.create(name, data) for _ in range(ASKED_AGAIN))
    return False


@contextmanager
def _believed(store: ObjectStore) -> Iterator[None]:
    """Let `create` send its condition without the check beforehand that unproven stores get."""
    before = store.properties
    store.properties = replace(before, conditional_put=True)
    try:
        yield
    finally:
        store.properties = before


def _reads_and_lists(store: ObjectStore, folder: str) -> float | None:
    """Write, read, replace and list; gives the clock's drift in seconds."""
    name, body = f"{folder}/body", secrets.token_bytes(70_000)
    before = time.time()
    store.put(name, body)
    after = time.time()
    listed = [info for info in store.list(f"{folder}/") if info.name == name]
    if [info.size for info in listed] != [len(body)]:
        raise Unsupported("a new object is not listed at once", subject=store.url)
    _same(store, name, body)
    if store.get(name, offset=4_000, length=60_000) != body[4_000:64_000]:
        raise Unsupported("a range of an object is not what was written", subject=store.url)
    _same(store, name, body[::-1])
    _same(store, f"{folder}/empty", b"")
    modified = listed[0].modified
    if modified is None:
        return None
    # S3 cuts to whole seconds; within the span of our own request nothing can be said.
    return min(0.0, modified + 1 - before) + max(0.0, modified - after)


def _same(store: ObjectStore, name: str, body: bytes) -> None:
    store.put(name, body)
    if store.get(name) != body:
        raise Unsupported("an object is not read back as it was written", subject=store.url)


def _is_conditional(store: ObjectStore, folder: str, findings: list[str]) -> bool:
    with _believed(store), suppress(NoConditions):
        return _creates_once(store, f"{folder}/twice") and _one_of_many(store, f"{folder}/race", findings)
    return False


def _creates_once(store: ObjectStore, name: str) -> bool:
    if not store.create(name, b"first"):
        raise Unsupported("an object that nobody made is said to exist", subject=store.url)
    return not store.create(name, b"second") and store.get(name) == b"first"


def _one_of_many(store: ObjectStore, name: str, findings: list[str]) -> bool:
    start = threading.Barrier(RACERS)

    def race(racer: int) -> bool | None:
        start.wait()
        try:
            return store.create(name, b"racer %d" % racer)
        except (Conflict, Unavailable) as error:
            if isinstance(error, Refused):
                raise
            return None

    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(race, range(RACERS)))
    if None in won:
        findings.append(f"{won.count(None)} of {RACERS} concurrent creates failed instead of losing")
    return won.count(True) == 1 and store.get(name) == b"racer %d" % won.index(True)


def _pages_are_whole(store: ObjectStore, prefix: str) -> None:
    """A page holds 1000 names: what goes wrong between two of them must not be found when there are so many.

    As bytes, `disk-x/0` comes before `disk/0`.  A server that keeps folders walks `disk` first; one that then goes on
    after the last name of a page, as bytes, loses `disk-x` (s3rver does).
    """
    bottom = innermost(store)
    if not isinstance(bottom, ListsInPages):
        return
    for folder in FOLDERS:
        store.put(f"{prefix}{folder}/0", b"")
    whole = [info.name for info in store.list(prefix)]
    for page in (1, 2):
        if list(bottom.list_in_pages(prefix, page)) != whole:
            raise Unsupported(f"a listing in pages of {page} misses objects", subject=store.url)
        if not set(FOLDERS) <= set(bottom.list_dirs_in_pages(prefix, page)):
            raise Unsupported(f"a listing of folders in pages of {page} misses some", subject=store.url)


def _refuses_damage(store: ObjectStore, name: str) -> bool | None:
    bottom = innermost(store)
    return bottom.refuses_damage(name) if isinstance(bottom, ChecksUploads) else None


def _cleaned_up(store: ObjectStore, folder: str) -> list[str]:
    """Delete what the probe made; findings about that."""
    try:
        for info in list(store.list(f"{folder}/")):
            store.delete(info.name)
        left = [info.name for info in store.list(f"{folder}/")]
    except Refused as error:
        return [f"objects cannot be deleted here ({error.message}): merges and gc will free nothing"]
    except Unavailable as error:
        return [f"the probe's objects under {folder}/ could not be deleted ({error.message})"]
    return [f"deleted objects are still listed, e.g. {left[0]}"] if left else []
