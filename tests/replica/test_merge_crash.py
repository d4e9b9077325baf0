"""A merge at a replica that dies at any call: every point that is promised reads, and the next comer settles it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest

from snapchain.errors import Corrupt
from snapchain.model.merging import Strategy
from snapchain.ops.log import log
from snapchain.replica import merging
from snapchain.replica.destination import ReplicaDestination
from snapchain.replica.stream.messages import Merge
from snapchain.replica.verification import verify_replica
from tests.memory import scratch
from tests.ops.faulty_calls import End, Fault, met
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, clean, qemu_img, same
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed, endpoint, merged_by

SHM = scratch()
STRATEGIES = {way.value: way for way in (Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT)}


class Scene:
    """Layers of which the lowest two are to be one, and of five the uppermost two; put back as often as needed."""

    def __init__(self, directory: Path, strategy: Strategy, *, count: int) -> None:
        writes = ["write -P 1 0 1M"], ["write -P 2 256k 256k"], ["write -P 3 0 64k"], ["write -P 4 1M 64k"]
        layers = [Layer(2 * MiB, commands) for commands in (*writes, ["write -P 5 1M 4k"])]
        self.chain = build(directory / "c", layers[:count])
        self.kept = [point for point in (2, 3, 5) if point <= count]
        self.pointed = Pointed(Place(directory / "replica"), directory / "shots")
        for path in self.chain:
            self.pointed.send(path)
        self.root, self.pristine = self.pointed.place.root, directory / "pristine"
        shutil.copytree(self.root, self.pristine)
        self.strategy = strategy

    def merge(self) -> None:
        """As the receiver does, without a stream: all its calls are of the files'."""
        with merged_by(self.strategy):
            merging.merge(ASKED, self.root, lambda *_: None)

    def reset(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.pristine, self.root)

    def check(self, where: str) -> None:
        """What is promised, before anybody has settled anything."""
        catalogue = self.pointed.place.catalogue()
        points = {point["point"]: point["layer"] for point in catalogue["points"]}
        assert points.keys() >= {*self.kept}, where
        files = {layer["id"]: self.pointed.place.directory / layer["file"] for layer in catalogue["layers"]}
        for point, layer in points.items():
            assert same(files[layer], self.pointed.shown[point]), f"{where}: point {point}"

    def check_settled(self, where: str, *, swept: bool = True) -> None:
        """All is the catalogue's: nothing is left over, be it merged or not. swept: half-written records neither."""
        files = self.pointed.place.files()
        left = {entry.name for entry in self.pointed.place.directory.iterdir()}
        left -= set() if swept else {name for name in left if ".json.new-" in name}
        assert left == {"catalogue.json", ".lock", *(path.name for path in files)}, where
        assert all(path.stat().st_mode & 0o777 == 0o400 for path in files), where
        found = verify_replica(endpoint(self.root), DISK, share=1.0)
        assert found.ok, (where, found.findings)

    def check_end(self, where: str) -> None:
        self.check_settled(where)
        files = self.pointed.place.files()
        assert [path.name for path in files] == [self.chain[point - 1].name for point in self.kept], where
        assert all(clean(path) for path in files), where


ASKED = Merge(disk=DISK, last=1, labels=(), zone="UTC")


@pytest.fixture
def memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def points_two_three_and_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule of the calendar is so fine."""
    from snapchain.model.retention import Decision
    from snapchain.replica import layer_merge
    from snapchain.replica.catalogue import Point

    def decide(points: list[Point], *_: object, **__: object) -> tuple[Decision[Point], ...]:
        return tuple(Decision(each, each.point in {2, 3, 5}, ("so",)) for each in points)

    monkeypatch.setattr(layer_merge, "decide_by", decide)


def resize_the_tip(files: list[Path]) -> None:
    qemu_img("resize", "-q", "-f", "qcow2", files[-1], "4M")


def put_the_tip_on_nothing(files: list[Path]) -> None:
    qemu_img("rebase", "-u", "-q", "-f", "qcow2", "-b", "", files[-1])


def put_the_tip_on_another_file(files: list[Path]) -> None:
    shutil.copy(files[1], files[1].with_name("other.qcow2"))
    qemu_img("rebase", "-u", "-q", "-f", "qcow2", "-b", "other.qcow2", "-F", "qcow2", files[-1])


@pytest.mark.parametrize(
    "harm",
    [resize_the_tip, put_the_tip_on_nothing, put_the_tip_on_another_file],
    ids=lambda harm: harm.__name__,
)
def test_files_that_are_neither_chain_leave_the_record(harm: Callable[[list[Path]], None], memory: Path) -> None:
    """A merge was killed and then somebody changed files: the record is what explains the damage, and stays."""
    scene = Scene(memory, Strategy.NEW, count=3)
    next(where for where, _ in met(scene.merge, Fault.KILL) if record_of(scene).exists())
    files = scene.pointed.place.files()
    files[-1].chmod(0o644)
    harm(files)
    files[-1].chmod(0o400)
    before, record = scene.pointed.place.catalogue(), record_of(scene).read_bytes()
    for _ in range(2):
        with pytest.raises(Corrupt, match="neither the chain that its catalogue names, nor what a merge") as caught:
            scene.merge()
        assert caught.value.subject == str(scene.pointed.place.directory)
        assert scene.pointed.place.catalogue() == before
        assert record_of(scene).read_bytes() == record


def record_of(scene: Scene) -> Path:
    return scene.pointed.place.directory / ".merging.json"


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("strategy", "fault"),
    [*((way, Fault.KILL) for way in STRATEGIES), ("commit", Fault.TORN), ("absorb", Fault.ENOSPC)],
)
def test_a_fault_at_any_call(strategy: str, fault: Fault, memory: Path) -> None:
    every_fault(Scene(memory, STRATEGIES[strategy], count=3), fault)


@pytest.mark.soak
@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_fault_at_any_call_of_two_merges(strategy: str, fault: Fault, memory: Path) -> None:
    every_fault(Scene(memory, STRATEGIES[strategy], count=5), fault)


def every_fault(scene: Scene, fault: Fault) -> None:
    nobody = endpoint(scene.root)

    def sends() -> None:
        assert scene.pointed.send(scene.chain[-1]).layers_sent == 0

    def looks() -> None:
        assert log(ReplicaDestination(nobody), DISK).disks[0].points

    def verifies() -> None:
        found = verify_replica(nobody, DISK, share=1.0)
        assert found.ok, found.findings

    comers: Iterator[Callable[[], None]] = cycle([sends, looks, verifies, scene.merge])
    count = 0
    for where, end in met(scene.merge, fault, each=6):
        count += 1
        scene.check(where)
        if end is End.FINISHED:
            scene.check_settled(where)
        comer = next(comers)
        comer()
        then = f"{where}, then {comer.__name__}"
        if comer is sends:
            scene.check_settled(then)
        scene.merge()
        scene.check_end(then)
        scene.reset()
    assert count > 5
