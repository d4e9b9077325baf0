"""A file system that was made, or happened, to break its reader: an error with words, in bounded time, and no file
outside of the target.
"""

from __future__ import annotations

import os
import random
import stat
import tarfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import pytest

from snapchain.errors import Corrupt, InvalidInput, SnapchainError, Unavailable
from snapchain.files import messages, session as sessions
from snapchain.files.messages import Kind
from snapchain.files.session import Session
from snapchain.ops.files import opening
from snapchain.ops.files.getting import GetReport, GetRequest, Getting
from snapchain.ops.files.history import find
from snapchain.ops.files.listing import list_files
from snapchain.ops.files.opening import Limits
from tests.exhaustive import EXHAUSTIVE
from tests.files.images import FileBytes, MiB, contents, kinds, make, plant
from tests.files.sources import BytesSource

EACH = 40 if EXHAUSTIVE else 2
PATIENCE = 15.0
_SIZES = {"ext4": 48, "ext2": 48, "fat": 48, "ntfs": 48, "exfat": 48, "xfs": 320}


@dataclass(frozen=True)
class Base:
    """A sound image, and where its metadata are: what a walk reads that looks at no content."""

    data: bytes
    places: list[tuple[int, int]]


@cache
def base(kind: str, folder: Path) -> Base:
    tree = plant(folder / f"tree-{kind}", 60, unix=kind in {"ext4", "ext2", "xfs"})
    image = make(kind, tree, folder / f"{kind}.image", size=_SIZES[kind] * MiB)
    disk = FileBytes(image)
    with Session(disk, subject="image", most_bytes=1 << 40) as session:
        session.volumes()
        session.open("disk")
        with session.walk([], depth=100) as entries:
            assert len([*entries]) > 60
    return Base(image.read_bytes(), sorted(set(disk.reads)))


def mutated(found: Base, chance: random.Random) -> bytes:
    """Some bytes of the metadata are others; bytes that are zero change less often, since most of them are unused."""
    data = bytearray(found.data)
    for _ in range(chance.choice([1, 3, 10, 40, 200])):
        offset, length = chance.choice(found.places)
        at = offset + chance.randrange(length)
        for _ in range(50):
            if data[at]:
                break
            at = offset + chance.randrange(length)
        data[at] = chance.choice([0, 1, 0xFF, 0x7F, data[at] ^ 1 << chance.randrange(8), chance.randrange(256)])
    return bytes(data)


def attempt(source: BytesSource, target: Path, *, patience: float = PATIENCE) -> GetReport | SnapchainError:
    """Get all files. Whatever happens, nothing is outside of the target, and it takes no endless time."""
    outside = target.parent / "outside"
    outside.mkdir(parents=True)
    (outside / "precious").write_text("mine")
    before = {str(path) for path in target.parent.rglob("*")}
    began = time.monotonic()
    request = GetRequest("/", target, keep=True, limits=Limits(patience=patience))
    try:
        result: GetReport | SnapchainError = Getting(source, request).run()
    except SnapchainError as error:
        result = error
    assert time.monotonic() - began < 20 * patience
    after = {str(path) for path in target.parent.rglob("*") if not path.is_relative_to(target)}
    assert after == before
    assert (outside / "precious").read_text() == "mine"
    for path in target.rglob("*"):
        assert stat.S_IFMT(path.lstat().st_mode) in {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
        assert not path.lstat().st_mode & 0o6000 or path.is_symlink()
    return result


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.sampled
@pytest.mark.parametrize("kind", kinds())
def test_mutated_file_systems(tmp_path: Path, bases: Path, kind: str) -> None:
    found = base(kind, bases)
    for seed in range(EACH):
        data = mutated(found, random.Random(f"{kind} {seed}"))
        attempt(BytesSource(FileBytes(Path(), data)), tmp_path / str(seed) / "out")


# ---- a child that was taken over


def lying(monkeypatch: pytest.MonkeyPatch, child: Callable[[int], None]) -> None:
    """A child that says what it likes. child: gets the socket's descriptor after READY, and the first command"""

    def start(module: str, argument: str, *, fd: int, environment: Any) -> int:
        _ = module, argument
        assert "SNAPCHAIN_PASSWORD" not in environment
        pid = os.fork()
        if pid:
            return pid
        try:
            messages.send(fd, Kind.READY, b"[]")
            messages.receive(fd)
            messages.send(fd, Kind.DONE, b'[{"name":"disk","size":1,"content":"ext","trouble":null}]')
            messages.receive(fd)
            messages.send(fd, Kind.DONE, b'{"dirty":false}')
            messages.receive(fd)
            child(fd)
        finally:
            os._exit(0)

    monkeypatch.setattr(sessions, "start_module", start)


def told(fd: int, *entries: str) -> None:
    for each in entries:
        messages.send(fd, Kind.ENTRY, each.encode())
        if '"file"' in each and "same_as" not in each:
            messages.send(fd, Kind.DATA, b"evil")
            messages.send(fd, Kind.END)
    messages.send(fd, Kind.DONE, b'{"path":[]}')


def said(path: str, kind: str = "file", more: str = "") -> str:
    size = 4 if kind == "file" else 0
    return f'{{"path":{path},"kind":"{kind}","id":1,"size":{size}{more}}}'


TOP = said("[]", "directory")


@pytest.mark.parametrize(
    "entry",
    [
        said('[".."]'),
        said('["..","outside","precious"]'),
        said('["/etc/evil"]'),
        said('["../outside/evil"]'),
        said('["a\\u0000b"]'),
        said('[""]'),
        said('["."]'),
        said(f'["{"x" * 256}"]'),
        said('["..", "outside"]', "directory"),
        said('["link"]', "symlink", ',"target":""'),
        said('["second"]', "file", ',"same_as":["..","outside","precious"]'),
    ],
)
def test_a_name_that_no_file_can_have_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    lying(monkeypatch, lambda fd: told(fd, TOP, entry, said('["good"]')))
    result = attempt(BytesSource(FileBytes(Path(), b"x" * 4096)), tmp_path / "out")
    assert isinstance(result, GetReport)  # `Directory` would refuse the name too, and end the command
    assert len(result.skipped) == 1
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["good"]


def test_a_file_never_goes_through_a_link_of_the_guest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = said('["door"]', "symlink", f',"target":"{tmp_path / "outside"}"')
    lying(monkeypatch, lambda fd: told(fd, TOP, link, said('["door","evil"]'), said('["door","precious"]')))
    result = attempt(BytesSource(FileBytes(Path(), b"x" * 4096)), tmp_path / "out")
    assert isinstance(result, SnapchainError)
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["precious"]


def test_a_file_that_cannot_be_read_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(fd: int) -> None:
        messages.send(fd, Kind.ENTRY, TOP.encode())
        messages.send(fd, Kind.ENTRY, said('["half"]').encode())
        messages.send(fd, Kind.DATA, b"ev")
        messages.send(fd, Kind.END, b"a block is gone")
        told(fd, said('["good"]'))

    lying(monkeypatch, child)
    result = attempt(BytesSource(FileBytes(Path(), b"x" * 4096)), tmp_path / "out")
    assert isinstance(result, GetReport)
    assert [(each.path, each.reason) for each in result.skipped] == [("/half", "a block is gone")]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["good"]


def test_devices_and_set_id_bits_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [said(f'["{each}"]', each, ',"mode":511') for each in ("device", "fifo", "socket", "unknown")]
    lying(monkeypatch, lambda fd: told(fd, TOP, *more, said('["suid"]', "file", ',"mode":3565')))
    result = attempt(BytesSource(FileBytes(Path(), b"x" * 4096)), tmp_path / "out")
    assert isinstance(result, GetReport)
    assert len(result.left_out) == 4
    assert result.not_kept == ("set-id bits",)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["suid"]
    assert (tmp_path / "out" / "suid").stat().st_mode & 0o7777 == 0o755


def test_a_name_that_comes_twice_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = said('["one"]', "symlink", f',"target":"{tmp_path / "outside" / "precious"}"')
    lying(monkeypatch, lambda fd: told(fd, TOP, link, said('["one"]')))
    result = attempt(BytesSource(FileBytes(Path(), b"x" * 4096)), tmp_path / "out")
    assert isinstance(result, GetReport)
    assert [each.path for each in result.skipped] == ["/one"]


@pytest.mark.parametrize("form", ["tar", "zip"])
@pytest.mark.parametrize("is_twice", [True, False])
def test_no_archive_has_a_file_below_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Literal["tar", "zip"], *, is_twice: bool
) -> None:
    again = [said('["door"]', "directory")] if is_twice else []
    link = said('["door"]', "symlink", ',"target":"/etc"')
    lying(monkeypatch, lambda fd: told(fd, TOP, link, *again, said('["door","evil"]')))
    written: list[bytes] = []
    getting = Getting(BytesSource(FileBytes(Path(), b"x" * 4096)), GetRequest("/", None, form))
    if is_twice:
        assert [each.path for each in getting.run(lambda data: written.append(bytes(data))).skipped] == ["/door"]
    else:
        with pytest.raises(Corrupt, match="below what is no directory"):
            getting.run(lambda data: written.append(bytes(data)))
    assert b"evil" not in b"".join(written)


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_nothing_in_an_archive_is_below_a_link_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Literal["tar", "zip"]
) -> None:
    link = said('["door"]', "symlink", ',"target":"/etc"')
    through = [said('["door"]', "directory"), said('["door"]')]
    backslash = said('["..\\\\evil"]')
    hard = [said('["hard"]', "file", ',"same_as":["door","passwd"]')] if form == "tar" else []
    lying(monkeypatch, lambda fd: told(fd, TOP, link, *through, *hard, backslash, said('["good"]')))
    archive = tmp_path / "out"
    report = Getting(BytesSource(FileBytes(Path(), b"x" * 4096)), GetRequest("/a/..", archive, form)).run()
    if form == "tar":
        with tarfile.open(archive) as tar:
            names = tar.getnames()
    else:
        with zipfile.ZipFile(archive) as zipped:
            names = [each.rstrip("/") for each in zipped.namelist()]
    own = ["root/..\\evil"] if form == "tar" else []  # a plain name, but on Windows
    assert names == ["root", "root/door", *own, "root/good"]
    assert len(report.skipped) == 3


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [('{"user.a\\u0000b":"00"}', GetReport), ('{"user.a":"no hex"}', Corrupt)],
)
def test_attributes_that_no_file_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attributes: str, expected: type
) -> None:
    lying(monkeypatch, lambda fd: told(fd, TOP, said('["a"]', "file", f',"attributes":{attributes}')))
    result = attempt(BytesSource(FileBytes(Path(), b"x" * 4096)), tmp_path / "out")
    assert isinstance(result, expected)
    if isinstance(result, GetReport):
        assert result.not_kept == ("attributes",)


def test_a_list_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = tmp_path
    deep = said(str(["x" * 255] * 200).replace("'", '"'))
    monkeypatch.setattr(opening, "MOST_HELD", 1 << 20)

    def child(fd: int) -> None:
        for _ in range(1000):
            messages.send(fd, Kind.ENTRY, deep.encode())

    for look in (partial(list_files, path="/", recursive=True), partial(find, name="*", hashes=False)):
        lying(monkeypatch, child)
        with pytest.raises(InvalidInput, match="more than 1 MiB of memory"):
            look(BytesSource(FileBytes(Path(), b"x" * 4096)))


def half_a_message(fd: int) -> None:
    os.write(fd, b"\x06")
    time.sleep(600)


@pytest.mark.parametrize(
    ("child", "words"),
    [
        (lambda fd: messages.send(fd, Kind.READ, messages.READ.pack(1 << 40, 5)), "sends what it should not"),
        (lambda fd: messages.send(fd, Kind.ENTRY, b"[" * 1000), "sends what it should not"),
        (lambda fd: messages.send(fd, Kind.ENTRY, b'{"path":[],"kind":"file"}'), "sends what it should not"),
        (lambda fd: os.write(fd, b"\xff" * 100), "the reader of its file system"),
        (lambda _: os.kill(os.getpid(), 9), "was ended by SIGKILL"),
        (lambda fd: told(fd, TOP, said('["a"]').replace('"size":4', '"size":3')), "sends what it should not"),
        (lambda _: time.sleep(600), "found nothing for 1 s"),
        (half_a_message, "sends what it should not"),
    ],
)
def test_a_child_that_was_taken_over_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, child: Callable[[int], None], words: str
) -> None:
    lying(monkeypatch, child)
    result = attempt(BytesSource(FileBytes(Path(), b"x" * 4096)), tmp_path / "out", patience=1.0)
    assert isinstance(result, Corrupt)
    assert words in str(result)


def test_a_child_that_reads_for_ever_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reads(fd: int) -> None:
        while True:
            messages.send(fd, Kind.READ, messages.READ.pack(0, MiB))
            messages.receive(fd)

    lying(monkeypatch, reads)
    result = attempt(BytesSource(FileBytes(Path(), bytes(MiB))), tmp_path / "out")
    assert "and found nothing" in str(result)


def test_files_of_more_bytes_than_the_limit_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huge = said('["huge"]').replace('"size":4', f'"size":{1 << 50}')
    lying(monkeypatch, lambda fd: told(fd, TOP, huge))
    result = attempt(BytesSource(FileBytes(Path(), b"x" * 4096)), tmp_path / "out")
    assert isinstance(result, InvalidInput)
    assert "more than 1073741824 bytes together" in str(result)


def test_a_store_that_is_away_is_no_damage(tmp_path: Path) -> None:
    class Away(FileBytes):
        def read(self, offset: int, length: int, /) -> bytes:
            _ = offset, length
            raise Unavailable("the store does not answer")

    result = attempt(BytesSource(Away(Path(), bytes(MiB))), tmp_path / "out")
    assert isinstance(result, Unavailable)


def test_a_file_in_a_lost_range_is_skipped_with_the_reason_of_the_store(tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", 20, unix=True)
    data = make("ext4", tree, tmp_path / "image", size=48 * MiB).read_bytes()
    at = data.index(b"middle" * 100)

    class Lost(FileBytes):
        def read(self, offset: int, length: int, /) -> bytes:
            if offset < at + 4 and at < offset + length:
                raise Corrupt("pack 7 is missing")
            return super().read(offset, length)

    result = attempt(BytesSource(Lost(Path(), data)), tmp_path / "got" / "out")
    assert isinstance(result, GetReport)
    lost = {each.path: each.reason for each in result.skipped}
    assert lost.keys() == {"/sparse", "/second name"}  # one file; its neighbours in a block of the disk are there
    assert "pack 7 is missing" in lost.values()
    found = contents(tmp_path / "got" / "out")
    assert {name: found[name] for name in contents(tree).keys() & found.keys()} == {
        name: value for name, value in contents(tree).items() if f"/{name}" not in lost
    }
