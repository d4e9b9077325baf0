"""Files that others use, or that lie elsewhere: what a merge and the doctor do with them, and what they say."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from snapchain.errors import Conflict, InvalidInput, Unsupported
from snapchain.host.temporary_names import temporary_beside
from snapchain.image import dependents
from snapchain.merge import plan as planning, run as merge_run, step as merge_plan
from snapchain.merge.journal import MergeJournal, OpenJournal, journal_path
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import StepReport
from snapchain.model.events import Event, Notice, Progress
from snapchain.model.merging import Strategy
from snapchain.ops import doctor
from snapchain.source import sealing as snapshot
from tests.ops import fake_virsh
from tests.ops.forest import Forest, State, write_image
from tests.ops.killing import killed_after


@pytest.fixture
def forest(tmp_path: Path) -> Forest:
    """_base/img <- i1/1.qcow2 <- i1/2.qcow2 <- i1/disk.qcow2: a disk on an image elsewhere."""
    found = Forest(tmp_path)
    below: Path | None = None
    for number, name in enumerate(["_base/img.qcow2", "i1/1.qcow2", "i1/2.qcow2", "i1/disk.qcow2"]):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        recorded = None if below is None else os.path.relpath(below, path.parent)
        found.add(path, {number: number + 1, 7: number + 1}, below, recorded)
        below = path
    found.remember()
    return found


def clone(forest: Forest, of: str, name: str = "i2/disk.qcow2") -> Path:
    path = forest.root / name
    path.parent.mkdir(exist_ok=True)
    forest.add(path, {3: 9}, forest.root / of, str(forest.root / of))
    forest.before[path] = State.of(path)
    return path


def request(forest: Forest, **options: object) -> MergeRequest:
    options = {"image": forest.root / "i1" / "disk.qcow2", "flatten": True, **options}
    return MergeRequest(image_format="qcow2", image_dirs=(forest.root / "_base",), **options)  # type: ignore[arg-type]


def merge(forest: Forest, **options: object) -> tuple[list[str], dict[str, str]]:
    """What was removed, and what was kept with the reason, by name from the root."""
    report = merge_run.run(planning.plan(request(forest, **options)))
    forest.check(forest.root / "i1" / "disk.qcow2")
    return shown(forest, report.merges[0])


def shown(forest: Forest, report: StepReport) -> tuple[list[str], dict[str, str]]:
    kept = {str(each.path.relative_to(forest.root)): each.reason for each in report.kept}
    return [str(path.relative_to(forest.root)) for path in report.removed], kept


OUTSIDE = "it lies outside {}, the directory of the disk (--remove FILE removes it)"


def test_a_file_of_another_directory_stays(forest: Forest) -> None:
    planned = planning.plan(request(forest))
    wanted = OUTSIDE.format(forest.root / "i1")
    assert [(each.path.name, each.reason) for each in planned.merges[0].keep] == [("img.qcow2", wanted)]
    assert merge(forest) == (["i1/2.qcow2", "i1/1.qcow2"], {"_base/img.qcow2": wanted})


def test_a_file_of_another_directory_goes_when_it_is_named(forest: Forest) -> None:
    base = forest.root / "_base" / "img.qcow2"
    forest.may_go = {base}
    removed, kept = merge(forest, remove=(base,))
    assert "_base/img.qcow2" in removed
    assert kept == {}


def test_a_named_file_that_somebody_stands_on_is_refused(forest: Forest) -> None:
    other, base = clone(forest, "_base/img.qcow2"), forest.root / "_base" / "img.qcow2"
    with pytest.raises(Conflict, match=f"--remove does not allow that: {other} depends on it") as error:
        planning.plan(request(forest, remove=(base,)))
    assert error.value.subject == str(base)
    with pytest.raises(InvalidInput, match="not in the chain") as wrong:
        planning.plan(request(forest, remove=(other,)))
    assert wrong.value.subject == str(other)
    with pytest.raises(InvalidInput, match="--keep-inputs and --remove contradict"):
        request(forest, remove=(base,), keep_inputs=True)


@pytest.mark.parametrize("strategy", [None, Strategy.NEW, Strategy.ABSORB])
def test_a_layer_that_a_clone_in_a_sibling_directory_needs_stays(strategy: Strategy | None, forest: Forest) -> None:
    other = clone(forest, "i1/1.qcow2")
    removed, kept = merge(forest, flatten=False, strategy=strategy)
    assert removed == ["i1/2.qcow2"]
    assert kept == {"i1/1.qcow2": f"{other} depends on it"}


@pytest.mark.parametrize("why", ["elsewhere", "clone", "link", "domain"])
def test_a_commit_into_a_file_that_is_not_the_disks_own_is_refused(
    why: str, forest: Forest, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowest = forest.root / ("_base/img.qcow2" if why == "elsewhere" else "i1/1.qcow2")
    reason = OUTSIDE.format(forest.root / "i1") if why == "elsewhere" else "depends on it"
    if why == "clone":
        clone(forest, "i1/1.qcow2")
    elif why == "link":
        (forest.root / "i1" / "golden.qcow2").symlink_to("1.qcow2")
        reason = "golden.qcow2 is a symbolic link to it"
    elif why == "domain":
        fake_virsh.install(forest.root / "fake", monkeypatch, domains={"web2": fake_virsh.domain("web2", lowest)})
        reason = "domain web2 (vda) uses it"
    forest.remember()
    with pytest.raises(Unsupported) as error:
        merge(forest, flatten=why == "elsewhere", strategy=Strategy.COMMIT)
    assert error.value.subject == str(lowest)
    assert error.value.message.endswith(reason)
    merge(forest, flatten=why == "elsewhere")  # by another strategy
    assert forest.shown.keys() >= {lowest}
    assert lowest.exists()


def test_a_result_in_another_directory_is_refused_unless_it_is_named(forest: Forest) -> None:
    upper = forest.root / "_base" / "upper.qcow2"
    top = forest.root / "i3" / "disk.qcow2"
    top.parent.mkdir()
    forest.add(upper, {1: 1}, forest.root / "_base" / "img.qcow2", "img.qcow2")
    forest.add(top, {2: 2}, upper, str(upper))
    forest.remember()
    with pytest.raises(Unsupported, match="the merged file would replace it, and it lies outside") as error:
        planning.plan(request(forest, image=top, to_layer=str(upper)))
    assert error.value.subject == str(upper)
    forest.may_go = {upper}
    planned = planning.plan(request(forest, image=top, to_layer=str(upper), remove=(upper,)))
    assert [path.name for path in merge_run.run(planned).removed] == []  # img.qcow2 is the base of i1, too
    forest.check(top)


def test_rules_leave_files_of_other_directories_alone(forest: Forest) -> None:
    """Their data would be copied once for every disk that shares them."""
    middle, top = forest.root / "_base" / "2.qcow2", forest.root / "i3" / "disk.qcow2"
    top.parent.mkdir()
    forest.add(middle, {1: 1}, forest.root / "_base" / "img.qcow2", "img.qcow2")
    forest.add(top, {2: 2}, middle, str(middle))
    forest.remember()
    planned = planning.plan(request(forest, image=top, flatten=False, max_layers=1))
    assert planned.merges == ()
    assert planned.layers[1].stays == (f"it lies outside {top.parent}, the directory of the disk",)
    # Said so, they are merged; i1 stands on the lowest one, whose view stays.
    assert planning.plan(request(forest, image=top, max_layers=1)).layers_after == 2


def test_a_top_that_is_a_link_owns_the_directory_of_its_file(forest: Forest) -> None:
    link, top = forest.root / "vm" / "disk.0", forest.root / "i1" / "top.qcow2"
    link.parent.mkdir()
    forest.add(top, {1: 8}, forest.root / "i1" / "1.qcow2", str(forest.root / "i1" / "1.qcow2"))
    (forest.root / "i1" / "disk.qcow2").unlink()
    (forest.root / "i1" / "2.qcow2").unlink()
    for name in ("disk.qcow2", "2.qcow2"):
        del forest.shown[forest.root / "i1" / name]
    link.symlink_to(top)
    forest.remember()
    report = merge_run.run(planning.plan(request(forest, image=link)))
    assert shown(forest, report.merges[0]) == (["i1/1.qcow2"], {"_base/img.qcow2": OUTSIDE.format(top.parent)})
    forest.check(link)


@pytest.mark.parametrize("recorded", ["../i1/2.qcow2", "whole"])
@pytest.mark.parametrize("command", ["merge", "snapshot"])
def test_a_disk_that_is_opened_by_a_link_elsewhere_can_still_be(recorded: str, command: str, forest: Forest) -> None:
    """QEMU takes relative names from the directory of the link."""
    top, link, below = (forest.root / name for name in ("i1/disk.qcow2", "vm/disk.0", "i1/2.qcow2"))
    link.parent.mkdir()
    link.symlink_to(top)
    write_image(below, {2: 3, 7: 3}, "./1.qcow2")  # leads nowhere from the directory of the link
    forest.add(top, {3: 4}, below, str(below) if recorded == "whole" else recorded)
    forest.shown[link] = forest.shown[top]
    forest.remember()
    if command == "merge":
        merge(forest, from_layer="2.qcow2", flatten=False)
    else:
        snapshot.run(snapshot.plan(top, image_dirs=[forest.root]))
    forest.check(top)


# ---- what changes meanwhile


def test_a_clone_made_after_the_plan_is_found(forest: Forest) -> None:
    planned = planning.plan(request(forest))
    clone(forest, "i1/1.qcow2")
    with pytest.raises(Conflict, match="changed after the merge was planned"):
        merge_run.run(planned)
    forest.check(forest.root / "i1" / "disk.qcow2")


def test_a_clone_made_while_the_merge_moves_data_keeps_what_it_stands_on(forest: Forest) -> None:
    planned = planning.plan(request(forest, strategy=Strategy.NEW))
    made: list[Path] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and not made:
            made.append(clone(forest, "i1/1.qcow2"))

    report = merge_run.run(planned, on_event=on_event)
    removed, kept = shown(forest, report.merges[0])
    assert removed == ["i1/2.qcow2"]
    assert kept["i1/1.qcow2"] == f"{made[0]} depends on it"
    forest.check(forest.root / "i1" / "disk.qcow2")


def killed_past_its_switch(forest: Forest) -> MergeJournal:
    """The journal of a merge that lives no more; its inputs are still there."""
    top = forest.root / "i1" / "disk.qcow2"
    for steps in range(1, 30):
        if not killed_after(lambda: merge(forest, strategy=Strategy.NEW), steps):
            break
        if journal_path(top).exists() and (forest.root / "i1" / "2.qcow2").exists():
            journal = MergeJournal.model_validate_json(journal_path(top).read_bytes())
            if journal.result.still(top):
                return journal
    raise AssertionError("it was never killed there")


def test_the_doctor_removes_only_what_is_the_disks_own_now(forest: Forest) -> None:
    """A journal of version 0.1 may list a shared base, and somebody may have made a clone since."""
    journal = killed_past_its_switch(forest)
    base, top = forest.root / "_base" / "img.qcow2", journal.replaced.path
    listed = (*journal.remove, type(journal.replaced).of(base))
    listing = {"remove": listed, "top": None, "links": (), "confirmed": ()}
    OpenJournal(journal.model_copy(update=listing)).close()
    other = clone(forest, "i1/1.qcow2")
    report = doctor.run(doctor.plan([top.parent]))
    (treated,) = report.treated
    assert [path.name for path in treated.removed] == ["2.qcow2"]
    assert {each.path.name: each.reason for each in treated.kept} == {
        "1.qcow2": f"{other} depends on it",
        "img.qcow2": OUTSIDE.format(top.parent),
    }
    forest.check(top)


def test_the_doctor_asks_for_the_place_of_a_file_too(forest: Forest) -> None:
    journal = killed_past_its_switch(forest)
    base, top = forest.root / "_base" / "img.qcow2", journal.replaced.path
    listed = (*journal.remove, type(journal.replaced).of(base))
    OpenJournal(journal.model_copy(update={"remove": listed})).close()
    (treated,) = doctor.run(doctor.plan([top.parent])).treated
    assert {each.path.name: each.reason for each in treated.kept} == {"img.qcow2": OUTSIDE.format(top.parent)}
    forest.check(top)


def test_the_doctor_keeps_a_half_made_file_on_which_somebody_stands(forest: Forest) -> None:
    left = forest.root / "i1" / ".disk.qcow2.merge-0123abcd"
    forest.add(left, {}, None, None)
    other = clone(forest, f"i1/{left.name}")
    (treated,) = doctor.run(doctor.plan([left.parent])).treated
    assert treated.error == f"{left}: it cannot be removed: {other} depends on it"
    forest.check(other)


# ---- what cannot be seen


def test_a_search_that_was_cut_off_is_told(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependents, "MOST_ENTRIES", 3)
    planned = planning.plan(request(forest))
    (notice,) = planned.notices
    assert notice.startswith("The search for other users of these files ended after ")
    report = merge_run.run(planned)
    assert report.incomplete == report.merges[0].incomplete == notice


def test_what_else_searches_for_users_says_where_it_ended(forest: Forest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said in a notice, and in the report, also where the search ends elsewhere the second time."""
    search = "The search for other users of these files ended after "
    top, base = forest.root / "i1" / "disk.qcow2", forest.root / "_base"
    assert snapshot.plan(top, image_dirs=[base]).incomplete is None
    monkeypatch.setattr(dependents, "MOST_ENTRIES", 3)
    planned = snapshot.plan(top, image_dirs=[base])
    monkeypatch.setattr(dependents, "MOST_ENTRIES", 2)
    events: list[Event] = []
    report = snapshot.run(planned, on_event=events.append)
    (notice,) = events
    assert isinstance(notice, Notice)
    assert (report.incomplete or "").startswith(search)
    assert notice.message == report.incomplete == planned.incomplete
    forest.check(top)
    left = temporary_beside(top, purpose="snapshot")
    left.touch()
    events.clear()
    (treated,) = doctor.run(doctor.plan([top.parent]), on_event=events.append).treated
    assert treated.done
    assert [event.message for event in events if isinstance(event, Notice)] == [treated.incomplete]
    assert (treated.incomplete or "").startswith(search)


@pytest.mark.root
@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_an_unreadable_image_counts_if_its_owner_can_reach_the_file(mode: int) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are closed to others
        root = Path(name)
        root.chmod(0o755)
        (root / "i1").mkdir()
        (root / "i2").mkdir()
        write_image(root / "i1" / "0.qcow2", {}, None)
        write_image(root / "i1" / "1.qcow2", {}, "0.qcow2")
        write_image(root / "i1" / "disk.qcow2", {}, "1.qcow2")
        write_image(root / "i2" / "disk.qcow2", {}, "../i1/1.qcow2")
        (root / "i2" / "disk.qcow2").chmod(0o600)
        os.chown(root / "i2" / "disk.qcow2", 4711, 4711)
        os.chown(root / "i1", 65534, 65534)
        (root / "i1").chmod(mode)
        os.seteuid(65534)
        try:
            found = merge_plan.plan_step(MergeRequest(image=root / "i1" / "disk.qcow2")).keep
            confirmed = merge_plan.plan_step(
                MergeRequest(image=root / "i1" / "disk.qcow2", remove=[root / "i1" / "1.qcow2"])
            ).keep
        finally:
            os.seteuid(0)
    why = f"{root / 'i2' / 'disk.qcow2'} cannot be read, and may depend on it (--remove FILE removes it)"
    assert {each.path.name: each.reason for each in found} == ({"1.qcow2": why} if mode == 0o755 else {})
    assert confirmed == ()


def test_an_image_on_which_others_stand_gets_no_overlay_in_its_place(forest: Forest) -> None:
    other, top = clone(forest, "i1/disk.qcow2"), forest.root / "i1" / "disk.qcow2"
    with pytest.raises(Conflict, match=f"cannot be replaced by an overlay: {other} depends on it") as error:
        snapshot.plan(top, image_dirs=[forest.root])
    assert error.value.subject == str(top)
    snapshot.run(snapshot.plan(top, overlay=Path("new.qcow2"), image_dirs=[forest.root]))
    forest.check(top)


def test_the_images_of_these_tests_are_whole(forest: Forest) -> None:
    """The writer of tests/ops/forest.py, judged by qemu-img."""
    from tests.ops.stacks import clean, flat

    for path, content in forest.shown.items():
        assert clean(path)
        assert flat(path, forest.root / "raw").read_bytes() == content
    write_image(forest.root / "zero.qcow2", {0: 5, 1: 0}, None)
    assert clean(forest.root / "zero.qcow2")
