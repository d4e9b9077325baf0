"""Forgetting points of a replica, the newest too: what stays reads as before, and a crash leaves no file behind."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from snapchain.destination.records import PointsMergeReport
from snapchain.errors import Busy, Conflict, InvalidInput, Unsupported
from snapchain.host.locks import ImageLock, LockMode
from snapchain.model.retention import DropPoints
from snapchain.replica import layer_cut, merging
from snapchain.replica.permissions import Permissions
from snapchain.replica.points_merge import ReplicaMerge
from snapchain.replica.store import ReplicaDisk
from snapchain.replica.stream import session
from snapchain.replica.stream.frames import Kind
from snapchain.replica.stream.messages import Merge
from snapchain.replica.stream.requests import Feature, Right
from snapchain.replica.verification import verify_replica
from tests.memory import scratch
from tests.ops.faulty_calls import End, Fault, met
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, clean, qemu_img, same
from tests.replica.conftest import DISK, Place
from tests.replica.merging import Pointed, endpoint

SHM = scratch()


class Scene:
    """Five points of one chain, put back as often as needed."""

    def __init__(self, directory: Path) -> None:
        layers = [Layer(2 * MiB, [f"write -P {n + 1} {n * 256}k 512k"]) for n in range(5)]
        self.chain = build(directory / "c", layers)
        self.pointed = Pointed(Place(directory / "replica"), directory / "shots")
        for path in self.chain:
            self.pointed.send(path)
        self.root, self.pristine = self.pointed.place.root, directory / "pristine"
        shutil.copytree(self.root, self.pristine)

    @property
    def place(self) -> Place:
        return self.pointed.place

    def reset(self) -> None:
        shutil.rmtree(self.root)
        shutil.copytree(self.pristine, self.root)

    def forget(self, *numbers: int) -> PointsMergeReport:
        return self.work(*numbers).run()

    def work(self, *numbers: int) -> ReplicaMerge:
        return ReplicaMerge(endpoint(self.root), DISK, DropPoints(frozenset(numbers), newest=True), zone="UTC")

    def check(self, where: str = "") -> set[int]:
        """Every point reads as before; their numbers."""
        catalogue = self.place.catalogue()
        files = {layer["id"]: self.place.directory / layer["file"] for layer in catalogue["layers"]}
        for point in catalogue["points"]:
            shown = self.pointed.shown[point["point"]]
            assert same(files[point["layer"]], shown), f"{where}: point {point['point']}"
        return {point["point"] for point in catalogue["points"]}

    def check_settled(self, where: str = "") -> None:
        """Nothing is there but what the catalogue names."""
        files = self.place.files()
        left = {entry.name for entry in self.place.directory.iterdir()}
        assert left == {"catalogue.json", ".lock", *(path.name for path in files)}, where
        assert all(clean(path) for path in files), where
        found = verify_replica(endpoint(self.root), DISK, share=1.0)
        assert found.ok, (where, found.findings)


@pytest.fixture(scope="module")
def made() -> Iterator[Scene]:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        yield Scene(Path(name))


@pytest.fixture
def scene(made: Scene) -> Scene:
    made.reset()
    return made


@pytest.mark.parametrize("seed", range(4))
def test_points_that_stay_read_as_before(scene: Scene, seed: int) -> None:
    draw = random.Random(seed)
    left = {1, 2, 3, 4, 5}
    while left:
        gone = set(draw.sample(sorted(left), draw.randint(1, len(left)))) | ({max(left)} if seed % 2 else set())
        plan = scene.work(*gone).plan()
        report = scene.forget(*gone)
        left -= gone
        assert scene.check() == left == {*report.points_kept}
        assert (report.layers_after, report.layers_before) == (plan.layers_after, plan.layers_before)
        # Layers that no point gives have become one with the next one above.
        assert report.layers_after == len(left) == len(scene.place.files())
        scene.check_settled()
    assert scene.place.catalogue()["next_point"] == 6
    assert scene.place.catalogue()["epoch"] == 1
    assert scene.pointed.send(scene.chain[-1]).point == 6
    scene.check_settled()


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("gone", "fault"), [({5}, Fault.KILL), ({1, 2, 3, 4, 5}, Fault.KILL), ({1, 2, 3, 4, 5}, Fault.EIO)]
)
def test_a_fault_at_any_call(scene: Scene, gone: set[int], fault: Fault) -> None:
    asked = Merge(disk=DISK, labels=(), zone="UTC", drop=tuple(sorted(gone)), newest=True)
    kept = {1, 2, 3, 4, 5} - gone
    count = 0
    for where, end in met(lambda: merging.merge(asked, scene.root, lambda *_: None), fault, each=5):
        count += 1
        there = scene.check(where)
        assert there in ({1, 2, 3, 4, 5}, kept), where
        if end is End.FINISHED:
            assert there == kept
        if count % 2:
            scene.forget(*gone)  # the next one settles what was begun
        else:
            scene.pointed.send(scene.chain[-1])  # and so does a shipment
            shown = scene.check(where)
            assert kept < shown
            scene.forget(*gone, *(shown - kept))
        assert scene.check(where) == kept, where
        scene.check_settled(where)
        scene.reset()
    assert count >= 3


def test_a_killed_cut_leaves_files_that_are_in_use(scene: Scene) -> None:
    """Somebody put an image on a file that no catalogue names any more: it stays, and goes with the next run."""
    place, files = scene.place, scene.place.files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_cut, "remove", _killed)
        with pytest.raises(KeyboardInterrupt):
            merging.merge(_asked(5), scene.root, lambda *_: None)
    assert scene.check() == {1, 2, 3, 4}
    clone = place.directory / "clone.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", files[-1].name, "-F", "qcow2", clone)
    scene.forget(1)
    assert files[-1].exists()
    clone.unlink()
    scene.forget(2)
    scene.check_settled()


def _killed(_: Path) -> None:
    raise KeyboardInterrupt


def _asked(*numbers: int) -> Merge:
    return Merge(disk=DISK, labels=(), zone="UTC", drop=numbers, newest=True)


def test_what_is_in_use_is_not_forgotten(scene: Scene) -> None:
    before, top = scene.place.catalogue(), scene.place.files()[-1]
    clone = scene.place.directory / "clone.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", top.name, "-F", "qcow2", clone)
    for act in ("plan", "run"):
        with pytest.raises(Conflict, match="cannot be removed"):
            getattr(scene.work(1, 5), act)()
    clone.unlink()
    lock = ImageLock(top, LockMode.READ)
    for act in ("plan", "run"):
        with pytest.raises(Busy, match=r"in use|open"):
            getattr(scene.work(1, 5), act)()
    lock.release()
    assert scene.place.catalogue() == before, "the other point has not gone either"
    scene.forget(1, 5)
    assert scene.check() == {2, 3, 4}


def test_a_transfer_that_was_cut_off_goes_with_the_layer_below_it(scene: Scene) -> None:
    """Layers above the newest point stay for the transfer to go on, unless the newest point goes."""
    disk = ReplicaDisk(scene.root, DISK)
    catalogue = disk.read()
    assert catalogue is not None
    disk.write(catalogue.after(points=catalogue.points[:3]))
    assert scene.forget(1).layers_after == 4
    assert scene.check() == {2, 3}
    assert scene.forget(3).layers_after == 1
    assert scene.check() == {2}
    scene.check_settled()


def test_an_older_server_is_not_asked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "FEATURES", tuple(each for each in session.FEATURES if each != Feature.DROP_NEWEST))
    with pytest.raises(Unsupported, match="drop-newest"):
        scene.forget(5)
    assert scene.check() == {1, 2, 3, 4, 5}


def test_the_newest_point_goes_only_by_the_right_to_cut() -> None:
    merges = Permissions(frozenset({Right.MERGE}))
    plain = Merge(disk=DISK, labels=(), zone="UTC", drop=(1,))
    merges.check(Kind.MERGE, plain, subject="a peer")
    with pytest.raises(InvalidInput, match="lacks the right 'cut'"):
        merges.check(Kind.MERGE, _asked(5), subject="a peer")
    Permissions(frozenset({Right.MERGE, Right.CUT})).check(Kind.MERGE, _asked(5), subject="a peer")
    with pytest.raises(InvalidInput, match="lacks the right 'merge'"):
        Permissions(frozenset({Right.CUT})).check(Kind.MERGE, _asked(5), subject="a peer")
