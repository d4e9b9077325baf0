"""Leases: writers work side by side, a collector works alone, and leaves what readers read.

A writer (ship, merge) puts `leases/w-NONCE`, the collector `leases/g-NONCE`, a reader `leases/r-NONCE`, and then lists
them.  A writer and a collector that find each other, or two collectors, take their own away again and wait; a reader
that finds a collector waits a little, and a collector that finds a reader spares the layers that the reader's lease
names.  All put first and look afterwards, so however two of them interleave, at least one sees the other (listings are
strongly consistent on S3 and in directories).

A lease is refreshed every few minutes; one that was not for half an hour is dead, and so is one whose process was
killed on this machine.  Ages are measured by the store's own clock.  A writer that stood still for that long must not
publish: `check` raises then. If it stands still after its last check, the collector's fence stops it (sweep.py).
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ConfigDict

from snapchain.errors import Busy, Conflict, Corrupt, NotFound, SnapchainError
from snapchain.objects.exclusive import boot_time, is_retired, retire, stays
from snapchain.objects.reserve import spending
from snapchain.objects.store import ObjectInfo, ObjectStore, Refused
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import Many, StoredModel, parse as parse_stored, seal, unseal

KIND = b"E"
REFRESH_SECONDS = 300.0
DEAD_SECONDS = 1800.0
_POLL_SECONDS = 1.0


def _remedy(error: SnapchainError) -> str:
    return "" if error.hint is None else f"; {error.hint}"


class Mode(Enum):
    """Who may work at the same time: writers and readers with each other, a collector with readers alone."""

    WRITE = "w"
    COLLECT = "g"
    READ = "r"

    @property
    def prefix(self) -> str:
        """How the names of such leases begin."""
        return f"leases/{self.value}-"


class Holder(StoredModel):
    """What a lease says of who holds it; sealed, since a store need not know host names.

    machine, started: see repository/leases.py; with them a killed process of this machine is known to be gone
    disks: names of those that it may publish to; layers: what a reader reads
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    host: str
    machine: str = ""
    pid: int
    started: int = 0
    work: str
    since: datetime
    disks: Many[str] = ()
    layers: Many[str] = ()

    @property
    def is_gone(self) -> bool:
        """Whether it was a process of this machine that no longer runs."""
        return bool(self.machine) and self.machine == machine() and started(self.pid) != self.started

    def __str__(self) -> str:
        return f"{self.work} on {self.host} (pid {self.pid}, since {self.since:%Y-%m-%d %H:%M:%S} UTC)"


class Lease:
    """Held from entry to exit of the `with` block.

    work: for people, e.g. `ship web1/vda`; patience: seconds to wait for the other kind before Busy; on_wait: told,
    with words, when there is something to wait for, and when the lease could not be removed in the end;
    disks, layers: see Holder
    spends: whether a full disk gives up its reserve for it (objects/reserve.py): for what frees room, or adds next to
    nothing

    A lease that cannot be removed is a note: the work under it is done (objects/exclusive.py).

    After entry, of a collector: `spared`, layers that readers read; `dead`, leases that nobody keeps up any more, with
    who held them.  They are the collector's to remove (`bury`), and nobody else's: what their holders may still do when
    they wake up must be made impossible first.
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
        disks: Sequence[str] = (),
        layers: Sequence[str] = (),
        spends: bool = False,
    ) -> None:
        self._spends, self._spending = spends, ExitStack()
        self.spared: frozenset[str] = frozenset()
        self.dead: dict[str, Holder | None] = {}
        self._store, self._keys, self._mode = store, keys, mode
        self._name = f"{mode.prefix}{secrets.token_hex(16)}"
        self._patience, self._on_wait = patience, on_wait
        pid = os.getpid()
        holder = Holder(
            host=socket.gethostname(),
            machine=machine(),
            pid=pid,
            started=started(pid),
            work=work,
            since=datetime.now(UTC),
            disks=tuple(disks),
            layers=tuple(layers),
        )
        self._body = seal(keys, KIND, self._name, holder.model_dump_json().encode())
        self._refreshed = 0.0
        self._lost = False
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            if self._spends:
                stack.enter_context(spending(self._store))
            self._begin()
            self._spending = stack.pop_all()
        return self

    def _begin(self) -> None:
        deadline = boot_time() + self._patience
        told = False
        while True:
            self._put()
            other = self._other()
            if other is None:
                break
            retire(self._store, self._name)
            who = self._describe(other)
            if boot_time() >= deadline:
                raise Busy(f"{who} is at work", subject=self._store.url, hint="wait for it, and run this again")
            if not told:
                self._on_wait(f"waiting for {who}")
                told = True
            time.sleep(_POLL_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 -- keeps two waiters apart
        self._thread = threading.Thread(target=self._refresh, name="lease", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        try:
            if isinstance(error, Corrupt | NotFound):
                self.check()  # a reader that slept through a collection may miss unneeded objects: that is no damage
        finally:
            left = retire(self._store, self._name)
            self._spending.close()
            if left is not None and error is None:
                self._on_wait(f"the lease {self._name} was not removed: {left.message}{_remedy(left)}")

    def check(self) -> None:
        """Raises Conflict when others may take the lease for dead: data that it protects may be deleted."""
        if self._lost or boot_time() - self._refreshed > DEAD_SECONDS / 2 or not stays(self._store.size(self._name)):
            raise Conflict(
                "this run stood still for so long that others took it for dead",
                subject=self._store.url,
                hint="run it again: what was sent is not sent twice",
            )

    def _put(self) -> None:
        try:
            self._store.put(self._name, self._body)
        except Refused:
            if self._mode is not Mode.COLLECT:
                raise
            self._store.put(self._name, b"")  # on a full disk there may be room for a name, and it keeps others away
        self._refreshed = boot_time()

    def _refresh(self) -> None:
        while not self._done.wait(REFRESH_SECONDS):
            try:
                # A lease that others removed is not put again: they have gone on without it.
                if not stays(self._store.size(self._name)):
                    self._lost = True
                    return
                self._put()
            except SnapchainError:
                continue  # the next round may succeed; `check` counts the seconds

    def bury(self) -> None:
        """Remove the dead leases; of a collector, once their holders can do no harm any more. Raises as the store."""
        for name in self.dead:
            self._store.delete(name)

    def _other(self) -> ObjectInfo | None:
        """A live lease that excludes ours."""
        found = list(self._store.list("leases/"))
        now = next((info.modified for info in found if info.name == self._name), None)
        collects = self._mode is Mode.COLLECT
        spared: set[str] = set()
        self.dead = {}
        for info in found:
            if info.name == self._name or not (collects or info.name.startswith(Mode.COLLECT.prefix)):
                continue
            if is_retired(info):
                if collects:
                    retire(self._store, info.name)
                continue
            holder = self._holder(info)
            expired = now is not None and info.modified is not None and now - info.modified > DEAD_SECONDS
            if expired or (holder is not None and holder.is_gone):
                if collects:
                    self.dead[info.name] = holder
                else:
                    retire(self._store, info.name)  # so that its own `check` fails
            elif info.name.startswith(Mode.READ.prefix) and holder is not None:
                spared.update(holder.layers)
            else:
                return info
        self.spared = frozenset(spared)
        return None

    def _describe(self, info: ObjectInfo) -> str:
        return str(self._holder(info) or "another snapchain")

    def _holder(self, info: ObjectInfo) -> Holder | None:
        try:
            body = unseal(self._keys, KIND, info.name, self._store.get(info.name))
            return parse_stored(Holder, body, what="the lease", subject=info.name)
        except SnapchainError:
            return None  # gone meanwhile, or sealed by nobody we know: its age decides


# --- Which running kernel this is, and whether a process of it is the one that once was.


def machine() -> str:
    """Names this boot of this kernel and the process numbers seen from here; "" where the kernel does not tell.

    A host name would not do: two containers may share it, and each has its own process 7.
    """
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def started(pid: int) -> int:
    """When a process started, in clock ticks since boot; 0 when there is none of this number. See proc(5), stat 22."""
    with suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    return 0
