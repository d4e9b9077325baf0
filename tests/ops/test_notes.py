"""Notes beside layer files: they follow their file, lose no hold, and are believed only where they are ours."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from snapchain.errors import NotFound
from snapchain.image import scan
from snapchain.source import sealing as snapshot
from snapchain.source.lineage import seal, sealed_at
from snapchain.source.notes import Hold, LayerNote, Notes
from tests.ops.stacks import Layer, build, names

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)


def hold(path: Path, tag: str = "audit") -> None:
    Notes().change(path, lambda note: note.model_copy(update={"holds": (*note.holds, Hold(tag=tag, since=NOW))}))


def tags(path: Path) -> list[str]:
    return [each.tag for each in Notes().of(path).holds]


def notes_in(directory: Path) -> list[Path]:
    return [entry for entry in directory.iterdir() if entry.name not in names(directory)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "web1.qcow2"
    path.write_bytes(b"x")
    return path


def test_a_note_follows_its_file_through_a_rename(file: Path) -> None:
    hold(file)
    moved = file.rename(file.with_name("web1.1.qcow2"))
    file.write_bytes(b"another file under the old name")
    assert tags(moved) == ["audit"]
    assert tags(file) == []
    hold(file, "other")
    hold(moved, "more")
    assert (tags(file), tags(moved)) == (["other"], ["audit", "more"])
    assert len(notes_in(file.parent)) == 2


def test_one_note_for_all_names_of_a_file(file: Path) -> None:
    """While it is sealed, a file has its old name and its new one."""
    hold(file)
    other = file.with_name("web1.1.qcow2")
    os.link(file, other)
    assert tags(other) == tags(file) == ["audit"]
    seal(other, labels=("a",), time=NOW)
    assert len(notes_in(file.parent)) == 1
    assert tags(other) == tags(file) == ["audit"]
    file.unlink()
    file.write_bytes(b"the next one")
    sealed = Notes().of(other)
    assert (tags(other), tags(file), sealed.sealed and sealed.sealed.labels) == (["audit"], [], ("a",))


def test_a_note_that_says_nothing_is_no_file(file: Path) -> None:
    hold(file)
    assert len(notes_in(file.parent)) == 1
    Notes().change(file, lambda note: note.model_copy(update={"holds": ()}))
    assert notes_in(file.parent) == []


def test_a_copied_directory_keeps_its_holds(file: Path, tmp_path: Path) -> None:
    hold(file)
    note = notes_in(tmp_path)[0]
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / file.name).write_bytes(b"x")
    (other / note.name).write_bytes(note.read_bytes())
    assert tags(other / file.name) == ["audit"]
    hold(other / file.name, "more")
    assert tags(other / file.name) == ["audit", "more"]
    assert len(notes_in(other)) == 1


def test_a_copied_directory_with_the_same_numbers_keeps_its_holds_where_they_were(tmp_path: Path) -> None:
    """Numbers of inodes are used again: here two files have changed theirs."""
    one, two = tmp_path / "1.qcow2", tmp_path / "2.qcow2"
    one.write_bytes(b"one")
    two.write_bytes(b"two, longer")
    hold(one)
    old = one.stat()
    one.rename(tmp_path / "x")
    two.rename(one)
    (tmp_path / "x").rename(two)
    one.write_bytes(b"one")
    os.utime(one, ns=(old.st_atime_ns, old.st_mtime_ns))
    two.write_bytes(b"two, longer")
    assert (tags(one), tags(two)) == (["audit"], [])
    hold(one, "more")
    assert (tags(one), tags(two)) == (["audit", "more"], [])
    assert len(notes_in(tmp_path)) == 1


def test_notes_of_files_that_are_gone_are_swept_but_for_holds(file: Path) -> None:
    gone = file.with_name("gone.qcow2")
    gone.write_bytes(b"y")
    seal(gone, labels=("a",), time=NOW)
    hold(file)
    (file.parent / f"..snapchain-layer-{file.name}-7.json.new-0123abcd").write_bytes(b"{")
    gone.unlink()
    away = file.rename(file.parent.parent / "away.qcow2")
    Notes().sweep(file.parent)
    assert len(notes_in(file.parent)) == 1
    away.rename(file)
    assert tags(file) == ["audit"]
    file.unlink()
    Notes().change(file, lambda note: note.model_copy(update={"holds": ()}))
    assert notes_in(file.parent) == []
    with pytest.raises(NotFound, match="no such file"):
        hold(file)


def test_who_else_could_have_written_a_note_can_hold_and_nothing_more(file: Path) -> None:
    seal(file, labels=("golden",), time=NOW)
    hold(file)
    Notes().change(file, lambda note: note)
    assert Notes().of(file).sealed is not None
    notes_in(file.parent)[0].chmod(0o666)
    assert Notes().of(file).sealed is None
    assert tags(file) == ["audit"]


def test_a_note_that_cannot_be_read_is_told(file: Path) -> None:
    hold(file)
    notes_in(file.parent)[0].write_bytes(b"{nonsense")
    found = Notes()
    assert found.of(file) == LayerNote(name=file.name, inode=file.stat().st_ino)
    assert "not the note of a layer" in str(found.faults([file])[0])


def test_a_symbolic_link_is_no_note(file: Path, tmp_path: Path) -> None:
    hold(file)
    note = notes_in(file.parent)[0]
    elsewhere = note.rename(tmp_path.parent / f"planted-{tmp_path.name}")
    note.symlink_to(elsewhere)
    assert tags(file) == []
    assert Notes().faults([file])


def test_a_snapshot_notes_its_time_and_labels(tmp_path: Path) -> None:
    image = build(tmp_path / "vm", [Layer(writes=["write -P 1 0 64k"])])[0]
    os.utime(image, ns=(0, 1_000_000_000_000_000_000))
    before = datetime.now(UTC)
    made = snapshot.run(snapshot.plan(image, labels=("golden", "tuesday")))
    with scan(image) as chain:
        when, labels = sealed_at(chain.files[0], Notes().of(made.sealed))
        assert before <= when <= datetime.now(UTC)
        assert labels == ("golden", "tuesday")
        assert sealed_at(chain.files[0], LayerNote(name="", inode=0))[0].year == 2001
    os.utime(made.sealed, ns=(0, 1_000_000_001_000_000_000))  # somebody wrote to it
    with scan(image) as chain:
        assert sealed_at(chain.files[0], Notes().of(made.sealed)) == (datetime.fromtimestamp(1_000_000_001, UTC), ())
