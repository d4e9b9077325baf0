"""kill -9 at every step: runs a function in a forked child that dies at its n-th call that changes a file."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from snapchain.host.records import made_key
from tests.exhaustive import EXHAUSTIVE

# What changes something on a disk, or makes a change last. qemu-img is a step as well (host.processes).
CALLS = ("link", "replace", "rename", "unlink", "fsync", "fchmod", "fchown", "setxattr")


def _dying(function: Callable[[], object], at: int) -> None:
    """Replace each call by one that counts, and kills us before the `at`-th. (After it is before the next.)"""

    done = 0

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    function()


def killed_at_every_step(function: Callable[[], object], *, each: int = 1, limit: int = 500) -> Iterator[str]:
    """Yields after each death, with where it was; ends when the function came to its end.

    The caller puts everything back before it goes on.  A child that fails otherwise fails the test.
    each: of a test marked `sampled`: without EXHAUSTIVE it dies at one in so many steps
    """
    made_key()  # the steps are those that every run takes
    for at in range(1, limit, 1 if EXHAUSTIVE else each):
        pid = os.fork()
        if pid == 0:
            try:
                _dying(function, at)
            except BaseException:  # noqa: BLE001 - the child must not run pytest's own clean-up
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, f"failed in step {at}"
            assert at > 3, "nothing was ever killed"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield f"before call {at}"
    raise AssertionError("too many steps")


def killed_after(function: Callable[[], object], steps: int) -> bool:
    """Run it in a forked child that dies before its `steps`-th call that changes a file. Whether it came to that.

    Errors of the function are the child's own.
    """
    made_key()
    pid = os.fork()
    if pid == 0:
        try:
            _dying(function, steps)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)
