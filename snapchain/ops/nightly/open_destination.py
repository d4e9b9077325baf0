"""One destination during a run: opened when first needed, given up when it fails to answer again and again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from snapchain.destinations import open_destination
from snapchain.errors import InvalidInput, SnapchainError, Unavailable
from snapchain.host import passphrases
from snapchain.model.retention import Policy
from snapchain.ops.nightly import open_destination as passphrase
from snapchain.ops.nightly.config import Destination
from snapchain.repository.repository import CONFIG, Repository

_PATIENCE = 2
"""So many shipments in a row find it unavailable, and the other disks do not try it: each has retried for minutes."""


class OpenDestination:
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
                    self._opened = open_destination(
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


# --- Where a destination's passphrase comes from: a file, a program, or a variable of the environment.
#
# A service gets the content of files as systemd's credentials, by the destination's name (systemd.py).

_DEFAULT = "SNAPCHAIN_PASSWORD"


def source(destination: Destination, *, on_notice: passphrases.OnNotice) -> Callable[[], str]:
    """A function that gives the passphrase when asked. It raises InvalidInput where nobody has set one."""
    configured = _configured(destination, on_notice)
    if destination.password_command is not None or destination.password_env is not None:
        return configured
    return lambda: _credential(destination.name, on_notice) or configured()


def _configured(destination: Destination, on_notice: passphrases.OnNotice) -> Callable[[], str]:
    if (path := destination.password_file) is not None:
        return lambda: passphrases.from_file(path, on_notice=on_notice)
    if (argv := destination.password_command) is not None:
        return lambda: passphrases.from_program(argv)
    name = destination.password_env or _DEFAULT
    return lambda: _variable(name)


def _credential(name: str, on_notice: passphrases.OnNotice) -> str | None:
    """The passphrase that systemd has handed over. None where it has none for this destination, or only a line end."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory or "/" in name:
        return None
    path = Path(directory) / name
    if not path.is_file() or path.stat().st_size <= 1:
        return None
    return passphrases.from_file(path, on_notice=on_notice)


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InvalidInput(
            f"the repository is encrypted, and the variable {name} with its passphrase is not set",
            hint="set it, or let the destination name its password_file, password_command or password_env",
        )
    return value
