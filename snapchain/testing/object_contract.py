"""What every object store must do, as a suite to subclass.

    class TestMine(ObjectStoreContract):
        @pytest.fixture
        def store(self) -> Iterator[ObjectStore]:
            yield MyStore(...)      # fresh and empty

Where `store.properties.conditional_put` is not true, the tests of many creators at once do not run, and nothing else
is excused.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from snapchain.errors import Corrupt, InvalidInput, NotFound
from snapchain.objects.store import LONGEST_NAME, ObjectStore

BAD_NAMES = (
    "", "/a", "a/", "a//b", "A", "a b", "a\n", "é", "..", "../a", "a/../b", "a/./b", ".hidden", "a/.nfs1", "tmp/a",
    "a\x00b", "a:b", "x" * 201, "/".join(["seg"] * (LONGEST_NAME // 4 + 1)),
)  # fmt: skip


def _noise(size: int) -> bytes:
    """The same bytes for the same size, so that a failure is seen again."""
    return random.Random(size).randbytes(size)  # noqa: S311


class ObjectStoreContract:
    """Subclasses give a fixture `store`: a fresh, empty store."""

    # ---- put and get

    @pytest.mark.parametrize("size", [0, 1, 4095, 4096, 3 * 1024 * 1024 + 1])
    def test_what_is_put_is_got(self, store: ObjectStore, size: int) -> None:
        body = _noise(size)
        store.put("a/b/c", body)
        assert store.get("a/b/c") == body
        assert store.size("a/b/c") == size

    def test_data_may_be_any_buffers(self, store: ObjectStore) -> None:
        page = bytearray(range(256))
        store.put("view", memoryview(page)[10:20])
        assert store.get("view") == bytes(range(10, 20))
        store.put("words", memoryview(page).cast("I"))
        assert store.get("words") == bytes(page)
        many = [bytes([number % 251]) * (number % 5) for number in range(3000)]
        store.put("many", many)
        assert store.get("many") == b"".join(many)
        store.put("none", [])
        assert store.get("none") == b""
        assert store.create("created", [b"", b"x", memoryview(b"yz")])
        assert store.get("created") == b"xyz"

    def test_put_replaces_the_whole(self, store: ObjectStore) -> None:
        store.put("a", b"long content")
        store.put("a", b"short")
        assert store.get("a") == b"short"
        assert [info.size for info in store.list("")] == [5]

    def test_names_of_every_allowed_character(self, store: ObjectStore) -> None:
        names = ["abcdefghijklmnopqrstuvwxyz", "0123456789", "a.b-c_d", "-a", "_", "a..b", "a/tmp/b", "x" * 200]
        for name in names:
            store.put(name, name.encode())
        assert [info.name for info in store.list("")] == sorted(names)
        for name in names:
            assert store.get(name) == name.encode()

    @pytest.mark.parametrize("name", BAD_NAMES)
    def test_bad_names_are_refused_by_every_call(self, store: ObjectStore, name: str) -> None:
        calls: list[Callable[[], object]] = [
            lambda: store.put(name, b""),
            lambda: store.create(name, b""),
            lambda: store.get(name),
            lambda: store.size(name),
            lambda: store.delete(name),
        ]
        if name not in {"", "a/"}:
            calls += [lambda: list(store.list(name)), lambda: list(store.list_dirs(name))]
        for call in calls:
            with pytest.raises(InvalidInput):
                call()

    def test_data_of_another_type_is_refused(self, store: ObjectStore) -> None:
        for data in ("text", [1, 2], 7):
            with pytest.raises(InvalidInput):
                store.put("a", data)  # type: ignore[arg-type]
        assert store.size("a") is None

    # ---- ranges

    def test_ranges(self, store: ObjectStore) -> None:
        body = bytes(range(256)) * 4
        store.put("a", body)
        for offset, length in [(0, 1), (0, 1024), (5, 300), (1023, 1), (0, 0), (1024, 0), (7, None), (1024, None)]:
            stop = 1024 if length is None else offset + length
            assert store.get("a", offset=offset, length=length) == body[offset:stop], (offset, length)

    def test_a_range_past_the_end_is_corrupt_never_short(self, store: ObjectStore) -> None:
        store.put("a", b"0123456789")
        store.put("empty", b"")
        for offset, length in [(0, 11), (9, 2), (10, 1), (11, 0), (11, None), (500, 3)]:
            with pytest.raises(Corrupt):
                store.get("a", offset=offset, length=length)
        with pytest.raises(Corrupt):
            store.get("empty", length=1)
        assert store.get("empty", length=0) == b""
        assert store.get("empty", offset=0) == b""

    def test_negative_ranges_are_refused(self, store: ObjectStore) -> None:
        store.put("a", b"0123456789")
        for offset, length in [(-1, None), (-1, 1), (0, -1)]:
            with pytest.raises(InvalidInput):
                store.get("a", offset=offset, length=length)

    # ---- what is not there

    def test_what_is_not_there(self, store: ObjectStore) -> None:
        store.put("dir/a", b"x")
        for name in ["b", "dir", "dir/b", "dir/a/b", "other/b"]:
            assert store.size(name) is None, name
            for length in (None, 0, 1):
                with pytest.raises(NotFound):
                    store.get(name, length=length)
        assert list(store.list("none")) == []
        assert list(store.list("none/")) == []
        assert list(store.list_dirs("none/")) == []

    def test_an_empty_store_lists_nothing(self, store: ObjectStore) -> None:
        assert list(store.list("")) == []
        assert list(store.list_dirs("")) == []

    def test_delete_is_idempotent(self, store: ObjectStore) -> None:
        store.delete("a")
        store.put("a", b"x")
        store.put("dir/a", b"y")
        for name in ["a", "a", "dir/b", "no/dir", "a/b"]:
            store.delete(name)
        assert store.size("a") is None
        assert [info.name for info in store.list("")] == ["dir/a"]
        store.delete("dir/a")
        assert list(store.list("")) == []
        assert list(store.list_dirs("")) == []
        assert store.create("a", b"again")

    # ---- listings

    def test_a_listing_ascends_by_name_as_bytes(self, store: ObjectStore) -> None:
        names = ["a-b/x", "a/b", "a.c", "a/0/z", "a/b-0", "a0", "b", "a_", "a/b.d/e", "aa/a"]
        for name in names:
            store.put(name, name.encode())
        listed = list(store.list(""))
        assert [info.name for info in listed] == sorted(names)
        assert all(info.size == len(info.name) for info in listed)

    def test_a_prefix_is_a_string_not_a_directory(self, store: ObjectStore) -> None:
        names = ["packs/00/ab1", "packs/00/ab2", "packs/00/b", "packs/01/ab3", "packsx/a", "p"]
        for name in names:
            store.put(name, b"")
        for prefix in ["", *("packs/00/ab"[:end] for end in range(1, 12)), "q", "p/"]:
            expected = sorted(name for name in names if name.startswith(prefix))
            assert [info.name for info in store.list(prefix)] == expected, prefix

    def test_directories(self, store: ObjectStore) -> None:
        for name in ["disks/b/1", "disks/a/1/x", "disks/a/2/x", "disks/top", "disks-x/c/1", "z/1", "disks/a-/1"]:
            store.put(name, b"")
        assert list(store.list_dirs("")) == ["disks", "disks-x", "z"]
        assert list(store.list_dirs("disks")) == ["a", "a-", "b"]
        assert list(store.list_dirs("disks")) == list(store.list_dirs("disks/"))
        assert list(store.list_dirs("disks/a/")) == ["1", "2"]
        assert list(store.list_dirs("disks/top")) == []
        store.delete("disks/b/1")
        assert "b" not in list(store.list_dirs("disks/"))

    def test_deleting_while_listing(self, store: ObjectStore) -> None:
        for number in range(10):
            store.put(f"d/{number}", b"")
        for info in store.list("d/"):
            store.delete(info.name)
        assert list(store.list("")) == []

    def test_the_time_of_an_object_is_about_now(self, store: ObjectStore) -> None:
        before = time.time()
        store.put("a", b"")
        (info,) = store.list("a")
        assert info.modified is not None
        assert before - 5 < info.modified < time.time() + 5

    # ---- create

    def test_create_never_replaces(self, store: ObjectStore) -> None:
        assert store.create("a", b"first") is True
        assert store.create("a", b"second") is False
        assert store.create("a", b"first") is False
        assert store.get("a") == b"first"
        store.put("b", b"put")
        assert store.create("b", b"created") is False
        assert store.get("b") == b"put"

    def test_of_many_creators_one_wins(self, store: ObjectStore) -> None:
        if store.properties.conditional_put is not True:
            return  # promised by exclusive.create_exclusively instead
        for game in range(10):
            name = f"race/{game}"
            start = threading.Barrier(8)

            def run(player: int, name: str = name, start: threading.Barrier = start) -> bool:
                start.wait()
                return store.create(name, f"player {player}".encode())

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(run, range(8)))
            assert won.count(True) == 1
            assert store.get(name) == f"player {won.index(True)}".encode()

    # ---- many threads

    def test_many_threads_at_once(self, store: ObjectStore) -> None:
        def work(number: int) -> None:
            name, body = f"t/{number % 4}/{number}", _noise(number * 1000)
            store.put(name, body)
            assert store.get(name) == body
            assert store.get(name, offset=number * 500) == body[number * 500 :]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(40)))
        listed = [info.name for info in store.list("t/")]
        assert len(listed) == 40
        assert all(left < right for left, right in pairwise(listed))

    def test_a_reader_sees_a_whole_object(self, store: ObjectStore) -> None:
        bodies = [bytes([number]) * (50_000 + number) for number in range(6)]
        store.put("a", bodies[0])
        done = threading.Event()

        def read() -> int:
            seen = 0
            while not done.is_set():
                assert store.get("a") in bodies
                seen += 1
            return seen

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                for _ in range(5):
                    for body in bodies:
                        store.put("a", body)
            finally:
                done.set()
            assert all(reader.result() > 0 for reader in readers)

    # ---- the rest

    def test_it_says_where_it_is(self, store: ObjectStore) -> None:
        assert store.url
        assert store.properties.description
        assert all(isinstance(warning, str) for warning in store.warnings)

    def test_close_is_idempotent(self, store: ObjectStore) -> None:
        store.put("a", b"x")
        store.close()
        store.close()
