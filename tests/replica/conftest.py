"""Chains on one side, a replica on the other, and bytes in between that a test may hold up, bend or cut."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import SnapchainError
from snapchain.host.channel import Channel
from snapchain.ops.ship.run import ShipReport, ShipRequest
from snapchain.replica.endpoint import DirectoryEndpoint, Endpoint
from snapchain.replica.receiver import receive
from tests.ops.stacks import clean, same
from tests.replica.sending import send_to_replica
from tests.waiting import HANG

DISK = "web1/vda"


def send(image: Path, endpoint: Endpoint, disk: str = DISK, **options: Any) -> ShipReport:
    return send_to_replica(ShipRequest(image=image, disk=disk, **options), endpoint)


@dataclass(frozen=True)
class Place:
    """A replica in a directory."""

    root: Path

    def send(self, image: Path, **options: Any) -> ShipReport:
        return send(image, DirectoryEndpoint(self.root), **options)

    @property
    def directory(self) -> Path:
        return self.root / "web1%2Fvda"

    def catalogue(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.directory / "catalogue.json").read_text())
        found.pop("check", None)  # of the file, not of what it says
        return found

    def files(self) -> list[Path]:
        """Root first."""
        return [self.directory / layer["file"] for layer in self.catalogue()["layers"]]

    def check(self, shown: Path) -> None:
        """The tip shows that; every file is clean, read-only, and nothing is left over."""
        files = self.files()
        assert same(files[-1], shown)
        for file in files:
            assert clean(file), file
            assert file.stat().st_mode & 0o777 == 0o400
        left = {entry.name for entry in self.directory.iterdir()}
        assert left == {"catalogue.json", ".lock", *(file.name for file in files)}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "replica")


Bend = Callable[[int, bytes], bytes | None]
"""(place in the stream, bytes) -> what goes on in their place; None cuts the line."""


class BentEndpoint:
    """A replica here behind two lines, each of which a test may bend."""

    def __init__(self, place: Place, *, there: Bend | None = None, back: Bend | None = None) -> None:
        from snapchain.replica.stream.compression import Link

        self.url, self.link, self.replica, self.directory = "bent", Link.NETWORK, None, None
        self._place, self._there, self._back = place, there or _straight, back or _straight
        self.error: BaseException | None = None

    @contextmanager
    def connect(self) -> Iterator[Channel]:
        pipes = [os.pipe() for _ in range(4)]
        (a_read, a_write), (b_read, b_write), (c_read, c_write), (d_read, d_write) = pipes
        ours = Channel(d_read, a_write, peer="the replica", patience=HANG)
        theirs = Channel(b_read, c_write, peer="the sender", patience=HANG)

        def serve() -> None:
            with theirs:
                try:
                    receive(theirs, self._place.root)
                except SnapchainError as error:
                    self.error = error

        threads = [
            threading.Thread(target=serve),
            threading.Thread(target=_pump, args=(a_read, b_write, self._there)),
            threading.Thread(target=_pump, args=(c_read, d_write, self._back)),
        ]
        for thread in threads:
            thread.start()
        try:
            with ours:
                yield ours
        finally:
            for thread in threads:
                thread.join(HANG)
                assert not thread.is_alive()


def _straight(_at: int, data: bytes) -> bytes:
    return data


def _pump(source: int, target: int, bend: Bend) -> None:
    at = 0
    try:
        while data := os.read(source, 4096):
            bent = bend(at, data)
            at += len(data)
            if bent is None:
                break
            while bent:
                bent = bent[os.write(target, bent) :]
    except OSError:
        pass
    finally:
        os.close(source)
        os.close(target)
