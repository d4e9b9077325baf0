"""Several guests in one failover: which ones, in which order, how many at once, and one proof for each old host.

    guests of one old host -> groups, one after the other -> in each at most so many at once

A guest that fails keeps no other from being taken over, and a group waits only until the one before it was tried.  Run
again, what was done is found done, and the others are tried again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase

from snapchain.destination.protocol import Destination
from snapchain.errors import Interrupted, InvalidInput, NotFound, SnapchainError
from snapchain.host.terminal import counted
from snapchain.model.events import Event, Notice, OnEvent, ignore
from snapchain.ops.failover.request import Failed, FailoverPlan, FailoverReport, FailoversPlan, FailoversReport
from snapchain.ops.failover.run import Failover
from snapchain.ops.guest_points import GuestView, guests_of
from snapchain.ops.guest_records import read_record

Opened = Callable[[OnEvent], Failover]
"""Opens the failover of one guest; what it raises is that guest's fault alone."""


def guests_from(destination: Destination, host: str, *, here: str) -> list[str]:
    """The guests of a destination of which a host is the master, and those that this one has taken over from it.

    here: the name of this host. Raises NotFound where there are none; the hosts that there are, are named.
    """
    found: list[str] = []
    masters: Counter[str] = Counter()
    for view in guests_of(destination.disks()):
        standing = destination.guest_state(view.name)
        master = standing.master or _shipped_by(destination, view)
        if master is not None:
            masters[master] += 1
        if master == host or (master == here and standing.former == host):
            found.append(view.name)
    if not found:
        hosts = ", ".join(f"{name} ({counted(count, 'guest')})" for name, count in sorted(masters.items()))
        raise NotFound(
            f"{host} is the master of no guest there",
            subject=destination.url,
            hint=f"the masters of its guests are {hosts}" if hosts else "no guest there has a guest point",
        )
    return found


def _shipped_by(destination: Destination, view: GuestView) -> str | None:
    """The host that has shipped the newest guest point whose record can be read."""
    for point in reversed(view.points):
        try:
            return read_record(destination, point, disk=view.record_disk).host
        except SnapchainError:
            continue
    return None


def groups_of(text: str, guests: Sequence[str], *, subject: object) -> list[list[str]]:
    """The guests in the groups of a list: one group a line, names and patterns such as web*; the others come last.

    Raises InvalidInput for a word that names no guest: a misspelt name would put a guest into the wrong place.
    """
    left = list(guests)
    groups: list[list[str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        group: list[str] = []
        for word in line.partition("#")[0].split():
            named = [guest for guest in guests if fnmatchcase(guest, word)]
            if not named:
                raise InvalidInput(f"line {number}: {word!r} names none of the guests", subject=subject)
            group += [guest for guest in named if guest in left]
            left = [guest for guest in left if guest not in named]
        if group:
            groups.append(group)
    return [*groups, left] if left else groups


def plan_all(work: Mapping[str, Opened]) -> FailoversPlan:
    """What `run_all` would do; changes nothing. A guest that cannot be taken over is in the plan, with the reason."""
    plans: list[FailoverPlan] = []
    failed: list[Failed] = []
    for order, (guest, opened) in enumerate(work.items(), 1):
        try:
            plans.append(opened(ignore).plan())
        except SnapchainError as error:
            failed.append(_failed(guest, error, order=order, group=1, seconds=0.0))
    return FailoversPlan(guests=tuple(plans), failed=tuple(failed))


def run_all(groups: Sequence[Mapping[str, Opened]], *, concurrency: int, on_event: OnEvent = ignore) -> FailoversReport:
    """Take several guests over, group after group; one that fails keeps no other from it. concurrency: at once, at most

    An interrupt passes: no further guest is begun, and those that are being taken over end at their next step.
    """
    begun = time.monotonic()
    stop = threading.Event()

    def heard(event: Event) -> None:
        if stop.is_set():
            raise Interrupted("the failover was interrupted")
        on_event(event)

    def one(order: int, group: int, guest: str, opened: Opened) -> FailoverReport | Failed:
        started = time.monotonic()
        try:
            return opened(heard).run(order=order, group=group)
        except SnapchainError as error:
            on_event(Notice(f"{guest}: {error.message}"))
            return _failed(guest, error, order=order, group=group, seconds=time.monotonic() - started)

    results: list[FailoverReport | Failed] = []
    with ThreadPoolExecutor(max(1, concurrency), "failover") as pool:
        try:
            for number, group in enumerate(groups, 1):
                first = len(results) + 1
                waiting = [pool.submit(one, order, number, *each) for order, each in enumerate(group.items(), first)]
                results += [each.result() for each in waiting]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return FailoversReport(
        guests=tuple(each for each in results if isinstance(each, FailoverReport)),
        failed=tuple(each for each in results if isinstance(each, Failed)),
        groups=len(groups),
        concurrency=concurrency,
        seconds=time.monotonic() - begun,
    )


def _failed(guest: str, error: SnapchainError, *, order: int, group: int, seconds: float) -> Failed:
    return Failed(
        guest=guest,
        kind=error.kind,
        message=str(error),
        hint=error.hint,
        order=order,
        group=group,
        seconds=seconds,
    )
