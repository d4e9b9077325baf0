"""The QEMU of a guest under a lease, and the guards by whose end the kernel stops it (host/deadman.py).

    guard     guards that stop it, should they end; it may run without them only where nothing is promised
    promise   it does not run after this deadline
    keep      until then it has guards and runs; without a guard it is stopped
    release   nothing is promised any more: the guards go, and it continues
    stop      for good

Only guards let it continue while something is promised, and only `release` sends SIGCONT itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from snapchain.errors import Unavailable, Unsupported
from snapchain.host import deadman
from snapchain.host.deadman import Deadman
from snapchain.host.process_identity import Identity, identity
from snapchain.model.lease import STOP_SECONDS

_START_SECONDS = 60.0
"""Deadline of guards that are not needed yet, or stop the guest once on trial: a busy machine starts them slowly."""


class GuardedQemu:
    """process: None while the guest is off; on_guards: called when there are others, which are to be noted"""

    def __init__(self, *, on_guards: Callable[[], None]) -> None:
        self.process: Identity | None = None
        self._on_guards = on_guards
        self._pair: Deadman | None = None
        self._older: tuple[Identity, ...] = ()
        """Of an earlier run of the watch: they go when newer ones may let the guest run."""

    @property
    def guards(self) -> tuple[Identity, ...]:
        """All that may live."""
        return (*self._older, *(() if self._pair is None else self._pair.guards))

    @property
    def is_there(self) -> bool:
        """Whether its process runs, stopped or not."""
        return self.process is not None and identity(self.process[0]) == self.process

    @property
    def is_stopped(self) -> bool:
        """True also for one that has ended."""
        return self.process is None or deadman.is_stopped(self.process) or not self.is_there

    def found(self, process: Identity) -> None:
        """It is this process, and nothing is promised."""
        self.process = process

    def adopt(self, process: Identity | None, guards: Sequence[Identity]) -> None:
        """Go on where an earlier run of the watch was ended; without guards that live it is stopped."""
        self.process, self._older = process, tuple(guards)

    def replaced_by(self, process: Identity) -> None:
        """The guest was started again while something is promised: it is stopped at once. Raises Unsupported."""
        self.process = process
        deadman.stop(process)

    def gone(self) -> None:
        """It has ended."""
        self.process, self._older = None, ()
        self._drop()

    # --- promises

    def guard(self) -> None:
        """Have guards, whose deadline is of no matter yet. Raises as `Deadman`."""
        assert self.process is not None, "it is what they guard"
        if self._pair is not None and not self._pair.works:
            self._drop()
        if self._pair is None:
            self._pair = Deadman(self.process, deadman.clock() + _START_SECONDS)
            self._on_guards()

    def promise(self, until: float) -> None:
        """By the deadman's clock. Raises Unavailable where the guards do not answer."""
        assert self._pair is not None, "they are there before"
        if not self._pair.extend(until):
            raise Unavailable("the processes that guard the guest do not answer")

    def renewed(self, until: float) -> None:
        """The promise is a later one now; the QEMU continues, if it was stopped."""
        if self._pair is not None and until > deadman.clock() and not self._extend(until):
            self._drop()  # one of them hangs: others take over
        self.keep(until)

    def keep(self, until: float) -> None:
        """Raises as `Deadman`; then it is stopped, or has the guards that it had."""
        if self._pair is not None and not self._pair.works:
            self._drop()
        if self.process is None:
            return
        is_new = self._pair is None
        if is_new and not any(identity(guard[0]) == guard for guard in self._older):
            deadman.stop(self.process)
        if until <= deadman.clock():
            return
        if is_new:
            self.guard()  # which may take long: the older ones stop the QEMU meanwhile, or it is stopped
        if (is_new or deadman.is_stopped(self.process)) and not self._extend(until):
            self._drop()
            return
        if self._older:
            older, self._older = self._older, ()
            deadman.end(older)  # which stops it
            self._on_guards()
            self._extend(until)

    def _extend(self, until: float) -> bool:
        assert self._pair is not None, "asked by whom there is one"
        return self._pair.extend(until, resumes=self.process is not None and deadman.is_stopped(self.process))

    def _drop(self) -> None:
        """The newer guards go, and the QEMU stops. Raises Unavailable for one that does not end; it counts no more."""
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.end()

    # --- the end of promises

    def release(self) -> None:
        """Raises Unavailable for a guard that does not end; then it is stopped."""
        self._drop()
        deadman.end(self._older)
        self._older = ()
        if self.process is not None:
            deadman.let_continue(self.process)

    def stop(self) -> None:
        """Another host has the guest. Raises Unsupported where that is not allowed."""
        try:
            self._drop()
            deadman.end(self._older)
        finally:  # the guards first: one of them may be about to let it continue
            if self.process is not None and not deadman.is_stopped(self.process):
                deadman.stop(self.process)

    def leave(self) -> None:
        """The guards stop it at the deadline."""
        if self._pair is not None:
            self._pair.close()

    def rehearse(self, *, on_guards: Callable[[Sequence[Identity]], None], wait: Callable[[float], object]) -> None:
        """Prove once that guards stop this QEMU: the guest stands still for milliseconds. Nothing is promised.

        on_guards: called before it may be stopped. Raises Unsupported where the kernel does not stop it: another user's
        QEMU, a container, a security module that forbids it.
        """
        assert self.process is not None, "it is tried with it"
        pair = Deadman(self.process, deadman.clock() + _START_SECONDS)
        try:
            on_guards(pair.guards)
            pair.extend(deadman.clock())
            until = deadman.clock() + STOP_SECONDS
            while not deadman.is_stopped(self.process) and deadman.clock() < until:
                wait(0.001)
            stops = deadman.is_stopped(self.process)
        finally:
            pair.end()
            deadman.let_continue(self.process)
        if not stops:
            raise Unsupported(
                "the kernel did not stop the guest's QEMU when its guards ended, so a lease would promise nothing",
                subject=f"process {self.process[0]}",
                hint="run the watch as root, outside of containers; a security module may forbid the signal",
            )
