"""A restore that was cut off continues when it is run again, from either kind of destination, and proves all of it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from snapchain.destination.protocol import Destination
from snapchain.destinations import open_destination
from snapchain.errors import Busy, Corrupt, Unavailable
from snapchain.model.events import Event, Notice, Progress, ignore
from snapchain.ops.restore import output
from snapchain.ops.restore.output import OutputFile
from snapchain.ops.restore.run import Restoration
from snapchain.ops.restore.target import RestoreReport
from snapchain.ops.ship.request import ShipRequest
from snapchain.ops.ship.run import run as ship
from snapchain.repository import filling
from snapchain.repository.opening import create_repository
from snapchain.testing.faults import Crash
from tests.ops.shipping import MiB
from tests.ops.stacks import Layer, build, flat, names, same

DISK = "web1/vda"
STEP = 4 * MiB


@dataclass(frozen=True)
class Source:
    """Two points of a disk: 24 MiB of noise, and 12 MiB of it written anew."""

    destination: Destination
    shown: list[Path]


@pytest.fixture(scope="module", params=["repository", "replica"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    directory = tmp_path_factory.mktemp(request.param)
    noise = directory / "noise"
    noise.write_bytes(random.Random(7).randbytes(24 * MiB))
    layers = [Layer(32 * MiB, [f"write -s {noise} 1M 24M"]), Layer(32 * MiB, [f"write -s {noise} 3M 12M"])]
    files = build(directory / "c", layers)
    if request.param == "repository":
        create_repository(str(directory / "there"), passphrase=lambda: None, encryption="none")
        where = open_destination(directory / "there", writing=True)
    else:
        where = open_destination(f"dir:{directory}/there")
    for file in files:
        ship(ShipRequest(image=file, disk=DISK), where)
    return Source(where, [flat(file, directory / f"{number}.raw") for number, file in enumerate(files)])


@pytest.fixture(autouse=True)
def notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(output, "WORTH", STEP)
    monkeypatch.setattr(filling, "PORTION_BYTES", MiB)
    (tmp_path / "out").mkdir()


def shows(out: Path, shown: Path) -> bool:
    return same(out, shown, image_format="raw" if out.suffix == ".raw" else "qcow2")


def restore(source: Source, out: Path, on_event: Callable[[Event], None] = ignore, **options: Any) -> RestoreReport:
    return Restoration(source.destination, DISK, out, **options).run(on_event=on_event)


def stopping(at: int, error: BaseException) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if isinstance(event, Progress) and event.done >= at:
            raise error

    return listen


def cut_off(source: Source, out: Path, *, at: int = 10 * MiB, **options: Any) -> list[str]:
    """What is left of a restore."""
    with pytest.raises(Crash):
        restore(source, out, stopping(at, Crash()), **options)
    assert not out.exists()
    return names(out.parent)


@pytest.mark.parametrize("name", ["a.raw", "a.qcow2"])
def test_what_was_cut_off_is_continued(source: Source, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out" / name
    (part,) = cut_off(source, out)
    done: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            done.append(event.done)

    report = restore(source, out, listen)
    assert STEP <= report.bytes_resumed < report.bytes_written
    assert report.bytes_resumed in done, "it does not begin at nothing"
    assert names(out.parent) == [name] != [part]
    assert shows(out, source.shown[-1])
    assert os.listxattr(out) == [] or output._NOTE not in os.listxattr(out)


def test_a_chain_that_was_cut_off_in_its_second_file_is_continued(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out" / "top.qcow2"
    assert len(cut_off(source, out, at=32 * MiB, whole_chain=True)) == 2
    report = restore(source, out, whole_chain=True)
    assert 24 * MiB + STEP <= report.bytes_resumed < report.bytes_written
    assert shows(out, source.shown[-1])
    assert len(names(out.parent)) == 2


def test_it_can_be_cut_off_again_and_again(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.qcow2"
    for at in (10 * MiB, 16 * MiB, 22 * MiB):
        assert len(cut_off(source, out, at=at)) == 1
    assert restore(source, out).bytes_resumed >= 16 * MiB
    assert shows(out, source.shown[-1])


@pytest.mark.parametrize("other", [{"point": "1"}, {"format": "qcow2"}])
def test_another_plan_begins_anew(source: Source, tmp_path: Path, other: dict[str, Any]) -> None:
    out = tmp_path / "out" / "a.img"
    (part,) = cut_off(source, out)
    report = restore(source, out, **other)
    assert report.bytes_resumed == 0
    assert names(out.parent) == ["a.img"] != [part]
    assert report.content_id


@pytest.mark.parametrize("name", ["a.raw", "a.qcow2"])
def test_what_does_not_prove_is_thrown_away(source: Source, tmp_path: Path, name: str) -> None:
    """Bytes of the unfinished file that are not the point's: all begins anew, and the end is right."""
    out = tmp_path / "out" / name
    (part,) = cut_off(source, out)
    with (out.parent / part).open("r+b") as file:
        file.seek(2 * MiB + 777)
        file.write(b"not what was there")
    said: list[Event] = []
    report = restore(source, out, said.append)
    assert report.bytes_resumed == 0
    assert any(isinstance(event, Notice) and "begins anew" in event.message for event in said)
    assert names(out.parent) == [name]
    assert shows(out, source.shown[-1])


def test_bytes_where_there_is_no_data_do_not_prove(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.raw"
    (part,) = cut_off(source, out)
    with (out.parent / part).open("r+b") as file:
        file.seek(30 * MiB)
        file.write(b"the point has zeroes here")
    assert restore(source, out).bytes_resumed == 0
    assert shows(out, source.shown[-1])


def test_a_file_that_was_finished_and_got_no_name(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.qcow2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputFile, "publish", _die)
        with pytest.raises(Crash):
            restore(source, out)
    assert len(names(out.parent)) == 1
    report = restore(source, out)
    assert report.bytes_resumed == report.bytes_written
    assert shows(out, source.shown[-1])


def _die(*_: object, **__: object) -> None:
    raise Crash


@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (KeyboardInterrupt("stopped"), True),
        (Unavailable("the link broke", subject="ssh://there"), True),
        (Corrupt("damaged"), False),
        (Busy("somebody has it open"), False),
    ],
)
def test_what_is_left_by_which_end(source: Source, tmp_path: Path, error: BaseException, stays: bool) -> None:
    out = tmp_path / "out" / "a.raw"
    with pytest.raises(type(error), match=str(error) or "^$") as raised:
        restore(source, out, stopping(10 * MiB, error))
    assert raised.value is error
    assert len(names(out.parent)) == stays


def test_a_full_disk_leaves_nothing(source: Source, tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.raw"
    with pytest.raises(Unavailable, match="no space left"):
        restore(source, out, stopping(10 * MiB, Unavailable("no space left on device", subject=out)))
    assert names(out.parent) == []


def test_little_is_begun_anew(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "WORTH", 32 * MiB)
    assert cut_off(source, tmp_path / "out" / "a.raw", at=20 * MiB) == []


def test_who_ends_it_early_finds_nothing_but_a_broken_link_is_continued(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice as much must be there where the user ended it: here more than all 24 MiB, however far other threads are."""
    monkeypatch.setattr(output, "WORTH", 12 * MiB + MiB // 2)
    out = tmp_path / "out" / "a.raw"
    assert cut_off(source, out, at=14 * MiB) == []
    with pytest.raises(Unavailable, match="the link broke"):
        restore(source, out, stopping(14 * MiB, Unavailable("the link broke", subject="elsewhere")))
    assert len(names(out.parent)) == 1


def test_a_filesystem_without_attributes(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    out = tmp_path / "out" / "a.raw"
    assert cut_off(source, out) == []
    assert restore(source, out).bytes_resumed == 0
