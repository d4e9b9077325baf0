"""Leases: writers, readers and one collector work side by side, and each knows of the others.

A writer (ship, merge) puts `leases/v-NONCE`, a reader `leases/r-NONCE`, a collector `leases/g-NONCE`, and then lists
them.  A collector waits for nobody before it begins, but for another collector; what it takes away waits until the
writers that it finds have ended (condemned.py), and it spares the layers that the leases of readers name.

Programs before this one know a collector that works alone.  Their writers put `leases/w-NONCE`, and wait for any
`leases/g-NONCE`; a collector that finds one of theirs takes its own lease away and waits, as they do.  A collector
whose lease is empty, since the disk was full, works alone, too: nobody can tell what it is.  All put first and look
afterwards, so however two of them interleave, at least one sees the other (listings are strongly consistent on S3 and
in directories).

A lease is refreshed every few minutes; one that was not for half an hour is dead, and so is one whose process was
killed on this machine.  Ages are measured by the store's own clock.  A writer that stood still for that long must not
publish: `check` raises then.  If it stands still after its last check, the collector's fence stops it (fence.py).
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

from snapchain.errors import Busy, Conflict, Corrupt, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.objects.exclusive import boot_time, is_retired, retire, stays
from snapchain.objects.reserve import spending
from snapchain.objects.store import ObjectInfo, ObjectStore, Refused
from snapchain.repository.crypto import Keyring
from snapchain.repository.envelope import Many, StoredModel, parse as parse_stored, seal, unseal

KIND = b"E"
REFRESH_SECONDS = 300.0
DEAD_SECONDS = 1800.0
END_SECONDS = 30 * 86400.0
"""How long it is remembered that a lease was ended by others: its holder may stand still for as long."""
EXPIRED = b"expired\n"
_END = ".ended"
_POLL_SECONDS = 1.0


def _end_of(name: str) -> str:
    """The object that says that a lease has ended, whatever its holder still puts."""
    return name + _END


def _remedy(error: SnapchainError) -> str:
    return "" if error.hint is None else f"; {error.hint}"


class Mode(Enum):
    """What somebody does."""

    WRITE = "v"
    COLLECT = "g"
    READ = "r"

    @property
    def prefix(self) -> str:
        """How the names of such leases begin."""
        return f"leases/{self.value}-"


class Holder(StoredModel):
    """What a lease says of who holds it; sealed, since a store need not know host names.

    machine, started: see repository/leases.py; with them a killed process of this machine is known to be gone
    disks: names of those that it may publish to, none where these may be any; layers: what a reader reads
    beside_writers: of a collector, that writers need not wait for it
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
    beside_writers: bool = False

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

    Of a collector, since it last looked (`survey`): `spared`, layers that readers read; `hides_layers`, whether the
    lease of a reader cannot be read; `writers`, leases of those at work, with who holds them if that can be read;
    `dead`, leases that nobody keeps up any more.  These are the collector's to remove, and nobody else's: what their
    holders may still do when they wake up must be made impossible first (fence.py).
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
        self.writers: dict[str, Holder | None] = {}
        self.hides_layers = False
        self.dead: dict[str, Holder | None] = {}
        self._alone = False
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
            beside_writers=mode is Mode.COLLECT,
        )
        self._body = seal(keys, KIND, self._name, holder.model_dump_json().encode())
        self._refreshed = 0.0
        self._lost = self._checked = False
        self._known: dict[str, Holder] = {}
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
        if self._may_publish_late(error):
            self._spending.close()
            return  # it dies, and is fenced
        try:
            if isinstance(error, Corrupt | NotFound):
                self.check()  # a reader that slept through a collection may miss unneeded objects: that is no damage
        finally:
            left = retire(self._store, self._name)
            self._spending.close()
            if left is not None and error is None:
                self._on_wait(f"the lease {self._name} was not removed: {left.message}{_remedy(left)}")

    def _may_publish_late(self, error: BaseException | None) -> bool:
        """Whether a generation may still be created: of a request whose outcome nobody knows, or that nobody awaits."""
        ends_unknown = error is not None and (isinstance(error, Unavailable) or not isinstance(error, SnapchainError))
        return self._mode is Mode.WRITE and self._checked and ends_unknown

    def check(self) -> None:
        """Raises Conflict when others may take the lease for dead: data that it protects may be deleted."""
        self._checked = True
        if self._lost or boot_time() - self._refreshed > DEAD_SECONDS / 2 or not self._is_held():
            raise Conflict(
                "this run stood still for so long that others took it for dead",
                subject=self._store.url,
                hint="run it again: what was sent is not sent twice",
            )

    def _is_held(self) -> bool:
        """Whether the lease is there, and nobody has ended it. In one look, since a refresh may arrive late."""
        sizes = {info.name: info.size for info in self._store.list(self._name)}
        return stays(sizes.get(self._name)) and _end_of(self._name) not in sizes

    def _put(self) -> None:
        try:
            self._store.put(self._name, b"" if self._alone else self._body)
        except Refused:
            if self._mode is not Mode.COLLECT:
                raise
            self._store.put(self._name, b"")  # on a full disk there may be room for a name, and it keeps others away
            self._alone = True
        self._refreshed = boot_time()

    def _refresh(self) -> None:
        while not self._done.wait(REFRESH_SECONDS):
            try:
                # A lease that others removed is not put again: they have gone on without it.
                if not self._is_held():
                    self._lost = True
                    return
                self._put()
            except SnapchainError:
                continue  # the next round may succeed; `check` counts the seconds

    @property
    def name(self) -> str:
        """The object that is the lease."""
        return self._name

    def survey(self) -> None:
        """Of a collector: look again who is at work. Whoever may not work beside it gives way by itself."""
        self._other()

    def shut_out_writers(self, patience: float) -> None:
        """Of a collector: work alone from now on, without any room to write. Raises Busy when writers do not end."""
        self._alone = True
        self._put()
        until = boot_time() + patience
        while True:
            self.survey()
            if not self.writers:
                return
            if boot_time() >= until:
                others = ", ".join(sorted(str(holder or "another snapchain") for holder in self.writers.values()))
                raise Busy(f"{others} is at work", subject=self._store.url, hint="wait for it, and run this again")
            time.sleep(_POLL_SECONDS)

    def is_over(self, name: str) -> bool:
        """Of a collector: whether a lease that was not listed has ended: a listing may miss what is there."""
        return not stays(self._store.size(name))

    @property
    def is_alone(self) -> bool:
        """Of a collector: whether there was no room to say what it is, so that writers wait for it."""
        return self._alone

    def end(self, name: str) -> None:
        """Of a collector: say that a dead lease has ended. From here on the `check` of its holder raises."""
        if self._store.size(_end_of(name)) is not None:
            return  # by a run that was interrupted; on a full disk its eight bytes would take the room of the fence
        try:
            self._store.put(_end_of(name), EXPIRED)
        except Refused:
            self._store.put(_end_of(name), b"")  # on a full disk there may be room for a name, which is all that counts

    def bury(self, name: str) -> None:
        """Of a collector: remove a dead lease, once its holder can do no harm any more. What `end` said stays."""
        self._store.delete(name)

    def _other(self) -> ObjectInfo | None:
        """A live lease that excludes ours."""
        found = list(self._store.list("leases/"))
        now = next((info.modified for info in found if info.name == self._name), None)
        collects = self._mode is Mode.COLLECT
        spared: set[str] = set()
        other: ObjectInfo | None = None
        self.dead, self.writers, self.hides_layers = {}, {}, False
        for info in found:
            if info.name == self._name or not (collects or info.name.startswith(Mode.COLLECT.prefix)):
                continue
            age = None if now is None or info.modified is None else now - info.modified
            if info.name.endswith(_END):
                if collects and age is not None and age > END_SECONDS:
                    self._store.delete(info.name)
                continue
            if is_retired(info):
                if collects:
                    retire(self._store, info.name)
                continue
            holder = self._holder(info)
            if holder is None and not stays(self._store.size(info.name)):
                continue  # it has ended since it was listed
            if (age is not None and age > DEAD_SECONDS) or (holder is not None and holder.is_gone):
                if collects:
                    self.dead[info.name] = holder
                else:
                    retire(self._store, info.name)  # so that its own `check` fails
            elif not collects and holder is not None and holder.beside_writers:
                continue
            elif collects and info.name.startswith(Mode.READ.prefix) and holder is not None:
                spared.update(holder.layers)
            elif collects and info.name.startswith(Mode.WRITE.prefix):
                self.writers[info.name] = holder
                other = other or (info if self._alone else None)
            else:
                self.hides_layers |= info.name.startswith(Mode.READ.prefix)
                other = other or info
        self.spared = frozenset(spared)
        return other

    def _describe(self, info: ObjectInfo) -> str:
        return str(self._holder(info) or "another snapchain")

    def _holder(self, info: ObjectInfo) -> Holder | None:
        """Who holds a lease, which never changes; None of one that is gone, or sealed by nobody we know."""
        found = self._known.get(info.name)
        if found is None and info.size:
            try:
                body = unseal(self._keys, KIND, info.name, self._store.get(info.name))
                found = parse_stored(Holder, body, what="the lease", subject=info.name)
            except (Corrupt, NotFound, Unsupported):
                return None
            self._known[info.name] = found
        return found


def count_writers(store: ObjectStore) -> int:
    """How many writers have a lease, those included that are dead."""
    found = (info for info in store.list("leases/") if info.name.startswith(Mode.WRITE.prefix))
    return sum(not (info.name.endswith(_END) or is_retired(info)) for info in found)


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
