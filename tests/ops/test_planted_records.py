"""Records that another user has planted beside images: root does nothing by them, outside or inside that directory."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Corrupt, InvalidInput
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.temporary_names import ACTIVE, MERGE, NEW, RESTORE, SNAPSHOT
from snapchain.image.dependent_search import find_dependents
from snapchain.merge import journal as journals, run as merge_run, step as merge_plan
from snapchain.merge.journal import FileId, MergeJournal, OpenJournal, journal_path
from snapchain.merge.request import MergeRequest
from snapchain.model.merging import Strategy
from snapchain.ops import doctor
from snapchain.ops.doctor import DoctorReport, Kind
from tests.host.others import ALICE, BOB, directory, file, open_host
from tests.ops.faulty_calls import killed_before
from tests.ops.stacks import Layer, MiB, build, flat, names, qemu_img, same

pytestmark = pytest.mark.root
__all__ = ["open_host"]

STACK = [Layer(MiB, [f"write -P {n + 1} {n * 64}k 128k"]) for n in range(4)]


@pytest.fixture
def stack(open_host: Path) -> list[Path]:
    """A chain in a directory of alice's."""
    paths = build(open_host / "vm", STACK)
    given_to_alice(open_host / "vm")
    return paths


def given_to_alice(place: Path) -> None:
    for path in (place, *place.iterdir()):
        os.lchown(path, ALICE, ALICE)


@pytest.fixture
def victim(open_host: Path) -> Path:
    """A file of root's that alice cannot reach."""
    return file(directory(open_host / "root-only", mode=0o700) / "precious", "precious")


def treat(*paths: Path, accept: tuple[Path, ...] = ()) -> DoctorReport:
    return doctor.run(doctor.plan(paths, accept=accept))


def id_of(path: Path) -> dict[str, object]:
    found = path.stat()
    return {"path": str(path), "device": found.st_dev, "inode": found.st_ino}


def honest(stack: list[Path]) -> dict[str, object]:
    """As of a merge past its switch, as version 0.1 wrote it."""
    return {
        "version": 2,
        "stage": "switching",
        "replaced": id_of(stack[-1]),
        "result": id_of(stack[-1]),
        "lowest": str(stack[1]),
        "link": None,
        "remove": [],
        "kept_as": None,
        "search": [],
    }


Hostile = Callable[[list[Path], Path], dict[str, object]]
HOSTILE: dict[str, Hostile] = {
    "removes a file elsewhere": lambda _, victim: {"remove": [id_of(victim)]},
    "removes one by way of ..": lambda stack, victim: {
        "remove": [{**id_of(victim), "path": f"{stack[0].parent}/../root-only/precious"}]
    },
    "removes one by a link": lambda stack, victim: {
        "remove": [{**id_of(victim), "path": str(planted_link(stack[0].parent / "way", victim.parent) / victim.name)}]
    },
    "removes the link's target": lambda stack, victim: {
        "remove": [{**id_of(victim), "path": str(planted_link(stack[0].parent / "link", victim))}]
    },
    "confirms what it removes": lambda _, victim: {"remove": [id_of(victim)], "confirmed": [str(victim)]},
    "has its top elsewhere": lambda _, victim: {
        "remove": [id_of(victim)], "top": str(victim.parent / "top"), "search": [str(victim.parent)]
    },
    "links there": lambda _, victim: {"remove": [id_of(victim)], "links": [str(victim)]},
    "gives a second name there": lambda stack, victim: {
        "result": {**id_of(victim), "path": str(stack[0].with_name("none"))},
        "replaced": {**id_of(victim), "path": str(stack[-1])},
        "kept_as": str(victim),
    },
    "adds to a file there": lambda stack, victim: {
        "stage": "absorbing", "replaced": {**id_of(victim), "path": str(stack[-1])}, "result": id_of(victim)
    },
    "begins there": lambda _, victim: {"stage": "committing", "result": id_of(victim), "lowest": str(victim)},
    "removes nothing that has a name": lambda _, __: {"remove": [{"path": "/x\0y", "device": 1, "inode": 2}]},
    "has numbers beyond all": lambda stack, _: {"replaced": {**id_of(stack[-1]), "inode": 10**4000}},
    "has a list without end": lambda stack, _: {"search": ["/"] * 100_000, "remove": [id_of(stack[1])] * 100_000},
    "has a mark that it made up": lambda _, victim: {"remove": [id_of(victim)], "mark": "0" * 64},
    "has a mark of another kind": lambda _, victim: {"remove": [id_of(victim)], "mark": {"a": [1]}},
}  # fmt: skip


def planted_link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    os.lchown(path, ALICE, ALICE)
    return path


def plant(path: Path, text: str, *, uid: int) -> Path:
    """uid 0: a guest's disk that root has restored into alice's directory, and alice has renamed."""
    return file(path, text, uid=uid, gid=uid)


@pytest.mark.parametrize("uid", [0, ALICE])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_planted_journal_is_told_and_does_nothing(what: str, uid: int, stack: list[Path], victim: Path) -> None:
    values = {**honest(stack), **HOSTILE[what](stack, victim)}
    path = plant(journal_path(stack[-1]), json.dumps(values), uid=uid)
    before = pictures(path.parent, victim)
    with pytest.raises((InvalidInput, Corrupt), match=r"journal") as caught:
        merge_plan.plan_step(MergeRequest(image=stack[-1]))
    assert (caught.value.subject, bool(caught.value.hint)) == (str(path), True)
    report = treat(stack[0].parent)
    assert [each.finding.kind for each in report.treated] == [Kind.UNREADABLE]
    assert not report.well
    assert pictures(path.parent, victim) == before
    # Whoever names it has looked at it. It still reaches nothing outside of its directory.
    report = treat(accept=(path,))
    assert victim.read_text() == "precious"
    assert names(victim.parent) == ["precious"]
    assert stat.S_IMODE(victim.stat().st_mode) == 0o600
    assert all(each.exists() for each in stack)


def pictures(*places: Path) -> list[tuple[str, int, int, int, int]]:
    """What stat tells of all that lies there."""
    paths = [path for place in places for path in ([place, *sorted(place.iterdir())] if place.is_dir() else [place])]
    found = [(str(path), path.lstat()) for path in paths]
    return [(name, each.st_ino, each.st_mode, each.st_uid, each.st_size) for name, each in found]


def no_file(kind: str) -> Callable[[Path, Path], None]:
    def make(path: Path, victim: Path) -> None:
        if kind == "link":
            path.symlink_to(victim)
        elif kind == "dangling link":
            path.symlink_to(victim.with_name("none"))
        elif kind == "FIFO":
            os.mkfifo(path)
        elif kind == "device":
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero: read to its end it has none
        elif kind == "directory":
            path.mkdir()
        elif kind == "hard link":
            os.link(victim, path)
        elif kind == "without end":
            path.touch()
            os.truncate(path, 1 << 40)
        else:
            path.write_text("[" * 100_000)
        if kind != "hard link":
            os.lchown(path, ALICE, ALICE)

    return make


KINDS = ["link", "dangling link", "FIFO", "device", "directory", "hard link", "without end", "nested"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_journal_is_told_at_once(kind: str, stack: list[Path], victim: Path) -> None:
    path = journal_path(stack[-1])
    no_file(kind)(path, victim)
    before = pictures(path.parent, victim.parent, victim)
    with pytest.raises((Corrupt, InvalidInput), match=r"journal|permission denied") as caught:
        merge_plan.plan_step(MergeRequest(image=stack[-1]))
    assert caught.value.subject == str(path)
    assert not treat(stack[0].parent).well
    assert not treat(accept=(path,)).well
    assert pictures(path.parent, victim.parent, victim) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("purpose", [MERGE, SNAPSHOT, RESTORE, ACTIVE, NEW])
def test_what_no_run_makes_stays_under_a_temporary_name(
    purpose: str, kind: str, stack: list[Path], victim: Path
) -> None:
    """A directory, FIFO, device, link, or a second name of a file: neither removed, nor emptied, nor a hindrance."""
    target = journal_path(stack[-1]) if purpose == NEW else stack[-1]
    path = target.with_name(f".{target.name}.{purpose}-0123abcd")
    no_file(kind)(path, victim)
    left = kind in {"without end", "nested"} and purpose != ACTIVE
    report = treat(stack[0].parent)
    assert report.well
    assert [path for each in report.treated for path in each.removed] == ([path] if left else [])
    assert victim.read_text() == "precious"
    assert os.path.lexists(path) != left
    report_of_merge = merge_run.run_step(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=Strategy.NEW)))
    assert report_of_merge.removed == (stack[2], stack[1])
    assert victim.read_text() == "precious"
    assert os.path.lexists(path) != left


def test_a_leftover_that_somebody_has_open_stays(stack: list[Path]) -> None:
    """A guest was started on it, or a user writes to it."""
    left = stack[-1].with_name(".disk.qcow2.merge-0123abcd")
    left.write_bytes(b"x" * 512)
    with ImageLock(left, LockMode.WRITE):
        (treated,) = treat(left.parent).treated
        assert "has it" in (treated.error or "")
        assert left.exists()
    assert treat(left.parent).well
    assert not left.exists()


# ---- our own journals


@pytest.fixture
def killed(open_host: Path) -> list[Path]:
    """A chain of root's in a directory of alice's, whose merge was killed past its switch."""
    paths = build(open_host / "vm", STACK)
    killed_before(
        lambda: merge_run.run_step(merge_plan.plan_step(MergeRequest(image=paths[-1], strategy=Strategy.NEW))),
        paths[0].parent,
        "unlink",
    )
    given_to_alice(open_host / "vm")
    return paths


def test_our_own_is_finished_whoever_owns_the_directory(killed: list[Path], open_host: Path) -> None:
    reference = flat(killed[-1], open_host / "flat")
    assert treat(killed[0].parent).well
    assert names(killed[0].parent) == ["0.qcow2", "disk.qcow2"]
    assert same(killed[-1], reference)


def bent(values: object) -> list[object]:
    """All that differs from a JSON value in one place."""
    if isinstance(values, dict):
        found: list[object] = [{**values, "more": 1}]
        for key, value in values.items():
            found += [{**values, key: each} for each in bent(value)]
            found.append({each: rest for each, rest in values.items() if each != key})
        return found
    if isinstance(values, list):
        found = [[*values, 1], values[1:]] if values else [[1]]
        return found + [
            [*values[:at], each, *values[at + 1 :]] for at, value in enumerate(values) for each in bent(value)
        ]
    if isinstance(values, int):
        return [values + 1]
    return ["other"] if values is None else [None, f"{values}x"]


def test_no_alteration_of_our_own_is_believed(killed: list[Path]) -> None:
    path = journal_path(killed[-1])
    values = json.loads(path.read_bytes())
    before = names(path.parent)
    altered = bent(values)
    assert len(altered) > 40
    for each in altered:
        path.write_text(json.dumps(each))
        with pytest.raises((Corrupt, InvalidInput), match="journal"):
            journals.read(path)
    path.write_text(json.dumps(altered[0]))
    assert not treat(path.parent).well
    assert names(path.parent) == before
    path.write_text(json.dumps(dict(reversed(values.items()))))  # the same, in another order
    assert treat(path.parent).well


def test_a_journal_of_another_directory_is_not_believed(killed: list[Path], open_host: Path) -> None:
    """Also where the same files are: alice may rename her directories."""
    other = open_host / "other"
    killed[0].parent.rename(other)
    with pytest.raises(Corrupt, match="another directory's merge"):
        journals.read(other / journal_path(killed[-1]).name)
    other.rename(killed[0].parent)
    copy = killed[0].parent.rename(open_host / "copy")
    killed[0].parent.mkdir()
    for path in copy.iterdir():
        os.link(path, killed[0].with_name(path.name))
    with pytest.raises(InvalidInput, match="did not write on this host"):
        journals.read(journal_path(killed[-1]))


def test_without_its_key_a_journal_is_told_and_accepted_by_name(
    killed: list[Path], open_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state directory is lost, or it is another host's on shared storage."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another state"))
    reference = flat(killed[-1], open_host / "flat")
    path = journal_path(killed[-1])
    (treated,) = treat(path.parent).treated
    assert (treated.finding.kind, treated.done) == (Kind.UNREADABLE, False)
    assert "--accept" in (treated.hint or "")
    report = treat(accept=(path,))
    assert report.well
    assert report.treated[0].removed == (killed[2], killed[1])
    assert same(killed[-1], reference)
    assert not path.exists()


def test_a_merge_that_cannot_mark_its_journal_says_so(
    stack: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "no directory").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "no directory"))
    monkeypatch.setattr("snapchain.host.records.SYSTEM_STATE", tmp_path / "no directory" / "either")
    said: list[str] = []
    report = merge_run.run_step(
        merge_plan.plan_step(MergeRequest(image=stack[-1])), on_event=lambda event: said.append(str(event))
    )
    assert report.removed
    assert any("its journal bears no mark" in each for each in said)


def test_an_input_that_was_written_to_since_stays_and_what_it_stands_on(killed: list[Path]) -> None:
    with killed[2].open("r+b") as upper:
        upper.seek(0, os.SEEK_END)
        upper.write(b"\0" * 512)
    (treated,) = treat(killed[0].parent).treated
    assert treated.removed == ()
    assert {each.path.name: each.reason for each in treated.kept} == {
        "2.qcow2": "it was written to after the merge",
        "1.qcow2": "2.qcow2 may depend on it",
    }


def test_a_later_file_with_the_number_of_an_input_stays(killed: list[Path]) -> None:
    """A filesystem gives the number of an inode that went to the next file."""
    journal = journals.read(journal_path(killed[-1]))
    killed[1].unlink()
    later = file(killed[1], "a guest's disk that was restored", uid=ALICE)
    found = FileId.of(later)
    assert found.born_ns is not None, "this filesystem tells when a file was made"
    entry = next(each for each in journal.remove if each.path == later)
    same_number = entry.model_copy(update={"inode": found.inode, "size": found.size, "mtime_ns": found.mtime_ns})
    others = tuple(each for each in journal.remove if each.path != later)
    OpenJournal(journal.model_copy(update={"remove": (*others, same_number)})).close()
    assert treat(later.parent).treated[0].removed == (killed[2],)
    assert later.read_text() == "a guest's disk that was restored"


@pytest.mark.parametrize("put", [lambda path: path.mkdir(), lambda path: path.symlink_to("/etc/passwd"), os.mkfifo])
def test_what_took_the_name_of_an_input_stays(put: Callable[[Path], None], killed: list[Path]) -> None:
    killed[1].unlink()
    put(killed[1])
    assert treat(killed[0].parent).treated[0].removed == (killed[2],)
    assert os.path.lexists(killed[1])


def test_what_takes_the_name_of_an_input_at_the_last_moment_stays(
    killed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:

    def swapped(*arguments: Any, **named: Any) -> Any:
        found = find_dependents(*arguments, **named)
        killed[1].rename(killed[1].with_name("moved"))
        file(killed[1], "another", uid=ALICE)
        return found

    monkeypatch.setattr("snapchain.merge.settle.find_dependents", swapped)
    assert treat(killed[0].parent).treated[0].removed == (killed[2],)
    assert killed[1].read_text() == "another"


def test_a_second_name_of_an_overlay_hides_no_user_of_an_input(stack: list[Path]) -> None:
    """As if it were a leftover, whose backing file nobody needs."""
    clone = stack[1].with_name("clone.qcow2")
    qemu_img("create", "-q", "-f", "qcow2", "-b", stack[1].name, "-F", "qcow2", clone)
    os.link(clone, stack[1].with_name(".disk.qcow2.merge-0123abcd"))
    report = merge_run.run_step(merge_plan.plan_step(MergeRequest(image=stack[-1], strategy=Strategy.NEW)))
    assert report.removed == (stack[2],)
    assert [each.path for each in report.kept] == [stack[1]]


def test_a_reboot_that_changes_the_number_of_the_device_changes_nothing(killed: list[Path]) -> None:
    journal = journals.read(journal_path(killed[-1]))

    def moved(entry: FileId) -> FileId:
        return entry.model_copy(update={"device": entry.device + 1})

    after = {"replaced": moved(journal.replaced), "result": moved(journal.result)}
    OpenJournal(journal.model_copy(update={**after, "remove": tuple(map(moved, journal.remove))})).close()
    (treated,) = treat(killed[0].parent).treated
    assert (treated.error, treated.kept, treated.removed) == (None, (), (killed[2], killed[1]))


def test_what_a_journal_may_name_has_bounds() -> None:
    values: dict[str, object] = {"path": "/a", "device": 1, "inode": 2}
    for wrong in ({"path": "a"}, {"path": "/a/../b"}, {"inode": -1}, {"inode": 1 << 64}, {"mtime_ns": 1 << 70}):
        with pytest.raises(ValueError, match=r"path|inode|mtime_ns"):
            FileId.model_validate({**values, **wrong})
    whole = {"stage": "switching", "replaced": values, "result": values, "lowest": "/a", "link": None}
    assert MergeJournal.model_validate(whole).path == Path("/.snapchain-merge-a.json")
    for outside in ({"kept_as": "/b/c"}, {"result": {**values, "path": "/b/c"}}):
        with pytest.raises(ValueError, match="another directory"):
            MergeJournal.model_validate({**whole, **outside})


def test_another_users_live_merge_is_left_alone_even_when_its_record_is_accepted(killed: list[Path]) -> None:
    import fcntl

    path = journal_path(killed[-1])
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        (treated,) = treat(accept=(path,)).treated
        assert "another merge" in (treated.error or "")
    os.chown(path, BOB, BOB)
    assert treat(path.parent).well, "it bears our mark, whoever owns the file"
