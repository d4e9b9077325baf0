"""After a local merge, a shipment knows the parts again that a destination has."""

from __future__ import annotations

from pathlib import Path

import pytest

from snapchain.image import scan
from snapchain.merge import run as merge_run, step as merge_plan
from snapchain.merge.request import MergeRequest
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.inventory import Collapse, Diverged, Held, Send, Wanted, missing
from snapchain.model.merging import Strategy
from snapchain.objects.memory import MemoryStore
from snapchain.repository.repository import Repository
from snapchain.source import sealing as snapshot
from snapchain.source.lineage import merged_files, wanted
from snapchain.source.notes import MergedFile, Notes
from tests.ops.shipping import restore, same_bytes, ship
from tests.ops.stacks import Layer, MiB, build, flat, write
from tests.repository.synthetic import repository


@pytest.fixture
def repo() -> Repository:
    return repository(MemoryStore(), block_size=256 * 1024)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = build(tmp_path / "vm", [Layer(writes=["write -P 1 0 2M"])])[0]
    for number in range(3):
        snapshot.run(snapshot.plan(path))
        write(path, f"write -P {2 + number} {number * 512}k 1M")
    return path


def merged(image: Path, *, last: int | None = None, strategy: Strategy | None = None) -> None:
    with scan(image) as chain:
        upto = len(chain.files) - 1 if last is None else last
        lowest, uppermost = str(chain.files[1].path), str(chain.files[upto].path)
        plan = merge_plan.plan_step(MergeRequest(image=image, from_layer=lowest, to_layer=uppermost, strategy=strategy))
    merge_run.run_step(plan)


@pytest.mark.parametrize("strategy", [Strategy.NEW, Strategy.ABSORB, Strategy.COMMIT])
@pytest.mark.parametrize("last", [None, 2])
def test_a_merged_chain_is_known_again(
    tmp_path: Path, image: Path, repo: Repository, strategy: Strategy, last: int | None
) -> None:
    first = flat(image, tmp_path / "first.raw")
    ship(image, repo)
    merged(image, last=last, strategy=strategy)
    assert ship(image, repo).bytes_read == 0
    snapshot.run(snapshot.plan(image))
    write(image, "write -P 9 3M 64k")
    second = flat(image, tmp_path / "second.raw")
    report = ship(image, repo)
    assert (report.bytes_read, report.layers_sent) == (64 << 10, 1)
    for point, shown in ((1, first), (3, second)):
        restore(repo, tmp_path / f"{point}.raw", point)
        assert same_bytes(tmp_path / f"{point}.raw", shown)


def test_a_merge_of_a_merge_is_known_again(tmp_path: Path, image: Path, repo: Repository) -> None:
    ship(image, repo)
    merged(image, last=2)
    for number in range(3):
        snapshot.run(snapshot.plan(image))
        write(image, f"write -P {20 + number} {number * 64}k 64k")
        assert ship(image, repo).bytes_read == 64 << 10
        merged(image, last=2)
    shown = flat(image, tmp_path / "shown.raw")
    assert ship(image, repo).bytes_read == 0
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", shown)


def test_a_merged_file_that_was_written_to_is_read(tmp_path: Path, image: Path, repo: Repository) -> None:
    ship(image, repo)
    merged(image)
    write(image, "write -P 9 0 64k")
    shown = flat(image, tmp_path / "shown.raw")
    assert ship(image, repo).bytes_read >= 2 * MiB
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", shown)


def test_a_damaged_note_costs_a_reading(tmp_path: Path, image: Path, repo: Repository) -> None:
    ship(image, repo)
    merged(image)
    for note in image.parent.glob(".snapchain-layer-*"):
        note.write_text("{")
    shown = flat(image, tmp_path / "shown.raw")
    assert ship(image, repo).bytes_read >= 2 * MiB
    restore(repo, tmp_path / "out.raw")
    assert same_bytes(tmp_path / "out.raw", shown)


def test_the_moment_of_a_merged_layer_is_that_of_its_view(image: Path) -> None:
    with scan(image) as chain:
        before = Notes().of(chain.files[2].real_path).sealed
        assert before is not None
    merged(image, last=2)
    with scan(image) as chain:
        after = Notes().of(chain.files[1].real_path).sealed
        assert after is not None
        assert (after.time, after.file) == (before.time, chain.files[1].fingerprint)


def test_depth_does_not_matter() -> None:
    def made(number: int) -> Fingerprint:
        return Fingerprint(inode=number, size=1, mtime_ns=5, ctime_ns=5)

    known = [MergedFile(made=made(n + 1), of=(made(n), made(100_000 + n))) for n in range(20_000)]
    (found,) = wanted([made(20_000), made(200_000)], known)
    depth, at = 0, found
    while at.replaces:
        depth, at = depth + 1, at.replaces[0]
    assert (depth, at) == (20_000, Wanted(made(0)))


def _mark(number: int) -> Fingerprint:
    return Fingerprint(inode=number, size=1, mtime_ns=5, ctime_ns=5)


def test_a_file_into_which_empty_layers_were_merged_is_the_same_file() -> None:
    """A commit of what an idle guest wrote changes nothing: the result is one of its inputs, again and again."""
    marks = [_mark(number) for number in range(6)]
    known = [MergedFile(made=marks[0], of=(marks[4], marks[5]))]
    for added in (marks[1:3], marks[3:4]):
        known = list(merged_files(marks[0], [marks[0], *added], known))
    (found,) = wanted([marks[0]], known)
    empty = tuple(Wanted(each) for each in marks[1:4])
    assert found == Wanted(marks[0], (Wanted(marks[4]), Wanted(marks[5])), empty)

    def held(*numbers: int) -> list[Held]:
        return [Held(str(number), (marks[number],)) for number in numbers]

    above = Wanted(_mark(9))
    for there in ((0,), (0, 1), (0, 1, 2, 3), (0, 3), (4, 5), (4, 5, 2)):
        answer = missing(held(*there), [found, above])
        base = answer.base_count if isinstance(answer, Send | Collapse) else None
        assert (base, getattr(answer, "first", None)) == (len(there), 1), there
    assert isinstance(missing([*held(0), Held("x", (_mark(8),))], [found]), Diverged)


def test_notes_that_contradict_each_other_end() -> None:
    one, other = _mark(1), _mark(2)
    known = [MergedFile(made=one, of=(other,)), MergedFile(made=other, of=(one,))]
    assert [each.source for each in wanted([one], known)] == [one]
    assert len(merged_files(_mark(3), [one], known)) == 3
