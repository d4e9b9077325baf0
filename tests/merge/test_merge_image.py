"""Offline merges of local chains: the same view, fewer files, and whole at every instant."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from snapchain.errors import Busy, Corrupt, InvalidInput, NotFound, Unavailable, Unsupported
from snapchain.host import files
from snapchain.image import scan
from snapchain.merge import journal as merge_journal, new_file, run as merge_run, settle, step as merge_plan
from snapchain.merge.assembly import Assembly, write_assembly
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import StepReport
from snapchain.merge.step import MergeStep
from snapchain.model.events import Event, Notice, Progress
from snapchain.model.merging import Strategy
from tests.ops.killing import killed_at_every_step
from tests.ops.stacks import Layer, MiB, build, clean, flat, names, same, standing, write

STACK = (
    Layer(writes=["write -P 1 0 4M"]),
    Layer(writes=["write -P 2 0 1M", "discard 2M 512k"], options="cluster_size=4096"),
    Layer(writes=["write -P 3 512k 1M", "write -zu 3M 300k"]),
    Layer(writes=["write -P 4 1M 64k"], options="extended_l2=on"),
)


def plan(image: Path, **options: object) -> MergeStep:
    """Into a new file unless something else is said; what is chosen else: test_merge_strategy.py."""
    return merge_plan.plan_step(MergeRequest(image=image, **{"strategy": Strategy.NEW, **options}))  # type: ignore[arg-type]


def merge(image: Path, **options: object) -> StepReport:
    return merge_run.run_step(plan(image, **options))


@pytest.fixture
def stack(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "vm", STACK)


@pytest.fixture
def reference(stack: list[Path], tmp_path: Path) -> Path:
    return flat(stack[-1], tmp_path / "reference.raw")


def test_everything_above_the_root_under_the_same_path(stack: list[Path], reference: Path) -> None:
    root = stack[0].stat()
    report = merge(stack[-1])
    assert (report.layers_before, report.layers_after, report.strategy) == (4, 2, Strategy.NEW)
    assert report.result == stack[-1]
    assert report.removed == (stack[2], stack[1])
    assert report.bytes_freed > 0
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]
    assert same(stack[-1], reference)
    assert clean(stack[-1])
    assert stack[0].stat().st_mtime_ns == root.st_mtime_ns
    with scan(stack[-1]) as chain:
        assert chain.top.backing is not None
        assert (chain.top.backing.name, chain.top.backing.format) == ("0.qcow2", "qcow2")
        assert report.bytes_moved == chain.top.extents.data_bytes
        # The discarded and zeroed ranges hide the root, and cost no data.
        assert chain.top.extents.zero_bytes > 700 * 1024
        assert chain.top.extents.data_bytes < 2 * MiB


def test_flatten_leaves_one_file(stack: list[Path], reference: Path) -> None:
    report = merge(stack[-1], flatten=True)
    assert (report.layers_after, report.strategy) == (1, Strategy.NEW)
    assert names(stack[0].parent) == ["disk.qcow2"]
    assert same(stack[-1], reference)
    assert clean(stack[-1])


def test_a_range_takes_the_place_of_its_uppermost_layer(stack: list[Path], reference: Path, tmp_path: Path) -> None:
    middle = flat(stack[2], tmp_path / "middle.raw")
    top = stack[-1].stat()
    report = merge(stack[-1], from_layer="1.qcow2", to_layer=str(stack[2]))
    assert report.result == stack[2]
    assert names(stack[0].parent) == ["0.qcow2", "2.qcow2", "disk.qcow2"]
    assert stack[-1].stat().st_mtime_ns == top.st_mtime_ns
    assert same(stack[-1], reference)
    assert same(stack[2], middle)


def test_a_range_with_the_root(stack: list[Path], reference: Path) -> None:
    report = merge(stack[-1], from_layer="0.qcow2", to_layer="1.qcow2")
    assert names(stack[0].parent) == ["1.qcow2", "2.qcow2", "disk.qcow2"]
    assert report.layers_after == 3
    assert same(stack[-1], reference)
    merge(stack[-1], flatten=True, to_layer="2.qcow2")
    assert names(stack[0].parent) == ["2.qcow2", "disk.qcow2"]
    assert same(stack[-1], reference)


def test_nothing_to_merge(stack: list[Path]) -> None:
    for options in ({"from_layer": "2.qcow2", "to_layer": "2.qcow2"}, {"to_layer": "0.qcow2"}):
        report = merge(stack[-1], **options)
        assert (report.strategy, report.layers_before, report.layers_after) == (Strategy.NOTHING, 4, 4)
        assert (report.removed, report.bytes_moved) == ((), 0)
    merge(stack[-1])
    assert merge(stack[-1]).strategy is Strategy.NOTHING
    merge(stack[-1], flatten=True)
    assert merge(stack[-1], flatten=True).strategy is Strategy.NOTHING


def test_planning_changes_nothing(stack: list[Path]) -> None:
    before = {entry: standing(entry) for entry in stack[0].parent.iterdir()}
    planned = plan(stack[-1])
    assert {entry: standing(entry) for entry in stack[0].parent.iterdir()} == before
    assert planned.strategy is Strategy.NEW
    assert planned.remove == (stack[2], stack[1])
    assert planned.needs_bytes > planned.bytes_to_move > 0
    assert planned.shadowed_bytes > 0


@pytest.mark.parametrize(
    "options",
    [
        {"from_layer": "no.qcow2"},
        {"to_layer": "/nowhere/1.qcow2"},
        {"from_layer": "2.qcow2", "to_layer": "1.qcow2"},
        {"flatten": True, "from_layer": "1.qcow2"},
    ],
)
def test_ranges_that_are_none(options: dict[str, object], stack: list[Path]) -> None:
    with pytest.raises((NotFound, InvalidInput), match=r"no such layer|lies above|cannot be combined"):
        merge(stack[-1], **options)


# -- kinds of stacks (random ones: test_merge_random.py) ---------------------------------------------------------


def test_a_short_middle_layer_hides_for_ever(tmp_path: Path) -> None:
    paths = build(
        tmp_path / "vm",
        [
            Layer(writes=["write -P 170 0 4M"]),
            Layer(1 * MiB, ["write -P 2 0 64k"]),
            Layer(4 * MiB, ["write -P 3 2M 64k"]),
        ],
    )
    reference = flat(paths[-1], tmp_path / "reference")
    merge(paths[-1])
    assert same(paths[-1], reference)
    assert reference.read_bytes()[3 * MiB : 3 * MiB + 512] == bytes(512)


def test_a_raw_root_stays_or_goes(tmp_path: Path) -> None:
    paths = build(
        tmp_path / "vm",
        [Layer(2 * MiB, ["write -P 7 0 1M"], image_format="raw"), Layer(), Layer(writes=["write -P 8 0 4k"])],
    )
    reference = flat(paths[-1], tmp_path / "reference")
    merge(paths[-1])
    assert names(tmp_path / "vm") == ["0.raw", "disk.qcow2"]
    assert same(paths[-1], reference)
    merge(paths[-1], flatten=True)
    assert names(tmp_path / "vm") == ["disk.qcow2"]
    assert same(paths[-1], reference)


def test_layers_in_other_directories(tmp_path: Path) -> None:
    (tmp_path / "vm" / "old").mkdir(parents=True)
    paths = build(tmp_path / "vm" / "old", [Layer(writes=["write -P 1 0 4M"]), Layer(writes=["write -P 2 0 1M"])])
    top = tmp_path / "vm" / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "old/disk.qcow2", "-F", "qcow2", top], check=True)
    write(top, "write -P 3 1M 64k")
    reference = flat(top, tmp_path / "reference")
    report = merge(top, remove=[paths[1]])
    assert report.removed == (paths[1],)
    assert same(top, reference)
    with scan(top) as chain:
        assert chain.top.backing is not None
        assert chain.top.backing.name == "old/0.qcow2"
    assert names(paths[0].parent) == ["0.qcow2"]


def test_odd_names(tmp_path: Path) -> None:
    paths = build(
        tmp_path / "vm",
        [Layer(writes=["write -P 1 0 4M"]), Layer(writes=["write -P 2 0 1M"]), Layer(writes=["write -P 3 0 4k"])],
        names=["-f %s.qcow2", "ü, 'x\".qcow2", "a=b,c.qcow2"],
    )
    reference = flat(paths[-1], tmp_path / "reference")
    merge(paths[-1])
    assert same(paths[-1], reference)
    assert names(tmp_path / "vm") == sorted(["-f %s.qcow2", "a=b,c.qcow2"])


# -- who else needs the files -------------------------------------------------------------------------------------


def clone(of: Path, name: str) -> Path:
    path = of.with_name(name)
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", of.name, "-F", "qcow2", str(path)]
    subprocess.run(argv, check=True)
    return path


def test_a_linked_clone_keeps_what_it_stands_on(stack: list[Path], reference: Path, tmp_path: Path) -> None:
    other = clone(stack[1], "clone.qcow2")
    write(other, "write -P 99 0 64k")
    before = flat(other, tmp_path / "clone.raw")
    planned = plan(stack[-1])
    assert planned.remove == (stack[2],)
    assert [kept.path for kept in planned.keep] == [stack[1]]
    assert "clone.qcow2" in planned.keep[0].reason
    report = merge_run.run_step(planned)
    assert [kept.path for kept in report.kept] == [stack[1]]
    assert same(other, before)
    assert same(stack[-1], reference)


def test_what_a_kept_file_stands_on_is_kept(stack: list[Path], reference: Path, tmp_path: Path) -> None:
    other = clone(stack[2], "clone.qcow2")
    before = flat(other, tmp_path / "clone.raw")
    assert merge(stack[-1], flatten=True).removed == ()
    assert same(other, before)
    assert same(stack[-1], reference)


def test_a_clone_of_the_replaced_file_reads_the_same(stack: list[Path], tmp_path: Path) -> None:
    other = clone(stack[2], "clone.qcow2")
    write(other, "write -P 99 0 64k")
    before = flat(other, tmp_path / "clone.raw")
    report = merge(stack[-1], from_layer="1.qcow2", to_layer="2.qcow2")
    assert report.removed == (stack[1],)
    assert same(other, before)


@pytest.mark.parametrize("broken", ["dirty", "json", "link"])
def test_clones_that_nobody_can_open_count_too(broken: str, stack: list[Path]) -> None:
    other = clone(stack[1], "clone.qcow2")
    if broken == "dirty":
        with other.open("r+b") as file:
            file.seek(72 + 7)
            file.write(b"\1")
    elif broken == "json":
        name = b'json:{"driver":"qcow2","file.filename":"' + bytes(stack[1]) + b'"}'
        with other.open("r+b") as file:
            file.seek(16)
            file.write(len(name).to_bytes(4, "big"))
            file.seek(8)
            offset = int.from_bytes(file.read(8), "big")
            file.seek(offset)
            file.write(name)
    else:
        real = other.rename(stack[0].parent.with_name("elsewhere.qcow2"))
        other.symlink_to(real)
    assert stack[1] not in merge(stack[-1]).removed


def test_keep_inputs_leaves_a_way_back(stack: list[Path], reference: Path) -> None:
    report = merge(stack[-1], keep_inputs=True)
    assert report.removed == ()
    old = stack[-1].with_name("disk.unmerged-1.qcow2")
    assert [kept.path for kept in report.kept] == [old, stack[2], stack[1]]
    assert names(stack[0].parent) == ["0.qcow2", "1.qcow2", "2.qcow2", "disk.qcow2", "disk.unmerged-1.qcow2"]
    assert same(stack[-1], reference)
    assert same(old, reference)


def test_hard_links_are_refused(stack: list[Path], tmp_path: Path) -> None:
    os.link(stack[1], tmp_path / "other.qcow2")
    with pytest.raises(Unsupported, match="hard link"):
        plan(stack[-1])


def test_bitmaps_and_internal_snapshots_are_not_lost_silently(stack: list[Path], reference: Path) -> None:
    subprocess.run(["qemu-img", "bitmap", "-f", "qcow2", "--add", stack[2], "daily"], check=True)
    with pytest.raises(Unsupported, match="daily") as caught:
        plan(stack[-1])
    assert "--drop-bitmaps" in (caught.value.hint or "")
    merge(stack[-1], drop_bitmaps=True, from_layer="1.qcow2", to_layer="2.qcow2")
    assert same(stack[-1], reference)
    subprocess.run(["qemu-img", "snapshot", "-c", "s", stack[2]], check=True)
    with pytest.raises(Unsupported, match="internal snapshot"):
        plan(stack[-1])


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("mode", [[], ["-r"]], ids=["writing", "reading"])
def test_refused_while_somebody_has_a_file_open(number: int, mode: list[str], stack: list[Path]) -> None:
    argv = ["qemu-io", *mode, "-f", "qcow2", str(stack[number])]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        user.stdin.write(b"length\n")
        user.stdin.flush()
        user.stdout.readline()
        if number == 0 and mode:
            assert merge(stack[-1]).layers_after == 2  # others may read the root as they like
        else:
            with pytest.raises(Busy, match=rf"qemu-io \(pid {user.pid}\)"):
                merge(stack[-1])
            assert names(stack[0].parent) == ["0.qcow2", "1.qcow2", "2.qcow2", "disk.qcow2"]


def test_nobody_can_start_on_it_meanwhile(stack: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def assemble(*arguments: object, **named: object) -> object:
        for mode in ([], ["-r"]):
            argv = ["qemu-io", *mode, "-f", "qcow2", "-c", "length", str(stack[-1])]
            seen.append(subprocess.run(argv, check=False, capture_output=True).returncode)
        return real(*arguments, **named)  # type: ignore[arg-type]

    real = write_assembly
    monkeypatch.setattr(new_file, "write_assembly", assemble)
    merge(stack[-1])
    assert seen == [1, 0]


# -- faults -------------------------------------------------------------------------------------------------------


def restore(directory: Path, pristine: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(pristine, directory)


@pytest.mark.parametrize(
    "options",
    [{}, {"flatten": True}, {"from_layer": "1.qcow2", "to_layer": "2.qcow2"}, {"keep_inputs": True}],
    ids=["default", "flatten", "range", "keep"],
)
def test_killed_at_every_step(options: dict[str, object], stack: list[Path], reference: Path) -> None:
    directory = stack[0].parent
    pristine = directory.with_name("pristine")
    shutil.copytree(directory, pristine)
    merge(stack[-1], **options)
    expected = names(directory)
    restore(directory, pristine)
    deaths = 0
    for where in killed_at_every_step(lambda: merge(stack[-1], **options)):
        deaths += 1
        assert same(stack[-1], reference), where
        if names(directory) != expected:  # a range that is merged has no such layers any more
            merge(stack[-1], **options)
        assert names(directory) == expected, where
        assert same(stack[-1], reference), where
        assert clean(stack[-1]), where
        restore(directory, pristine)
    assert deaths > 7


def test_a_killed_merge_keeps_a_clone_made_since(stack: list[Path], reference: Path, tmp_path: Path) -> None:
    for _ in killed_at_every_step(lambda: merge(stack[-1])):
        left = merge_journal.unsettled([stack[-1]])
        if left and settle.switched(left[0]):
            break
    assert stack[1].exists()
    other = clone(stack[1], "clone.qcow2")
    before = flat(other, tmp_path / "clone.raw")
    events: list[Event] = []
    report = merge_run.run_step(plan(stack[-1]), on_event=events.append)
    assert report.strategy is Strategy.NOTHING
    assert report.finished == (stack[-1],)
    assert any(isinstance(event, Notice) and "finished" in event.message for event in events)
    assert stack[1].exists()
    assert same(other, before)
    assert same(stack[-1], reference)


@pytest.mark.parametrize(
    "call", ["link", "rename", "fsync", "fchmod", "unlink", pytest.param("fchown", marks=pytest.mark.root)]
)
def test_a_failing_call_leaves_all_as_it_was(
    call: str, stack: list[Path], reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one of its kind in turn, until the merge makes no further one."""
    stack[-1].chmod(0o640)
    if call == "fchown":
        os.chown(stack[-1], 64055, 994)
    directory = stack[0].parent
    pristine = directory.with_name("pristine")
    copy = "cp", "-a"  # with its owner
    subprocess.run([*copy, directory, pristine], check=True)
    before = names(directory)
    done = sorted([*before, "disk.unmerged-1.qcow2"])
    for nth in range(1, 30):
        with monkeypatch.context() as patch:
            failing = Failing(call, nth, patch)
            events: list[Event] = []
            try:
                merge_run.run_step(plan(stack[-1], keep_inputs=True), on_event=events.append)
            except Unavailable as error:
                assert "no space" in str(error)  # noqa: PT017
                assert failing.failed
                said = True
            else:
                said = any(isinstance(event, Notice) and "cannot note" in event.message for event in events)
        assert same(stack[-1], reference)
        if not failing.failed:
            break
        assert said, "a failure is an error, or a notice where only a note is lost"
        # Before the switch all is as it was; past it the next run finishes what is left, if anything is.
        assert names(directory) in (before, done) or merge_journal.unsettled([stack[-1]])
        merge(stack[-1], keep_inputs=True)
        assert same(stack[-1], reference)
        assert names(directory) == done
        shutil.rmtree(directory)
        subprocess.run([*copy, pristine, directory], check=True)
    assert 1 < nth < 29, "some were made to fail, and all were"


class Failing:
    """Makes the n-th call of a function of `os` fail for want of space."""

    def __init__(self, call: str, nth: int, patch: pytest.MonkeyPatch) -> None:
        self.failed = False
        count, real = itertools.count(1), getattr(os, call)

        def fail(*arguments: object, **named: object) -> object:
            if next(count) == nth:
                self.failed = True
                raise OSError(28, "No space left on device")
            return real(*arguments, **named)

        patch.setattr(os, call, fail)


def test_no_room_is_told_up_front(stack: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(stack[0].parent)
    monkeypatch.setattr(files, "free_bytes", lambda _directory: 100_000)
    with pytest.raises(Unavailable, match=r"needs [0-9]+ bytes"):
        merge(stack[-1])
    assert names(stack[0].parent) == before


@pytest.mark.root
def test_a_full_filesystem_met_on_the_way(stack: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = stack[0].parent
    mounted = directory.with_name("small")
    mounted.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16M", "none", mounted], check=False).returncode:
        pytest.fail("root cannot mount a tmpfs here")
    try:
        for path in stack:
            shutil.copy(path, mounted)
        (mounted / "ballast").write_bytes(bytes(files.free_bytes(mounted) - MiB))
        before = names(mounted)
        monkeypatch.setattr(files, "free_bytes", lambda _directory: 1 << 40)
        with pytest.raises(Unavailable, match=r"full|space") as caught:
            merge(mounted / "disk.qcow2")
        assert caught.value.exit_code == 7
        assert names(mounted) == before
    finally:
        subprocess.run(["umount", mounted], check=True)


@pytest.mark.parametrize("wrong", ["content", "zeroes", "link", "leak", "size"])
def test_a_wrong_result_is_never_believed(
    wrong: str, stack: list[Path], reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write_assembly

    def assemble(assembly: Assembly, fd: int, **named: object) -> object:
        done = real(assembly, fd, **named)  # type: ignore[arg-type]
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if wrong == "content":
            write(path, "write -P 77 513k 512")
        elif wrong == "zeroes":
            write(path, "discard 3M 64k", "write -P 9 3M 64k")
        elif wrong == "link":
            # The recipe that is wrong and checks clean: a link moved without the data.
            argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", str(stack[1]), "-F", "qcow2", str(path)]
            subprocess.run(argv, check=True)
        elif wrong == "size":
            subprocess.run(["qemu-img", "resize", "-q", "-f", "qcow2", path, "5M"], check=True)
        else:
            with path.open("r+b") as file:
                file.seek(48)
                file.seek(int.from_bytes(file.read(8), "big"))
                block = int.from_bytes(file.read(8), "big")
                file.seek(block + 2 * 1000)
                file.write(b"\0\1")
                file.truncate(1001 * assembly.layout.cluster_size)
        return done

    monkeypatch.setattr(new_file, "write_assembly", assemble)
    with pytest.raises(Corrupt) as caught:
        merge(stack[-1])
    if wrong == "content":
        assert f"bytes {513 * 1024} to {513 * 1024 + 512}" in str(caught.value)
    assert names(stack[0].parent) == ["0.qcow2", "1.qcow2", "2.qcow2", "disk.qcow2"]
    assert same(stack[-1], reference)


def test_a_planted_journal_is_not_believed(stack: list[Path], tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    journal = merge_journal.MergeJournal(
        stage="switching",
        replaced=merge_journal.FileId.of(stack[-1]),
        lowest=stack[1],
        link=None,
        result=merge_journal.FileId.of(stack[-1]),
        remove=(merge_journal.FileId.of(victim),),
    )
    path = merge_journal.journal_path(stack[-1])
    path.write_text(journal.model_dump_json())
    path.chmod(0o666)
    with pytest.raises(InvalidInput, match="journal"):
        plan(stack[-1])
    path.chmod(0o600)
    path.write_text("{}")
    with pytest.raises(Corrupt, match="not a merge's journal"):
        plan(stack[-1])
    assert victim.exists()


def test_standing_is_kept_and_progress_told(stack: list[Path]) -> None:
    stack[-1].chmod(0o640)
    if os.geteuid() == 0:
        os.chown(stack[-1], 64055, 994)
    before = stack[-1].stat()
    events: list[Event] = []
    planned = plan(stack[-1])
    merge_run.run_step(planned, on_event=events.append)
    after = stack[-1].stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    merged = [event for event in events if isinstance(event, Progress) and event.phase == "merge"]
    verified = [event for event in events if isinstance(event, Progress) and event.phase == "verify"]
    assert merged[-1].done == merged[-1].total == planned.bytes_to_move
    assert verified[-1].done == verified[-1].total


def test_the_room_estimate_holds(tmp_path: Path) -> None:
    writes = [f"write -P 1 {n * 160}k 4k" for n in range(200)]
    for options in ("cluster_size=512", "", "cluster_size=2M"):
        directory = tmp_path / f"vm{options}"
        paths = build(
            directory, [Layer(64 * MiB), Layer(64 * MiB, writes), Layer(64 * MiB, ["write -z 1M 1M"], options)]
        )
        write(paths[0], "write -P 5 0 32M")
        planned = plan(paths[-1], keep_inputs=True)
        merge_run.run_step(planned)
        assert paths[-1].stat().st_blocks * 512 <= planned.needs_bytes, options
        shutil.rmtree(directory)
