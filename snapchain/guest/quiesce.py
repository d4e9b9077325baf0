"""Freeze a guest's filesystems around the switch to new overlays, and thaw them whatever happens.

    pre-freeze hook -> watchdog, agent's ping -> record "thaw owed", fsync -> freeze -> SWITCH -> thaw -> post-thaw hook

What is reached is *filesystem* only when the agent reported the freeze before the switch, and its thaw after the switch
thawed as many filesystems.  Windows ends a freeze by itself after ten seconds: its agent then fails at the thaw, or
thaws none.  All else is *crash*.  Hooks of the agent itself may have brought programs into order, but the agent does
not tell whether it has any: *application* is never claimed.

In the frozen window nothing is done that waits for another program, a network or another guest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from snapchain.errors import SnapchainError, ToolFailed, Unavailable
from snapchain.guest import journal
from snapchain.guest.agent import open_agent
from snapchain.guest.protocol import Guest
from snapchain.guest.watchdog import THAW_SECONDS, Orders, Watchdog
from snapchain.host import hooks
from snapchain.host.detached import start_module
from snapchain.host.process_identity import identity
from snapchain.model.consistency import Consistency
from snapchain.model.events import Notice, OnEvent

THAW = "thaw"
"""The operation of the journal's record of a freeze."""
_PING_SECONDS = 3.0
_LOOK = 0.05


@dataclass(slots=True)
class Quiesced:
    """consistency, why_not, frozen_seconds: as `guest.snapshot.GuestSnapshot` has them, right after the block

    may_be_late: set by the block when it does not know whether its work was done while the filesystems were frozen
    """

    consistency: Consistency = Consistency.CRASH
    why_not: str | None = None
    frozen_seconds: float | None = None
    may_be_late: bool = False


@contextmanager
def frozen(
    guest: Guest, *, required: bool, freeze_seconds: float, bound_seconds: float, on_event: OnEvent
) -> Iterator[Quiesced]:
    """A block in which the guest's filesystems are frozen, if its agent can do that.

    required: without a freeze the block is not entered, and the reason is raised: Unavailable, Busy, Unsupported
    freeze_seconds: deadline for the freeze; bound_seconds: the longest that the guest may stay frozen
    """
    reached = Quiesced()
    guard: _Guard | None = None
    try:
        try:
            guard = _Guard(guest, bound_seconds)
            guard.freeze(freeze_seconds)
        except SnapchainError as error:
            if required:
                raise
            reached.why_not = error.message
        yield reached
    finally:
        if guard is not None:
            guard.thaw(reached, on_event)


class _Guard:
    """A watchdog, and the record of the thaw that is owed."""

    def __init__(self, guest: Guest, bound: float) -> None:
        """Raises Unavailable when there is no agent, or none that answers."""
        agent = guest.agent()
        if agent is None:
            raise Unavailable(
                "the guest has no channel for a guest agent",
                subject=guest.name,
                hint="add a virtio-serial port org.qemu.guest_agent.0 to it, and install qemu-guest-agent in it",
            )
        self._guest, self._address = guest, agent.address()
        record = journal.begun(guest, THAW, agent=dict(self._address))
        self._record = journal.path_for(record)
        self._watchdog = Watchdog(Orders(self._address, str(self._record), bound, record.process, record.boot), _start)
        self._began: float | None = None
        """When the freeze was ordered; None while it is not acknowledged."""
        self._frozen = 0
        """How many filesystems were frozen."""
        try:
            self._watchdog.ping(timeout=_PING_SECONDS)
            # It is the watchdog that owes the thaw: `doctor` leaves it alone as long as that lives.
            owed_by = identity(self._watchdog.pid) or record.writer
            journal.write(record.model_copy(update={"writer": owed_by}), self._record)
        except BaseException:
            self._watchdog.close()
            raise

    def freeze(self, seconds: float) -> None:
        """Raises Unavailable, Busy, Unsupported, as an Agent."""
        began = time.monotonic()
        self._frozen = self._watchdog.freeze(timeout=seconds)
        self._began = began
        if self._frozen == 0:
            raise Unavailable(
                "the guest agent froze no filesystem",
                subject=self._guest.name,
                hint="is one mounted that can be frozen?",
            )

    def thaw(self, reached: Quiesced, on_event: OnEvent) -> None:
        """Raises nothing of the agent's: what was done between stays done, and the watchdog goes on."""
        if self._began is not None:
            self._thaw(self._began, reached, on_event)
        elif self._watchdog.works:
            self._watchdog.close()  # it thaws what may yet freeze, and ends
        else:
            self._rescue(on_event)

    def _thaw(self, began: float, reached: Quiesced, on_event: OnEvent) -> None:
        try:
            thawed = self._watchdog.thaw()
            reached.frozen_seconds = time.monotonic() - began
        except SnapchainError as error:
            self._rescue(on_event)
            reached.frozen_seconds = time.monotonic() - began
            reached.why_not = f"the filesystems were not frozen for certain up to the end: {error.message}"
            return
        self._watchdog.ended()
        if reached.why_not is not None:
            return
        if thawed < self._frozen:
            reached.why_not = "the filesystems had been thawed before the snapshot was done"
        elif reached.may_be_late:
            reached.why_not = "the answer of the guest's monitor was lost, so the snapshot may be from after the thaw"
        else:
            reached.consistency = Consistency.FILESYSTEM

    def _rescue(self, on_event: OnEvent) -> None:
        """The watchdog did not report a thaw: leave it to the watchdog while that works, else do it here."""
        if self._is_thawed_by(time.monotonic() + THAW_SECONDS):
            self._watchdog.ended()
            return
        if self._watchdog.works:
            self._watchdog.close()
            on_event(_still_frozen(self._guest, f"process {self._watchdog.pid} keeps trying to thaw them"))
            return
        self._watchdog.kill()
        try:
            thaw_now(self._address, timeout=THAW_SECONDS)
        except SnapchainError as error:
            on_event(_still_frozen(self._guest, error.message))
            return
        journal.remove(self._record)

    def _is_thawed_by(self, deadline: float) -> bool:
        """Whether the watchdog has removed the record: that is the last thing that it does."""
        while self._record.exists():
            if time.monotonic() >= deadline or identity(self._watchdog.pid) is None:
                return not self._record.exists()
            time.sleep(_LOOK)
        return True


def thaw_now(address: Mapping[str, str], *, timeout: float) -> None:
    """Thaw, and see that it is thawed. Raises what an Agent raises; Unavailable when it is still frozen."""
    agent = open_agent(address)
    with agent.connected():
        agent.thaw(timeout=timeout)
        if agent.is_frozen(timeout=timeout):
            raise Unavailable("the guest agent reports that the filesystems are still frozen")


def settle_thaw(found: journal.Found, *, timeout: float = 2 * THAW_SECONDS) -> bool:
    """Do what a killed run and its killed watchdog owe; whether there was a guest. Raises what an Agent raises."""
    lives = found.record.qemu_runs is not False
    if lives:
        address = found.record.details.get("agent")
        if isinstance(address, dict):
            thaw_now({str(name): str(value) for name, value in address.items()}, timeout=timeout)
    journal.remove(found.path)
    return lives


@contextmanager
def with_hooks(
    *,
    pre_freeze: tuple[str, ...],
    post_thaw: tuple[str, ...],
    facts: Mapping[str, object],
    on_event: OnEvent,
    timeout: float = hooks.SECONDS,
) -> Iterator[Callable[..., None]]:
    """A block between two programs of this host: the second runs whenever the first was begun, also after a failure.

    Gives a function that takes more facts for the second: `consistency=...`.
    Raises ToolFailed when the first fails; then the block is not entered. A failure of the second is a Notice.
    """
    later: dict[str, object] = {"outcome": "failed"}
    try:
        if pre_freeze:
            hooks.run_hook("pre_freeze", pre_freeze, facts, timeout=timeout)
        yield lambda **more: later.update(more)
        later["outcome"] = "ok"
    finally:
        if post_thaw:
            try:
                hooks.run_hook("post_thaw", post_thaw, {**facts, **later}, timeout=timeout)
            except ToolFailed as error:
                on_event(Notice(str(error)))


def _start(argument: str, fd: int) -> int:
    return start_module("snapchain.guest.watchdog", argument, fd=fd)


def _still_frozen(guest: Guest, why: str) -> Notice:
    return Notice.of(guest.name, f"its filesystems may still be frozen: {why}; see `snapchain doctor {guest.option}`")
