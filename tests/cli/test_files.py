"""`snapchain files` as a user meets it: listing, showing, getting and finding files of points and images."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.cli.conftest import Run, spawned
from tests.files.images import MiB, contents, make, plant, run as command

DISK = "repo::web1/vda"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("files") / "tree", 60, unix=True)


@pytest.fixture(scope="module")
def made(tree: Path) -> Path:
    return make("ext4", tree, tree.with_name("image.raw"), size=32 * MiB)


@pytest.fixture
def image(made: Path, tmp_path: Path) -> Path:
    """Its own copy."""
    path = tmp_path / "web1.raw"
    command("cp", "--sparse=always", made, path)
    return path


@pytest.fixture
def shipped(run: Run, image: Path) -> Path:
    """Three points; the second has another passwd, the third none."""
    assert run("init", "repo", "--no-encryption").status == 0
    assert run("ship", str(image), DISK).status == 0
    for words in (["write passwd /passwd"], ["rm /passwd"]):
        Path("passwd").write_text("root:x:0:0")
        command("debugfs", "-w", *[each for word in words for each in ("-R", word)], image)
        assert run("ship", str(image), DISK).status == 0
    return image


def test_the_files_of_a_point(run: Run, shipped: Path, tree: Path) -> None:
    listed = run("files", "ls", f"{DISK}@2", "--json").json
    names = {path.name for path in tree.iterdir()} | {"lost+found", "passwd"}
    assert {Path(each["path"]).name for each in listed["files"]} == names
    assert (listed["point"], listed["volume"], listed["skipped"]) == (2, "disk", [])
    link = next(each for each in listed["files"] if each["path"] == "/link")
    assert (link["kind"], link["target"]) == ("symlink", "d1")
    through = run("files", "ls", DISK, "/link", "--json").json  # a link to d1
    assert [each["path"].rpartition("/")[2] for each in through["files"]] == sorted(
        path.name for path in (tree / "d1").iterdir()
    )
    assert "link -> d1" in run("files", "ls", DISK).out
    (volume,) = run("files", "volumes", DISK, "--json").json["volumes"]
    assert (volume["name"], volume["content"], volume["size"]) == ("disk", "ext", shipped.stat().st_size)


def test_a_file_goes_to_stdout(run: Run, shipped: Path, tree: Path, tmp_path: Path) -> None:
    _ = run, shipped
    with (
        (tmp_path / "out").open("wb") as out,
        spawned(["files", "cat", DISK, "/sparse"], tmp_path, stdout=out) as child,
    ):
        assert (child.communicate()[1], child.returncode) == ("", 0)
    assert (tmp_path / "out").read_bytes() == (tree / "sparse").read_bytes()
    shown = run("files", "cat", f"{DISK}@2", "passwd", "--json").json
    assert base64.b64decode(shown["content_base64"]) == b"root:x:0:0"
    assert shown["sha256"] == hashlib.sha256(b"root:x:0:0").hexdigest()


def test_a_tree_is_what_the_guest_has(run: Run, shipped: Path, tree: Path, tmp_path: Path) -> None:
    _ = shipped
    report = run("files", "get", f"{DISK}@1", "/", "out", "--keep", "--json").json
    found = contents(tmp_path / "out")
    del found["lost+found"]
    assert found == contents(tree)
    assert (report["skipped"], report["not_kept"], report["left_out"]) == ([], [], [])
    kept, original = tmp_path / "out" / "sparse", tree / "sparse"
    assert kept.samefile(tmp_path / "out" / "second name")
    assert kept.stat().st_mode == original.stat().st_mode
    assert int(kept.stat().st_mtime) == int(original.stat().st_mtime)
    assert os.getxattr(kept, "user.note") == b"kept"
    assert kept.stat().st_blocks * 512 < kept.stat().st_size // 2  # still sparse
    assert (tmp_path / "out" / "d1").stat().st_mtime == int((tree / "d1").stat().st_mtime)


def test_without_keep_files_are_for_their_owner(run: Run, image: Path, tmp_path: Path) -> None:
    assert run("files", "get", str(image), "/sparse", "new").status == 0
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600


def test_a_replica_gives_files_too(run: Run, image: Path, tree: Path, tmp_path: Path) -> None:
    command("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, tmp_path / "web1.qcow2")
    disk = f"dir:{tmp_path}/replica::web1/vda"
    assert run("ship", "web1.qcow2", disk).status == 0
    assert run("files", "get", disk, "/d1", "d1").status == 0
    assert contents(tmp_path / "d1") == contents(tree / "d1")


def test_find_tells_when_a_file_changed(run: Run, shipped: Path) -> None:
    _ = shipped
    found = run("files", "find", DISK, "pass*", "--all-points", "--json").json
    ((path, versions),) = [(each["path"], each["versions"]) for each in found["files"]]
    assert path == "/passwd"
    assert [(each["point"], each["change"]) for each in versions] == [(2, "new"), (3, "gone")]
    assert versions[0]["sha256"] == hashlib.sha256(b"root:x:0:0").hexdigest()
    by_path = run("files", "find", DISK, "/sparse", "--all-points", "--json").json
    assert [each["change"] for each in by_path["files"][0]["versions"]] == ["new", "same", "same"]
    assert "unchanged since, up to point 3" in run("files", "find", DISK, "/sparse", "--all-points").out
    assert run("files", "find", DISK, "/passwd", "--json").json["files"] == []


def test_a_tar_stream_is_read_by_tar(run: Run, image: Path, tree: Path, tmp_path: Path) -> None:
    _ = run
    words = ["files", "get", str(image), "/", "-", "--tar", "--keep"]
    with (tmp_path / "out.tar").open("wb") as out, spawned(words, tmp_path, stdout=out) as child:
        assert "links" in child.communicate()[1]
        assert child.returncode == 0
    (tmp_path / "out").mkdir()
    command("tar", "-x", "-f", tmp_path / "out.tar", "-C", tmp_path / "out", "--xattrs", "--strip-components=1")
    found = contents(tmp_path / "out")
    del found["lost+found"]
    assert found == contents(tree)
    assert (tmp_path / "out" / "sparse").samefile(tmp_path / "out" / "second name")
    assert os.getxattr(tmp_path / "out" / "sparse", "user.note") == b"kept"


def test_a_zip_archive_holds_all_files(run: Run, image: Path, tree: Path, tmp_path: Path) -> None:
    assert run("files", "get", str(image), "/d1", "d1.zip", "--zip").status == 0
    with zipfile.ZipFile(tmp_path / "d1.zip") as archive:
        assert archive.testzip() is None
        found = {each.filename: archive.read(each) for each in archive.infolist() if not each.is_dir()}
    wanted = {f"d1/{name}": data for name, data in contents(tree / "d1").items() if data is not None}
    assert found == wanted


def test_dry_run_writes_nothing(run: Run, image: Path, tmp_path: Path, tree: Path) -> None:
    plan = run("files", "get", str(image), "/d1", "new", "--dry-run", "--json").json["plan"]
    assert plan["bytes"] == sum(len(each) for each in contents(tree / "d1").values() if isinstance(each, bytes))
    assert not (tmp_path / "new").exists()


def test_nothing_that_exists_is_replaced(run: Run, image: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to("precious")
    for name in ("precious", "link"):
        for more in ([], ["--tar"], ["--zip"]):
            said = run("files", "get", str(image), "/sparse", name, *more)
            assert (said.status, "it exists" in said.err) == (4, True)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        (["ls", "web1.raw", "/nothing"], 3, "/nothing: there is no such file"),
        (["cat", "web1.raw", "/d1"], 2, "/d1 is a directory, not a file"),
        (["get", "web1.raw", "/d1"], 2, "get needs OUT"),
        (["ls", "web1.raw", "--keep"], 2, "--keep is not for ls"),
        (["frobnicate", "web1.raw"], 2, "there is no such action"),
        (["get", "web1.raw", "/", "o", "--tar", "--zip"], 2, "--tar and --zip are both given"),
        (["ls", "web1.raw", "--volume", "p9"], 3, "the disk has no volume 'p9'"),
        (["get", "web1.raw", "/", "o", "--max-bytes", "1M"], 2, "more than 1048576 bytes together"),
        (["get", "web1.raw", "/", "missing/o"], 3, "missing"),
        (["get", "web1.raw", "/", "."], 2, "this is no name of its own"),
        (["find", "web1.raw", "x", "--all-points"], 2, "an image has no points"),
    ],
)
def test_errors_say_what_is_wrong(run: Run, image: Path, words: list[str], status: int, error: str) -> None:
    _ = image
    said = run("files", *words)
    assert (said.status, error in said.err) == (status, True), said.err
    assert "Traceback" not in said.err


def test_volumes_must_be_named_where_there_are_several(run: Run, made: Path, tmp_path: Path, tree: Path) -> None:
    disk = tmp_path / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(80 * MiB)
    subprocess.run(["sfdisk", "-q", disk], input="label: gpt\n,32M\n,32M\n", text=True, check=True)
    starts = json.loads(subprocess.run(["sfdisk", "-J", disk], capture_output=True, check=True).stdout)
    for each in starts["partitiontable"]["partitions"]:
        with disk.open("r+b") as file:
            file.seek(each["start"] * 512)
            file.write(made.read_bytes())
    said = run("files", "ls", "disk.raw")
    assert (said.status, "say --volume, and one of p1, p2" in said.err) == (2, True)
    assert run("files", "get", "disk.raw", "/d1", "d1", "--volume", "p2").status == 0
    assert contents(tmp_path / "d1") == contents(tree / "d1")


def test_btrfs_is_refused_with_a_way_out(run: Run, tmp_path: Path) -> None:
    with (tmp_path / "disk.raw").open("wb") as file:
        file.truncate(128 * MiB)
    command("mkfs.btrfs", "-q", tmp_path / "disk.raw")
    said = run("files", "ls", "disk.raw")
    assert (said.status, "Btrfs is not supported" in said.err) == (6, True)
    assert "mount it in a guest of your own" in said.err


def test_a_missing_extra_is_an_error_that_names_it(run: Run, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _ = image
    hidden = [each for each in sys.path if "site-packages" not in each]
    needed = Path("needed")
    needed.mkdir()
    for each in (Path(path) for path in sys.path if "site-packages" in path and Path(path).is_dir()):
        for entry in each.iterdir():
            if not entry.name.startswith(("pyfsext", "libfsext")) and not (needed / entry.name).exists():
                (needed / entry.name).symlink_to(entry)
    monkeypatch.setattr(sys, "path", [*hidden, str(needed.absolute())])
    said = run("files", "ls", "web1.raw")
    assert (said.status, "this Python lacks pyfsext" in said.err) == (2, True)
    assert "pip install 'snapchain[files]'" in said.err


def test_a_journal_that_was_not_replayed_is_told(run: Run, image: Path) -> None:
    with image.open("r+b") as file:
        file.seek(1024 + 0x60)
        features = int.from_bytes(file.read(4), "little")
        file.seek(1024 + 0x60)
        file.write((features | 4).to_bytes(4, "little"))
    said = run("files", "ls", str(image))
    assert said.status == 0
    assert "has changes in its journal" in said.err
