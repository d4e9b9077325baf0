"""Leases: writers work side by side, a collector works alone.

A writer (ship, merge) puts `leases/w-NONCE`, the collector `leases/g-NONCE`, and then lists them.  Who finds the other
kind takes its own away again and waits.  Both put first and look afterwards, so however the two interleave, at
least one of them sees the other (listings are strongly consistent on S3 and in directories).

A lease is refreshed every few minutes; one that was not for half an hour is dead and is removed, and so is one whose
process was killed on this machine.  Ages are measured by the store's own clock.  A writer that stood still for that
long must not publish: `check` says so.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import Enum
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from snapchain.errors import Busy, Conflict, SnapchainError
from snapchain.host.identity import machine, started
from snapchain.objects.store import ObjectInfo, ObjectStore
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import seal, unseal

KIND = b"E"
REFRESH_SECONDS = 300.0
DEAD_SECONDS = 1800.0
_POLL_SECONDS = 1.0


class Mode(Enum):
    """Who may work at the same time: writers with writers, a collector with nobody."""

    WRITE = "w"
    COLLECT = "g"


class Holder(BaseModel):
    """What a lease says of who holds it; sealed, since a store need not know host names.

    machine, started: see host/identity.py; with them a killed process of this machine is known to be gone
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str
    machine: str = ""
    pid: int
    started: int = 0
    work: str
    since: datetime

    @property
    def is_gone(self) -> bool:
        """Whether it was a process of this machine that no longer runs."""
        return bool(self.machine) and self.machine == machine() and started(self.pid) != self.started

    def __str__(self) -> str:
        return f"{self.work} on {self.host} (pid {self.pid}, since {self.since:%Y-%m-%d %H:%M:%S} UTC)"


class Lease:
    """Held from entry to exit of the `with` block.

    work: for people, e.g. `ship web1/vda`; patience: seconds to wait for the other kind before Busy; on_wait: told
    once, with words, when there is something to wait for
    """

    def __init__(
        self,
        store: ObjectStore,
        keys: Keyring,
        mode: Mode,
        *,
        work: str,
        patience: float,
        on_wait: Callable[[str], None],
    ) -> None:
        self._store, self._keys, self._mode = store, keys, mode
        self._name = f"leases/{mode.value}-{secrets.token_hex(16)}"
        self._patience, self._on_wait = patience, on_wait
        pid = os.getpid()
        holder = Holder(
            host=socket.gethostname(),
            machine=machine(),
            pid=pid,
            started=started(pid),
            work=work,
            since=datetime.now(UTC),
        )
        self._body = seal(keys, KIND, self._name, holder.model_dump_json().encode())
        self._refreshed = 0.0
        self._lost = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        deadline = time.monotonic() + self._patience
        told = False
        while True:
            self._put()
            other = self._other()
            if other is None:
                break
            self._store.delete(self._name)
            who = self._describe(other)
            if time.monotonic() >= deadline:
                raise Busy(f"{who} is at work", subject=self._store.url, hint="wait for it, and run this again")
            if not told:
                self._on_wait(f"waiting for {who}")
                told = True
            time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 -- keeps two waiters apart
        self._thread = threading.Thread(target=self._refresh, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        try:
            self._store.delete(self._name)
        except SnapchainError:
            if error is None:
                raise

    def check(self) -> None:
        """Raises Conflict when the lease may be held dead by others: what was relied on may be gone."""
        if self._lost or time.monotonic() - self._refreshed > DEAD_SECONDS / 2 or self._store.size(self._name) is None:
            raise Conflict(
                "this run stood still for so long that others took it for dead",
                subject=self._store.url,
                hint="run it again: what was sent is not sent twice",
            )

    def _put(self) -> None:
        self._store.put(self._name, self._body)
        self._refreshed = time.monotonic()

    def _refresh(self) -> None:
        while not self._done.wait(REFRESH_SECONDS):
            try:
                # A lease that others removed is not put again: they have gone on without it.
                if self._store.size(self._name) is None:
                    self._lost = True
                    return
                self._put()
            except SnapchainError:
                continue  # the next round may succeed; `check` counts the seconds

    def _other(self) -> ObjectInfo | None:
        """A live lease that excludes ours; dead ones are removed on the way."""
        found = list(self._store.list("leases/"))
        now = next((info.modified for info in found if info.name == self._name), None)
        for info in found:
            if info.name == self._name:
                continue
            if now is not None and info.modified is not None and now - info.modified > DEAD_SECONDS:
                self._store.delete(info.name)
                continue
            writer = info.name.startswith(f"leases/{Mode.WRITE.value}-")
            if writer and self._mode is Mode.WRITE:
                continue
            holder = self._holder(info)
            if holder is not None and holder.is_gone:
                self._store.delete(info.name)
                continue
            return info
        return None

    def _describe(self, info: ObjectInfo) -> str:
        return str(self._holder(info) or "another snapchain")

    def _holder(self, info: ObjectInfo) -> Holder | None:
        try:
            return Holder.model_validate_json(unseal(self._keys, KIND, info.name, self._store.get(info.name)))
        except (SnapchainError, ValidationError):
            return None  # gone meanwhile, or sealed by nobody we know: its age decides
