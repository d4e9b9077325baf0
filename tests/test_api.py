"""The public API: its names, what importing it costs, and each name with real images."""

from __future__ import annotations

import pydoc
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

import snapchain
from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, SnapchainError, WrongPassphrase
from tests.cli.conftest import made_disk, qemu_img, write

NAMES = {
    "Destination", "Event", "Policy", "SnapchainError", "copy", "create_repository", "errors", "gc", "inspect", "log",
    "merge_image", "merge_points", "open_destination", "open_image", "restore", "ship", "snapshot", "verify",
}  # fmt: skip
"""Removing or renaming one breaks programs: a changelog line, and a minor version."""
TYPES = {"Destination", "Event", "Policy"}
"""Each has a page of its own, and none in `help(snapchain)`."""
MiB = 1 << 20
SECRET = "correct horse"


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return made_disk(tmp_path)


@pytest.fixture(params=["repository", "replica"])
def place(request: pytest.FixtureRequest, image: Path) -> snapchain.Destination:
    """An opened destination of either kind, with one point of the image: 1, labelled first."""
    if request.param == "repository":
        snapchain.create_repository("backup", passphrase=SECRET)
        opened = snapchain.open_destination("backup", passphrase=SECRET, writing=True)
    else:
        opened = snapchain.open_destination(f"dir:{image.parent}/replica", writing=True)
    snapchain.ship(image, opened, "web1/vda", labels=["first"])
    return opened


def test_the_names_are_pinned() -> None:
    assert set(snapchain.__all__) == NAMES
    assert set(dir(snapchain)) == NAMES - TYPES | {"__version__"}
    assert snapchain.__version__ == version("snapchain")
    for name in NAMES:
        assert getattr(snapchain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Polcy'"):
        _ = snapchain.Polcy  # type: ignore[attr-defined]


def test_importing_it_loads_nothing_heavy() -> None:
    program = "import sys, snapchain; snapchain.SnapchainError; dir(snapchain); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert {name for name in loaded if name.startswith("snapchain")} == {"snapchain", "snapchain.errors"}
    assert not {"numpy", "pydantic", "rich", "typer", "boto3", "cryptography", "pathlib"} & set(loaded)


def test_its_help_is_a_page_of_what_it_exports() -> None:
    page = pydoc.plain(pydoc.render_doc(snapchain))
    assert page.index("Ship, merge and restore") < page.index("Stable:") < page.index("\nFUNCTIONS\n")
    for name in NAMES - TYPES - {"errors"}:
        assert f"    {name}(" in page or f"class {name}(" in page, name
    for name in TYPES:
        assert f" `{name}` " in page.split("\nFUNCTIONS\n")[0], name
    assert len(page.splitlines()) < 400
    assert "\n    _opened" not in page
    assert "Raises" in (snapchain.ship.__doc__ or "")


def test_a_point_goes_there_and_comes_back(image: Path, place: snapchain.Destination, tmp_path: Path) -> None:
    """By a path of either type, by its number, its label and as the newest; with nothing sent twice."""
    events: list[snapchain.Event] = []
    snapchain.snapshot(image, labels=["sealed"])
    write(image, "write -P 5 4M 1M")
    second = snapchain.ship(str(image), place, "web1/vda", labels=("second",), on_event=events.append)
    assert (second.disk, second.point) == ("web1/vda", 2)
    assert snapchain.ship(image, place, "web1/vda").layers_sent == 0
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, "now.raw")
    assert snapchain.restore(place, "web1/vda", "newest.qcow2").content_id == second.content_id
    assert snapchain.restore(place, "web1/vda", tmp_path / "second.raw", point="second").content_id == second.content_id
    first = snapchain.restore(place, "web1/vda", "first.raw", point=1, on_event=events.append)
    assert first.content_id != second.content_id
    qemu_img("compare", "-f", "qcow2", "-F", "raw", "newest.qcow2", "now.raw")
    qemu_img("compare", "-f", "raw", "-F", "raw", "second.raw", "now.raw")
    assert events
    with pytest.raises(Conflict, match="exists"):
        snapchain.restore(place, "web1/vda", "first.raw")
    snapchain.restore(place, "web1/vda", "first.raw", force=True)
    with pytest.raises(NotFound, match="nowhere"):
        snapchain.restore(place, "web1/vda", "other.raw", point="nowhere")


def test_listing_and_verifying(place: snapchain.Destination) -> None:
    (disk,) = snapchain.log(place).disks
    assert disk.name == "web1/vda"
    assert [(point.point, point.labels) for point in disk.points] == [(1, ("first",))]
    assert snapchain.log(place, "web1/vda").disks == (disk,)
    with pytest.raises(NotFound, match="web2/vda"):
        snapchain.log(place, "web2/vda")
    report = snapchain.verify(place, share=1.0)
    assert (report.ok, report.findings) == (True, ())
    assert snapchain.verify(place, "web1/vda").ok


def test_points_are_merged_by_a_policy(image: Path, place: snapchain.Destination) -> None:
    for number in range(2):
        snapchain.snapshot(image)
        write(image, f"write -P {number + 6} {number}M 64k")
        snapchain.ship(image, place, "web1/vda")
    merged = snapchain.merge_points(place, "web1/vda", snapchain.Policy(last=1, labels=frozenset({"first"})))
    assert (merged.points_kept, merged.points_dropped) == ((1, 3), (2,))
    snapchain.restore(place, "web1/vda", "after.qcow2")
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", "after.qcow2", image)
    if place.traits.needs_collecting:
        assert snapchain.gc(place).findings == ()
    else:
        with pytest.raises(InvalidInput, match="replica"):
            snapchain.gc(place)
    assert snapchain.verify(place, share=1.0).ok


def test_an_image_is_opened_inspected_sealed_and_merged(image: Path, tmp_path: Path) -> None:
    sealed = snapchain.snapshot("web1.qcow2", labels=["monday"])
    assert sealed.layers == 2
    write(image, "write -P 3 1M 1M")
    for path in (image, "web1.qcow2", Path("web1.qcow2")):
        report = snapchain.inspect(path)
        assert [layer.data_bytes for layer in report.layers] == [3 * MiB, MiB]
        assert report.layers[0].shadowed_bytes == MiB
    with snapchain.open_image("web1.qcow2") as chain:
        assert (chain.size, len(chain.files)) == (16 * MiB, 2)
        buffer = bytearray(4)
        chain.read_into(MiB, memoryview(buffer))
    assert bytes(buffer) == b"\x03\x03\x03\x03"
    snapchain.snapshot(image)
    write(image, "write -P 4 2M 64k")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", image, "before.raw")
    merged = snapchain.merge_image(image, max_layers=2, keep_inputs=False)
    assert (merged.layers_before, merged.layers_after) == (3, 2)
    assert snapchain.merge_image("web1.qcow2", flatten=True).layers_after == 1
    qemu_img("compare", "-f", "qcow2", "-F", "raw", image, tmp_path / "before.raw")


def test_a_destination_is_named_by_any_path(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative one too: as text, as a Path; with the passphrase from the environment."""
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", SECRET)
    made = snapchain.create_repository(Path("backup"))
    assert made.destination == str(image.parent / "backup")
    addresses: list[str | Path] = ["backup", Path("backup"), "./backup", image.parent / "backup"]
    for number, address in enumerate(addresses, 1):
        assert snapchain.ship(image, address, "web1").point == number
    assert len(snapchain.log(f"file://{image.parent}/backup").disks[0].points) == 4
    snapchain.ship(image, f"dir:{image.parent}/replica", "web1")
    assert snapchain.verify(f"dir:{image.parent}/replica").ok


def test_what_is_wrong_is_an_error_of_the_tree(image: Path) -> None:
    (image.parent / "text.qcow2").write_text("no image")
    wrong: list[tuple[type[SnapchainError], str, Callable[[], object]]] = [
        (InvalidInput, "needs a passphrase", lambda: snapchain.create_repository("backup")),
        (NotFound, "no snapchain repository", lambda: snapchain.open_destination("backup")),
        (InvalidInput, "gopher", lambda: snapchain.open_destination("gopher://there")),
        (NotFound, "no such file", lambda: snapchain.open_image("nowhere.qcow2")),
        (Corrupt, "not a qcow2 image", lambda: snapchain.inspect("text.qcow2")),
    ]
    for kind, words, call in wrong:
        with pytest.raises(kind, match=words):
            call()
        assert getattr(snapchain.errors, kind.__name__) is kind
    snapchain.create_repository("backup", passphrase=SECRET)
    with pytest.raises(Conflict, match="already"):
        snapchain.create_repository("backup", passphrase=SECRET)
    with pytest.raises(WrongPassphrase, match="wrong passphrase"):
        snapchain.open_destination("backup", passphrase="wrong")
    with pytest.raises(InvalidInput, match="last"):
        snapchain.Policy(last=-7)
