"""Notes beside images that somebody else wrote, or may have written: what they forbid, and that they do no more."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError
from snapchain.image import scan
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.ops import doctor, hold
from snapchain.ops.doctor import Kind
from snapchain.ops.inspect import inspect_image
from snapchain.ops.migrate.request import MigrateRequest, Move
from snapchain.ops.migrate.run import migrate, plan_take_back, take_back
from snapchain.ops.nightly.state import read_state
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.source import notes, ownership, sealing as snapshot
from snapchain.source.lineage import seal
from snapchain.source.notes import Given, Hold, LayerNote, Notes, Overlay
from tests.host.others import ALICE, BOB, KVM, directory, file, open_host, root_only
from tests.ops.stacks import Layer, MiB, build
from tests.ops.test_group_shared import as_user

pytestmark = pytest.mark.root
__all__ = ["open_host"]

NOW = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
STACK = [Layer(MiB, [f"write -P {n + 1} {n * 64}k 128k"]) for n in range(3)]
EVIL = "x; touch /tmp/pwned\x1b]0;"


def image(place: Path, *, uid: int = 0) -> Path:
    return file(place / "vm.qcow2", uid=uid, gid=uid, mode=0o640)


def note_of(path: Path, **values: Any) -> Path:
    """A note that somebody has written by hand, with all that one may say."""
    found = path.stat()
    given = {
        "destination": f"dir:{EVIL}", "disk": "d`id`", "epoch": 2, "token": "0" * 32, "time": NOW.isoformat(),
        "overlay": {"name": "v", "layer": "0" * 32, "virtual_size": MiB, "cluster_size": 65536, "extended_l2": False},
        "together": ["d`id`"], "mode": 0o6777, "confirmed": True, "started": False,
    }  # fmt: skip
    sealed = {"inode": found.st_ino, "size": found.st_size, "mtime_ns": found.st_mtime_ns, "ctime_ns": 0}
    note = {
        "version": 1, "name": path.name, "inode": found.st_ino, "size": found.st_size, "mtime_ns": found.st_mtime_ns,
        "holds": [{"tag": EVIL, "since": NOW.isoformat(), "reason": EVIL, "word_of": {"user": "root", "note": "/x"}}],
        "sealed": {"time": NOW.isoformat(), "labels": ["golden"], "file": sealed},
        "merged": [{"made": sealed, "of": [sealed]}],
        "epoch": 7,
        "given": given,
    }  # fmt: skip
    where = path.with_name(f".snapchain-layer-{path.name}-{found.st_ino}.json")
    where.write_text(json.dumps({**note, **values}))
    return where


def counts(path: Path) -> tuple[bool, bool, bool]:
    """Whether a note counts as ours, for what it forbids, or is ignored."""
    read = Notes()
    note = read.of(path)
    ours = note.sealed is not None or bool(note.merged) or note.epoch > 1
    return ours, bool(note.holds or note.given), bool(read.ignored([path]))


OURS, WORD, IGNORED, NOTHING = (True, True, False), (False, True, False), (False, False, True), (False, False, False)
# (owner and mode of the directory, owner of the image, owner and mode of the note) -> what it counts for, to root
TABLE = [
    ((0, 0o755), 0, (0, 0o644), OURS),
    ((0, 0o755), ALICE, (0, 0o644), OURS),
    ((0, 0o1777), 0, (0, 0o644), OURS),
    ((0, 0o755), 0, (0, 0o666), WORD),  # whoever wrote to it
    ((0, 0o777), 0, (0, 0o644), WORD),  # renamed into place, or another host's
    ((ALICE, 0o755), ALICE, (0, 0o644), WORD),
    ((ALICE, 0o755), 0, (0, 0o644), WORD),
    ((ALICE, 0o755), ALICE, (ALICE, 0o644), WORD),
    ((ALICE, 0o755), BOB, (ALICE, 0o644), WORD),  # libvirt gives an image away while its guest runs
    ((0, 0o1777), ALICE, (ALICE, 0o644), WORD),
    ((0, 0o777), ALICE, (ALICE, 0o644), WORD),
    ((ALICE, 0o755), 0, (ALICE, 0o644), IGNORED),
    ((0, 0o1777), 0, (ALICE, 0o644), IGNORED),
    ((0, 0o777), 0, (ALICE, 0o644), IGNORED),
    ((0, 0o777), BOB, (ALICE, 0o644), IGNORED),
    ((ALICE, 0o777), ALICE, (BOB, 0o644), IGNORED),
    ((ALICE, 0o777), 0, (BOB, 0o666), IGNORED),
]


@pytest.mark.parametrize(("place", "of_image", "of_note", "wanted"), TABLE)
def test_what_a_note_counts_for_to_root(
    place: tuple[int, int], of_image: int, of_note: tuple[int, int], wanted: tuple[bool, ...], open_host: Path
) -> None:
    there = directory(open_host / "d", uid=place[0], mode=place[1])
    path = image(there, uid=of_image)
    note = note_of(path)
    os.chown(note, of_note[0], of_note[0])
    note.chmod(of_note[1])
    assert counts(path) == wanted
    read = Notes().of(path)
    word = wanted == WORD
    assert [each.tag for each in read.holds] == ([EVIL.replace("\x1b", "?")] if word else [EVIL] * wanted[0])
    assert [each.reason for each in read.holds] == ([""] if word else [EVIL] * wanted[0])
    words = [each.word_of for each in read.holds] + ([read.given.word_of] if read.given else [])
    assert all((each is not None) == word for each in words)


def test_a_note_of_roots_may_have_been_put_there_by_a_group_or_by_a_second_name(open_host: Path) -> None:
    groups = directory(open_host / "groups", gid=KVM, mode=0o775)
    shared = directory(open_host / "shared", mode=0o1777)
    for there in (groups, shared):
        note = note_of(image(there))
        if there == shared:
            assert counts(there / "vm.qcow2") == OURS
            os.link(note, open_host / "second")
        assert counts(there / "vm.qcow2") == WORD


@pytest.mark.parametrize(("place", "of_image", "of_note", "wanted"), TABLE)
def test_an_unreadable_note_stops_only_whom_it_may(
    place: tuple[int, int], of_image: int, of_note: tuple[int, int], wanted: tuple[bool, ...], open_host: Path
) -> None:
    there = directory(open_host / "d", uid=place[0], mode=place[1])
    path = image(there, uid=of_image)
    note = note_of(path)
    note.write_text("{nonsense")
    os.chown(note, of_note[0], of_note[0])
    read = Notes()
    assert [bool(read.faults([path])), bool(read.ignored([path]))] == [wanted != IGNORED, wanted == IGNORED]
    assert all(str(fault.subject) == str(note) and fault.hint for fault in read.faults([path]))


def test_marked_notes_of_roots_count_in_everybodys_directory(open_host: Path) -> None:
    """Whoever owns the file: root's own are alice's where root acts with her rights."""
    for number, (uid, mode) in enumerate([(ALICE, 0o755), (0, 0o777), (0, 0o1777)]):
        there = directory(open_host / str(number), uid=uid, mode=mode)
        path = image(there)
        seal(path, labels=("golden",), time=NOW)
        (note,) = [each for each in there.iterdir() if each != path]
        for owner in (0, ALICE, BOB):
            os.chown(note, owner, owner)
            assert Notes().of(path).sealed is not None
        text = note.read_text()
        note.write_text(text.replace("golden", "purple"))
        assert Notes().of(path).sealed is None
        note.write_text(text)
        os.chown(note, 0, 0)
        elsewhere = directory(open_host / f"{number}x", uid=ALICE)
        os.link(path, elsewhere / path.name)
        shutil.copy(note, elsewhere / note.name)
        assert Notes().of(elsewhere / path.name).sealed is None, "a mark is of one directory"


def test_our_note_stands_beside_anothers_and_never_takes_over_what_that_says(open_host: Path) -> None:
    there = directory(open_host / "d", uid=ALICE)
    path = image(there, uid=ALICE)
    theirs = note_of(path)
    os.chown(theirs, ALICE, ALICE)
    before = theirs.read_bytes()
    hold.hold_image(path, "mine")
    assert theirs.read_bytes() == before
    (ours,) = [each for each in there.iterdir() if each not in (path, theirs)]
    said = json.loads(ours.read_bytes())
    assert [each["tag"] for each in said["holds"]] == ["mine"]
    assert (said["given"], said["merged"], said["sealed"], said["epoch"]) == (None, [], None, 1)
    assert len(Notes().of(path).holds) == 2
    with pytest.raises(Conflict, match="a note of user 40101 says that it is held") as caught:
        hold.release_image(path, EVIL.replace("\x1b", "?"))
    assert str(theirs) in (caught.value.hint or "")
    hold.release_image(path, "mine")
    assert sorted(there.iterdir()) == sorted([path, theirs])
    Notes().sweep(there)
    path.unlink()
    Notes().sweep(there)
    assert theirs.exists(), "not ours to sweep"


def request(path: Path) -> MigrateRequest:
    return MigrateRequest(moves=[Move(path, "d")])


def endpoint(place: Path) -> DirectoryEndpoint:
    return DirectoryEndpoint(directory(place))


@pytest.fixture
def alices(open_host: Path) -> list[Path]:
    """A chain of alice's."""
    chain = build(open_host / "vm", STACK)
    for path in (chain[0].parent, *chain):
        os.chown(path, ALICE, ALICE)
    return chain


def verbs(path: Path, place: Path) -> dict[str, Callable[[], object]]:
    def of_chain(work: Callable[[Any], object]) -> Callable[[], object]:
        def run() -> None:
            with scan(path) as chain:
                work(chain)

        return run

    there = endpoint(place)
    return {
        "snapshot": lambda: snapshot.plan(path),
        "merge": lambda: merge_plan.plan_step(MergeRequest(image=path)),
        "migrate": lambda: migrate(request(path), there),
        "take back": lambda: take_back(request(path), there, unasked=True),
        "plan a take back": lambda: plan_take_back(request(path), there),
        "check": of_chain(ownership.check_not_given),
        "look": of_chain(lambda chain: ownership.given(chain, Notes())),
    }


def told(error: SnapchainError) -> str:
    return f"{error} {error.hint}"


@pytest.mark.parametrize("verb", ["snapshot", "merge", "migrate", "take back", "plan a take back", "check", "look"])
def test_a_disk_that_its_owner_says_was_given_is_refused_in_one_sentence(
    verb: str, alices: list[Path], tmp_path: Path
) -> None:
    """Without any word of that note: no command, no address, no mode."""
    note = note_of(alices[-1], holds=[])
    os.chown(note, ALICE, ALICE)
    work = verbs(alices[-1], tmp_path / "replica")[verb]
    with pytest.raises(
        Conflict, match=f"a note of user {ALICE} says that this disk was given to another host"
    ) as caught:
        work()
    assert str(note) in (caught.value.hint or "")
    assert not [word for word in ("touch", "`id`", "migrate", "dir:", "\x1b") if word in told(caught.value)]
    assert stat.S_IMODE(alices[-1].stat().st_mode) == 0o644
    note.unlink()  # the remedy
    snapshot.plan(alices[-1])


def test_a_stranger_s_note_changes_nothing_that_root_does(open_host: Path) -> None:
    there = directory(open_host / "d", mode=0o1777)
    chain = build(there, STACK)
    for path in chain:
        os.chown(note_of(path), BOB, BOB)
    plain = build(directory(open_host / "plain"), STACK)
    said: list[str] = []
    report = merge_run.run_step(
        merge_plan.plan_step(MergeRequest(image=chain[-1])), on_event=lambda event: said.append(str(event))
    )
    other = merge_run.run_step(merge_plan.plan_step(MergeRequest(image=plain[-1])))
    assert [each.name for each in report.removed] == [each.name for each in other.removed]
    assert sum(f"a note of user {BOB}" in each for each in said) == 3
    assert not [each for each in said if "touch" in each]
    made = snapshot.run(snapshot.plan(chain[-1]))
    with scan(chain[-1]) as opened:
        assert ownership.epoch_of(opened, Notes()) == 1
        assert ownership.mark_of(opened, Notes()) is None
    assert [sentence for sentence in inspect_image(chain[-1]).findings if f"user {BOB}" in sentence]
    assert Notes().of(made.sealed).epoch == 1


@pytest.mark.parametrize(("noted", "after"), [(0o6777, 0o666), (0o640, 0o640), (0, 0o644), (0o111, 0o644)])
def test_no_note_gives_more_than_the_rights_to_read_and_write(noted: int, after: int, open_host: Path) -> None:
    """Not our own either: it may be one of an older version, or accepted unread."""
    there = directory(open_host / "d")
    path = build(there, STACK[:1])[0]
    mark = Given(
        destination="dir:/x", disk="d", epoch=2, token="t", time=NOW, together=("d",), mode=noted,
        overlay=Overlay(name="v", layer="l", virtual_size=MiB, cluster_size=65536, extended_l2=False),
    )  # fmt: skip
    Notes().change(path, lambda note: note.model_copy(update={"given": mark}))
    path.chmod(0o444)
    with scan(path) as chain:
        ownership.unfence(chain, "t")
    assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(after)


def test_the_token_of_a_handover_is_read_by_nobody_else(open_host: Path) -> None:
    path = build(directory(open_host / "d"), STACK[:1])[0]
    mark = Given(
        destination="dir:/x", disk="d", epoch=2, token="t", time=NOW, together=("d",),
        overlay=Overlay(name="v", layer="l", virtual_size=MiB, cluster_size=65536, extended_l2=False),
    )  # fmt: skip
    with scan(path) as chain:
        ownership.fence(chain, mark)
    (note,) = [each for each in path.parent.iterdir() if each != path]
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o444


# ---- what is no note


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 30)


def plants(path: Path, victim: Path) -> dict[str, Callable[[], object]]:
    return {
        "link": lambda: path.symlink_to(victim),
        "FIFO": lambda: os.mkfifo(path),
        "device": lambda: os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5)),
        "directory": path.mkdir,
        "hard link": lambda: os.link(victim, path),
        "without end": lambda: sparse(path),
        "padded": lambda: path.write_text('{"version": 1, "name": "vm.qcow2", "inode": 1}' + " " * (5 * MiB)),
        "nested": lambda: path.write_text("[" * 1_000_000),
        "deep": lambda: path.write_text('{"a":' * 1_000_000),
        "a long number": lambda: path.write_text('{"inode":' + "1" * 1_000_000 + "}"),
        "no object": lambda: path.write_text("[]"),
        "no UTF-8": lambda: path.write_bytes(b"\xff{}"),
        "half a character": lambda: path.write_text('{"name": "\\udcff"}'),
        "no number": lambda: path.write_text('{"version": NaN}'),
    }


@pytest.mark.parametrize("kind", list(plants(Path(), Path())))
@pytest.mark.parametrize("uid", [0, ALICE])
def test_what_is_no_note_is_told_at_once(kind: str, uid: int, open_host: Path) -> None:
    there = directory(open_host / "d", uid=ALICE)
    victim = file(directory(open_host / "root-only", mode=0o700) / "precious", "precious")
    path = image(there, uid=ALICE)
    note = there / f".snapchain-layer-vm.qcow2-{path.stat().st_ino}.json"
    plants(note, victim)[kind]()
    if kind != "hard link":
        os.lchown(note, uid, uid)
    (fault,) = Notes().faults([path])
    assert isinstance(fault, SnapchainError)
    assert fault.subject in (str(note), str(path))
    with pytest.raises((Corrupt, InvalidInput), match=r"not the note|permission denied|regular file"):
        Notes().accept(note)
    hold.hold_image(path, "mine")
    assert [each.tag for each in Notes().of(path).holds] == ["mine"]
    assert (victim.read_text(), stat.S_IMODE(victim.stat().st_mode)) == ("precious", 0o600)


BOUNDS: list[dict[str, Any]] = [
    {"inode": 1 << 64}, {"inode": -2}, {"size": 1 << 70}, {"mtime_ns": -(1 << 70)}, {"epoch": 0},
    {"epoch": (1 << 31) + 1},
    {"name": "n" * 256}, {"version": 2}, {"holds": [{"tag": "t" * 256, "since": NOW.isoformat()}]},
    {"holds": [{"tag": "t", "since": NOW.isoformat(), "reason": "r" * 65537}]},
    {"holds": [{"tag": "t", "since": NOW.isoformat()}] * 10_001},
    {"sealed": {"time": NOW.isoformat(), "labels": ["l"] * 10_001, "file": {}}},
]  # fmt: skip


@pytest.mark.parametrize("values", BOUNDS)
def test_what_a_note_may_say_has_bounds(values: dict[str, Any], open_host: Path) -> None:
    path = image(directory(open_host / "d"))
    note_of(path, **values)
    (fault,) = Notes().faults([path])
    assert isinstance(fault, Corrupt)


def test_more_notes_of_others_than_anybody_needs_are_not_read(open_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "_MOST_FOREIGN", 5)
    there = directory(open_host / "d", uid=ALICE)
    path = image(there, uid=ALICE)
    for number in range(10):
        file(there / f".snapchain-layer-x-{number}.json", "{}", uid=ALICE)
    faults = Notes().faults([path])
    assert "too many notes of other users" in str(faults[-1])
    assert len(faults) == 6


def test_a_lock_that_somebody_keeps_on_the_directory_does_not_stop_a_note(
    open_host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any user who may read it can take that lock, for ever."""
    monkeypatch.setattr(notes, "_LOCK_TRIES", 2)
    path = image(directory(open_host / "d"))
    fd = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    hold.hold_image(path, "mine")
    os.close(fd)
    assert [each.tag for each in Notes().of(path).holds] == ["mine"]


def test_what_a_merge_keeps_of_its_lineage_has_a_bound(open_host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notes, "_MOST_MERGED", 2)
    path = image(directory(open_host / "d"))
    note_of(path)
    merged = Notes().of(path).merged * 5
    Notes().change(path, lambda note: note.model_copy(update={"merged": merged}))
    assert Notes().of(path).merged == merged[:2]


# ---- the doctor


def test_the_doctor_tells_of_doubtful_notes_and_accepts_one_by_name(alices: list[Path]) -> None:
    """Such as those of version 0.1, which had no mark."""
    place = alices[0].parent
    note = note_of(alices[1], given=None)
    (finding,) = doctor.plan([place]).findings
    assert (finding.kind, finding.path, finding.image) == (Kind.NOTE, note, alices[1])
    assert doctor.run(doctor.plan([place])).well
    assert Notes().of(alices[1]).sealed is None
    report = doctor.run(doctor.plan([], accept=[note]))
    assert report.well
    sealed = Notes().of(alices[1]).sealed
    assert sealed is not None
    assert sealed.labels == ("golden",)
    assert doctor.plan([place]).findings == ()
    with pytest.raises(NotFound, match=r"disk.qcow2: neither a merge's journal nor a layer's note"):
        doctor.plan([], accept=[alices[-1]])
    with pytest.raises(NotFound, match="no such file"):
        doctor.plan([], accept=[place / ".snapchain-layer-none-1.json"])


# ---- the owner's own


@root_only
def test_the_images_unprivileged_owner_has_all_as_before() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        there = directory(place / "d", uid=ALICE)
        path = image(there, uid=ALICE)

        def work() -> None:
            os.environ["XDG_STATE_HOME"] = str(there / "state")
            seal(path, labels=("golden",), time=NOW)
            hold.hold_image(path, "mine")
            note = Notes().of(path)
            assert note.sealed is not None
            assert [each.word_of for each in note.holds] == [None]
            (there / "state" / "snapchain" / "records.key").unlink()  # a lost key costs nothing here
            assert Notes().of(path) == note
            hold.release_image(path, "mine")

        as_user(ALICE, work, groups=())
        # Root's, in alice's directory, for alice.
        hold.hold_image(path, "roots")

        def look() -> None:
            assert [(each.tag, each.word_of) for each in Notes().of(path).holds] == [("roots", None)]

        as_user(ALICE, look, groups=())
        assert isinstance(Notes().of(path), LayerNote)
        assert Hold(tag="a", since=NOW).model_dump_json() == '{"tag":"a","since":"2026-05-04T03:02:01Z","reason":""}'


@pytest.mark.parametrize(("of_place", "of_file", "mode"), [(ALICE, 0, 0o600), (0, ALICE, 0o600), (0, 0, 0o666)])
def test_state_that_another_user_may_have_written_is_not_read(
    of_place: int, of_file: int, mode: int, open_host: Path
) -> None:
    """It would leave disks out of a night."""
    path = file(directory(open_host / "d", uid=of_place) / "state.json", "{}", uid=of_file, mode=mode)
    with pytest.raises(InvalidInput, match=r"state\.json: another user may have written it"):
        read_state(path)
    own = file(directory(open_host / "own") / "state.json", "{}")
    assert read_state(own) is not None
