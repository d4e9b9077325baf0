"""The record of what clients read first: by both readers; damage, and what else lies there; a disk's new name."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.errors import Corrupt
from snapchain.model.first_reads import MOST_LEAVES, FirstReads
from snapchain.objects.memory import MemoryStore
from snapchain.repository import first_reads as module
from snapchain.repository.collecting import run as collect
from snapchain.repository.crypto import NONE
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.envelope import seal
from snapchain.repository.first_reads import StoredFirstReads
from snapchain.repository.format import first_reads_name
from snapchain.repository.renaming import renaming
from snapchain.repository.repository import Repository
from snapchain.repository.verification import verify
from tests.ops.shipping import DISK, ship as ship_stack
from tests.ops.stacks import Layer, build
from tests.repository.synthetic import again, repository

READS: FirstReads = ((7, 2), (1, 1), (90, MOST_LEAVES - 3))


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    """One point."""
    made = repository(MemoryStore(), suite=NONE)
    ship_stack(build(tmp_path / "c", [Layer(1 << 20, ["write -P 1 0 128k"])])[-1], made, each_layer=True)
    return made


def record(repo: Repository, disk: str = DISK) -> StoredFirstReads:
    return StoredFirstReads(repo.store, repo.keys, disk)


def test_a_point_gives_back_what_was_noted_of_another_one_of_its_disk(repo: Repository) -> None:
    with RepositoryDestination(again(repo)).whole(DISK, "1") as disk:
        assert disk.first_reads() == ()
        disk.note_first_reads(READS)
        disk.note_first_reads(READS[:2])
    with RepositoryDestination(again(repo)).whole(DISK) as disk:
        assert disk.first_reads() == READS[:2]


def test_gc_and_verify_leave_it_alone(repo: Repository) -> None:
    record(repo).write(READS)
    before = repo.store.get(first_reads_name(repo.keys.disk_key(DISK)))
    assert verify(again(repo), share=1.0).ok
    collect(again(repo))
    assert repo.store.get(first_reads_name(repo.keys.disk_key(DISK))) == before
    assert record(repo).read() == READS


def test_a_new_name_takes_it_along(repo: Repository) -> None:
    record(repo).write(READS)
    renaming(again(repo), DISK, "www/vda").run()
    assert record(repo, "www/vda").read() == READS
    assert record(repo).read() == ()


@pytest.mark.parametrize(
    "body",
    [
        b"x",
        b"\0" * 16,
        b"\1" * 16,
        (1 << 41).to_bytes(8, "little") + b"\1" + bytes(7),
        (bytes(8) + b"\2" + bytes(7)) * 4000,
    ],
    ids=["no rows", "no leaves", "too many leaves", "beyond any disk", "too many in all"],
)
def test_nonsense_is_damage(body: bytes) -> None:
    repo = repository()
    name = first_reads_name(repo.keys.disk_key(DISK))
    repo.store.put(name, seal(repo.keys, module.KIND, name, body))
    with pytest.raises(Corrupt, match="the record of first reads is unsound"):
        record(repo).read()


def test_an_altered_or_moved_record_is_damage() -> None:
    repo = repository()
    record(repo).write(READS)
    name = first_reads_name(repo.keys.disk_key(DISK))
    data = repo.store.get(name)
    repo.store.put(first_reads_name(repo.keys.disk_key("other")), data)
    repo.store.put(name, data[:-1] + bytes([data[-1] ^ 1]))
    for disk in (DISK, "other"):
        with pytest.raises(Corrupt, match="altered"):
            record(repo, disk).read()
    repo.store.put(name, b"")
    with pytest.raises(Corrupt, match="not the snapchain object"):
        record(repo).read()
