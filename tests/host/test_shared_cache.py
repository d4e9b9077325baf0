"""A cache that processes share: bounds, kills, strangers' bytes, and who fetches what."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from snapchain.errors import InvalidInput
from snapchain.host import shared_cache as module
from snapchain.host.shared_cache import FOLDER, SharedCache
from tests.waiting import HANG, wait_until

KiB = 1 << 10


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[SharedCache]:
    with SharedCache(tmp_path, 100 * KiB) as made:
        yield made


def blobs(folder: Path) -> dict[str, int]:
    found = {path.name: path.stat().st_size for path in (folder / FOLDER).iterdir()}
    return {name: size for name, size in found.items() if name not in ("total", "claims")}


def test_what_one_keeps_another_takes(cache: SharedCache, tmp_path: Path) -> None:
    cache.keep("a", b"x" * KiB)
    with SharedCache(tmp_path, 100 * KiB) as other:
        assert other.take("a", size=KiB) == b"x" * KiB
        assert other.take("b", size=KiB) is None
        assert other.take("a", size=KiB - 1) is None, "longer than it should be"
        assert other.take("a", size=KiB + 1) is None, "torn"
        other.drop("a")
        other.drop("a")
    assert cache.take("a", size=KiB) is None


def test_it_is_for_this_user_alone(cache: SharedCache, tmp_path: Path) -> None:
    cache.keep("a", b"x")
    assert (tmp_path / FOLDER).stat().st_mode & 0o077 == 0
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / FOLDER).iterdir()} == {0o600}
    link = tmp_path / "other"
    link.mkdir()
    (link / FOLDER).symlink_to(tmp_path / FOLDER)
    with pytest.raises(InvalidInput, match="not a directory"):
        SharedCache(link, 100 * KiB)


def test_it_is_bounded_and_what_is_used_stays(cache: SharedCache, tmp_path: Path) -> None:
    for number in range(300):
        cache.keep(f"{number}", bytes(10 * KiB))
        os.utime(tmp_path / FOLDER / f"{number}", (number, number))
        assert cache.take("0", size=10 * KiB) is not None, "its time is renewed when it is taken"
        assert sum(blobs(tmp_path).values()) <= 100 * KiB
    assert "299" in blobs(tmp_path)
    cache.keep("large", bytes(100 * KiB + 1))
    assert "large" not in blobs(tmp_path)


def test_processes_keep_the_bound_together_and_a_kill_leaves_it_usable(tmp_path: Path) -> None:
    """Three processes write; one is killed in the middle, whatever it was doing."""
    program = f"""
import sys
from pathlib import Path
from snapchain.host.shared_cache import SharedCache
cache = SharedCache(Path({str(tmp_path)!r}), {100 * KiB})
for number in range(int(sys.argv[2])):
    cache.keep(sys.argv[1] + str(number), bytes([number % 256]) * {4 * KiB})
    print(number, flush=True)
"""
    argv = [sys.executable, "-c", program]
    killed = subprocess.Popen([*argv, "k", "1000000"], stdout=subprocess.PIPE)
    others = [subprocess.Popen([*argv, name, "150"], stdout=subprocess.DEVNULL) for name in "ab"]
    with killed:
        assert killed.stdout is not None
        for _ in range(20):
            killed.stdout.readline()
        killed.kill()
    assert [each.wait() for each in others] == [0, 0]
    assert sum(blobs(tmp_path).values()) <= 100 * KiB + 3 * 4 * KiB
    with SharedCache(tmp_path, 100 * KiB) as cache:
        for number in range(60):
            cache.keep(f"n{number}", bytes(4 * KiB))
        assert sum(blobs(tmp_path).values()) <= 100 * KiB
        assert cache.take("n59", size=4 * KiB) == bytes(4 * KiB)


@pytest.mark.parametrize("total", [b"", b"x", b"\xff" * 8])
def test_a_wrong_total_is_found_out(total: bytes, cache: SharedCache, tmp_path: Path) -> None:
    (tmp_path / FOLDER / "total").write_bytes(total)
    for number in range(50):
        cache.keep(f"{number}", bytes(10 * KiB))
    assert 70 * KiB <= sum(blobs(tmp_path).values()) <= 100 * KiB


def test_what_a_killed_process_has_left_goes(cache: SharedCache, tmp_path: Path) -> None:
    left = tmp_path / FOLDER / ".x.new-12345678"
    left.write_bytes(bytes(50 * KiB))
    os.utime(left, (1, 1))
    for number in range(20):
        cache.keep(f"{number}", bytes(10 * KiB))
    assert not left.exists()


def test_one_process_fetches_what_several_want(cache: SharedCache, tmp_path: Path) -> None:
    with SharedCache(tmp_path, 100 * KiB) as other:
        with cache.claimed(["a", "b"]) as ours, other.claimed(["b", "c"]) as theirs:
            assert (ours, theirs) == ({"a", "b"}, {"c"})
        with other.claimed(["a", "b", "c"]) as theirs:
            assert theirs == {"a", "b", "c"}


def test_who_waits_for_a_process_that_hangs_goes_on(
    cache: SharedCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.02)
    with SharedCache(tmp_path, 100 * KiB) as other, cache.claimed(["a"]):
        other.wait("a")
    cache.wait("a")


def test_where_nothing_can_be_kept_nothing_is_said(
    cache: SharedCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache._directory, "write_unsynced", full)
    cache.keep("a", b"x")
    monkeypatch.undo()
    cache.keep("a", b"x")
    assert cache.take("a", size=1) is None, "not tried again for a minute"
    with SharedCache(tmp_path, 100 * KiB) as other:
        other.keep("a", b"x")
    assert cache.take("a", size=1) == b"x"


def test_its_end_waits_for_who_is_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a number of a descriptor would be that of another file."""
    gate, is_open = threading.Event(), []
    cache = SharedCache(tmp_path, 100 * KiB)

    def slow(*_: object) -> None:
        gate.wait(HANG)
        is_open.append(os.fstat(cache._total).st_ino == (tmp_path / FOLDER / "total").stat().st_ino)

    monkeypatch.setattr(cache._directory, "write_unsynced", slow)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(cache.keep, "a", b"x")
        wait_until(lambda: cache._users)
        ending = pool.submit(cache.__exit__, None, None, None)
        wait_until(lambda: cache._closed)
        with suppress(TimeoutError):
            ending.result(0.1)
        gate.set()
        writing.result(HANG)
        ending.result(HANG)
    assert is_open == [True]


def test_after_its_end_it_touches_no_descriptor(tmp_path: Path) -> None:
    """A thread whose store hung comes back."""
    with SharedCache(tmp_path, 100 * KiB) as cache:
        pass
    files = [(tmp_path / f"{number}").open("w+b") for number in range(8)]
    cache.keep("a", b"x")
    assert cache.take("a", size=1) is None
    with cache.claimed(["a"]) as ours:
        assert ours == {"a"}
    for file in files:
        assert not os.pread(file.fileno(), 9, 0)
        file.close()


def test_a_place_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    with pytest.raises(InvalidInput, match="not a directory"):
        SharedCache(tmp_path, KiB)
