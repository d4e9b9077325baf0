"""The two ends of a live migration through QEMU's monitors: the guest that leaves, and the QEMU that awaits it.

    source                                       destination
                                                 -S -incoming defer, NBD exports of its overlays, migrate-incoming
    blockdev-mirror sync=top, background      -> the overlays; READY: from now on they are a moment behind
    migrate, pause-before-switchover          -> memory, while the guest runs
    pre-switchover: the guest is paused
    block-job-cancel without force            -> copies the rest, flushes; every mirror must end without an error
    migrate-continue                          -> device state; completed: paused on both sides
    quit                                         nbd-server-stop, cont

Without pause-before-switchover QEMU 7.2 can report `completed` with the last writes missing at the destination, or
abort the source: it is always set.  In mode write-blocking a mirror lets the guest's writes wait for the network; and
where it is cancelled by force while the guest writes, QEMU 7.2 dies (decision 0126): that mode is never used.

After `completed` QEMU accepts `cont` on both sides: who calls it is decided by a record, never here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Busy, Conflict, NotFound, SnapchainError, Unavailable, Unsupported
from snapchain.guest import graph
from snapchain.guest.qmp import Monitor, Refused, not_understood

CAPABILITIES = ("events", "return-path", "pause-before-switchover")
AUTO_CONVERGE = "auto-converge"
LOOK_SECONDS = 0.5
"""Between two looks at something that reports no event."""
_PREFIX = "sc-move-"
_LIMITS = ("downtime-limit", "max-bandwidth")
_SWITCHES = ("finish-migrate", "postmigrate")
"""What the guest is called while QEMU has paused it for the switch."""
_UNLIMITED = 64 << 30
"""Bytes a second: more than any link."""
_READY = ("ready", "standby")
"""A job that is level with the guest; standby: while QEMU holds it for a moment."""
_OVER = ("none", "completed", "failed", "cancelled")
_UNDO_SECONDS = 60.0
_ANNOUNCE = {"initial": 50, "max": 550, "rounds": 5, "step": 100}
"""Milliseconds: how often its network cards tell switches where they are now, as QEMU itself does."""


@dataclass(frozen=True, slots=True)
class MemoryLook:
    """How the memory of a guest travels.

    status: as QEMU calls it; total, remaining, transferred: bytes; rate: bytes a second; round: over all pages, from 1
    dirty_rate: bytes a second that the guest dirties; error: QEMU's words for one that failed
    """

    status: str
    total: int
    remaining: int
    transferred: int
    rate: float
    round: int
    dirty_rate: float
    error: str | None

    @property
    def is_over(self) -> bool:
        return self.status in _OVER


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def job_of(token: str, number: int) -> str:
    """The id of a mirror."""
    return f"{_PREFIX}{token[:8]}-{number}"


def look_at_memory(monitor: Monitor) -> MemoryLook:
    """See `MemoryLook`."""
    answer = monitor.fields("query-migrate")
    ram = answer.get("ram")
    ram = ram if isinstance(ram, Mapping) else {}

    def number(row: Mapping[str, object], name: str) -> float:
        value = row.get(name)
        return float(value) if isinstance(value, (int, float)) else 0.0

    error = answer.get("error-desc")
    return MemoryLook(
        status=str(answer.get("status", "none")),
        total=int(number(ram, "total")),
        remaining=int(number(ram, "remaining")),
        transferred=int(number(ram, "transferred")),
        rate=number(ram, "mbps") * 1e6 / 8,
        round=int(number(ram, "dirty-sync-count")),
        dirty_rate=number(ram, "dirty-pages-rate") * number(ram, "page-size"),
        error=None if error is None else str(error),
    )


def root_nodes(monitor: Monitor) -> dict[str, str]:
    """The root node of each disk, by the disk's name."""
    return graph.roots(monitor.rows("query-block"))


def version_of(monitor: Monitor) -> tuple[int, int]:
    """Of QEMU: (major, minor). Raises ToolFailed."""
    found = monitor.fields("query-version").get("qemu")
    if isinstance(found, Mapping):
        major, minor = found.get("major"), found.get("minor")
        if isinstance(major, int) and isinstance(minor, int):
            return major, minor
    raise not_understood("query-version", "it has no version", subject=monitor.path)


def measured_dirty_rate(monitor: Monitor) -> float | None:
    """Bytes of memory a second that the guest dirties, over one second; None where this QEMU cannot measure it."""
    if not monitor.has("calc-dirty-rate"):
        return None
    try:
        monitor.execute("calc-dirty-rate", {"calc-time": 1})
        until = time.monotonic() + 10
        while time.monotonic() < until:
            found = monitor.fields("query-dirty-rate")
            rate = found.get("dirty-rate")
            if found.get("status") == "measured" and isinstance(rate, int) and rate >= 0:
                return float(rate << 20)
            monitor.wait(lambda _name, _data: False, after=monitor.mark(), seconds=0.1)
    except Refused:
        return None
    return None


class Outgoing:
    """The guest that leaves. token: of the move, which names its jobs and nodes; disks: their names in the guest.

    Every method may raise Refused and Unavailable as `Monitor.execute`.
    """

    def __init__(self, monitor: Monitor, token: str, disks: Sequence[str]) -> None:
        self._monitor, self._disks = monitor, tuple(disks)
        self._jobs = [job_of(token, number) for number in range(len(self._disks))]
        self._are_ready = False
        """Whether all mirrors were seen level with the guest: then QEMU keeps them so."""

    @property
    def monitor(self) -> Monitor:
        return self._monitor

    def check(self) -> None:
        """Raises Unsupported for what QEMU itself cannot migrate, and Busy where a migration is under way."""
        answer = self._monitor.fields("query-migrate")
        if answer.get("status") in ("setup", "active", "pre-switchover", "device", "cancelling", "postcopy-active"):
            raise Busy("another migration of the guest is under way", subject=self._monitor.path, hint="let it end")
        blocked = answer.get("blocked-reasons")
        if isinstance(blocked, list) and blocked:
            raise Unsupported(
                f"QEMU cannot migrate the guest: {'; '.join(map(str, blocked))}",
                subject=self._monitor.path,
                hint="remove that device; or shut the guest down, and migrate it with --offline",
            )

    def named_bitmaps(self) -> set[str]:
        """The dirty bitmaps with a name in the active layers."""
        roots = root_nodes(self._monitor)
        active = {roots[disk] for disk in self._disks if disk in roots}
        return {
            str(bitmap["name"])
            for node in self._monitor.rows("query-named-block-nodes", {"flat": True})
            if node.get("node-name") in active
            for bitmap in node.get("dirty-bitmaps", ())
            if bitmap.get("name")
        }

    def mirror(self, nbd: Path, *, speed: int) -> None:
        """Begin to mirror what is not sealed of every disk to its export there. speed: bytes a second, 0 no limit."""
        roots = root_nodes(self._monitor)
        for disk, job in zip(self._disks, self._jobs, strict=True):
            if disk not in roots:
                raise NotFound(f"the guest has no disk {disk} any more", subject=self._monitor.path)
            target = {"driver": "nbd", "node-name": job, "server": {"type": "unix", "path": str(nbd)}, "export": disk}
            self._monitor.execute("blockdev-add", target)
            mirror = {
                "job-id": job,
                "device": roots[disk],
                "target": job,
                "sync": "top",
                "copy-mode": "background",
                "auto-dismiss": False,
                "on-source-error": "report",
                "on-target-error": "report",
                **({"speed": speed} if speed else {}),
            }
            self._monitor.execute("blockdev-mirror", mirror)

    def wait_until_mirrored(self, on_look: Callable[[int, int], bool]) -> None:
        """Until each mirror is READY, or as near to it as is enough. Raises as `check_mirrors`.

        on_look: called with bytes done, and of how many; whether that is enough
        """
        while True:
            mark = self._monitor.mark()
            rows = self.check_mirrors()
            if on_look(sum(row[1] for row in rows), sum(row[2] for row in rows)) or self._are_ready:
                return
            self._monitor.wait(_is_news, after=mark, seconds=LOOK_SECONDS)

    def check_mirrors(self) -> list[tuple[str, int, int]]:
        """(status, bytes done, of how many) of each mirror. Raises Unavailable for one that has failed, or is gone."""
        known = {str(row.get("id")): row for row in self._monitor.rows("query-jobs")}
        found = []
        for disk, job in zip(self._disks, self._jobs, strict=True):
            row = known.get(job)
            if row is None or row.get("error") or row.get("status") in ("concluded", "aborting", "null"):
                words = "it is gone" if row is None else str(row.get("error") or row.get("status"))
                raise Unavailable(
                    f"the mirror of its writes to the destination has ended: {words}",
                    subject=disk,
                    hint="see that the link is up and that there is room at the destination; then run it again",
                )
            done, total = row.get("current-progress"), row.get("total-progress")
            numbers = (done if isinstance(done, int) else 0, total if isinstance(total, int) else 0)
            found.append((str(row.get("status")), *numbers))
        self._are_ready |= all(status in _READY for status, *_ in found)
        return found

    def capabilities(self) -> dict[str, bool]:
        """As they are now, for `undo`."""
        rows = self._monitor.rows("query-migrate-capabilities")
        return {str(row.get("capability")): row.get("state") is True for row in rows}

    def send_memory(self, ram: Path, *, pause_limit: float, bandwidth: int | None, auto_converge: bool) -> None:
        """Begin to send the memory. pause_limit: seconds that its last part may take; bandwidth: bytes a second."""
        wanted = dict.fromkeys(CAPABILITIES, True) | {AUTO_CONVERGE: auto_converge}
        _set_capabilities(self._monitor, wanted)
        limits = {"downtime-limit": _milliseconds(pause_limit), "max-bandwidth": bandwidth or _UNLIMITED}
        self._monitor.execute("migrate-set-parameters", limits)
        self._monitor.execute("migrate", {"uri": f"unix:{ram}"})

    def allow_pause(self, seconds: float) -> None:
        """From now on the last part of the memory may take so long."""
        self._monitor.execute("migrate-set-parameters", {"downtime-limit": _milliseconds(seconds)})

    def wait_for_switchover(self, on_look: Callable[[MemoryLook], None]) -> MemoryLook:
        """Until the guest is paused at pre-switchover. on_look: called at each look; what it raises ends the wait.

        Raises Unavailable for a migration that has ended, Conflict for a guest that somebody has paused, or that has
        shut down: it would run there. And as `check_mirrors`.
        """
        while True:
            mark = self._monitor.mark()
            look = look_at_memory(self._monitor)
            if look.status == "pre-switchover":
                return look
            if look.is_over:
                raise _ended(look, self._monitor)
            self._check_runs()
            self.check_mirrors()
            on_look(look)
            self._monitor.wait(_is_news, after=mark, seconds=LOOK_SECONDS)

    def _check_runs(self) -> None:
        answer = self._monitor.fields("query-status")
        if answer.get("running") is not True and answer.get("status") not in _SWITCHES:
            raise Conflict(
                f"the guest does not run any more: it is {answer.get('status')}",
                subject=self._monitor.path,
                hint="let it run, then run it again; or migrate its disks with --offline or --paused",
            )

    def end_mirrors(self, *, seconds: float) -> None:
        """At pre-switchover: have each mirror drain and flush, and end. Raises Unavailable for an error of any.

        Only `block-job-cancel` without force does that; `job-cancel` would leave the last writes out.  The jobs stay
        as concluded: to dismiss them would only take time, and QEMU ends next, or `undo` does that.
        """
        until = time.monotonic() + seconds
        self._wait_until_ready(until)
        mark = self._monitor.mark()
        try:
            for job in self._jobs:
                self._monitor.execute("block-job-cancel", {"device": job, "force": False})
        except Refused:
            self.check_mirrors()
            raise
        waiting = list(self._jobs)
        while waiting:
            # Events are enough where they came: each question takes time from the guest, which is paused.
            self._monitor.wait(_is_end_of(waiting[0]), after=mark, seconds=LOOK_SECONDS)
            waiting = [job for job in waiting if not self._has_ended_well(job, after=mark)]
            if not waiting:
                return
            known = {str(row.get("id")): row for row in self._monitor.rows("query-jobs")}
            for job, disk in zip(self._jobs, self._disks, strict=True):
                row = known.get(job)
                if row is None:
                    raise Unavailable("the mirror of its writes is gone before it was read", subject=disk)
                if row.get("status") == "concluded" and row.get("error"):
                    raise Unavailable(
                        f"the last writes of the guest did not reach the destination: {row.get('error')}",
                        subject=disk,
                        hint="see that the link is up and that there is room at the destination; then run it again",
                    )
            waiting = [job for job in waiting if known[job].get("status") != "concluded"]
            if waiting:
                _check_time(until, "the last writes of the guest", self._monitor)

    def _wait_until_ready(self, until: float) -> None:
        """Of a mirror that is not level yet, `block-job-cancel` would leave the last writes out."""
        while not self._are_ready:
            mark = self._monitor.mark()
            self.check_mirrors()
            if not self._are_ready:
                _check_time(until, "the last writes of the guest", self._monitor)
                self._monitor.wait(_is_news, after=mark, seconds=LOOK_SECONDS)

    def _has_ended_well(self, job: str, *, after: int) -> bool:
        """Whether events said so: completed without an error, and concluded."""

        def is_completed(name: str, data: Mapping[str, object]) -> bool:
            return name == "BLOCK_JOB_COMPLETED" and data.get("device") == job

        done = self._monitor.newest(is_completed, after=after)
        ended = self._monitor.newest(_is_end_of(job), after=after)
        return done is not None and not done.get("error") and ended is not None

    def switch_over(self, *, seconds: float) -> None:
        """Send the device state. At the end the guest is paused on both sides. Raises Unavailable."""
        until, mark = time.monotonic() + seconds, self._monitor.mark()
        self._monitor.execute("migrate-continue", {"state": "pre-switchover"})
        while True:
            self._monitor.wait(_is_end_of_migration, after=mark, seconds=LOOK_SECONDS)
            news = self._monitor.newest(_is_end_of_migration, after=mark)
            if news is not None and news.get("status") == "completed":
                return
            look = look_at_memory(self._monitor)
            if look.status == "completed":
                return
            if look.is_over:
                raise _ended(look, self._monitor)
            _check_time(until, "the state of the devices", self._monitor)

    def mirrors_left(self) -> int:
        """Bytes that the mirrors are behind. Raises as `check_mirrors`."""
        return sum(max(0, total - done) for _, done, total in self.check_mirrors())

    def limits(self) -> dict[str, int]:
        """As they are now, for `undo`."""
        found = self._monitor.fields("query-migrate-parameters")
        return {name: value for name in _LIMITS if isinstance(value := found.get(name), int)}

    def undo(
        self, capabilities: Mapping[str, bool], limits: Mapping[str, int], *, seconds: float = _UNDO_SECONDS
    ) -> None:
        """The guest goes on here as before, and nothing of ours is left in it. Idempotent, from whatever state.

        capabilities, limits: as they were before. The caller knows that no other host has the guest or will have it by
        this move.  A migration beside which no mirror of this move is, is another one's: it is left alone, and so is a
        guest that it has paused.
        seconds: for each of its steps. The guest goes on first; a mirror whose link hangs ends only with that.
        Raises Unavailable where QEMU does not come to rest.
        """
        if self._our_jobs():
            self._cancel_memory(seconds)
            self._go_on()
            with suppress(Refused):
                before = {name: capabilities.get(name, False) for name in (*CAPABILITIES, AUTO_CONVERGE)}
                _set_capabilities(self._monitor, before)
                if limits:
                    self._monitor.execute("migrate-set-parameters", limits, repeatable=True)
            self._end_jobs(seconds)  # last: by them it is known that the rest is ours
        for job in self._jobs:
            with suppress(Refused):  # it was never opened, or is closed
                self._monitor.execute("blockdev-del", {"node-name": job})

    def _our_jobs(self) -> list[Mapping[str, object]]:
        return [row for row in self._monitor.rows("query-jobs") if row.get("id") in self._jobs]

    def _go_on(self) -> None:
        answer = self._monitor.fields("query-status")
        if answer.get("status") in _SWITCHES:
            self._monitor.execute("cont", repeatable=True)

    def _cancel_memory(self, seconds: float) -> None:
        until, asked = time.monotonic() + seconds, False
        while not (look := look_at_memory(self._monitor)).is_over:
            mark = self._monitor.mark()
            if not asked or look.status == "pre-switchover":
                self._monitor.execute("migrate_cancel", repeatable=True)
                asked = True
            elif look.status == "cancelling":
                # Cancelled just as it would pause at pre-switchover, QEMU 7.2 waits there for this, the guest paused.
                with suppress(Refused):  # it has ended by now
                    self._monitor.execute("migrate-continue", {"state": "cancelling"}, repeatable=True)
            _check_time(until, "the end of the migration", self._monitor)
            self._monitor.wait(_is_news, after=mark, seconds=LOOK_SECONDS)

    def _end_jobs(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while True:
            mark = self._monitor.mark()
            if not (ours := self._our_jobs()):
                return
            for row in ours:
                over = row.get("status") == "concluded"
                with suppress(Refused):  # its state changed meanwhile
                    self._monitor.execute("job-dismiss" if over else "job-cancel", {"id": row.get("id")})
            _check_time(until, "the end of its mirrors", self._monitor)
            self._monitor.wait(_is_news, after=mark, seconds=0.1)

    def quit(self) -> None:
        """End QEMU: the guest is another host's. The caller waits for the process. Idempotent."""
        with suppress(Unavailable, NotFound):  # it ended before it answered, or is gone
            self._monitor.execute("quit")


class Incoming:
    """The QEMU at the destination, started with -S -incoming defer. Errors as of `Outgoing`."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def listen(self, ram: Path, nbd: Path, disks: Sequence[str]) -> None:
        """Await memory at one socket, and the writes of the disks at the other.

        Raises Conflict where this QEMU does not wait for a migration, or lacks a disk.
        """
        status = self._monitor.fields("query-status").get("status")
        if status != "inmigrate":
            raise Conflict(
                f"the QEMU at the destination does not wait for a migration: it is {status}",
                subject=self._monitor.path,
                hint="its command line must have -incoming defer, and -S",
            )
        nodes = root_nodes(self._monitor)
        if missing := [disk for disk in disks if disk not in nodes]:
            raise Conflict(f"the QEMU at the destination has no disk {', '.join(missing)}", subject=self._monitor.path)
        _set_capabilities(self._monitor, dict.fromkeys(CAPABILITIES, True))
        self._monitor.execute("migrate-incoming", {"uri": f"unix:{ram}"})
        address = {"type": "unix", "data": {"path": str(nbd)}}
        self._monitor.execute("nbd-server-start", {"addr": address, "max-connections": 2 * len(disks)})
        for number, disk in enumerate(disks):
            export = {"type": "nbd", "id": f"{_PREFIX}{number}", "node-name": nodes[disk], "name": disk}
            self._monitor.execute("block-export-add", {**export, "writable": True})

    def status(self) -> str:
        """Of the machine: inmigrate, paused, running, ..."""
        return str(self._monitor.fields("query-status").get("status"))

    def check_complete(self, *, seconds: float) -> None:
        """Wait until it has loaded the guest, and is paused. Raises Conflict where it has not."""
        until = time.monotonic() + seconds
        while True:
            mark = self._monitor.mark()
            news = self._monitor.newest(_is_end_of_migration, after=0)
            status = self.status()
            if news is not None and news.get("status") == "completed" and status == "paused":
                return
            look = look_at_memory(self._monitor)
            if look.status == "completed" and status in ("paused", "prelaunch"):
                return
            if look.status in ("failed", "cancelled") or time.monotonic() >= until:
                raise Conflict(
                    f"the destination has not got the whole guest: its migration is {look.status}, the guest {status}",
                    subject=self._monitor.path,
                )
            self._monitor.wait(_is_news, after=mark, seconds=0.1)

    def stop_exports(self) -> None:
        """No mirror writes to the disks any more. Idempotent."""
        with suppress(Refused):  # it was stopped before
            self._monitor.execute("nbd-server-stop", repeatable=True)

    def run(self) -> float | None:
        """Let the guest run: it is this host's. When it went on, seconds since the epoch. Idempotent.

        Only after `stop_exports`: an export would keep QEMU from writing.
        """
        self._monitor.execute("cont", repeatable=True)
        if self._monitor.fields("query-status").get("running") is not True:
            raise Unavailable("the guest does not run although it was told to", subject=self._monitor.path)
        with suppress(SnapchainError):  # QEMU has done so once, before the guest could hear answers
            self._monitor.execute("announce-self", _ANNOUNCE)
        with suppress(SnapchainError):  # the next migration sets its own
            _set_capabilities(self._monitor, dict.fromkeys(CAPABILITIES, False))
        return self._monitor.time_of("RESUME")


def _set_capabilities(monitor: Monitor, wanted: Mapping[str, bool]) -> None:
    rows = [{"capability": name, "state": state} for name, state in wanted.items()]
    monitor.execute("migrate-set-capabilities", {"capabilities": rows}, repeatable=True)


def _is_news(name: str, _data: Mapping[str, object]) -> bool:
    return name in ("JOB_STATUS_CHANGE", "MIGRATION", "MIGRATION_PASS", "STOP", "RESUME") or name.startswith(
        "BLOCK_JOB_"
    )


def _is_end_of(job: str) -> Callable[[str, Mapping[str, object]], bool]:
    return lambda name, data: name == "JOB_STATUS_CHANGE" and (data.get("id"), data.get("status")) == (job, "concluded")


def _is_end_of_migration(name: str, data: Mapping[str, object]) -> bool:
    return name == "MIGRATION" and data.get("status") in _OVER


def _ended(look: MemoryLook, monitor: Monitor) -> Unavailable:
    words = f": {look.error}" if look.error else ""
    return Unavailable(
        f"the migration of the guest's memory ended as {look.status}{words}",
        subject=monitor.path,
        hint="the guest goes on here; see whether the destination and the link are up, then run it again",
    )


def _check_time(until: float, what: str, monitor: Monitor) -> None:
    if time.monotonic() >= until:
        raise Unavailable(f"QEMU does not come to an end with {what}", subject=monitor.path)
