"""How the move of a libvirt domain ends, whoever has died: libvirt has decided, and both sides are asked.

    here            there                    who has it
    runs                                     this host: libvirt lets it go on only where no Finish was sent
    paused, off     runs, or has run         the destination
    paused, off     libvirt has no such      this host: it can never come there, since virsh has ended
    paused, off     still waits, or silent   unknown: nothing is done, and the record stays

Before all this virsh has ended, and with it whatever libvirt had under way.
"""

from __future__ import annotations

import time
from contextlib import suppress

from snapchain.destinations import replica_at
from snapchain.errors import Busy, Conflict, NotFound, SnapchainError, Unavailable
from snapchain.guest import journal
from snapchain.guest.libvirt_migration import LeavingDomain, Presence
from snapchain.host.virsh import Virsh
from snapchain.model.events import Notice, OnEvent, ignore
from snapchain.ops.migrate import live_settle
from snapchain.ops.migrate.live_request import SettledMove
from snapchain.ops.migrate.live_settle import MoveRecord, Verdict
from snapchain.ops.migrate.look import opened
from snapchain.replica.guest_client import moving
from snapchain.replica.stream.guest_messages import DomainPresence, MoveStep, Moving
from snapchain.source import ownership

_ABORT_SECONDS = 60.0
_AGAIN_SECONDS = 1.0
_BOTH = "somebody has started it by hand: destroy one of them at once, then run `snapchain migrate --abort`"
_THERE = (DomainPresence.HERE, DomainPresence.DEFINED)


def judge_domain(stage: str, here: Presence, there: Moving | None, *, is_lasting: bool, subject: str) -> Verdict:
    """Who has the domain. there: how the move stands at the destination, None without an answer

    here: once no migration is under way; is_lasting: whether it had a definition that lasts
    Raises Conflict for a domain that runs on both hosts.
    """
    if stage == "moving":
        return Verdict.STAY
    if here is Presence.RUNNING:
        if stage == "switched" or (there is not None and (there.given or there.domain in _THERE)):
            raise Conflict("libvirt runs the domain here, and the destination has it", subject=subject, hint=_BOTH)
        return Verdict.STAY
    if stage == "switched":
        return Verdict.MOVED
    if there is None or there.domain is None:
        return Verdict.UNKNOWN
    if there.given or there.domain in _THERE:
        return Verdict.MOVED
    if there.domain is DomainPresence.INCOMING:
        return Verdict.UNKNOWN
    # Somebody else has removed a definition that lasts: perhaps on both hosts.
    return Verdict.UNKNOWN if here is Presence.ABSENT and is_lasting else Verdict.STAY


def settle_domain(found: journal.Found, *, is_gone: bool, on_event: OnEvent = ignore) -> SettledMove:
    """See `live_settle.settle`. Raises Unavailable too where libvirt here does not answer: it holds the guest."""
    record = live_settle.record_of(found)
    assert record.domain is not None
    leaving = LeavingDomain(Virsh(found.record.connect), record.domain.uuid, record.domain.name)
    try:
        return _End(found, record, leaving, on_event).run(is_gone=is_gone)
    finally:
        leaving.close()


class _End:
    def __init__(self, found: journal.Found, record: MoveRecord, leaving: LeavingDomain, on_event: OnEvent) -> None:
        assert record.domain is not None
        self._found, self._record, self._leaving, self._on_event = found, record, leaving, on_event
        self._domain = record.domain
        self._has_ended = False
        self._endpoint = replica_at(record.destination)

    def run(self, *, is_gone: bool) -> SettledMove:
        stage = self._record.stage
        if stage != "moving":
            self._leaving.abort(seconds=_ABORT_SECONDS)
        here = self._leaving.presence()
        there = None
        if stage == "switching" and not is_gone:
            # What runs here need not wait for an answer.
            seconds = live_settle.TELL_SECONDS if here is Presence.RUNNING else live_settle.ASK_SECONDS
            there = self._asked(here, seconds)
        verdict = self._judge(stage, here, there)
        if is_gone and stage == "switching":
            verdict = Verdict.STAY
        match verdict:
            case Verdict.UNKNOWN:
                raise Unavailable(
                    "it is not known which host has the guest: the destination does not say what became of it",
                    subject=self._record.destination,
                    hint="bring the link and libvirt there up, then run it again, or with --abort; if that host is "
                    "gone for good, say --abort --destination-is-gone",
                )
            case Verdict.STAY:
                return self._stay(here, is_gone=is_gone, was_asked=stage == "switching")
            case _:
                return self._moved()

    def _judge(self, stage: str, here: Presence, there: Moving | None) -> Verdict:
        return judge_domain(stage, here, there, is_lasting=self._domain.is_lasting, subject=self._domain.name)

    def _asked(self, here: Presence, seconds: float) -> Moving | None:
        """How the move stands there, once libvirt there has settled; None without an answer.

        Where the domain stays here, the other side has ended the move by then: a guest may be waiting for that.
        """
        until = time.monotonic() + seconds

        def ask() -> Moving:
            with moving(self._endpoint, self._record.what) as move:
                there = move.step(MoveStep.LOOK)
                if self._judge("switching", here, there) is Verdict.STAY:
                    move.step(MoveStep.END)
                    self._has_ended = True
                move.stop()
            return there

        there = None
        with suppress(Unavailable, Busy, NotFound):
            while True:
                there = live_settle.persisted(ask, max(1.0, until - time.monotonic()))
                if there.domain is not DomainPresence.INCOMING or time.monotonic() >= until:
                    return there
                time.sleep(_AGAIN_SECONDS)
        return there

    def _stay(self, here: Presence, *, is_gone: bool, was_asked: bool) -> SettledMove:
        record = self._record
        if was_asked:
            for each in record.disks:
                with opened(record.request, each.moved) as chain:
                    ownership.unfence(chain, record.token, epoch=each.mark.epoch + 1 if is_gone else 1)
        if here is Presence.WAITING and was_asked:  # else somebody has paused it
            self._leaving.resume()
        if here not in (Presence.ABSENT, Presence.DEFINED) and self._domain.max_downtime:
            with suppress(SnapchainError):  # a bound that nobody but the next migration heeds
                self._leaving.set_max_downtime(self._domain.max_downtime)
        if not is_gone and not self._has_ended:
            self._tell_end()
        is_off = here in (Presence.ABSENT, Presence.DEFINED)
        words = "its QEMU here has ended; start it here" if is_off else "it goes on here, as before"
        return self._done(moved=False, says=words)

    def _moved(self) -> SettledMove:
        with moving(self._endpoint, self._record.what) as move:
            there = move.step(MoveStep.LOOK)
            if not there.given and there.domain in _THERE:
                there = move.step(MoveStep.GIVE)
            move.stop()
        self._found = live_settle.restaged(self._found, "switched")
        self._leaving.end(is_lasting=self._domain.is_lasting)
        live_settle.fence_all(self._record)
        runs = there.domain is DomainPresence.HERE
        lost = "libvirt there does not run it (any more): start it there"
        return self._done(moved=True, says="it is the destination's" if runs else f"it is the destination's; {lost}")

    def _end_there(self) -> None:
        with moving(self._endpoint, self._record.what) as move:
            move.step(MoveStep.END)
            move.stop()

    def _tell_end(self) -> None:
        try:
            live_settle.persisted(self._end_there, live_settle.TELL_SECONDS)
        except (Unavailable, Busy, NotFound) as error:
            words = f"it was not told that the guest stays; run `snapchain doctor` there when it is back: {error}"
            self._on_event(Notice.of(self._record.destination, words))

    def _done(self, *, moved: bool, says: str) -> SettledMove:
        live_settle.remove_directories(self._record)
        journal.remove(self._found.path)
        guest = self._found.record.guest
        return SettledMove(guest=guest, destination=self._record.destination, moved=moved, says=says)
