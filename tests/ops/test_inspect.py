"""inspect: the numbers of each layer are those that counting bytes gives, for files and for stored chains."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError
from snapchain.image import scan
from snapchain.model.extents import DATA, ZERO
from snapchain.objects.memory import MemoryStore
from snapchain.ops.inspect import InspectReport, inspect_image, inspect_point
from snapchain.repository.destination import RepositoryDestination
from snapchain.testing.reference import bytewise, walk
from tests.ops.shipping import DISK, MiB, random_stack, ship
from tests.ops.stacks import Layer, build, qemu_img, write
from tests.repository.counting import CountingStore
from tests.repository.synthetic import again, repository


def counted(path: Path) -> list[tuple[int, int, int, int]]:
    """(data, zero, shadowed data, shadowed zero) of each layer, sector by sector."""
    with scan(path) as chain:
        maps = [file.extents for file in chain.files]
        small = [type(each)(-(-each.size // 512), each.at // 512, each.val) for each in maps]
        assert all((each.at % 512 == 0).all() for each in maps)
    owners = walk(small)
    found = []
    for place, layer in enumerate(small):
        values = bytewise(layer)
        data, zero = values.count(DATA), values.count(ZERO)
        shown = [values[offset] for offset, owner in enumerate(_owners(small)) if owner == place]
        assert len(owners) == small[-1].size
        found.append((data, zero, data - shown.count(DATA), zero - shown.count(ZERO)))
    return [(a * 512, b * 512, c * 512, d * 512) for a, b, c, d in found]


def _owners(maps: list) -> list[int]:  # type: ignore[type-arg]
    """Which layer answers each sector, ZERO runs included; -1 where none does."""
    values = [bytewise(each) for each in maps]
    answers = []
    for offset in range(len(values[-1])):
        answer = -1
        for place in range(len(values) - 1, -1, -1):
            if offset >= len(values[place]):
                break
            if values[place][offset] >= ZERO:
                answer = place
                break
        answers.append(answer)
    return answers


def numbers(report: InspectReport) -> list[tuple[int, int, int, int]]:
    return [
        (layer.data_bytes, layer.zero_bytes, layer.shadowed_bytes, layer.shadowed_zero_bytes) for layer in report.layers
    ]


@pytest.mark.parametrize("seed", range(60, 66))
def test_what_each_file_holds_and_hides(tmp_path: Path, seed: int) -> None:
    stack = random_stack(tmp_path / "s", seed)
    report = inspect_image(stack.files[-1])
    assert [layer.path for layer in report.layers] == [str(path) for path in stack.files]
    assert numbers(report) == counted(stack.files[-1])
    assert report.virtual_size == stack.shown[-1].stat().st_size


def test_a_stored_chain_says_the_same(tmp_path: Path) -> None:
    """But for DATA that is all zero, which is stored as ZERO."""
    repo = repository(MemoryStore())
    files = build(
        tmp_path / "c",
        [
            Layer(4 * MiB, ["write -P 1 0 1M"]),
            Layer(4 * MiB, ["write -P 2 512k 1M", "write -z 2M 64k"]),
            Layer(4 * MiB, ["write -P 3 2M 64k"]),
        ],
    )
    ship(files[-1], repo, each_layer=True)
    stored, local = inspect_point(RepositoryDestination(again(repo)), DISK), inspect_image(files[-1])
    assert numbers(stored) == numbers(local)
    assert numbers(stored)[0] == (MiB, 0, MiB // 2, 0)
    assert stored.content_id == repo.catalogue(DISK).points[-1].content_id
    assert [layer.strip for layer in stored.layers] == [layer.strip for layer in local.layers]
    assert len(inspect_point(RepositoryDestination(again(repo)), DISK, point="1").layers) == 1
    with pytest.raises(NotFound, match="has no point 9"):
        inspect_point(RepositoryDestination(repo), DISK, point="9")
    with pytest.raises(NotFound, match="there is no disk 'none'"):
        inspect_point(RepositoryDestination(repo), "none")


def test_no_guest_data_is_read(tmp_path: Path) -> None:
    repo = repository(MemoryStore())
    files = build(tmp_path / "c", [Layer(4 * MiB, ["write -P 1 0 1M"]), Layer(4 * MiB, ["write -P 2 0 64k"])])
    ship(files[-1], repo)
    store = CountingStore(repo.store)
    inspect_point(RepositoryDestination(again(repo, store)), DISK)
    assert store.bytes_of("get", "packs/") < 10_000


def test_findings(tmp_path: Path) -> None:
    files = build(
        tmp_path / "c",
        [
            Layer(4 * MiB, ["write -P 1 0 64k"], options="compat=0.10"),
            Layer(2 * MiB),
            Layer(8 * MiB, ["write -P 1 0 64k"]),
        ],
    )
    qemu_img("snapshot", "-c", "inside", files[-1])
    qemu_img("bitmap", "-f", "qcow2", "--add", files[-1], "dirty0")
    found = inspect_image(files[-1]).findings
    for words in ("0.qcow2 is longer", "1.qcow2 is shorter", "1 internal snapshot,", "dirty0", "version 2"):
        assert any(words in finding for finding in found), (words, found)
    assert inspect_image(files[0]).layers[0].snapshots == 0


def test_an_image_in_use_is_looked_at_and_said_so(tmp_path: Path) -> None:
    (image,) = build(tmp_path / "c", [Layer(4 * MiB, ["write -P 1 0 64k"])])
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write("length\n")
        child.stdin.flush()
        child.stdout.readline()
        findings = inspect_image(image).findings
        child.kill()
    assert any("qemu-io" in finding and "of this moment" in finding for finding in findings)


def test_broken_images_are_errors(tmp_path: Path) -> None:
    bad = tmp_path / "bad.qcow2"
    bad.write_bytes(b"not qcow2")
    refusals: list[tuple[Path, type[SnapchainError], str]] = [
        (bad, Corrupt, "the magic bytes are missing"),
        (tmp_path / "none.qcow2", NotFound, "no such file"),
        (tmp_path, InvalidInput, "a directory"),
    ]
    for path, error, says in refusals:
        with pytest.raises(error, match=says) as caught:
            inspect_image(path)
        assert caught.value.subject == str(path)


def test_it_changes_nothing(tmp_path: Path) -> None:
    (image,) = build(tmp_path / "c", [Layer(MiB, ["write -P 1 0 64k"])])
    before = image.stat()
    inspect_image(image)
    write(image, "write -P 2 0 512")
    assert before.st_ino == image.stat().st_ino
