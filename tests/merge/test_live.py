"""Live merges by block jobs, with a real QEMU: what the guest reads, what stays, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, NotFound, Unsupported
from snapchain.guest.protocol import Guest, JobKind
from snapchain.image import ImageFile
from snapchain.merge import live_run
from snapchain.merge.live import LiveMergePlan, plan
from snapchain.merge.live_run import run
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import MergeReport
from snapchain.model.merging import Strategy
from snapchain.model.retention import Policy
from snapchain.source.lineage import seal
from snapchain.source.notes import Notes
from tests.guest.live_chain import MIB, Chain, K, fill, layer, links, names, patterns_hold, running, same, sound, tool
from tests.guest.machine import Machine


def wanted(chain: Chain, first: int | None = None, last: int | None = None, **more: object) -> MergeRequest:
    """A request for files `first` to `last` of a chain, or for all above the root."""
    return MergeRequest(
        image=chain.active,
        from_layer=None if first is None else str(chain.files[first]),
        to_layer=None if last is None else str(chain.files[last]),
        **more,  # type: ignore[arg-type]
    )


def merged(guest: Guest, request: MergeRequest, disk: str = "vda") -> tuple[LiveMergePlan, MergeReport]:
    planned = plan(guest, disk, request)
    return planned, run(guest, planned)


def leftovers(folder: Path) -> list[str]:
    """Journals that lie in a folder."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".snapchain-merge-")]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path / "images")


def test_a_commit_of_sealed_layers(tmp_path: Path, chain: Chain) -> None:
    with running(tmp_path / "m", chain) as (machine, guest):
        machine.write("vda", 3 * MIB, 64 * K, 77)
        planned, report = merged(guest, wanted(chain, 1, 3, strategy=Strategy.COMMIT))
        assert planned.jobs == (JobKind.COMMIT,)
        assert (report.layers_before, report.layers_after) == (5, 3)
        assert report.strategy == "commit"
        assert report.result == chain.files[1]
        assert set(report.removed) == {chain.files[2], chain.files[3]}
        assert report.bytes_freed > 0
        assert names(chain.active) == ["0.qcow2", "1.qcow2", "4.qcow2"]
        # Relative, so that a moved directory opens.
        assert links(chain.active) == [None, "0.qcow2", "1.qcow2"]
        assert patterns_hold(machine, chain)
        assert machine.reads("vda", 3 * MIB, 64 * K, 77)
        assert not leftovers(chain.folder)
        chain.check_view(chain.files[1], "3.qcow2")
        chain.check_view(chain.files[0], "0.qcow2")
        machine.quit()
    sound(chain.active)
    moved = chain.folder.rename(tmp_path / "moved")
    assert names(moved / "4.qcow2") == ["0.qcow2", "1.qcow2", "4.qcow2"]


def test_a_stream_of_sealed_layers(tmp_path: Path, chain: Chain) -> None:
    with running(tmp_path / "m", chain) as (machine, guest):
        planned, report = merged(guest, wanted(chain, 1, 3, strategy=Strategy.ABSORB))
        assert planned.jobs == (JobKind.STREAM,)
        assert report.result == chain.files[3]
        assert set(report.removed) == {chain.files[1], chain.files[2]}
        assert links(chain.active) == [None, "0.qcow2", "3.qcow2"]
        assert patterns_hold(machine, chain)
        chain.check_view(chain.files[3], "3.qcow2")
        assert not leftovers(chain.folder)
        machine.quit()
    chain.check_view(chain.active, "4.qcow2")
    sound(chain.active)


def test_everything_above_the_root_goes_into_the_active_layer(tmp_path: Path, chain: Chain) -> None:
    """Whoever starts a guest of a bare QEMU again knows the path of its active layer: it stays."""
    with running(tmp_path / "m", chain) as (machine, guest):
        planned, report = merged(guest, wanted(chain))
        assert planned.jobs == (JobKind.STREAM,)
        assert names(chain.active) == ["0.qcow2", "4.qcow2"]
        assert report.result == chain.active
        assert patterns_hold(machine, chain)
        machine.quit()
    chain.check_view(chain.active, "4.qcow2")
    sound(chain.active)


def test_the_image_of_the_command_line_goes_as_well(tmp_path: Path, chain: Chain) -> None:
    """QEMU keeps a file open that it was given under a node name, after the file has left the chain, too."""
    new = layer(tmp_path / "images" / "5.qcow2", chain.active, chain.size)
    with running(tmp_path / "m", chain) as (machine, guest):
        node = {"driver": "qcow2", "node-name": "new", "backing": None}
        machine.ask("blockdev-add", **node, file={"driver": "file", "filename": str(new)})
        machine.ask("blockdev-snapshot", node="vda-top", overlay="new")
        planned, report = merged(guest, MergeRequest(image=new, flatten=True))
        assert planned.jobs == (JobKind.STREAM,)
        assert set(report.removed) == set(chain.files)
        opened = {str(each.readlink()) for each in Path(f"/proc/{machine.process.pid}/fd").iterdir()}
        assert not [each for each in opened if each.startswith(str(chain.folder)) and each != str(new)]
        assert not leftovers(chain.folder)
        assert patterns_hold(machine, chain)


def test_an_active_commit_pivots(tmp_path: Path, chain: Chain) -> None:
    with running(tmp_path / "m", chain) as (machine, guest):
        planned, report = merged(guest, wanted(chain, strategy=Strategy.COMMIT))
        assert planned.jobs == (JobKind.ACTIVE_COMMIT,)
        assert any("1.qcow2" in notice for notice in planned.notices)
        assert report.image == chain.files[1]
        assert set(report.removed) == set(chain.files[2:])
        assert patterns_hold(machine, chain)
        chain.check_view(chain.files[1], "4.qcow2")
        machine.write("vda", 3 * MIB, 64 * K, 78)
        assert machine.status() == "running"
        machine.quit()
    assert names(chain.files[1]) == ["0.qcow2", "1.qcow2"]
    sound(chain.files[1])


def test_a_pivot_while_the_guest_writes(tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the guest writes to is another one before its map is read to the end."""
    with running(tmp_path / "m", chain) as (_, guest):
        lowest = chain.files[1].stat()

        def changed(file: ImageFile) -> bool:
            return file.device == (lowest.st_dev, lowest.st_ino) and guest.disks()[0].active.path == chain.files[1]

        monkeypatch.setattr(ImageFile, "changed", changed)
        _, report = merged(guest, wanted(chain, strategy=Strategy.COMMIT))
        assert report.image == chain.files[1]
        assert set(report.removed) == set(chain.files[2:])
        assert leftovers(chain.folder) == []


@pytest.mark.parametrize(("strategy", "result"), [(Strategy.ABSORB, 4), (Strategy.COMMIT, 1)])
def test_a_guest_may_write_while_the_result_is_proven(
    tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch, strategy: Strategy, result: int
) -> None:
    """The active layer is never taken for a sealed one, which must not change while it is read."""
    written_to = chain.files[result]
    unpatched, prove = ImageFile.changed, live_run._prove

    def under_load(*arguments: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ImageFile, "changed", lambda self: self.real_path == written_to or unpatched(self))
            prove(*arguments)

    monkeypatch.setattr(live_run, "_prove", under_load)
    with running(tmp_path / "m", chain) as (machine, guest):
        _, report = merged(guest, wanted(chain, strategy=strategy))
        assert report.layers_after == 2
        assert patterns_hold(machine, chain)
        machine.quit()
    sound(written_to)


def test_the_root_is_merged_when_asked_for(tmp_path: Path, chain: Chain) -> None:
    with running(tmp_path / "m", chain) as (machine, guest):
        merged(guest, wanted(chain, flatten=True))
        assert links(chain.active) == [None]
        assert patterns_hold(machine, chain)
        machine.quit()
    chain.check_view(chain.active, "4.qcow2")


def test_a_raw_root(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    root = folder / "root.img"
    tool("qemu-img", "create", "-q", "-f", "raw", root.name, 4 * MIB, cwd=folder)
    fill(root, (0, MIB, 1), image_format="raw")
    first = layer(folder / "1.qcow2", root, 4 * MIB, raw_backing=True)
    top = layer(folder / "2.qcow2", first, 4 * MIB)
    fill(first, (64 * K, 64 * K, 2))
    copy = tmp_path / "copy.raw"
    tool("qemu-img", "convert", "-O", "raw", top, copy, cwd=folder)
    chain = Chain(tmp_path / "other", count=2)
    chain.files = [root, first, top]
    with running(tmp_path / "m", chain) as (machine, guest):
        merged(guest, MergeRequest(image=top, flatten=True, to_layer=str(first), strategy=Strategy.COMMIT))
        assert links(top) == [None, "root.img"]
        assert machine.reads("vda", 64 * K, 64 * K, 2)
        assert machine.reads("vda", 0, 64 * K, 1)
        machine.quit()
    same(top, copy)


def test_kept_points_keep_their_views(tmp_path: Path, chain: Chain) -> None:
    with running(tmp_path / "m", chain) as (machine, guest):
        from datetime import UTC, datetime

        for number, labels in enumerate([[], [], ["golden"], []]):
            seal(chain.files[number], labels=labels, time=datetime(2026, 1, number + 1, tzinfo=UTC))
        request = MergeRequest(image=chain.active, policy=Policy(labels=frozenset({"golden"})))
        planned, _ = merged(guest, request)
        assert [each.layers for each in planned.merges] == [(chain.files[1], chain.files[2])]
        left = names(chain.active)
        assert len(left) == 4
        golden = chain.folder / left[1]
        chain.check_view(golden, "2.qcow2")
        chain.check_view(chain.files[3], "3.qcow2")
        # The result has the time and the labels of the view that it shows, and is known as what it was made of.
        note = Notes().of(golden)
        assert note.sealed is not None
        assert note.sealed.labels == ("golden",)
        assert note.sealed.time == datetime(2026, 1, 3, tzinfo=UTC)
        assert len(note.merged[0].of) == 2
        assert patterns_hold(machine, chain)
        machine.quit()


def test_a_held_layer_stays(tmp_path: Path, chain: Chain) -> None:
    from datetime import UTC, datetime

    from snapchain.source.notes import Hold

    Notes().change(
        chain.files[2], lambda note: note.model_copy(update={"holds": (Hold(tag="audit", since=datetime.now(UTC)),)})
    )
    with running(tmp_path / "m", chain) as (_, guest):
        with pytest.raises(Conflict, match="audit"):
            plan(guest, "vda", wanted(chain, 1, 3))
        planned = plan(guest, "vda", MergeRequest(image=chain.active, max_layers=2))
        assert all(chain.files[2] not in each.layers for each in planned.merges)


def test_another_image_forbids_a_commit_and_keeps_its_file(tmp_path: Path, chain: Chain) -> None:
    other = layer(chain.folder / "clone.qcow2", chain.files[2], chain.size)
    with running(tmp_path / "m", chain) as (machine, guest):
        with pytest.raises(Unsupported, match=r"clone\.qcow2"):
            plan(guest, "vda", wanted(chain, 1, 3, strategy=Strategy.COMMIT))
        planned, report = merged(guest, wanted(chain, 1, 3))
        assert planned.jobs == (JobKind.STREAM,)
        assert not report.removed
        assert {each.path for each in report.kept} == {chain.files[1], chain.files[2]}
        chain.check_view(other, "2.qcow2")
        assert names(chain.active) == ["0.qcow2", "3.qcow2", "4.qcow2"]
        machine.quit()


@pytest.mark.parametrize("strategy", [Strategy.COMMIT, Strategy.ABSORB])
@pytest.mark.parametrize("short", [1, 2, 3])
def test_a_shorter_layer_is_refused(tmp_path: Path, short: int, strategy: Strategy) -> None:
    """QEMU 7.2 itself would show the end of what lies below again (docs/decisions/0118)."""
    chain = Chain(tmp_path / "images", count=2)
    below: Path | None = None
    files = []
    for number in range(5):
        path = layer(chain.folder / f"s{number}.qcow2", below, (2 if number == short else 4) * MIB)
        if number == 0:
            fill(path, (0, 4 * MIB, 9))
        files.append(path)
        below = path
    chain.files = files
    with running(tmp_path / "m", chain) as (machine, guest):
        with pytest.raises(Unsupported, match="shorter"):
            plan(guest, "vda", wanted(chain, 1, 3, strategy=strategy))
        # By rules it is left out.
        planned, _ = merged(guest, MergeRequest(image=files[-1], max_layers=4))
        assert all(files[short] not in each.layers[1:] for each in planned.merges)
        assert not machine.reads("vda", 2 * MIB, MIB, 9)
        machine.quit()


@pytest.mark.parametrize("strategy", [Strategy.COMMIT, Strategy.ABSORB])
@pytest.mark.parametrize("longer", [1, 2, 3])
def test_layers_that_grow(tmp_path: Path, longer: int, strategy: Strategy) -> None:
    folder = tmp_path / "images"
    chain = Chain(folder, count=2)
    files: list[Path] = []
    for number in range(4):
        path = layer(folder / f"g{number}.qcow2", files[-1] if files else None, (4 if number >= longer else 2) * MIB)
        fill(path, (number * 128 * K, 128 * K, 30 + number))
        files.append(path)
    copy = tmp_path / "copy.raw"
    tool("qemu-img", "convert", "-O", "raw", files[-1], copy, cwd=folder)
    chain.files = files
    with running(tmp_path / "m", chain) as (machine, guest):
        merged(guest, wanted(chain, 1, 2, strategy=strategy))
        machine.quit()
    assert len(names(files[-1])) == 3
    same(files[-1], copy)


def test_bitmaps_are_respected(tmp_path: Path, chain: Chain) -> None:
    tool("qemu-img", "bitmap", "--add", "-f", "qcow2", chain.files[2], "backup", cwd=chain.folder)
    with running(tmp_path / "m", chain) as (machine, guest):
        for strategy in (Strategy.COMMIT, Strategy.ABSORB):
            with pytest.raises(Unsupported, match="backup"):
                plan(guest, "vda", wanted(chain, 1, 3, strategy=strategy))
        # In the uppermost input it stays right under a stream.
        assert plan(guest, "vda", wanted(chain, 1, 2)).jobs == (JobKind.STREAM,)
        _, report = merged(guest, wanted(chain, 1, 3, drop_bitmaps=True))
        assert report.layers_after == 3
        assert patterns_hold(machine, chain)


def test_a_file_of_another_directory_is_not_committed_into(tmp_path: Path, chain: Chain) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    base = layer(shared / "base.qcow2", None, 4 * MIB)
    fill(base, (0, MIB, 5))
    own = chain.folder / "own.qcow2"
    top = chain.folder / "top.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", own, cwd=chain.folder)
    fill(own, (0, 64 * K, 6))
    layer(top, own, 4 * MIB)
    chain.files = [base, own, top]
    with running(tmp_path / "m", chain) as (machine, guest):
        with pytest.raises(Unsupported, match="outside"):
            plan(guest, "vda", MergeRequest(image=top, flatten=True, to_layer=str(own), strategy=Strategy.COMMIT))
        _, report = merged(guest, MergeRequest(image=top, flatten=True))
        assert links(top) == [None]
        assert [each.path for each in report.kept] == [base]
        assert report.removed == (own,)
        assert machine.reads("vda", 64 * K, 64 * K, 5)
        machine.quit()
    assert base.exists()


def test_a_read_only_file_is_not_committed_into(tmp_path: Path, chain: Chain) -> None:
    chain.files[1].chmod(0o444)
    with running(tmp_path / "m", chain) as (_, guest):
        with pytest.raises(Unsupported, match="read-only"):
            plan(guest, "vda", wanted(chain, 1, 3, strategy=Strategy.COMMIT))
        assert plan(guest, "vda", wanted(chain, 1, 3)).jobs == (JobKind.STREAM,)


def test_what_only_a_merge_at_rest_can_do_is_refused(tmp_path: Path, chain: Chain) -> None:
    with running(tmp_path / "m", chain) as (_, guest):
        for request in (
            wanted(chain, keep_inputs=True),
            wanted(chain, cluster_size=4096),
            wanted(chain, strategy=Strategy.NEW),
        ):
            with pytest.raises(Unsupported, match="while the guest runs"):
                plan(guest, "vda", request)
        with pytest.raises(NotFound, match="no disk"):
            plan(guest, "vdz", wanted(chain))
        with pytest.raises(InvalidInput, match="lies above"):
            plan(guest, "vda", wanted(chain, 3, 1))


def test_a_foreign_job_is_respected(tmp_path: Path, chain: Chain) -> None:
    target = layer(tmp_path / "copy.qcow2", None, chain.size)
    with running(tmp_path / "m", chain) as (machine, guest):
        planned = plan(guest, "vda", wanted(chain, 1, 3))
        machine.ask(
            "blockdev-add", driver="qcow2", file={"driver": "file", "filename": str(target)}, **{"node-name": "t"}
        )
        machine.ask("blockdev-mirror", device="vda-top", target="t", sync="full", **{"job-id": "theirs"})
        with pytest.raises(Busy, match="theirs"):
            run(guest, planned)
        assert names(chain.active) == [f"{number}.qcow2" for number in range(5)]
        assert not leftovers(chain.folder)
        for path in chain.files:
            chain.check_view(path, path.name)


def test_a_throttle_filter_stays_on_top(tmp_path: Path, chain: Chain) -> None:
    blockdevs = {
        "vda": [
            f"driver=qcow2,node-name=fmt,file.driver=file,file.filename={chain.active}",
            "driver=throttle,node-name=thr,throttle-group=tg,file=fmt",
        ]
    }
    objects = ("-object", "throttle-group,id=tg")
    from snapchain.guest.address import GuestAddress, open_guest

    for strategy, first, last in ((Strategy.COMMIT, 1, 2), (Strategy.ABSORB, 1, 3), (Strategy.COMMIT, 3, 4)):
        with (
            Machine(tmp_path / "m", blockdevs=blockdevs, argv=objects) as machine,
            open_guest(GuestAddress(qmp=machine.qmp)) as guest,
        ):
            files = [layer_.path for layer_ in guest.disks()[0].chain]
            low = files[1] if first == 1 else files[-2]
            up = files[min(last, len(files) - 1)] if last != 4 else files[-1]
            request = MergeRequest(image=chain.active, from_layer=str(low), to_layer=str(up), strategy=strategy)
            run(guest, plan(guest, "vda", request))
            assert patterns_hold(machine, chain)
            assert guest.disks()[0].filters
            machine.quit()
        if strategy is Strategy.COMMIT and last == 4:
            break


def test_writes_go_on_meanwhile(tmp_path: Path, chain: Chain) -> None:
    """The guest writes at each look at the job; what it wrote is there at the end, and so is all the rest."""
    for path in chain.files[1:4]:
        fill(path, (MIB, MIB, 60 + int(path.stem)))
    with running(tmp_path / "m", chain) as (machine, guest):
        written: list[int] = []

        def write(_event: object) -> None:
            if len(written) < 8:
                at = 2 * MIB + len(written) * 64 * K
                machine.write("vda", at, 64 * K, 200 + len(written))
                written.append(at)

        for strategy, first, last in ((Strategy.ABSORB, 1, 2), (Strategy.COMMIT, 2, 3)):
            run(guest, plan(guest, "vda", wanted(chain, first, last, strategy=strategy)), on_event=write)
        run(guest, plan(guest, "vda", wanted(chain)), on_event=write)
        assert written
        assert all(machine.reads("vda", at, 64 * K, 200 + number) for number, at in enumerate(written))
        assert patterns_hold(machine, chain)
        assert machine.status() == "running"
        machine.quit()
    sound(chain.active)


def test_a_wrong_result_is_not_believed(tmp_path: Path, chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU that has copied other bytes: the inputs stay, and the journal tells."""
    from snapchain.guest.qmp_jobs import QmpJob

    kept = chain.folder / "kept"

    def dismiss(job: QmpJob) -> None:
        real(job)
        shutil.copy(chain.files[1], kept)
        with chain.files[1].open("r+b") as file:
            data = file.read()
            at = data.index(bytes([3]) * 64 * K)
            file.seek(at)
            file.write(b"\xee" * 512)

    real = QmpJob.dismiss
    monkeypatch.setattr(QmpJob, "dismiss", dismiss)
    with running(tmp_path / "m", chain) as (_, guest):
        with pytest.raises(Corrupt, match="differently"):
            merged(guest, wanted(chain, 1, 3, strategy=Strategy.COMMIT))
        assert all(path.exists() for path in chain.files)
        assert leftovers(chain.folder)


def test_dry_runs_change_nothing(tmp_path: Path, chain: Chain) -> None:
    with running(tmp_path / "m", chain) as (_, guest):
        before = {path: path.stat().st_mtime_ns for path in chain.folder.iterdir()}
        planned = plan(guest, "vda", wanted(chain))
        assert planned.disk == "vda"
        assert (planned.layers_before, planned.layers_after) == (5, 2)
        assert planned.bytes_to_move > 0
        assert {path: path.stat().st_mtime_ns for path in chain.folder.iterdir()} == before
        assert replace(planned.live_steps[0].step) == planned.steps[0]


def test_a_disk_of_one_layer_has_nothing_to_merge(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "images", count=1)
    with running(tmp_path / "m", chain) as (machine, guest):
        planned, report = merged(guest, MergeRequest(image=chain.active))
        assert (planned.strategy, report.strategy) == ("nothing", "nothing")
        assert (report.layers_before, report.layers_after) == (1, 1)
        assert plan(guest, "vda", MergeRequest(image=chain.active, max_layers=1)).merges == ()
        assert machine.status() == "running"
