"""Data that were compressed in any mode restore exactly, by this program and by the second reader, side by side."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

import snapchain
from snapchain.destinations import open_destination
from snapchain.errors import InvalidInput
from snapchain.model.compression import LEVELS, STEPS, Compression
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import Data
from snapchain.ops.restore.run import Restoration
from snapchain.ops.ship.request import ShipRequest
from snapchain.ops.ship.run import run as ship
from snapchain.repository import layer_writer
from snapchain.repository.layer_writer import CompressionLevel
from snapchain.repository.opening import create_repository
from snapchain.repository.packer import UPLOADS, Packer
from tests.ops.shipping import DISK, MiB
from tests.ops.stacks import Layer, build, flat
from tests.repository.second_reader import Reader
from tests.repository.synthetic import repository
from tests.waiting import HANG

KiB = 1 << 10


def test_every_mode_is_read_back_by_any_reader(tmp_path: Path) -> None:
    """One repository, a mode for each layer of a chain; a program's text, so that the levels differ."""
    create_repository(str(tmp_path / "repo"), passphrase=lambda: None, encryption="none")
    text = b"".join(path.read_bytes() for path in sorted(Path(snapchain.__file__).parent.rglob("*.py")))
    bodies = [tmp_path / f"body{n}" for n in range(4)]
    for number, body in enumerate(bodies):  # other cuts, so that nothing is found in the index
        body.write_bytes(text[number : MiB + number])
    layers = [Layer(8 * MiB, [f"write -s {body} {n + 1}M 1M"]) for n, body in enumerate(bodies)]
    files = build(tmp_path / "c", layers)
    weights = {}
    for mode, file in zip(Compression, files, strict=True):
        place = open_destination(tmp_path / "repo", writing=True, compression=mode)
        weights[mode] = ship(ShipRequest(image=file, disk=DISK), place).bytes_stored
    assert weights[Compression.MAX] < weights[Compression.DEFAULT] < weights[Compression.FAST]
    reader = Reader(tmp_path / "repo")
    for number, file in enumerate(files, 1):
        shown = flat(file, tmp_path / "shown").read_bytes()
        out = tmp_path / f"{number}.raw"
        Restoration(open_destination(tmp_path / "repo"), DISK, out, point=str(number)).run()
        assert out.read_bytes() == shown
        assert reader.restore(DISK, number) == shown


def test_auto_hears_that_the_store_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs wait while no upload ends, and only then."""
    gate, waiting = threading.Event(), threading.Event()
    waits: list[float] = []

    class Slow(MemoryStore):
        def put(self, name: str, data: Data) -> None:
            assert gate.wait(HANG)
            super().put(name, data)

    repo = repository(MemoryStore(), block_size=64 * KiB)
    own = threading.BoundedSemaphore.acquire

    def acquire(self: threading.BoundedSemaphore, *args: object, **more: object) -> bool:
        if self._value == 0:
            waiting.set()
        return own(self, *args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(threading.BoundedSemaphore, "acquire", acquire)
    with Packer(Slow(), repo.keys, repo.index(), pack_size=512 * KiB, on_waited=waits.append) as packer:

        def fill() -> None:
            for number in range(UPLOADS + 3):
                body = bytes([number]) * (400 * KiB)
                packer.add(number.to_bytes(32, "little"), body, len(body))

        filler = threading.Thread(target=fill)
        filler.start()
        assert waiting.wait(HANG)
        assert len(waits) == UPLOADS + 1
        gate.set()
        filler.join()
        packer.flush()
    assert len(waits) > UPLOADS + 1


def test_a_level_follows_what_packs_waited() -> None:
    now = [0.0]
    level = CompressionLevel(Compression.AUTO, clock=lambda: now[0])
    assert level.current() == LEVELS[Compression.FAST]
    for _ in range(2):
        now[0] += 1
        level.note_waited(0.9)
    assert level.current() == STEPS[1]
    now[0] += 1
    level.note_waited(0)
    assert level.current() == STEPS[0]


@pytest.mark.parametrize("mode", [Compression.FAST, Compression.DEFAULT, Compression.MAX])
def test_a_mode_that_was_asked_for_stays(mode: Compression) -> None:
    level = CompressionLevel(mode, clock=lambda: 0.0)
    level.note_waited(9)
    level.note_waited(9)
    assert level.current() == LEVELS[mode]


def test_what_is_asked_for_reaches_the_compressor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Compression] = []

    class Heard(CompressionLevel):
        def __init__(self, mode: Compression) -> None:
            asked.append(mode)
            super().__init__(mode)

    monkeypatch.setattr(layer_writer, "CompressionLevel", Heard)
    create_repository(str(tmp_path / "repo"), passphrase=lambda: None, encryption="none")
    (file,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])
    for given in (None, Compression.AUTO):
        ship(ShipRequest(image=file, disk=DISK), open_destination(tmp_path / "repo", writing=True, compression=given))
        file.touch()
    assert asked[0] is Compression.DEFAULT
    assert asked[-1] in (Compression.AUTO, Compression.DEFAULT)


def test_a_replica_compresses_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="a replica keeps plain files"):
        open_destination(f"dir:{tmp_path}/r", compression=Compression.MAX)
