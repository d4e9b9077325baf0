"""One destination during a run: opened when first needed, given up when it fails to answer again and again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from snapchain.errors import SnapchainError, Unavailable
from snapchain.model.retention import Policy
from snapchain.ops.nightly import passphrase
from snapchain.ops.nightly.config import Destination
from snapchain.repository.opening import open_repository
from snapchain.repository.repository import CONFIG, Repository

_PATIENCE = 2
"""So many shipments in a row find it unavailable, and the other disks do not try it: each has retried for minutes."""


class Place:
    """A destination of this run. Thread-safe."""

    def __init__(self, config: Destination, policy: Policy, *, writing: bool, on_notice: Callable[[str], None]) -> None:
        self.config = config
        self.name = config.name
        self.policy = policy
        self._writing, self._on_notice = writing, on_notice
        self._opened: Repository | None = None
        self._fault: SnapchainError | None = None
        self._in_a_row = 0
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(config.concurrency)

    @property
    def fault(self) -> SnapchainError | None:
        """Why it is not used any more in this run."""
        return self._fault

    def open(self) -> Repository:
        """The repository. Raises what opening it raised, also later: it is not tried again in this run."""
        with self._lock:
            if self._fault is not None:
                raise self._fault
            if self._opened is None:
                try:
                    self._opened = open_repository(
                        self.config.url,
                        passphrase=passphrase.source(self.config, on_notice=self._note),
                        writing=self._writing,
                        limit_rate=self.config.limit_rate,
                        pack_size=self.config.pack_size,
                    )
                except SnapchainError as error:
                    self._fault = error
                    raise
                for notice in self._opened.notices:
                    self._note(notice)
            return self._opened

    def _note(self, words: str) -> None:
        self._on_notice(f"{self.name}: {words}")

    @contextmanager
    def turn(self) -> Iterator[Repository]:
        """One of the few that may write to it at once."""
        with self._turns:
            opened = self.open()
            try:
                yield opened
            except Unavailable as error:
                with self._lock:
                    self._in_a_row += 1
                    if self._in_a_row >= _PATIENCE and not _answers(opened):
                        self._fault = error
                raise
            self._in_a_row = 0


def _answers(repository: Repository) -> bool:
    """Whether it was an image that could not be read, and the destination is sound."""
    try:
        repository.store.get(CONFIG)
    except SnapchainError:
        return False
    return True
