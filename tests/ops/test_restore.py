"""restore: the bytes of the point or an error that says what is lost, and never an output in between."""

from __future__ import annotations

import fcntl
import os
import random
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable
from snapchain.host.batches import Buffer
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.image.raw import RawWriter
from snapchain.model.events import Event, Progress
from snapchain.objects.memory import MemoryStore
from snapchain.objects.store import ObjectStore
from snapchain.ops.restore import target as restore_target
from snapchain.ops.restore.output import OutputFile
from snapchain.ops.restore.run import Restoration
from snapchain.repository.destination import RepositoryDestination
from snapchain.repository.repository import Repository
from snapchain.testing.faults import Fault, FaultStore, On
from tests.ops.shipping import DISK, MiB, restore, same_bytes, ship
from tests.ops.stacks import Layer, build, clean, flat, names, same, standing, write
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository


@pytest.fixture
def repo() -> Repository:
    return repository(MemoryStore(), block_size=256 * 1024)


@pytest.fixture
def chain(tmp_path: Path, repo: Repository) -> list[Path]:
    """Shipped, with a point for each of three files. Noise, so that blobs are not shared."""
    files = build(
        tmp_path / "chain",
        [
            Layer(8 * MiB, [f"write -P {n + 1} {n * 256}k 256k" for n in range(16)]),
            Layer(8 * MiB, ["write -P 200 1M 128k", "write -z 3M 64k"]),
            Layer(8 * MiB, ["write -P 201 2M 64k"]),
        ],
    )
    ship(files[-1], repo, each_layer=True)
    return files


# ---- where it goes


def test_an_existing_file_is_replaced_only_by_force(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    out.write_bytes(b"mine")
    with pytest.raises(Conflict, match="exists already"):
        restore(repo, out)
    assert out.read_bytes() == b"mine"
    Restoration(RepositoryDestination(again(repo)), DISK, out, force=True).run()
    assert same_bytes(out, flat(chain[-1], tmp_path / "flat"))


def test_a_dangling_link_is_in_the_way_too(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    out.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Conflict, match="exists already"):
        restore(repo, out)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_appears_meanwhile_is_not_replaced(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "d" / "out.raw"
    out.parent.mkdir()

    def appear(event: Event) -> None:
        out.write_bytes(b"theirs")

    with pytest.raises(Conflict, match="exists already"):
        Restoration(RepositoryDestination(again(repo)), DISK, out).run(on_event=appear)
    assert out.read_bytes() == b"theirs"
    assert names(out.parent) == ["out.raw"]


@pytest.mark.parametrize(
    ("name", "error", "fact"),
    [
        ("missing/out.raw", NotFound, "there is no such directory"),
        ("dir", InvalidInput, "this is a directory"),
        ("out", InvalidInput, "the suffix '' does not tell the format"),
        ("out.vmdk", InvalidInput, "the suffix '.vmdk' does not tell the format"),
    ],
)
def test_places_that_do_not_do(
    repo: Repository, chain: list[Path], tmp_path: Path, name: str, error: type[SnapchainError], fact: str
) -> None:
    (tmp_path / "dir").mkdir()
    with pytest.raises(error, match=fact) as raised:
        restore(repo, tmp_path / name)
    assert raised.value.subject == str(tmp_path / name if "/" not in name else tmp_path / "missing")


def test_the_format_is_the_suffix_or_what_is_said(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    for name, said, magic in [
        ("a.qcow2", None, b"QFI\xfb"),
        ("a.QCOW2", None, b"QFI\xfb"),
        ("a.img", None, b"\1\1\1\1"),
        ("a.raw", None, b"\1\1\1\1"),
        ("b.raw", "qcow2", b"QFI\xfb"),
        ("b.qcow2", "raw", b"\1\1\1\1"),
        ("b", "raw", b"\1\1\1\1"),
    ]:
        Restoration(RepositoryDestination(again(repo)), DISK, tmp_path / name, format=said).run()  # type: ignore[arg-type]
        assert (tmp_path / name).read_bytes()[:4] == magic
    with pytest.raises(InvalidInput, match="own format"):
        Restoration(RepositoryDestination(again(repo)), DISK, tmp_path / "c.raw", format="raw", whole_chain=True)


def test_no_room_is_told_before_anything_is_written(
    repo: Repository, chain: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restore_target, "free_bytes", lambda _: 1000)
    before = names(tmp_path)
    with pytest.raises(Unavailable, match="only 1000 are free"):
        restore(repo, tmp_path / "out.raw")
    assert names(tmp_path) == before


# ---- a chain of files


def test_a_chain_is_files_on_one_another(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / "web.qcow2"
    report = restore(repo, out, chain=True)
    assert len(report.files) == 3
    assert report.files[-1] == str(out)
    for name, original in zip(report.files, chain, strict=True):
        assert clean(Path(name))
        assert same(Path(name), flat(original, tmp_path / "flat"))
    sizes = [Path(name).stat().st_size for name in report.files]
    assert max(sizes[1:]) < MiB, "each file holds its own layer"
    assert names(out.parent) == sorted(Path(name).name for name in report.files)


def test_a_chain_of_an_older_point_shares_its_lower_files(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    """Restored beside each other; what lies there already is whole and named by its layer."""
    (tmp_path / "d").mkdir()
    one = restore(repo, tmp_path / "d" / "web.qcow2", 3, chain=True)
    (tmp_path / "d" / "web.qcow2").rename(tmp_path / "d" / "three.qcow2")
    other = restore(repo, tmp_path / "d" / "web.qcow2", 2, chain=True)
    assert other.files[0] == one.files[0]
    assert same(tmp_path / "d" / "three.qcow2", flat(chain[2], tmp_path / "flat"))
    assert same(tmp_path / "d" / "web.qcow2", flat(chain[1], tmp_path / "flat"))


def test_a_lower_file_that_somebody_wrote_to_is_replaced_only_by_force(
    repo: Repository, chain: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / "web.qcow2"
    lower = Path(restore(repo, out, chain=True).files[0])
    out.unlink()
    write(lower, "write -P 99 0 64k")
    mine = lower.read_bytes()
    with pytest.raises(Conflict, match="exists already") as caught:
        restore(repo, out, chain=True)
    assert caught.value.subject == str(lower)
    assert lower.read_bytes() == mine
    assert not out.exists()
    Restoration(RepositoryDestination(again(repo)), DISK, out, whole_chain=True, force=True).run()
    assert same(out, flat(chain[-1], tmp_path / "flat"))


# ---- plans and progress


def test_a_plan_writes_nothing_and_holds(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    before = names(tmp_path)
    work = Restoration(RepositoryDestination(again(repo)), DISK, tmp_path / "out.qcow2", point="2")
    plan = work.plan()
    assert names(tmp_path) == before
    assert (plan.point, plan.virtual_size, plan.device, plan.replaces) == (2, 8 * MiB, False, False)
    said: list[Event] = []
    report = work.run(on_event=said.append)
    assert report.bytes_written == plan.bytes_to_write == 4 * MiB - 64 * 1024
    progress = [each for each in said if isinstance(each, Progress)]
    assert progress[-1].done == progress[-1].total


def test_only_what_the_point_shows_is_read(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    store = CountingStore(repo.store)
    Restoration(RepositoryDestination(again(repo, store)), DISK, tmp_path / "out.raw", point="1").run()
    assert store.of("list", "packs/") == store.of("list", "index/") == store.of("list", "layers/") == []
    assert store.bytes_of("get", "packs/") < 200_000
    written = [*store.of("put"), *store.of("create"), *store.of("delete")]
    assert all(each.name.startswith("leases/r-") for each in written)


# ---- damage


def damage(repo: Repository, point: int, guest_offset: int) -> str:
    """Flip a byte of the blob that holds this guest byte of a point; the pack's object name."""
    catalogue = repo.catalogue(DISK)
    layer = again(repo).layer(catalogue.points[point - 1].layer)
    (page,) = layer.pages(guest_offset, guest_offset + 1)
    row = page.runs[page.places(guest_offset, guest_offset + 1)][0]
    pack = page.packs[int(row["pack"])]
    name = f"packs/{pack[:2]}/{pack}"
    body = bytearray(repo.store.get(name))
    body[int(row["offset"])] ^= 1
    repo.store.put(name, bytes(body))
    return name


@pytest.mark.parametrize("name", ["out.raw", "out.qcow2"])
def test_a_damaged_range_is_named_and_nothing_appears(
    repo: Repository, chain: list[Path], tmp_path: Path, name: str
) -> None:
    pack = damage(repo, 1, 512 * 1024)
    (tmp_path / "d").mkdir()
    with pytest.raises(Corrupt, match="guest bytes 524288 to 786432 are lost") as raised:
        restore(repo, tmp_path / "d" / name, 1)
    assert pack in str(raised.value)
    assert names(tmp_path / "d") == []


def test_a_point_that_does_not_show_the_damaged_bytes_restores(
    repo: Repository, chain: list[Path], tmp_path: Path
) -> None:
    damage(repo, 2, MiB)
    with pytest.raises(Corrupt, match="guest bytes 1048576 to"):
        restore(repo, tmp_path / "2.raw", 2)
    restore(repo, tmp_path / "1.raw", 1)
    assert same_bytes(tmp_path / "1.raw", flat(chain[0], tmp_path / "flat"))


def test_a_store_that_does_not_answer_has_lost_nothing(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    """The error says to try again, not that bytes are lost."""
    store = FaultStore(repo.store, [On(2, Fault.UNAVAILABLE, operation="get", prefix="packs/")])
    with pytest.raises(Unavailable, match="overloaded"):
        Restoration(RepositoryDestination(again(repo, store)), DISK, tmp_path / "out.raw", point="1").run()
    assert not (tmp_path / "out.raw").exists()


@pytest.mark.parametrize("fault", [Fault.TRUNCATED, Fault.BIT_FLIP])
@pytest.mark.parametrize("nth", [1, 2, 3, 4, 5, 6])
def test_a_store_that_lies_once_is_never_believed(
    repo: Repository, chain: list[Path], tmp_path: Path, fault: Fault, nth: int
) -> None:
    store = FaultStore(repo.store, [On(nth, fault, operation="get")])
    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / "out.raw"
    try:
        Restoration(RepositoryDestination(again(repo, store)), DISK, out).run()
    except SnapchainError as error:
        assert isinstance(error, Corrupt)  # noqa: PT017
        assert names(out.parent) == []
    else:
        assert same_bytes(out, flat(chain[-1], tmp_path / "flat")), "the fault met a read that was made again"


def test_missing_records_name_the_object(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    layer = repo.catalogue(DISK).points[1].layer
    repo.store.delete(f"layers/{layer}")
    with pytest.raises(Corrupt, match=layer):
        restore(repo, tmp_path / "out.raw", 3)
    restore(repo, tmp_path / "out.raw", 1)


@pytest.mark.parametrize("target", ["out.raw", "out.qcow2", "chain.qcow2"])
@pytest.mark.parametrize("writer", [RawWriter, Qcow2Writer])
def test_what_was_written_is_what_is_reported(
    repo: Repository,
    chain: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    writer: type[RawWriter | Qcow2Writer],
) -> None:
    """All that is read is sound; on its way into the file one byte changes."""
    whole = writer.write_pieces
    left = [1]

    def bent(self: Any, pieces: Sequence[tuple[int, Buffer]]) -> None:
        given = [(offset, bytearray(memoryview(data).cast("B"))) for offset, data in pieces]
        if given and left:
            left.pop()
            given[0][1][5] ^= 1
        whole(self, given)

    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / target
    is_chain = target.startswith("chain")
    monkeypatch.setattr(writer, "write_pieces", bent)
    is_met = (writer is RawWriter) == (target == "out.raw")
    if is_met:
        with pytest.raises(Corrupt, match="the restored content id is") as raised:
            restore(repo, out, chain=is_chain)
        assert Path(raised.value.subject or "").parent == out.parent
        assert names(out.parent) == []
        monkeypatch.undo()
    report = restore(repo, out, chain=is_chain)
    assert report.content_id == repo.catalogue(DISK).points[-1].content_id
    assert ship(out, repository(MemoryStore(), block_size=256 * 1024)).content_id == report.content_id


def test_an_error_while_writing_leaves_nothing(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()

    def stop(event: Event) -> None:
        if isinstance(event, Progress) and event.done:
            raise KeyboardInterrupt

    for name, whole in (("out.raw", False), ("out.qcow2", True)):
        with pytest.raises(KeyboardInterrupt):
            Restoration(RepositoryDestination(again(repo)), DISK, tmp_path / "d" / name, whole_chain=whole).run(
                on_event=stop
            )
        assert names(tmp_path / "d") == []


# ---- two at once


def test_two_restores_to_one_place_one_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    with OutputFile(out) as first:
        os.write(first.fd, b"first")
        with pytest.raises(Busy, match="another snapchain"), OutputFile(out):
            pass
        first.publish(replaced=None)
    assert out.read_bytes() == b"first"
    with OutputFile(out) as second, pytest.raises(Conflict, match="exists already"):
        second.publish(replaced=None)
    assert names(tmp_path) == ["out.raw"]


PARTS = [".out.raw.snapchain-part", ".out.raw.snapchain-part-0123abcd"]


@pytest.mark.parametrize("name", PARTS)
def test_leftovers_of_a_killed_run_go_with_the_next(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"leftovers of a longer run")
    with OutputFile(tmp_path / "out.raw") as output:
        assert names(tmp_path) == [output.growing.name] != [name]
        os.write(output.fd, b"whole")
        output.publish(replaced=None)
    assert (tmp_path / "out.raw").read_bytes() == b"whole"
    assert names(tmp_path) == ["out.raw"]


def test_a_name_that_was_about_to_go_goes_with_the_next(tmp_path: Path) -> None:
    """Killed between the final name and the end of the temporary one."""
    (tmp_path / "out.raw").write_bytes(b"whole")
    os.link(tmp_path / "out.raw", tmp_path / PARTS[1])
    with OutputFile(tmp_path / "out.raw"):
        pass
    assert names(tmp_path) == ["out.raw"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", ["another's file", "hard link", "symbolic link", "FIFO", "directory", "locked"])
def test_what_somebody_else_has_put_there_is_neither_taken_up_nor_in_the_way(
    tmp_path: Path, name: str, kind: str
) -> None:
    victim, planted = tmp_path / "victim", tmp_path / "d" / name
    planted.parent.mkdir()
    victim.write_bytes(b"precious")
    match kind:
        case "another's file" | "locked":
            planted.write_bytes(b"planted")
            _give_away(planted)
        case "hard link":
            os.link(victim, planted)
        case "symbolic link":
            planted.symlink_to(victim)
        case "FIFO":
            os.mkfifo(planted)
        case "directory":
            planted.mkdir()
    with ExitStack() as stack:
        if kind == "locked":
            fcntl.flock(stack.enter_context(planted.open("rb")), fcntl.LOCK_EX)
        before = standing(planted) if kind != "symbolic link" else ()
        with OutputFile(tmp_path / "d" / "out.raw") as output:
            os.write(output.fd, b"whole")
            output.publish(replaced=None)
    assert (tmp_path / "d" / "out.raw").read_bytes() == b"whole"
    assert (tmp_path / "d" / "out.raw").stat().st_uid == os.geteuid()
    assert victim.read_bytes() == b"precious"
    assert os.path.lexists(planted)
    assert before == (standing(planted) if kind != "symbolic link" else ())


def _give_away(path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file to somebody else")
    os.chown(path, 65534, 65534)


def test_many_at_once_end_with_one_whole_file(repo: Repository, chain: list[Path], tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    out = tmp_path / "d" / "out.raw"
    start = threading.Barrier(4)
    ends: list[str] = []

    def one() -> None:
        work = Restoration(RepositoryDestination(again(repo)), DISK, out, point="1")
        start.wait()
        try:
            work.run()
        except (Busy, Conflict) as error:
            ends.append(type(error).__name__)
        else:
            ends.append("done")

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.count("done") == 1, ends
    assert len(ends) == 4
    assert same_bytes(out, flat(chain[0], tmp_path / "flat"))
    assert names(tmp_path / "d") == ["out.raw"]


def test_a_plan_says_what_reading_takes(tmp_path: Path) -> None:
    """Requests and bytes are those that the restore then makes, but for the maps; a damaged beginning has no time."""
    repo = repository(MemoryStore(), block_size=64 * 1024)
    noise = tmp_path / "noise"
    noise.write_bytes(random.Random(3).randbytes(3 * MiB))
    (image,) = build(tmp_path / "chain", [Layer(8 * MiB, [f"write -s {noise} 1M 3M", "write -z 6M 1M"])])
    ship(image, repo)

    def restoration(store: ObjectStore) -> Restoration:
        return Restoration(RepositoryDestination(again(repo, store)), DISK, tmp_path / "out.raw")

    plan = restoration(repo.store).plan()
    store = CountingStore(repo.store)
    restoration(store).run()
    read = store.of("get", "packs/")
    assert plan.requests is not None
    assert plan.bytes_to_fetch is not None
    assert plan.requests <= len(read) <= plan.requests + 2, "and the page of the map"
    assert 3 * MiB <= plan.bytes_to_fetch < 3 * MiB + 10_000
    assert plan.seconds is not None
    assert 0 < plan.seconds < 60
    for info in list(repo.store.list("packs/")):
        if info.size > MiB:
            repo.store.put(info.name, bytes(info.size))
    (tmp_path / "out.raw").unlink()
    damaged = restoration(repo.store).plan()
    assert (damaged.requests, damaged.seconds) == (plan.requests, None)
