"""The directory store: the contract, and what only a file system can get wrong."""

import ctypes
import errno
import gc
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.host.links import Followed, follow
from snapchain.objects import local as linking, rooted
from snapchain.objects.local import LocalStore
from snapchain.objects.rooted import MEANINGS, from_os_error
from snapchain.objects.store import ObjectStore, Refused
from snapchain.testing.object_contract import ObjectStoreContract


class TestLocal(ObjectStoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> ObjectStore:
        return LocalStore(tmp_path / "new" / "root", make=True)


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root", make=True)


def unfinished(store: LocalStore) -> list[Path]:
    return list((store.root / "tmp").iterdir())


def test_a_store_that_nobody_closes_leaves_no_descriptor(tmp_path: Path) -> None:
    """Descriptors of that directory: others may open and close theirs meanwhile."""
    root = tmp_path / "root"
    LocalStore(root, make=True).put("x", b"y")
    gc.collect()
    links = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not [link for link in links if link.is_relative_to(root)]


def test_a_missing_directory_is_not_made_by_itself(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, says in [
        ("none", "no such directory"),
        ("file", "a file, not a directory"),
        ("file/x", "no such directory"),
    ]:
        with pytest.raises(NotFound, match=says):
            LocalStore(tmp_path / name)
    assert not (tmp_path / "none").exists()


def test_everything_is_private(local: LocalStore) -> None:
    old = os.umask(0)
    try:
        local.put("a/b", b"")
        local.create("a/c", b"")
    finally:
        os.umask(old)
    for path in [local.root, *local.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_names_and_directories_share_one_space(local: LocalStore) -> None:
    local.put("a/b/c", b"")
    for name in ["a", "a/b"]:
        for write in (local.put, local.create):
            with pytest.raises(InvalidInput, match="is a directory"):
                write(name, b"")
    for name in ["a/b/c/d", "a/b/c/d/e"]:
        with pytest.raises(InvalidInput, match="object stands"):
            local.put(name, b"")
    assert unfinished(local) == []


def test_foreign_files_are_not_objects(local: LocalStore) -> None:
    local.put("a/b", b"1")
    (local.root / "lost+found").mkdir()
    (local.root / "a" / ".nfs0001").touch()
    (local.root / "a" / "README.txt").touch()
    (local.root / "tmp" / "1-abc").touch()
    os.mkfifo(local.root / "a" / "pipe")
    assert [info.name for info in local.list("")] == ["a/b"]
    assert list(local.list_dirs("")) == ["a"]
    with pytest.raises(Unsupported, match="regular file"):
        local.get("a/pipe")


def test_symbolic_links_lead_nowhere(local: LocalStore, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    local.put("real/x", b"x")
    (local.root / "dir").symlink_to(outside)
    (local.root / "leaf").symlink_to(outside / "secret")
    for name in ["dir/secret", "leaf"]:
        with pytest.raises(Unsupported, match="too many levels of symbolic links") as caught:
            local.get(name)
        assert caught.value.hint is not None
        assert "bind mount" in caught.value.hint
    for write in (local.put, local.create):
        with pytest.raises(Unsupported, match="too many levels of symbolic links"):
            write("dir/new", b"")
    with pytest.raises(Unsupported, match="too many levels of symbolic links"):
        local.delete("dir/secret")
    assert [info.name for info in local.list("")] == ["real/x"]
    local.put("leaf", b"mine")  # replaces the link, not what it points to
    local.delete("leaf")
    assert (outside / "secret").read_bytes() == b"secret"
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]


def test_the_path_that_the_user_named_may_be_a_link(local: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(local.root)
    LocalStore(tmp_path / "link").put("a", b"1")
    assert local.get("a") == b"1"


def test_a_failed_write_leaves_nothing(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    local.put("a", b"before")

    def full(fd: int, views: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", full)
    for write in (local.put, local.create):
        with pytest.raises(Refused, match="no space left on device") as caught:
            write("b", b"data")
        assert caught.value.hint is not None
        assert "free space" in caught.value.hint
    with pytest.raises(Refused, match="no space left"):
        local.put("a", b"after")
    monkeypatch.undo()
    assert local.get("a") == b"before"
    assert local.size("b") is None
    assert unfinished(local) == []


def test_a_failed_sync_is_a_failed_put(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    local.put("d/a", b"before")
    sync = os.fsync

    def broken(fd: int) -> None:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Unavailable, match="input/output error"):
        local.put("d/a", b"after")
    monkeypatch.undo()
    assert local.get("d/a") == b"before"
    assert unfinished(local) == []


def test_short_writes_are_continued(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: writev(fd, [views[0][:3]]))
    parts = [bytes([number]) * (number % 9) for number in range(200)]
    local.put("a", parts)
    assert local.get("a") == b"".join(parts)


def test_short_reads_are_continued(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    body = os.urandom(1000)
    local.put("a", body)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, length, offset: pread(fd, min(length, 7), offset))
    assert local.get("a", offset=3, length=900) == body[3:903]


def test_a_limit_set_by_the_kernel(local: LocalStore) -> None:
    script = (
        "import resource, signal, sys\n"
        "from snapchain.objects.local import LocalStore\n"
        "from snapchain.objects.store import Refused\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "store = LocalStore(sys.argv[1])\n"
        "try:\n"
        "    store.put('big', bytes(10000))\n"
        "except Refused as error:\n"
        "    print(error, error.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(local.root)], capture_output=True, text=True, check=True)
    assert "file too large" in done.stdout
    assert "ulimit -f" in done.stdout
    assert local.size("big") is None
    assert unfinished(local) == []


def test_a_killed_writer_leaves_only_what_a_sweep_takes(local: LocalStore) -> None:
    script = (
        "import os, signal, sys\n"
        "from snapchain.objects.local import LocalStore\n"
        "def sync(fd):\n"
        "    if os.readlink(f'/proc/self/fd/{fd}').startswith(sys.argv[1] + '/tmp/'):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.fsync = sync\n"
        "LocalStore(sys.argv[1]).put('d/a', bytes(5000))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(local.root)], check=False)
    assert done.returncode == -9
    (left,) = (local.root / "tmp").iterdir()
    assert list(local.list("")) == []
    assert local.create("d/a", b"mine")
    assert local.sweep_temporary() == 0, "it may be at work"
    day_ago = time.time() - 90_000
    os.utime(left, (day_ago, day_ago))
    LocalStore(local.root).put("d/b", b"")  # the first write of a store sweeps
    assert not left.exists()
    assert local.sweep_temporary() == 0
    assert [info.name for info in local.list("")] == ["d/a", "d/b"]


def test_sweeping_makes_nothing(local: LocalStore) -> None:
    assert local.sweep_temporary(0) == 0
    assert list(local.root.iterdir()) == []


def test_a_removed_directory_is_made_again(local: LocalStore) -> None:
    local.put("d/e/a", b"1")
    local.delete("d/e/a")
    (local.root / "d" / "e").rmdir()
    (local.root / "d").rmdir()
    local.put("d/e/a", b"2")
    assert local.get("d/e/a") == b"2"


def test_new_directories_are_synced_before_the_object(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    sync = os.fsync
    root = str(local.root)

    def record(fd: int) -> None:
        path = str(Path(f"/proc/self/fd/{fd}").readlink()).replace(root, "")
        synced.append("tmp/*" if path.startswith("/tmp/") else path)
        sync(fd)

    monkeypatch.setattr(os, "fsync", record)
    local.put("d/e/a", b"1")
    assert synced == ["", "", "/d", "tmp/*", "/d/e"]  # tmp and d into the root, e into d, the data, a into e
    synced.clear()
    local.put("d/e/b", b"2")
    assert synced == ["tmp/*", "/d/e"]


def test_create_where_hard_links_are_unknown(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert local.create("d/a", b"1") is True
    (local.root / "tmp" / "loser").write_bytes(b"2")
    tmp, folder = (os.open(local.root / name, os.O_RDONLY) for name in ("tmp", "d"))
    assert linking.link_once(tmp, "loser", folder, "a") is False
    os.close(tmp)
    os.close(folder)
    assert local.get("d/a") == b"1"


def test_create_where_nothing_is_atomic_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=None))
    fd = os.open(tmp_path, os.O_RDONLY)
    (tmp_path / "a").touch()
    with pytest.raises(Unsupported, match="neither link nor rename") as caught:
        linking.rename_once(fd, "a", fd, "b")
    os.close(fd)
    assert caught.value.hint is not None


def test_a_link_whose_reply_was_lost_is_ours(local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeated(*args: object, **kwargs: object) -> None:
        link(*args, **kwargs)  # type: ignore[arg-type]
        link(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", repeated)
    assert local.create("a", b"mine") is True


def test_a_closed_store_says_so(local: LocalStore) -> None:
    local.put("a", b"")
    local.close()
    with pytest.raises(InvalidInput, match="closed"):
        local.get("a")
    with pytest.raises(InvalidInput, match="closed"):
        local.put("a", b"")


def test_no_descriptor_is_left_open(local: LocalStore) -> None:
    local.put("d/a", b"1")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        local.put("d/a", b"1")
        local.create("d/a", b"2")
        local.get("d/a")
        local.size("e/f")
        next(local.list(""))
        list(local.list_dirs(""))
        with pytest.raises(NotFound, match="d: no such object"):
            local.get("d")
        with pytest.raises(InvalidInput, match="an object stands where a directory is needed"):
            local.put("d/a/x", b"")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("number", sorted(MEANINGS))
def test_every_errno_has_a_class_and_the_system_s_words(number: int) -> None:
    error = from_os_error(OSError(number, os.strerror(number)), "x")
    assert error.subject == "x"
    assert os.strerror(number).lower() in str(error)


def test_an_unknown_errno_is_unavailable() -> None:
    error = from_os_error(OSError(errno.EBADE, "?"), "x")
    assert type(error) is Unavailable
    assert type(from_os_error(OSError("odd"), "x")) is Unavailable


# ---- a store in hostile hands


@pytest.mark.parametrize("name", ["config", "keys/a", "leases/a", "disks/a", "index/a", "layers/a", "packs/aa/a", "a"])
@pytest.mark.parametrize("kind", ["sparse", "fifo", "directory", "link", "socket", "device"])
def test_what_is_no_plausible_object_is_refused_at_once(
    kind: str, name: str, local: LocalStore, tmp_path: Path
) -> None:
    """No wait for a writer, no terabyte in memory, nothing from outside."""
    path = local.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "outside").write_text("secret")
    if kind == "sparse":
        path.touch()
        os.truncate(path, 1 << 40)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "outside")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            fd = os.open(path.parent, os.O_RDONLY)
            made.bind(f"/proc/self/fd/{fd}/{path.name}")
            os.close(fd)
    elif os.geteuid() == 0:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    else:
        path.symlink_to("/dev/zero")
    kinds: dict[str, tuple[type[SnapchainError], str]] = {
        "sparse": (Corrupt, "it has [0-9]+ bytes; at most [0-9]+ are plausible"),
        "directory": (NotFound, "no such object"),
        "link": (Unsupported, "too many levels of symbolic links"),
        "socket": (Unavailable, "no such device or address"),
    }
    expected, words = kinds.get(kind, (Unsupported, "not a regular file"))
    with pytest.raises(expected, match=words):
        local.get(name)
    with pytest.raises(expected, match=words):
        local.get(name, offset=0, length=1 << 39)
    assert all(info.size == 1 << 40 for info in local.list(""))


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_modes_do_not_depend_on_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        store = LocalStore(tmp_path / "new" / "root", make=True)
        store.put("a/b/c", b"x")
        store.create("a/d", b"x")
        with store.spending():
            pass
        store.close()
    finally:
        os.umask(before)
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("kind", ["fifo", "hard link", "link"])
def test_a_planted_reserve_is_not_written_to(kind: str, local: LocalStore, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("of somebody else")
    path = local.root / ".reserve"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "hard link":
        path.hardlink_to(victim)
    else:
        path.symlink_to(victim)
    with local.spending():
        local.put("a", b"x")
    assert victim.read_text() == "of somebody else"


@pytest.mark.root
def test_root_follows_no_link_that_another_user_could_have_made(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / "empty").mkdir()
    (theirs / "repo").symlink_to(tmp_path / "empty")
    os.chown(theirs, 65534, 65534)
    for make in (False, True):
        for place in (theirs / "repo", theirs / "repo" / "below"):
            with pytest.raises(Unsupported, match="another user could have made a symbolic link") as caught:
                LocalStore(place, make=make)
            assert str(tmp_path / "empty") in str(caught.value.hint)
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "mine").symlink_to(tmp_path / "empty")
    LocalStore(tmp_path / "mine", make=True).close()


@pytest.mark.root
def test_a_directory_that_becomes_a_link_while_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner swaps it as soon as the way was judged."""
    (tmp_path / "secret").mkdir(mode=0o700)
    theirs = tmp_path / "theirs"
    (theirs / "store").mkdir(parents=True)
    os.chown(theirs, 4321, 4321)
    judge = follow

    def judged(path: Path) -> Followed:
        found = judge(path)
        (theirs / "store").rename(theirs / "aside")
        (theirs / "store").symlink_to(tmp_path / "secret")
        return found

    monkeypatch.setattr(rooted, "follow", judged)
    with pytest.raises(Unsupported, match="another user could have made a symbolic link"):
        LocalStore(theirs / "store" / "repository", make=True)
    assert not list((tmp_path / "secret").iterdir())
