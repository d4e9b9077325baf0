"""qemu-img behind typed functions: names that are traps, exit codes, and what it prints."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snapchain.errors import Busy, InvalidInput, ToolFailed, Unavailable
from snapchain.host import processes
from snapchain.host.locks import ImageLock, LockMode
from snapchain.host.os_errors import translated
from snapchain.testing import qemu_img
from snapchain.testing.qemu_img import BackingLink, Qcow2Options

MiB = 1 << 20
PLAIN = Qcow2Options()


def qemu_io(path: Path, *commands: str) -> None:
    arguments = [part for command in commands for part in ("-c", command)]
    subprocess.run(["qemu-io", "-f", "qcow2", *arguments, path.absolute()], check=True, capture_output=True)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.qcow2"
    qemu_img.create(path, 4 * MiB, options=PLAIN)
    qemu_io(path, "write -P 1 0 1M", "write -z 1M 64k")
    return path


def test_info_and_maps(base: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img.create(top, 8 * MiB, options=Qcow2Options(cluster_size=4096), backing=BackingLink("base.qcow2", "qcow2"))
    qemu_io(top, "write -P 2 64k 4k")
    said = qemu_img.info(top, "qcow2")
    assert (said.virtual_size, said.cluster_size, said.backing_filename) == (8 * MiB, 4096, "base.qcow2")
    assert said.backing_filename_format == "qcow2"
    assert [run.length for run in qemu_img.map_alone(top, "qcow2") if run.present] == [4096]
    depths = {run.depth for run in qemu_img.map_chain(top, "qcow2") if run.data}
    assert depths == {0, 1}


@pytest.mark.parametrize("name", ["-f.qcow2", "nbd:x.qcow2", "json:{}.qcow2", "a,b=c.qcow2", "%s é 'x\".qcow2"])
def test_names_that_look_like_something_else(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, top, flat = Path(name), Path(f"{name}.top"), Path(f"{name}.flat")
    qemu_img.create(base, MiB, options=PLAIN)
    qemu_io(base, "write -P 7 0 64k")
    qemu_img.create(top, MiB, options=PLAIN, backing=BackingLink(name, "qcow2"))
    assert qemu_img.check(top).clean
    assert qemu_img.compare(base, top, formats=("qcow2", "qcow2")) is None
    qemu_img.convert(top, flat, formats=("qcow2", "raw"))
    assert qemu_img.compare(flat, top, formats=("raw", "qcow2")) is None
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted([name, f"{name}.top", f"{name}.flat"])


def test_a_line_break_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="file name with a line break"):
        qemu_img.create(tmp_path / "a\nb", MiB, options=PLAIN)


def test_compare_tells_bytes_and_sizes_apart(base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    qemu_img.create(other, 4 * MiB, options=PLAIN)
    qemu_io(other, "write -P 1 0 1M", "write -P 9 2M 512")
    said = qemu_img.compare(base, other, formats=("qcow2", "qcow2"))
    assert said is not None
    assert str(2 * MiB) in said
    assert "%" not in said
    bigger = tmp_path / "bigger.qcow2"
    qemu_img.create(bigger, 5 * MiB, options=PLAIN, backing=BackingLink("base.qcow2", "qcow2"))
    assert qemu_img.compare(base, bigger, formats=("qcow2", "qcow2")) is not None
    with pytest.raises(ToolFailed, match=r"exit status 2: .*none") as caught:
        qemu_img.compare(base, tmp_path / "none", formats=("qcow2", "qcow2"))
    assert caught.value.status == 2


def test_check_counts_leaks_and_corruptions(base: Path) -> None:
    assert qemu_img.check(base).clean
    data = bytearray(base.read_bytes())
    block = int.from_bytes(data[int.from_bytes(data[48:56], "big") :][:8], "big")
    last = len(data) // 65536 - 1
    data += bytes(65536)
    data[block + 2 * (last + 1) : block + 2 * (last + 2)] = b"\0\1"
    base.write_bytes(data)
    result = qemu_img.check(base)
    assert (result.leaks, result.corruptions) == (1, 0)
    data[block : block + 2] = b"\0\0"
    base.write_bytes(data)
    assert qemu_img.check(base).corruptions
    assert not qemu_img.check(base).clean


def test_a_check_that_could_not_be_made_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "x.qcow2").write_bytes(b"no image")
    with pytest.raises(ToolFailed, match=r"exit status 1: .*Could not open") as caught:
        qemu_img.check(tmp_path / "x.qcow2")
    assert caught.value.status == 1


def test_alone_leaves_the_backing_file_closed(tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu_img.create(top, MiB, options=PLAIN, backing=BackingLink("/nonexistent/base", "raw"))
    assert qemu_img.check(top).clean
    assert [run.present for run in qemu_img.map_alone(top, "qcow2")] == [False]
    with pytest.raises(ToolFailed, match="Could not open backing file"):
        qemu_img.map_chain(top, "qcow2")


def test_every_option_reaches_the_header(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow2"
    options = Qcow2Options(
        cluster_size=32768,
        extended_l2=True,
        compression_type="zstd",
        lazy_refcounts=True,
        refcount_bits=64,
        preallocation=qemu_img.Preallocation.FULL,
    )
    qemu_img.create(path, MiB, options=options)
    said = json.loads(
        subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True).stdout
    )
    data = said["format-specific"]["data"]
    assert said["cluster-size"] == 32768
    assert (data["extended-l2"], data["compression-type"], data["lazy-refcounts"]) == (True, "zstd", True)
    assert (data["refcount-bits"], data["compat"]) == (64, "1.1")
    assert path.stat().st_blocks * 512 > MiB


def test_it_never_reads_past_a_lock(base: Path) -> None:
    with ImageLock(base, LockMode.WRITE), pytest.raises(Busy, match=r"base.qcow2: somebody has one of its files open"):
        qemu_img.info(base, "qcow2")
    with ImageLock(base, LockMode.READ):
        assert qemu_img.info(base, "qcow2").virtual_size == 4 * MiB
        with pytest.raises(Busy, match=r"somebody .* has it open for reading"):
            ImageLock(base, LockMode.WRITE)


def test_every_run_is_bounded(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[processes.Limits | None] = []
    real = processes.run

    def spy(argv: list[str], **named: Any) -> processes.Completed:
        limits = named["limits"]
        assert isinstance(limits, processes.Limits)
        assert "-U" not in argv
        seen.append(limits)
        return real(argv, **named)

    monkeypatch.setattr(qemu_img, "run", spy)
    qemu_img.info(base, "qcow2")
    qemu_img.map_alone(base, "qcow2")
    qemu_img.map_chain(base, "qcow2")
    qemu_img.check(base)
    qemu_img.compare(base, base, formats=("qcow2", "qcow2"))
    qemu_img.create_raw(tmp_path / "r", 512)
    qemu_img.convert(base, tmp_path / "c", formats=("qcow2", "qcow2"), compressed=True, options=PLAIN)
    assert len(seen) == 7
    assert all(limits is not None and limits.address_space for limits in seen)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_filesystem_that_is_full_or_read_only_is_no_failure_of_the_tool(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever subcommand meets it; the same error and hint as where we meet it ourselves."""

    def fail(argv: list[str], **_named: Any) -> None:
        said = f"qemu-img: {argv[-1]}: {os.strerror(number)}"
        raise ToolFailed("ended with exit status 1", argv=argv, status=1, stderr=said, subject="qemu-img")

    monkeypatch.setattr(qemu_img, "run", fail)
    image, other = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    ours = translated(OSError(number, os.strerror(number)), tmp_path)
    subcommands: tuple[Callable[[], None], ...] = (
        lambda: qemu_img.create(image, 1 << 20, options=Qcow2Options()),
        lambda: qemu_img.create_raw(image, 1 << 20),
        lambda: qemu_img.convert(other, image, formats=("qcow2", "qcow2")),
    )
    for writes in subcommands:
        with pytest.raises(Unavailable, match=os.strerror(number).lower()) as caught:
            writes()
        assert (caught.value.subject, caught.value.hint) == (ours.subject, ours.hint)
        assert caught.value.hint
    with pytest.raises(ToolFailed, match="qemu-img"):
        qemu_img.info(image, "qcow2")
