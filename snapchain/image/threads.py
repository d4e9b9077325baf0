"""Work spread over a few threads: jobs come from an iterator on demand, and the first failure ends all.

Reading, writing, hashing and decompressing release the interpreter's lock.  Ctrl-C arrives in the thread that waits
here: running jobs finish, no further one begins.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
AT_MOST = 4
_WAKE = 0.5


def spread(jobs: Iterable[T], work: Callable[[T], None], *, threads: int | None = None) -> None:
    """Do `work` on every job, in any order. Raises the error of the first failing job."""
    count = threads or min(AT_MOST, len(os.sched_getaffinity(0)))
    waiting = iter(jobs)
    lock = threading.Lock()
    failures: list[BaseException] = []
    stop = threading.Event()

    def labour() -> None:
        try:
            while not stop.is_set():
                with lock:
                    try:
                        job = next(waiting)
                    except StopIteration:
                        return
                work(job)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            failures.append(error)
            stop.set()

    crew = [threading.Thread(target=labour, name=f"worker-{number}", daemon=True) for number in range(count)]
    try:
        for worker in crew:
            worker.start()
        for worker in crew:
            while worker.is_alive():
                worker.join(_WAKE)
    finally:
        stop.set()
        for worker in crew:
            if worker.ident is not None:
                worker.join()
    if failures:
        raise failures[0]
