"""Each kind of destination keeps the contract: repositories in a directory, in memory and on S3, replicas at dir:."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from snapchain.destination.protocol import Destination
from snapchain.destinations import replica_at
from snapchain.image import scan
from snapchain.objects import open_store
from snapchain.objects.local import LocalStore
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.endpoint import Endpoint
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.repository import Repository
from snapchain.testing.destination_contract import DestinationContract, Site, Traits
from tests.repository.synthetic import again, repository
from tests.servers import S3Server

RECORDS = Traits(one_chain=False, merges=True)
FILES = Traits(one_chain=True, merges=True)


@dataclass(frozen=True)
class RepositorySite:
    """A repository over any store."""

    repository: Repository
    traits: Traits = RECORDS

    @property
    def store(self) -> ObjectStore:
        return self.repository.store

    def open(self, *, writing: bool = False) -> Destination:
        _ = writing
        return RepositoryDestination(again(self.repository))

    def stored(self) -> Sequence[str]:
        return [info.name for info in self.store.list("") if info.size]

    def read(self, name: str) -> bytes:
        return self.store.get(name)

    def write(self, name: str, whole: bytes) -> None:
        self.store.put(name, whole)

    def vital(self, name: str, whole: bytes) -> Sequence[int]:
        _ = name
        return range(len(whole))


@dataclass(frozen=True)
class ReplicaSite:
    """A replica whose directory lies here, however it is reached."""

    root: Path
    endpoint: Endpoint
    traits: Traits = FILES

    def open(self, *, writing: bool = False) -> Destination:
        _ = writing
        return ReplicaDestination(self.endpoint)

    def stored(self) -> Sequence[str]:
        return [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file() and _size(path)]

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, whole: bytes) -> None:
        path = self.root / name
        mode = path.stat().st_mode
        path.chmod(0o644)
        path.write_bytes(whole)
        path.chmod(mode)

    def vital(self, name: str, whole: bytes) -> Sequence[int]:
        # Of a qcow2 file: what its header says of itself and of where things lie, all tables as far as they are used,
        # and what a guest reads. What pads header, tables and the last cluster nobody reads.
        if name.endswith(".json"):
            return range(len(whole))
        with scan(self.root / name, format="qcow2") as chain:
            header, runs = chain.top.header, chain.top.physical
            assert header is not None
            fields, size = header.fields, header.cluster_size
            first = fields.refcount_table_offset
            block = int.from_bytes(whole[first : first + 8])
            l1 = fields.l1_table_offset
            entries = [whole[at : at + 8] for at in range(l1, l1 + 8 * fields.l1_size, 8)]
            l2 = [int.from_bytes(entry) & ((1 << 56) - 512) for entry in entries]
            counts = [*range(8), *range(20, 32), *range(40, 56), *range(first, first + 8), *range(l1, l1 + 8 * len(l2))]
            counts += range(block, block + 2 * (len(whole) // size))
            for table in filter(None, l2):
                counts += range(table, table + 8 * min(size // 8, -(-header.size // size)))
            for host, start, stop in zip(runs.host.tolist(), runs.start.tolist(), runs.ends.tolist(), strict=True):
                counts += range(host, host + stop - start, 511) if host >= 0 else ()
        return counts


def _size(path: Path) -> int:
    return path.stat().st_size


class TestDirectory(DestinationContract):
    @pytest.fixture(scope="class")
    @classmethod
    def sites(cls, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Site]:
        def made() -> Site:
            return RepositorySite(repository(LocalStore(tmp_path_factory.mktemp("repo") / "r", make=True)))

        return made


class TestMemory(DestinationContract):
    @pytest.fixture(scope="class")
    @classmethod
    def sites(cls) -> Callable[[], Site]:
        return lambda: RepositorySite(repository(MemoryStore()), replace(RECORDS, damages=4, every=3))


class TestS3(DestinationContract):
    @pytest.fixture(scope="class")
    @classmethod
    def sites(cls, moto_server: S3Server) -> Iterator[Callable[[], Site]]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in moto_server.environment.items():
                patch.setenv(name, value)
            yield lambda: RepositorySite(
                repository(open_store(f"s3://{moto_server.new_bucket()}/here")),
                replace(RECORDS, damages=2, every=4),
            )


class TestReplica(DestinationContract):
    @pytest.fixture(scope="class")
    @classmethod
    def sites(cls, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Site]:
        roots = (tmp_path_factory.mktemp("replica") / f"{number}" for number in itertools.count())

        def made() -> Site:
            root = next(roots)
            return ReplicaSite(root, replica_at(f"dir:{root}"))

        return made
