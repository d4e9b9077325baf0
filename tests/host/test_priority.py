"""What a paused guest waits for goes before other work."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from snapchain.host.priority import urgent


def own() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.root
def test_all_threads_and_new_ones_until_the_end_of_the_block() -> None:
    usual = own()
    with ThreadPoolExecutor(1) as old:
        assert old.submit(own).result() == usual
        with urgent(), ThreadPoolExecutor(1) as new:
            assert [own(), old.submit(own).result(), new.submit(own).result()] == [-15] * 3
        assert [own(), old.submit(own).result()] == [usual] * 2


def test_its_threads_take_turns_quickly() -> None:
    usual = sys.getswitchinterval()
    with urgent():
        with urgent():
            assert sys.getswitchinterval() == pytest.approx(0.0005)
        assert sys.getswitchinterval() == pytest.approx(0.0005)
    assert sys.getswitchinterval() == pytest.approx(usual)


def test_without_the_right_to_it_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refused)
    usual = own()
    with urgent():
        assert own() == usual
