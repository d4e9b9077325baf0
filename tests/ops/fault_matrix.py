"""One host of the fault matrix: a process that ships, drops points, collects or restores, over a store that fails.

    python -m tests.ops.fault_matrix ROLE NUMBER PLACE URL

ROLE is writer, collector or reader.  What is known of the points is in PLACE: `ledger/` has a file for each writer, in
which a line is written (and synced) after a point was reported, and before points are dropped.  Each call of the store
may fail, lose its reply, take long or give other bytes than are stored; sometimes most calls fail for a while; and
sometimes the process dies.  Leases end after seconds, so that a process that the supervisor stops is taken for dead.

`tests/ops/test_fault_matrix.py` is the supervisor.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest

from snapchain.errors import Busy, Conflict, Corrupt, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.model.retention import Policy
from snapchain.objects.store import Data, ObjectInfo, ObjectStore, StoreWrapper
from snapchain.repository import collecting, leases, repository as repositories
from snapchain.repository.opening import open_repository
from snapchain.repository.points_merge import RepositoryMerge
from snapchain.repository.repository import Repository
from tests.ops.large_indexes import as_if_large
from tests.ops.shipping import restore, ship
from tests.repository.synthetic import again

PASSPHRASE = "the passphrase of the fault matrix"
SIZE = 48 << 20
DEAD_SECONDS = 20.0
DIED = 66
"""Exit status of a process that died as planned."""
FAULTS = {"fails": 0.002, "loses its reply": 0.002, "takes long": 0.01, "gives other bytes": 0.0005, "dies": 0.0004}
STORM_SECONDS, STORM_EACH = 2.0, 25.0
REPEATS = 3
Result = TypeVar("Result")


class Failing(StoreWrapper):
    """A store whose calls fail by chance. counts: how often what happened."""

    def __init__(self, inner: ObjectStore, draw: random.Random, counts: Counter[str]) -> None:
        super().__init__(inner)
        self._draw, self._counts = draw, counts

    def _happens(self, fault: str) -> bool:
        happens = self._draw.random() < FAULTS[fault]
        if happens:
            self._counts[fault] += 1
        return happens

    def _call(self, effect: Callable[[], Result], name: str, *, changes: bool = False) -> Result:
        """A call; one that changes nothing is repeated as a client of S3 repeats it."""
        for _ in range(0 if changes else REPEATS):
            with suppress(Unavailable):
                return self._called(effect, name)
            time.sleep(self._draw.uniform(0, 0.2))
        return self._called(effect, name, changes=changes)

    def _called(self, effect: Callable[[], Result], name: str, *, changes: bool = False) -> Result:
        storm = time.monotonic() % STORM_EACH < STORM_SECONDS and self._draw.random() < 0.5
        if storm or self._happens("fails"):
            self._counts["storm"] += storm
            raise Unavailable("injected: 503", subject=name)
        if self._happens("takes long"):
            time.sleep(self._draw.uniform(0, 0.5))
        if self._happens("dies"):
            self._say()
            if self._draw.random() < 0.5:
                effect()
            os._exit(DIED)
        result = effect()
        if changes and self._happens("loses its reply"):
            raise Unavailable("injected: the reply was lost", subject=name)
        return result

    def _say(self) -> None:
        print(json.dumps({"counts": self._counts}), flush=True)

    def put(self, name: str, data: Data) -> None:
        self._call(lambda: self.inner.put(name, data), name, changes=True)

    def create(self, name: str, data: Data) -> bool:
        return self._call(lambda: self.inner.create(name, data), name, changes=True)

    def get(self, name: str, *, offset: int = 0, length: int | None = None) -> bytes:
        body = self._call(lambda: self.inner.get(name, offset=offset, length=length), name)
        if body and self._happens("gives other bytes"):
            at = self._draw.randrange(len(body))
            body = body[:at] if self._draw.random() < 0.5 else body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        return body

    def size(self, name: str) -> int | None:
        return self._call(lambda: self.inner.size(name), name)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._call(lambda: list(self.inner.list(prefix)), prefix))

    def list_dirs(self, prefix: str) -> Iterator[str]:
        return iter(self._call(lambda: list(self.inner.list_dirs(prefix)), prefix))

    def delete(self, name: str) -> None:
        self._call(lambda: self.inner.delete(name), name, changes=True)


class Host:
    """One process."""

    def __init__(self, number: int, place: Path, repository: Repository) -> None:
        self.draw = random.Random(os.getpid())
        self.counts: Counter[str] = Counter()
        self.number, self.place, self._repository = number, place, repository

    def repository(self) -> Repository:
        """Opened afresh, over a store that fails."""
        store = Failing(self._repository.store, self.draw, self.counts)
        return again(self._repository, store)

    def run(self, work: Callable[[], None]) -> None:
        """Work for ever; what may end a piece of work is counted, and everything else ends the process."""
        while True:
            try:
                work()
            except (Busy, Conflict, Unavailable) as error:
                self.counts[type(error).__name__] += 1
                time.sleep(self.draw.uniform(0, 0.5))
            except (Corrupt, Unsupported) as error:
                self.counts[type(error).__name__] += 1  # some byte was given wrong, and was seen to be wrong
            print(json.dumps({"counts": self.counts}), flush=True)
            self.counts.clear()

    # --- Writers.

    @property
    def disk(self) -> str:
        return f"host{self.number}/vda"

    def note(self, line: Mapping[str, object]) -> None:
        """Write a line to this host's ledger, for good."""
        with (self.place / "ledger" / str(self.number)).open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def writes(self) -> None:
        """Change the image, ship it; now and then drop all points but the newest six."""
        image = self.place / f"disk{self.number}.qcow2"
        if not image.exists():
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE)], check=True)
        commands = [
            f"write -P {self.draw.randrange(1, 255)} {self.draw.randrange((SIZE >> 16) - 3) << 16} {length}"
            for length in self.draw.choices([4096, 65536, 65536, 262144], k=self.draw.randrange(1, 12))
        ]
        fresh = self.place / f"noise{self.number}"
        fresh.write_bytes(self.draw.randbytes(1 << 20))
        commands.append(f"write -s {fresh} {self.draw.randrange((SIZE >> 20) - 1) << 20} 1M")
        flags = [word for command in commands for word in ("-c", command)]
        subprocess.run(["qemu-io", "-f", "qcow2", *flags, image], check=True, stdout=subprocess.DEVNULL)
        content = digest_of(image, "qcow2", self.place / f"flat{self.number}.raw")
        report = ship(image, self.repository(), disk=self.disk, store=self.repository().store)
        assert report.point is not None
        self.note({"disk": self.disk, "point": report.point, "content": content})
        self.counts["points reported"] += 1
        if self.draw.random() < 0.2:
            self.drops()

    def drops(self) -> None:
        repository = self.repository()
        try:
            work = RepositoryMerge(repository, self.disk, Policy(last=6))
        except NotFound:
            return
        going = [each.point for each in work.plan().points if not each.kept]
        self.note({"disk": self.disk, "dropped": going})
        work.run()
        self.counts["points dropped"] += len(going)

    # --- Others.

    def collects(self) -> None:
        report = collecting.run(self.repository())
        self.counts["collections"] += 1
        self.counts["bytes freed"] += report.bytes_freed
        self.counts["bytes moved"] += report.bytes_moved
        self.counts["collections that left something for later"] += report.bytes_left > 0
        for finding in report.findings:
            self.counts[f"finding of gc: {finding.kind}"] += 1
        time.sleep(self.draw.uniform(0, 1))

    def reads(self) -> None:
        points, dropped = ledger(self.place)
        if not points:
            time.sleep(0.5)
            return
        disk, point = self.draw.choice(sorted(points.keys() - dropped) or sorted(points))
        out = self.place / f"restored{self.number}.raw"
        try:
            restore(self.repository(), out, point, disk=disk, force=True)
        except NotFound:
            if (disk, point) not in ledger(self.place)[1] | dropped:
                print(json.dumps({"lost": [disk, point]}), flush=True)
                raise
            return
        if hashlib.sha256(out.read_bytes()).hexdigest() not in points[disk, point]:
            print(json.dumps({"wrong": [disk, point]}), flush=True)
            raise AssertionError("wrong bytes were restored, without an error")
        self.counts["restores"] += 1


def ledger(place: Path) -> tuple[dict[tuple[str, int], set[str]], set[tuple[str, int]]]:
    """(what each reported point shows, points that somebody was told to drop)."""
    points: dict[tuple[str, int], set[str]] = {}
    dropped: set[tuple[str, int]] = set()
    for file in (place / "ledger").iterdir():
        for text in file.read_text().splitlines():
            line = json.loads(text)
            if "dropped" in line:
                dropped.update((line["disk"], point) for point in line["dropped"])
            else:
                points.setdefault((line["disk"], line["point"]), set()).add(line["content"])
    return points, dropped


def digest_of(image: Path, image_format: str, flat: Path) -> str:
    """SHA-256 of what an image shows, by stock qemu-img."""
    subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", image, flat], check=True)
    return hashlib.sha256(flat.read_bytes()).hexdigest()


def main(role: str, number: str, place: str, url: str) -> None:
    """Be one host."""
    leases.DEAD_SECONDS, leases.REFRESH_SECONDS = DEAD_SECONDS, 2.0
    repositories.PATIENCE = repositories.READERS_PATIENCE = 5.0
    collecting.PATIENCE = 3.0
    if int(number) % 2:
        as_if_large(pytest.MonkeyPatch())
    while True:
        try:
            opened = open_repository(url, passphrase=lambda: PASSPHRASE, writing=True)
            break
        except SnapchainError as error:
            print(error, file=sys.stderr)
            time.sleep(1)
    host = Host(int(number), Path(place), opened)
    host.run({"writer": host.writes, "collector": host.collects, "reader": host.reads}[role])


if __name__ == "__main__":
    main(*sys.argv[1:])
