"""Files that a night finds and must not take for disks; disks that are another host's; notes that repeat."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from snapchain.model.events import Event, Notice
from snapchain.ops.migrate.run import MigrateRequest, Move, migrate
from snapchain.ops.nightly.report import NightlyReport, Outcome
from snapchain.ops.restore.run import Restoration
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.repository.destination import RepositoryDestination
from snapchain.source import at_rest as source, sealing as snapshot
from tests.ops.nightly.night import Host, row
from tests.ops.stacks import write
from tests.replica.conftest import Place

OFF = '[[disks]]\nglob = "images/vda.qcow2"\nsnapshot = false\n'


@pytest.fixture
def host(tmp_path: Path) -> Host:
    made = Host(tmp_path)
    made.repository()
    return made


def restored_alone(host: Host, image: Path, *, by_a_night: bool) -> list[Path]:
    """A disk that is sealed and shipped, and whose top is then restored without its chain: the layers that are left."""
    for number in range(2):
        write(image, f"write -P {number + 50} 1M 64k")
        if by_a_night:
            assert host.run("").outcome is Outcome.OK
        else:
            snapshot.run(snapshot.plan(image))
    if not by_a_night:
        host.run(OFF)
    Restoration(RepositoryDestination(host.repository()), image.stem, image, force=True).run()
    return [image.with_name(f"{image.stem}.{number}.qcow2") for number in (1, 2)]


@pytest.mark.parametrize("by_a_night", [True, False], ids=["sealed by nights", "sealed by hand"])
@pytest.mark.parametrize("noted", [True, False], ids=["noted", "notes lost"])
def test_layers_that_nothing_stands_on_are_no_disks(host: Host, by_a_night: bool, noted: bool) -> None:
    """Neither in the next night nor in those after it, which have seen the new top alone."""
    image = host.disk("vda")
    left = restored_alone(host, image, by_a_night=by_a_night)
    assert all(path.exists() for path in left)
    if not noted:
        for note in host.images.glob(".snapchain-layer-*"):
            note.unlink()
    before = {path: path.read_bytes() for path in left}
    for _ in range(3):
        report = host.run("")
        assert [disk.disk for disk in report.disks] == ["vda"]
        assert report.outcome is Outcome.OK
    assert set(left) <= set(report.layers_left_out)
    assert left[-1] in report.leftovers
    assert {path: path.read_bytes() for path in left} == before
    assert [catalogue.disk for catalogue in host.repository().catalogues()] == ["vda"]


def test_what_only_looks_like_a_layer_is_a_disk(host: Host) -> None:
    """Sealed once, but written to since; renamed to be the disk; numbered, but newer than the plain name."""
    written, rolled_back = host.disk("a"), host.disk("b")
    for image in (written, rolled_back):
        snapshot.run(snapshot.plan(image))
        image.unlink()
    write(written.with_name("a.1.qcow2"), "write -P 9 0 64k")
    rolled_back.with_name("b.1.qcow2").rename(rolled_back)
    old = host.disk("c")
    host.disk("c.2")
    os.utime(old, (1_000_000_000, 1_000_000_000))
    report = host.run("")
    assert sorted(disk.disk for disk in report.disks) == ["a.1", "b", "c", "c.2"]
    assert (report.outcome, report.leftovers) == (Outcome.OK, ())


def test_nothing_is_said_of_layers_in_use(host: Host) -> None:
    image = host.disk("vda")
    snapshot.run(snapshot.plan(image))
    report = host.run("")
    assert (report.leftovers, report.layers_left_out) == ((), (image.with_name("vda.1.qcow2"),))


def test_a_disk_that_was_given_away_is_moved(host: Host, tmp_path: Path) -> None:
    """No failure, night after night; what became of it is said, and the other disks have their turn."""
    image, other = host.disk("vda"), host.disk("vdb")
    host.run("")
    replica = DirectoryEndpoint(Place(tmp_path / "replica").root)
    migrate(MigrateRequest(moves=[Move(image, "web1/vda")]), replica)
    for number in range(2):
        write(other, f"write -P {number + 77} 2M 64k")
        report = host.run("")
        found = row(report, "vda")
        assert (found.outcome, found.moved_to) == (Outcome.MOVED, f"{replica.url}::web1/vda")
        assert (found.faults, found.left, found.snapshot) == ((), (), "none")
        assert [each.outcome for each in found.destinations] == [Outcome.MOVED]
        assert (row(report, "vdb").outcome, row(report, "vdb").snapshot) == (Outcome.OK, "made")
        assert report.complete
        assert report.counts[Outcome.MOVED] == 1
    assert host.metric("disk_success", disk="vda") == 1
    assert host.metric("disks", outcome="moved") == 1


def test_notes_that_repeat_are_said_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A filesystem without locks is told of once a run: not for each file, step and disk."""
    for module in (source, snapshot):
        true = module.ImageLock

        class Unlocked(true):  # type: ignore[misc,valid-type]
            def __init__(self, *arguments: object, **named: object) -> None:
                super().__init__(*arguments, **named)
                self.enforced = False

        monkeypatch.setattr(module, "ImageLock", Unlocked)

    def night() -> tuple[NightlyReport, list[str]]:
        said: list[str] = []

        def heard(event: Event) -> None:
            if isinstance(event, Notice):
                said.append(event.message)

        return host.run("", on_event=heard), said

    for name in ("a", "b", "c"):
        host.disk(name)
    for number in range(2):
        for name in ("a", "b", "c"):
            write(host.images / f"{name}.qcow2", f"write -P {number + 3} 1M 64k")
        report, said = night()
        assert report.outcome is Outcome.OK
        assert len([words for words in said if "has no locks" in words]) == 1
