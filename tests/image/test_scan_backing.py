"""Which file a backing name means, and which files are never opened."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fixtures import qcow2_bytes as q
from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.image import scan
from snapchain.image.backing import Place
from snapchain.image.opening import open_image
from tests.host.others import ALICE, BOB, directory, file, link, root_only
from tests.image.oracle import our_bytes, their_bytes


def overlay(path: Path, backing: str, image_format: str = "qcow2") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    q.create(path, backing=backing, backing_format=image_format)
    return path


def base(path: Path, pattern: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    q.create(path)
    q.qemu_io(path, f"write -P {pattern} 0 64k")
    return path


def test_a_relative_name_starts_at_the_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base(tmp_path / "below" / "deep" / "base.qcow2")
    overlay(tmp_path / "below" / "mid.qcow2", "deep/base.qcow2")
    overlay(tmp_path / "top.qcow2", "below/mid.qcow2")
    monkeypatch.chdir(tmp_path)
    with scan("top.qcow2") as chain:
        assert [file.path.name for file in chain.files] == ["base.qcow2", "mid.qcow2", "top.qcow2"]
        assert chain.files[0].real_path == (tmp_path / "below" / "deep" / "base.qcow2").resolve()
        assert chain.top.path.is_absolute()


def test_a_symbolic_link_to_the_top_is_resolved_as_qemu_resolves_it(tmp_path: Path) -> None:
    """Relative to the directory of the link, not of the file: both have a base, with other bytes."""
    base(tmp_path / "pool" / "base.qcow2", 1)
    base(tmp_path / "vm" / "base.qcow2", 2)
    overlay(tmp_path / "pool" / "disk.qcow2", "base.qcow2")
    (tmp_path / "vm" / "disk.qcow2").symlink_to(tmp_path / "pool" / "disk.qcow2")
    with scan(tmp_path / "vm" / "disk.qcow2") as chain:
        theirs = their_bytes(chain.top.path, "qcow2", tmp_path)
        assert our_bytes(chain).tobytes() == theirs.tobytes()
        assert theirs[0] == 2
        assert chain.top.real_path.parent.name == "pool"


def test_a_backing_file_elsewhere_needs_its_directory_named(tmp_path: Path) -> None:
    outside = base(tmp_path / "templates" / "debian.qcow2")
    top = overlay(tmp_path / "vm" / "disk.qcow2", str(outside))
    with pytest.raises(Unsupported, match="outside the directories") as caught:
        scan(top)
    assert caught.value.hint is not None
    assert f"--image-dir {outside.parent}" in caught.value.hint
    with scan(top, image_dirs=[tmp_path / "templates"]) as chain:
        assert len(chain.files) == 2
    with pytest.raises(Unsupported, match="outside the directories"):
        scan(top, image_dirs=[tmp_path / "templat"])


def test_a_link_inside_an_allowed_directory_leads_no_further(tmp_path: Path) -> None:
    secret = tmp_path / "secret.raw"
    secret.write_bytes(b"secret" * 1000)
    top = overlay(tmp_path / "vm" / "disk.qcow2", "innocent.raw", "raw")
    (tmp_path / "vm" / "innocent.raw").symlink_to(secret)
    with pytest.raises(Unsupported, match="outside the directories"):
        scan(top)


def test_a_path_that_climbs_out_and_back_is_where_the_kernel_says(tmp_path: Path) -> None:
    base(tmp_path / "vm" / "base.qcow2")
    top = overlay(tmp_path / "vm" / "disk.qcow2", "../vm/base.qcow2")
    with scan(top) as chain:
        assert len(chain.files) == 2


@pytest.mark.parametrize(
    "name", ["a:b.qcow2", "file:base.qcow2", "json:{}", "nbd+unix:///?socket=/x", "host_device:/x"]
)
def test_protocols_are_not_followed(tmp_path: Path, name: str) -> None:
    top = tmp_path / "disk.qcow2"
    q.create(top)
    q.put_backing(top, name.encode())
    with pytest.raises(Unsupported, match="not a plain path"):
        scan(top)


def test_a_colon_behind_a_slash_is_part_of_the_name(tmp_path: Path) -> None:
    base(tmp_path / "a:b.qcow2")
    with scan(overlay(tmp_path / "disk.qcow2", "./a:b.qcow2")) as chain:
        assert len(chain.files) == 2


def test_an_empty_backing_name_is_none(tmp_path: Path) -> None:
    top = base(tmp_path / "disk.qcow2")
    q.put(top, backing_file_offset=1024, backing_file_size=0)
    with scan(top) as chain:
        assert len(chain.files) == 1


def test_a_chain_of_200_is_read_and_one_of_201_refused(tmp_path: Path) -> None:
    base(tmp_path / "0000.qcow2")
    overlay(tmp_path / "template.qcow2", "0000.qcow2")
    template = (tmp_path / "template.qcow2").read_bytes()[: 256 << 10]
    for number in range(1, 201):
        below = b"%04d.qcow2" % (number - 1)
        (tmp_path / f"{number:04}.qcow2").write_bytes(template.replace(b"0000.qcow2", below))
    with scan(tmp_path / "0199.qcow2") as chain:
        assert len(chain.files) == 200
        assert our_bytes(chain)[:2].tolist() == [1, 1]
    with pytest.raises(Unsupported, match="200 files"):
        scan(tmp_path / "0200.qcow2")


def test_a_loop_through_a_link_is_found_by_inode(tmp_path: Path) -> None:
    top = overlay(tmp_path / "disk.qcow2", "other.qcow2")
    (tmp_path / "other.qcow2").symlink_to("disk.qcow2")
    with pytest.raises(Corrupt, match="loops"):
        scan(top)


def test_hard_links_are_a_loop_too(tmp_path: Path) -> None:
    top = overlay(tmp_path / "disk.qcow2", "other.qcow2")
    (tmp_path / "other.qcow2").hardlink_to(top)
    with pytest.raises(Corrupt, match="loops"):
        scan(top)


WRONG_TOPS: dict[str, tuple[Callable[[Path], object], type[SnapchainError], str]] = {
    "missing": (lambda _path: None, NotFound, "no such file"),
    "no directory": (lambda path: path.parent.rmdir(), NotFound, "no such file"),
    "fifo": (os.mkfifo, InvalidInput, "FIFO"),
    "directory": (lambda path: path.mkdir(), InvalidInput, "directory"),
    "device": (lambda path: path.symlink_to("/dev/null"), InvalidInput, "character device"),
    "link to itself": (lambda path: path.symlink_to(path.name), InvalidInput, "cannot be opened|symbolic link"),
}


@pytest.mark.parametrize("name", WRONG_TOPS)
def test_what_is_no_image_file(tmp_path: Path, name: str) -> None:
    make, kind, words = WRONG_TOPS[name]
    path = tmp_path / "images" / "disk.raw"
    path.parent.mkdir()
    make(path)
    with pytest.raises(kind, match=words):
        scan(path)


def test_a_socket_is_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("disk.raw")
        with pytest.raises(InvalidInput, match="a socket"):
            scan("disk.raw")


def test_wrong_requests(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="NUL"):
        scan("a\0b")
    with pytest.raises(InvalidInput, match="format 'vmdk'"):
        scan(base(tmp_path / "disk.qcow2"), format="vmdk")


def test_the_format_is_said_or_told_by_the_suffix_never_probed(tmp_path: Path) -> None:
    path = base(tmp_path / "disk.img")
    with pytest.raises(InvalidInput, match="begin like qcow2"):
        scan(path)
    with scan(path, format="qcow2") as chain:
        assert chain.top.format == "qcow2"
    with scan(path, format="raw") as chain:
        assert (chain.top.format, chain.size) == ("raw", -(-path.stat().st_size // 512) * 512)
    (tmp_path / "disk.QCOW2").write_bytes(bytes(4096))
    with pytest.raises(Corrupt, match="magic"):
        scan(tmp_path / "disk.QCOW2")


SWAP = """
import os, sys
os.chdir(sys.argv[1])
while True:
    os.symlink("../secret.raw", "in/spare")
    os.rename("in/spare", "in/disk.raw")
    os.link("in/good.raw", "in/spare")
    os.rename("in/spare", "in/disk.raw")
"""


def test_a_name_that_is_swapped_while_it_is_opened_opens_one_of_both_or_nothing(tmp_path: Path) -> None:
    """The other file lies outside; a link to it takes the image's place again and again."""
    image, good, secret = tmp_path / "in" / "disk.raw", tmp_path / "in" / "good.raw", tmp_path / "secret.raw"
    good.parent.mkdir()
    good.write_bytes(b"good")
    secret.write_bytes(b"evil")
    shutil.copy(good, image)
    swapper = subprocess.Popen([sys.executable, "-c", SWAP, str(tmp_path)])
    refused = opened = 0
    try:
        deadline = time.monotonic() + 20
        while min(refused, opened) < 200 and time.monotonic() < deadline:
            try:
                fd = open_image(image, subject=image)
            except SnapchainError:
                refused += 1
                continue
            opened += 1
            try:
                assert os.pread(fd, 4, 0) == b"good"
            finally:
                os.close(fd)
    finally:
        swapper.kill()
        swapper.wait()
    assert refused
    assert opened


def test_places_keep_the_name_and_know_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    place = Place.of("link/../disk.qcow2")
    assert place.path == Path.cwd() / "link/../disk.qcow2"
    assert place.real == tmp_path.resolve() / "disk.qcow2"


# --- root, and files of other users


def stacked(overlay: Path, base: str | Path, *, uid: int) -> Path:
    link = ("-u", "-b", str(base), "-F", "raw")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *link, overlay, "64k"], check=True)
    os.chown(overlay, uid, uid)
    overlay.chmod(0o600)
    return overlay


@root_only
@pytest.mark.parametrize(
    ("base", "allowed"),
    [
        ("open", True),  # anybody may read it
        ("secret", False),  # root's own
        ("hidden/open", False),  # in a directory that only root may enter
        ("own", True),
        ("bobs", False),
    ],
)
def test_a_backing_file_is_read_only_if_the_overlays_owner_may_read_it(
    open_host: Path, base: str, *, allowed: bool
) -> None:
    """Else a guest that has broken out shows root's backup the disks of others, or has them merged into its own."""
    directory(open_host / "hidden", mode=0o700)
    for name, uid, mode in (("open", 0, 0o644), ("secret", 0, 0o600), ("own", ALICE, 0o600), ("bobs", BOB, 0o600)):
        for place in (open_host, open_host / "hidden"):
            file(place / name, "x" * 65536, uid=uid, mode=mode)
    overlay = stacked(open_host / "disk.qcow2", base, uid=ALICE)
    if allowed:
        scan(overlay, image_dirs=[open_host]).close()
    else:
        with pytest.raises(Unsupported, match=f"leads root to this file, which user {ALICE}.* cannot read") as raised:
            scan(overlay, image_dirs=[open_host])
        assert raised.value.subject == str(open_host / base)
        assert f"let user {ALICE} read it" in str(raised.value.hint)
    os.chown(overlay, 0, 0)
    scan(overlay, image_dirs=[open_host]).close()


@root_only
def test_a_layer_in_a_directory_of_somebody_is_opened_as_theirs(open_host: Path) -> None:
    """As nova has it: the directory is its own, the files are libvirt's."""
    nova = directory(open_host / "nova", uid=BOB)
    file(nova / "base", "x" * 65536, uid=ALICE)
    overlay = stacked(nova / "disk.qcow2", "base", uid=ALICE)
    scan(overlay).close()
    os.chown(overlay, BOB, BOB)
    scan(overlay).close()
    os.chown(nova / "base", 0, 0)
    with pytest.raises(Unsupported, match=f"which user {BOB}, to whom that belongs, cannot read"):
        scan(overlay)


@root_only
def test_a_link_of_somebody_leads_only_where_they_may_read(open_host: Path) -> None:
    secret = directory(open_host / "secret", mode=0o755)
    file(secret / "a.raw", "x" * 65536)
    file(secret / "b.raw", "x" * 65536, mode=0o644)
    alices = directory(open_host / "alice", uid=ALICE)
    for name in ("a.raw", "b.raw"):
        link(alices / name, secret / name, uid=ALICE)
    with pytest.raises(Unsupported, match=f"a.raw leads root to this file, which user {ALICE}"):
        scan(alices / "a.raw")
    with scan(alices / "b.raw") as chain, pytest.raises(Unsupported, match="root does not change for them"):
        chain.top.check_may_be_changed()
