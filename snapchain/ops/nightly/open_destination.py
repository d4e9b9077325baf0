"""One destination during a run: opened when first needed, given up when it fails to answer again and again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from snapchain.destination.protocol import Destination as AnyDestination
from snapchain.destination.traits import Traits
from snapchain.destination.writing import Opening
from snapchain.destinations import open_destination, traits_of
from snapchain.errors import Busy, Conflict, Corrupt, InvalidInput, SnapchainError, Unavailable
from snapchain.host import passphrases
from snapchain.model.events import ignore
from snapchain.model.retention import Policy
from snapchain.model.traffic import Bill
from snapchain.ops.nightly.config import Destination

_PATIENCE = 2
"""After so many failures in a row other disks do not try the destination: each has retried for minutes."""
_DEFAULT = "SNAPCHAIN_PASSWORD"


class OpenDestination:
    """A destination of this run. Thread-safe."""

    def __init__(self, config: Destination, policy: Policy, *, writing: bool, on_notice: Callable[[str], None]) -> None:
        self.config = config
        self.name = config.name
        self.policy = policy
        self._writing, self._on_notice = writing, on_notice
        self._opened: AnyDestination | None = None
        self._fault: SnapchainError | None = None
        self._answered = False
        self._in_a_row = 0
        self._lock = threading.Lock()
        self._turns = threading.Semaphore(config.concurrency)

    @property
    def traits(self) -> Traits:
        """What kind of destination it is; it need not be reachable."""
        return traits_of(self.config.url)

    @property
    def bill(self) -> Bill | None:
        """What was asked of it so far in this run, None where that is not counted."""
        traffic = None if self._opened is None else self._opened.traffic
        return None if traffic is None else Bill.of(self.name, traffic, self.config.prices)

    @property
    def fault(self) -> SnapchainError | None:
        """Why it is not used any more in this run."""
        return self._fault

    def open(self) -> AnyDestination:
        """The destination. Raises the error of the first attempt, also later: it is not tried again in this run."""
        with self._lock:
            if self._fault is not None:
                raise self._fault
            if self._opened is None:
                try:
                    self._opened = open_destination(
                        self.config.url,
                        passphrase=passphrase_of(self.config, on_notice=self._note),
                        writing=self._writing,
                        limit_rate=self.config.limit_rate,
                        pack_size=self.config.pack_size,
                        compression=self.config.compression,
                    )
                except SnapchainError as error:
                    self._fault = error
                    raise
                for notice in self._opened.notices:
                    self._note(notice)
            return self._opened

    def reach(self, disk: str) -> None:
        """Open it, and see once in a run that it answers: opening a replica sends nothing. disk: any name.

        Raises as `open`, and what keeps it from answering.
        """
        opened = self.open()
        if not self._answered:
            error = _unreachable(opened, disk)
            if error is not None:
                with self._lock:
                    self._fault = error
                raise error
            self._answered = True

    def _note(self, text: str) -> None:
        self._on_notice(f"{self.name}: {text}")

    @contextmanager
    def turn(self) -> Iterator[AnyDestination]:
        """One of the few that may write to it at once."""
        with self._turns:
            opened = self.open()
            try:
                yield opened
            except Unavailable as error:
                with self._lock:
                    self._in_a_row += 1
                    if self._in_a_row >= _PATIENCE and _unreachable(opened, "any") is not None:
                        self._fault = error
                raise
            self._in_a_row = 0


def _unreachable(destination: AnyDestination, disk: str) -> SnapchainError | None:
    """The error of a destination that cannot be used: it does not answer when this disk is looked up."""
    try:
        with destination.look(Opening(disk=disk), on_event=ignore):
            return None
    except (Busy, Conflict, Corrupt):  # the disk's own: its shipment reports it
        return None
    except SnapchainError as error:
        return error


def passphrase_of(destination: Destination, *, on_notice: passphrases.OnNotice) -> Callable[[], str]:
    """A function that returns the passphrase: from a file, a program, or a variable of the environment.

    A service gets the content of files as systemd's credentials, by the destination's name (systemd.py).
    The function raises InvalidInput where nobody has set a passphrase.
    """
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
    """The passphrase in systemd's credential for this destination. None where there is none, or only a line end."""
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
