"""The probe tells the good servers from the bad ones, and leaves nothing behind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from snapchain.errors import Unavailable, Unsupported
from snapchain.objects import open_store
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.probe import MOST_DRIFT, ProbeResult, probe, still_conditional
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, Refused, StoreWrapper
from tests.servers import S3Server
from tests.waiting import wait_until


def test_a_directory(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    result = probe(store)
    assert result.conditional_put
    assert result.findings == ()
    assert result.clock_drift == pytest.approx(0, abs=60)
    assert list(store.list("")) == []


def test_memory() -> None:
    assert probe(MemoryStore()) == ProbeResult(conditional_put=True, clock_drift=0.0)


def test_moto_honours_conditions_and_does_not_check_uploads(moto: S3Server) -> None:
    store = open_store(f"s3://{moto.new_bucket()}/a/b")
    result = probe(store)
    assert result.conditional_put
    assert result.refuses_damage is False
    assert ["damaged uploads" in finding for finding in result.findings] == [True]
    assert result.clock_drift == pytest.approx(0, abs=60)
    assert store.properties.conditional_put is None, "the opener believes it, not the probe"
    assert list(store.list("")) == []
    store.close()


def test_rclone_ignores_conditions_and_checks_uploads(rclone: S3Server) -> None:
    store = open_store(f"s3://{rclone.new_bucket()}/a")
    result = probe(store)
    assert not result.conditional_put
    assert result.refuses_damage is True
    assert ["not honoured" in finding for finding in result.findings] == [True]
    assert list(store.list("")) == []
    store.close()


def test_a_result_is_stored_and_read_again() -> None:
    result = ProbeResult(conditional_put=False, clock_drift=-1.5, findings=("a", "b"))
    assert ProbeResult.model_validate_json(result.model_dump_json()) == result


def test_a_recorded_condition_is_checked_with_one_request(moto: S3Server, rclone: S3Server) -> None:
    for server, honours in [(moto, True), (rclone, False)]:
        store = open_store(f"s3://{server.new_bucket()}", endpoint=server.endpoint)
        store.put("config", b"data")
        for known in (True, False, None):
            store.properties = replace(store.properties, conditional_put=known)
            assert still_conditional(store, "config", b"data") is honours
            assert store.properties.conditional_put is known
        assert store.get("config") == b"data"
        store.close()


# ---- stores with one vice each


class Vicious(StoreWrapper):
    """Remembers what it deleted, to list it; the rest is for the subclasses."""

    def __init__(self) -> None:
        super().__init__(MemoryStore())


class Overwrites(Vicious):
    def create(self, name: str, data: Data) -> bool:
        self.inner.put(name, data)
        return True


class LooksBeforeItWrites(Vicious):
    """Right alone, wrong in a race: only the race finds it out."""

    def __init__(self) -> None:
        super().__init__()
        self.looked: list[str] = []

    def create(self, name: str, data: Data) -> bool:
        if self.inner.size(name) is not None:
            return False
        self.looked.append(name)
        wait_until(lambda: "race" not in name or self.looked.count(name) > 1)
        self.inner.put(name, data)
        return True


class FailsLosers(Vicious):
    def create(self, name: str, data: Data) -> bool:
        if not self.inner.create(name, data) and "race" in name:
            raise Unavailable("HTTP 500 UnknownError")
        return self.inner.get(name) == data


class AltersBytes(Vicious):
    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return b"10000\r\n" + self.inner.get(name, offset=offset, length=length)


class AltersEmpty(Vicious):
    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self.inner.get(name, offset=offset, length=length) or b"\0"


class IgnoresOffsets(Vicious):
    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        return self.inner.get(name, offset=offset // 8192, length=length)


class ListsLate(Vicious):
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(list(self.inner.list(prefix))[1:])


class KeepsTheOld(Vicious):
    def put(self, name: str, data: Data) -> None:
        self.inner.create(name, data)


class SaysItExists(Vicious):
    def create(self, name: str, data: Data) -> bool:
        return self.inner.size(name) is not None and len(data) < 0


class ForgetsBetweenPages(MemoryStore):
    """Begins each page after the first with the second name that follows."""

    def list_in_pages(self, prefix: str, page: int) -> Sequence[str]:
        names = [info.name for info in self.list(prefix)]
        return [name for number, name in enumerate(names) if number < page or number % (page + 1)]

    def list_dirs_in_pages(self, prefix: str, _: int) -> Sequence[str]:
        return list(self.list_dirs(prefix))


class WalksFolders(MemoryStore):
    """Lists in the order of a walk through folders, and goes on after a page's last name as bytes: as s3rver does.

    objects: of the two listings, whether that of objects does
    """

    def __init__(self, *, objects: bool) -> None:
        super().__init__()
        self.objects = objects

    def list_in_pages(self, prefix: str, page: int) -> Sequence[str]:
        names = [info.name for info in self.list(prefix)]
        return walked(names, page) if self.objects else names

    def list_dirs_in_pages(self, prefix: str, page: int) -> Sequence[str]:
        return [name.rstrip("/") for name in walked([f"{name}/" for name in self.list_dirs(prefix)], page)]


def walked(names: Sequence[str], page: int) -> list[str]:
    """What a client gets of these names, page by page."""
    found: list[str] = []
    while True:
        following = [name for name in names if not found or name > found[-1]]
        if not following:
            return sorted(found)
        found += sorted(following, key=lambda name: name.split("/"))[:page]


class NeverDeletes(Vicious):
    def delete(self, name: str) -> None:
        raise Refused("access denied", subject=name)


class DeletesLater(Vicious):
    def delete(self, name: str) -> None:
        assert self.inner.size(name) is not None


class BreaksOnDelete(Vicious):
    def delete(self, name: str) -> None:
        raise Unavailable("broke off", subject=name)


@pytest.mark.parametrize(
    ("vice", "words"),
    [
        (AltersBytes, "not read back as it was written"),
        (AltersEmpty, "not read back as it was written"),
        (IgnoresOffsets, "a range of an object is not what was written"),
        (ListsLate, "not listed at once"),
        (KeepsTheOld, "not read back as it was written"),
        (SaysItExists, "that nobody made is said to exist"),
    ],
)
def test_what_no_repository_can_live_with(vice: type[Vicious], words: str) -> None:
    store = vice()
    with pytest.raises(Unsupported, match=words):
        probe(store)
    assert list(store.inner.list("")) == [] or vice is ListsLate


def test_a_listing_that_loses_names_between_pages() -> None:
    with pytest.raises(Unsupported, match="in pages of 1 misses objects"):
        probe(ForgetsBetweenPages())
    with pytest.raises(Unsupported, match="in pages of 1 misses objects"):
        probe(WalksFolders(objects=True))
    with pytest.raises(Unsupported, match="a listing of folders in pages of 1 misses some"):
        probe(WalksFolders(objects=False))


@pytest.mark.parametrize("vice", [Overwrites, LooksBeforeItWrites])
def test_creates_that_exclude_nobody(vice: type[Vicious]) -> None:
    result = probe(vice())
    assert not result.conditional_put
    assert "not honoured" in result.findings[0]


@pytest.mark.parametrize(
    ("vice", "words"),
    [
        (FailsLosers, "failed instead of losing"),
        (NeverDeletes, "cannot be deleted"),
        (DeletesLater, "still listed"),
        (BreaksOnDelete, "could not be deleted"),
    ],
)
def test_what_the_operator_should_know(vice: type[Vicious], words: str) -> None:
    result = probe(vice())
    assert result.conditional_put
    (finding,) = result.findings
    assert words in finding


@pytest.mark.parametrize("drift", [-4000, 4000])
def test_a_clock_that_is_wrong(drift: int) -> None:
    result = probe(MemoryStore(clock=lambda: time.time() + drift))
    assert result.clock_drift == pytest.approx(drift, abs=60)
    assert abs(drift) > MOST_DRIFT
    assert ("ahead" if drift > 0 else "behind") in result.findings[0]


def test_a_condition_that_was_lost_is_noticed() -> None:
    store: ObjectStore = Overwrites()
    store.put("config", b"data")
    assert not still_conditional(store, "config", b"data")
