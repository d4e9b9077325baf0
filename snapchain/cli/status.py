"""`snapchain status DEST[::GUEST]...`: show how guests stand: who may run each, how far behind, what is owed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import moment, size
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.protocol import Destination
    from snapchain.model.guest_checks import GuestCheck
    from snapchain.ops.guest_status import GuestStatus, StatusReport


@verb(
    examples="""
    snapchain status /backup
    snapchain status ssh://root@kvm2/srv/replica::web1 /backup::web1
    snapchain status /backup --json | jq -r '.guests[] | select(.owed != []) | .guest'
    """,
    when_interrupted="nothing was being changed",
)
@options.takes_output(passphrase=True, dry_run=False, progress=False)
def status(
    places: Annotated[
        list[str],
        options.address(metavar="DEST[::GUEST]...", help="Destinations, or single guests of them."),
    ],
    *,
    out: Output,
) -> None:
    """Show how the guests of destinations stand.

    For each guest: its state, the host that may run it, and the epoch; the lease that it runs under; its newest guest
    point, how old that is, and about how much the guest wrote since; when it was last verified, and when a clone of it
    last booted. A line `owed` says what is left to be done, such as after a failover.

    The guest's other destinations are asked, too: one of them may have a newer master.

    A guest or a destination that does not answer is a line of the list, and does not change the exit code.
    """
    from snapchain.destination.address import PointAddress, parse_destination
    from snapchain.ops.guest_status import status as run

    asked: list[tuple[Destination, str | None]] = []
    for text in places:
        address = parse_destination(text)
        guest = None
        if isinstance(address, PointAddress):
            if address.point is not None:
                raise InvalidInput("a guest is wanted here, not a point of it", subject=text)
            guest = address.disk
        asked.append((options.destination(address.dest, out), guest))
    out.show(run(asked, reach=options.reach(None, None, out)), _draw)


def _draw(console: Console, report: StatusReport) -> None:
    if not report.guests:
        render.headline(console, "no guest is there")
    for guest in report.guests:
        on = "" if guest.master is None else f" on {guest.master}"
        state = "unknown" if guest.state is None else f"{guest.state.value}{on}, epoch {guest.epoch}"
        render.headline(console, f"{guest.guest}: {state}")
        render.facts(
            console,
            [
                ("at", render.place(guest.destination)),
                ("since", "" if guest.since is None else moment(guest.since)),
                ("from", guest.former or ""),
                ("lease", "" if guest.lease is None else render.lease(guest.lease)),
                ("guest point", _point(guest)),
                ("behind", _lag(guest)),
                ("others", ", ".join(guest.others)),
                *(("no answer", each) for each in guest.silent),
                *(("gone", each) for each in guest.gone),
                ("verified", _checked(guest.verified, with_share=True)),
                ("boot tested", _checked(guest.booted)),
                *(("owed", each) for each in guest.owed),
                ("no answer", guest.fault or ""),
            ],
        )


def _point(guest: GuestStatus) -> str:
    if guest.guest_point is None or guest.time is None:
        return "" if guest.fault else "none"
    how = "" if guest.consistency is None else f", {guest.consistency.value}"
    torn = f"; {guest.torn} newer moments are incomplete" if guest.torn else ""
    return f"{guest.guest_point} of {moment(guest.time)}{how}{torn}"


def _checked(check: GuestCheck | None, *, with_share: bool = False) -> str:
    if check is None:
        return "never"
    share = f", {check.share:.0%} of the data" if with_share and check.share else ", records" if with_share else ""
    verdict = "" if check.ok else f"; FAILED: {check.words}"
    return f"{moment(check.time)} by {check.by}: guest point {check.point}{share}{verdict}"


def _lag(guest: GuestStatus) -> str:
    if guest.lag_seconds is None:
        return ""
    words = quantities.duration(guest.lag_seconds)
    if guest.lag_bytes is not None:
        words += f", about {size(guest.lag_bytes)}"
    return words
