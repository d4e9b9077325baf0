"""What killed runs leave behind: found, named, finished or undone; and what is nobody's leftover is left alone."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from snapchain.errors import NotFound
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.journal import journal_path
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from snapchain.ops import doctor
from snapchain.ops.doctor import DoctorReport, Kind
from snapchain.ops.restore.output import OutputFile
from snapchain.source import sealing as snapshot
from tests.ops.faulty_calls import killed_before
from tests.ops.stacks import Layer, MiB, build, clean, flat, names, same

STACK = [Layer(MiB, [f"write -P {n + 1} {n * 64}k 128k"]) for n in range(4)]


@pytest.fixture
def stack(tmp_path: Path) -> list[Path]:
    return build(tmp_path / "vm", STACK)


def killed_at(image: Path, wanted: str, nth: int = 1) -> None:
    """A merge of the image that dies before its n-th call of this name."""
    killed_before(
        lambda: merge_run.run_step(merge_plan.plan_step(MergeRequest(image=image, strategy=Strategy.NEW))),
        image.parent,
        wanted,
        nth,
    )


def treat(*paths: Path) -> DoctorReport:
    return doctor.run(doctor.plan(paths))


def test_nothing_to_find(stack: list[Path]) -> None:
    assert treat(stack[-1]).treated == treat(stack[0].parent).treated == ()
    with pytest.raises(NotFound, match="nowhere: no such file"):
        doctor.plan([stack[0].with_name("nowhere")])


def test_a_merge_killed_early_is_undone(stack: list[Path], tmp_path: Path) -> None:
    reference = flat(stack[-1], tmp_path / "reference")
    before = names(stack[0].parent)
    killed_at(stack[-1], "rename")
    planned = doctor.plan([stack[-1]])
    assert {finding.kind for finding in planned.findings} == {Kind.NEW_FILE}
    assert names(stack[0].parent) != before, "planning changes nothing"
    report = doctor.run(planned)
    assert report.well
    assert names(stack[0].parent) == before
    assert same(stack[-1], reference)


def test_a_merge_killed_past_its_switch_is_finished(stack: list[Path], tmp_path: Path) -> None:
    reference = flat(stack[-1], tmp_path / "reference")
    killed_at(stack[-1], "unlink", 2)
    (finding,) = doctor.plan([stack[0].parent]).findings
    assert (finding.kind, finding.image) == (Kind.MERGE, stack[-1])
    report = treat(stack[0].parent)
    assert report.treated[0].removed == (stack[1],)
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]
    assert same(stack[-1], reference)
    assert clean(stack[-1])
    assert treat(stack[0].parent).treated == ()


def test_what_has_come_to_stand_on_an_input_keeps_it(stack: list[Path]) -> None:
    killed_at(stack[-1], "unlink")
    clone = stack[0].with_name("clone.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", "1.qcow2", "-F", "qcow2", clone], check=True)
    assert treat(stack[0].parent).treated[0].removed == (stack[2],)
    assert names(stack[0].parent) == ["0.qcow2", "1.qcow2", "clone.qcow2", "disk.qcow2"]


def test_what_somebody_is_at_work_on_is_left_alone(stack: list[Path]) -> None:
    killed_at(stack[-1], "unlink")
    left = names(stack[0].parent)
    with journal_path(stack[-1]).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        report = treat(stack[0].parent)
    assert not report.well
    assert "another merge" in (report.treated[0].error or "")
    assert names(stack[0].parent) == left
    assert treat(stack[0].parent).well


def test_a_live_new_file_is_left_alone(stack: list[Path]) -> None:
    new = stack[-1].with_name(".disk.qcow2.merge-0123abcd")
    with new.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert not treat(stack[-1]).well
        assert new.exists()
    assert treat(stack[-1]).well
    assert not new.exists()


def test_leftovers_of_snapshots(stack: list[Path]) -> None:
    directory = stack[0].parent
    left = directory / ".disk.qcow2.snapshot-0123abcd"
    left.write_bytes(b"")
    os.link(stack[-1], directory / "disk.1.qcow2")
    assert {finding.kind for finding in doctor.plan([directory]).findings} == {Kind.NEW_FILE, Kind.SECOND_NAME}
    assert treat(directory).well
    assert names(directory) == ["0.qcow2", "1.qcow2", "2.qcow2", "disk.qcow2"]


def test_names_that_are_nobodys_leftovers(stack: list[Path]) -> None:
    directory = stack[0].parent
    snapshot.run(snapshot.plan(stack[-1]))
    os.link(directory / "0.qcow2", directory / "backup-of-0.qcow2")
    for name in (".disk.qcow2.merge-xyz", ".disk.qcow2.swp", "disk.2.qcow2", ".snapchain-merge-disk.qcow2"):
        (directory / name).write_bytes(b"mine")
    before = names(directory)
    assert treat(directory).treated == ()
    assert names(directory) == before


def test_a_second_name_on_which_something_stands_stays(stack: list[Path]) -> None:
    directory = stack[0].parent
    os.link(stack[-1], directory / "disk.1.qcow2")
    argv = [
        "qemu-img",
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "disk.1.qcow2",
        "-F",
        "qcow2",
        str(directory / "new.qcow2"),
    ]
    subprocess.run(argv, check=True)
    report = treat(directory)
    assert "new.qcow2 depends on it" in (report.treated[0].error or "")
    assert (directory / "disk.1.qcow2").exists()


def test_a_journal_that_nobody_can_believe(stack: list[Path]) -> None:
    killed_at(stack[-1], "unlink")
    path = journal_path(stack[-1])
    path.chmod(0o666)
    report = treat(stack[0].parent)
    assert [each.finding.kind for each in report.treated] == [Kind.UNREADABLE]
    assert not report.well
    assert path.exists()
    assert stack[1].exists()


def test_a_journal_that_could_not_be_read_and_then_can(stack: list[Path]) -> None:
    """Somebody has swapped it for a moment; the finding is no leftover that may go."""
    killed_at(stack[-1], "unlink")
    path = journal_path(stack[-1])
    right = path.read_bytes()
    path.write_text("{")
    planned = doctor.plan([path.parent])
    path.write_bytes(right)
    (treated,) = doctor.run(planned).treated
    assert not treated.done
    assert treated.error == f"{path}: another file took its name meanwhile"
    assert path.read_bytes() == right


def test_the_command(stack: list[Path]) -> None:
    killed_at(stack[-1], "unlink")
    program = [str(Path(sys.executable).with_name("snapchain")), "doctor", str(stack[-1]), "--json"]
    said = json.loads(subprocess.run([*program, "--dry-run"], check=True, capture_output=True).stdout)
    assert [finding["kind"] for finding in said["plan"]["findings"]] == ["interrupted-merge"]
    assert stack[1].exists()
    done = json.loads(subprocess.run(program, check=True, capture_output=True).stdout)
    assert done["treated"][0]["done"] is True
    assert names(stack[0].parent) == ["0.qcow2", "disk.qcow2"]
    journal_path(stack[-1]).write_text("{}")
    assert subprocess.run(program, check=False, capture_output=True).returncode == 10


# ---- restores


def test_what_a_killed_restore_has_left_is_found_told_and_removed(tmp_path: Path) -> None:
    for name in (".a.qcow2.snapchain-part-0123abcd", ".b.raw.snapchain-part"):
        (tmp_path / name).write_bytes(b"a part")
    planned = doctor.plan([tmp_path])
    assert [(each.kind, each.image.name) for each in planned.findings] == [
        (Kind.NEW_FILE, "a.qcow2"),
        (Kind.NEW_FILE, "b.raw"),
    ]
    assert all("restore that was not finished" in each.says for each in planned.findings)
    assert len(names(tmp_path)) == 2, "looking changes nothing"
    report = doctor.run(planned)
    assert report.well
    assert names(tmp_path) == []


def test_a_restore_at_work_is_left_alone(tmp_path: Path) -> None:
    with OutputFile(tmp_path / "a.qcow2") as output:
        (treated,) = treat(tmp_path).treated
        assert (treated.done, treated.error) == (False, f"{tmp_path}/a.qcow2: another snapchain is writing it")
        assert names(tmp_path) == [output.growing.name]
        output.publish(replaced=None)
    assert treat(tmp_path).treated == ()


def test_names_that_only_look_like_a_restores_are_left_alone(tmp_path: Path) -> None:
    victim, place = tmp_path / "victim", tmp_path / "d"
    place.mkdir()
    victim.write_bytes(b"precious")
    os.link(victim, place / ".a.raw.snapchain-part")
    (place / ".b.raw.snapchain-part").symlink_to(victim)
    os.mkfifo(place / ".c.raw.snapchain-part")
    (place / "d.raw.snapchain-part").write_bytes(b"no dot")
    assert treat(place).treated == ()
    assert len(names(place)) == 4
