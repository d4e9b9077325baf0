"""`snapchain failover DEST::GUEST...`: take guests over whose host is gone."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import moment, size
from snapchain.cli.trial_tables import draw_trials
from snapchain.errors import InvalidInput, PartialFailure
from snapchain.host.terminal import counted, printable

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.address import PointAddress
    from snapchain.destination.protocol import Destination
    from snapchain.model.events import OnEvent
    from snapchain.model.guest_state import GuestStanding
    from snapchain.ops.failover.fence import Proofs
    from snapchain.ops.failover.lease import LeaseProof
    from snapchain.ops.failover.request import (
        FailoverPlan,
        FailoverReport,
        FailoverRequest,
        FailoversPlan,
        FailoversReport,
        Loss,
    )
    from snapchain.ops.failover.run import Failover

_PROOF = "Proof that the old host is down"
_GUEST = "The guest"
_TEST = "A test"


@verb(
    examples="""
    snapchain failover dir:/srv/replica::web1 --dry-run
    snapchain failover dir:/srv/replica::web1 --fence 'ipmi-off kvm1' --define --start
    snapchain failover dir:/srv/replica --from kvm1 --fence ipmi-off --define --start --yes --concurrency 4
    snapchain failover dir:/srv/replica --from kvm1 --order /etc/snapchain/order --fence ipmi-off --start --yes
    snapchain failover /backup::web1 --into /images/web1 --source-is-gone --define --start
    snapchain failover dir:/srv/replica::web1 --lease --witness s3://bucket/prefix --define --start --yes
    snapchain failover dir:/srv/replica::web1 --withdraw
    snapchain failover /backup::web1 --test --into /var/tmp
    """,
    when_interrupted="run it again: it continues; --withdraw undoes it as long as the guest was not started",
)
@options.takes_output(passphrase=True)
def failover(
    guests: Annotated[
        list[str],
        typer.Argument(
            metavar="DEST::GUEST...",
            help="The guests, at a destination that this host reaches; with --from, DEST alone.",
        ),
    ],
    *,
    from_host: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="HOST",
            help="Take over all guests of the destination DEST whose master is HOST, as `snapchain status` names it.",
        ),
    ] = None,
    order: Annotated[
        Path | None,
        typer.Option(
            "--order",
            metavar="FILE",
            readable=False,
            help="The order of several guests: one group a line, names or patterns. A group begins when the one before "
            "it was tried; guests that no line names come last.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="POINT", help="The guest point. By default the newest that is whole."),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            "--into",
            readable=False,
            metavar="DIR",
            help="Directory of the definition, and of the disks that come from a repository. With several guests, each "
            "gets a directory of its name in it.",
        ),
    ] = None,
    prove: Annotated[
        bool, typer.Option("--prove", help="Read all data of the guest's points again before one is chosen.")
    ] = False,
    fence: Annotated[
        str | None,
        typer.Option(
            "--fence",
            metavar="PROGRAM",
            help="A program (no shell) that makes sure that the old host is down, and exits with 0 only then. It "
            "is run twice, the second time right before the start. Its environment has SNAPCHAIN_GUEST and _HOST.",
            rich_help_panel=_PROOF,
        ),
    ] = None,
    source_is_gone: Annotated[
        bool,
        typer.Option(
            "--source-is-gone",
            help="You vouch that the old host is down and stays down. Your name is recorded.",
            rich_help_panel=_PROOF,
        ),
    ] = False,
    lease: Annotated[
        bool,
        typer.Option(
            "--lease",
            help="The guest runs under a lease (`watch --lease`), which its old host cannot renew any more. It takes "
            "about two and a half times the lease to be sure. Refused while the lease is renewed.",
            rich_help_panel=_PROOF,
        ),
    ] = False,
    witness: Annotated[
        str | None,
        typer.Option(
            "--witness",
            autocompletion=options.complete_address,
            metavar="DEST",
            help="With --lease: the lease's witness, as this host names it.",
            rich_help_panel=_PROOF,
        ),
    ] = None,
    reason: Annotated[
        str | None,
        typer.Option("--reason", metavar="TEXT", help="Recorded with --source-is-gone.", rich_help_panel=_PROOF),
    ] = None,
    defines: Annotated[
        bool, typer.Option("--define", help="Define the guest in libvirt.", rich_help_panel=_GUEST)
    ] = False,
    connect: Annotated[
        str | None,
        typer.Option("--connect", metavar="URI", help="The libvirt to define it in.", rich_help_panel=_GUEST),
    ] = None,
    start: Annotated[
        bool,
        typer.Option(
            "--start",
            help="Start it: by libvirt, or by QEMU's command line on the new files.",
            rich_help_panel=_GUEST,
        ),
    ] = False,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, max=64, help="How many guests are taken over at the same time.")
    ] = 1,
    test: Annotated[
        bool,
        typer.Option(
            "--test",
            help="Boot a throw-away clone of each guest without a network, and report. Nothing is taken over.",
            rich_help_panel=_TEST,
        ),
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="PROGRAM",
            help="The clone has booted when PROGRAM (no shell) exits with 0. By default when its guest agent answers. "
            "Its environment has SNAPCHAIN_DOMAIN or SNAPCHAIN_QMP.",
            rich_help_panel=_TEST,
        ),
    ] = None,
    console_says: Annotated[
        str | None,
        typer.Option(
            "--console-says",
            metavar="TEXT",
            help="The clone has booted when it writes TEXT to its first serial port.",
            rich_help_panel=_TEST,
        ),
    ] = None,
    full_restore: Annotated[
        bool,
        typer.Option(
            "--full-restore",
            help="Restore the clone's disks into --into first. By default it reads them from the destination, where "
            "that is a repository, or a replica on this host.",
            rich_help_panel=_TEST,
        ),
    ] = False,
    timeout: Annotated[
        float,
        typer.Option("--timeout", metavar="SECONDS", min=1, help="How long a clone may boot.", rich_help_panel=_TEST),
    ] = 300,
    withdraw: Annotated[
        bool,
        typer.Option("--withdraw", help="Undo a failover that was begun. Refused once the guest is active."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    at: options.OtherAt = None,
    without: options.Without = None,
    out: Output,
) -> None:
    """Take guests over whose host is gone: this host becomes their master, at the last guest point that is whole.

    Run it on the host that is to run the guests. What is lost is stated first: the seconds since the guest point, and
    the bytes.

    It demands proof that the old host is down: a fence program, a lease that ran out, or your word. Then the epoch of
    the guest and of all its disks rises at the destination, and whatever the old host sends there is refused from then
    on.

    The guest's other destinations are asked first: the guest may have been moved or taken over there, and then that
    host must be down. One that does not answer stops the failover, unless you vouch for it, or it is on the old host.
    The other destinations are told, too, and refuse the old host from then on.

    At a replica (dir:/path) each disk gets a writable overlay on its point, and nothing is copied. From a repository
    the disks are restored into --into DIR first. Newer layers and points stay where they are.

    Of several guests one that fails keeps no other from it, and the fence program runs once a round for each old host.
    Run it again to try those that failed. Ends with exit code 10 when there are any.
    """
    from snapchain.ops.failover.fence import Proofs, word_of_a_person
    from snapchain.ops.failover.request import FailoverRequest
    from snapchain.ops.failover.several import groups_of, plan_all, run_all

    if reason is not None and not source_is_gone:
        raise InvalidInput("--reason belongs to --source-is-gone")
    if check is not None and not test:
        raise InvalidInput("--check is for --test")
    if (console_says is not None or full_restore) and not test:
        raise InvalidInput("--console-says and --full-restore are for --test")
    if test:
        _test(
            guests,
            into,
            out,
            to=to,
            prove=prove,
            check=check,
            console_says=console_says,
            full_restore=full_restore,
            timeout=timeout,
            connect=connect,
        )
        return
    if witness is not None and not lease:
        raise InvalidInput("--witness belongs to --lease")
    vouched = word_of_a_person(reason or "") if source_is_gone else None
    proof = _lease_proof(witness, out) if lease else None

    def request_of(directory: Path) -> FailoverRequest:
        return FailoverRequest(
            directory=directory,
            point=to,
            proves=prove,
            fence=[] if fence is None else options.argv_of(fence, option="--fence"),
            vouched=vouched,
            lease=proof,
            defines=defines,
            connect=connect,
            starts=start,
            reach=options.reach(at, without, out),
        )

    asked = _asked(guests, from_host, out)
    names = [address.disk for _, address in asked]
    if len(set(names)) < len(names):
        raise InvalidInput("a guest is named twice", hint="it is taken over at one destination")
    many = len(asked) > 1 or from_host is not None
    proofs = Proofs(names)
    opener = _Opener(into, request_of, proofs, out, many=many)
    work = {address.disk: partial(opener.opened, text, address) for text, address in asked}
    groups = [names]
    if order is not None:
        from snapchain.host.files import read_small

        groups = groups_of(read_small(order, cap=1 << 20).decode(errors="replace"), names, subject=order)
    if withdraw:
        if many:
            raise InvalidInput("--withdraw is for one guest")
        one = work[names[0]](out.on_event)
        if out.dry_run:
            out.plan(one.plan_withdraw(), _draw_withdraw_plan)
        else:
            out.report(one.withdraw(), _draw_withdrawn)
        return
    if not many:
        one = work[names[0]](out.on_event)
        if out.dry_run or not yes:
            plan = one.plan()
            if out.plan(plan, _draw_plan):
                return
            _ask(plan)
        out.report(one.run(), _draw_report)
        return
    if out.dry_run or not yes:
        plans = plan_all(work)
        status = PartialFailure.exit_code if plans.failed else 0
        if out.plan(plans, _draw_plans, problems=_draw_failed, status=status):
            return
        _ask_all(plans)
    report = run_all(
        [{name: work[name] for name in group} for group in groups], concurrency=concurrency, on_event=out.on_event
    )
    status = PartialFailure.exit_code if report.failed else 0
    out.report(report, _draw_all, problems=_draw_failed, status=status)


def _lease_proof(witness: str | None, out: Output) -> LeaseProof:
    from snapchain.destination.address import parse_destination
    from snapchain.ops.failover.lease import LeaseProof

    if witness is None:
        return LeaseProof()
    return LeaseProof(witness=options.destination(parse_destination(witness).dest, out, writing=True))


def _asked(guests: list[str], from_host: str | None, out: Output) -> list[tuple[str, PointAddress]]:
    """The guests that are named, or all of a host at the one destination that is."""
    from snapchain.destination.address import PointAddress, parse_destination, parse_disk_address
    from snapchain.ops.failover.several import guests_from

    if from_host is None:
        return [(text, parse_disk_address(text)) for text in dict.fromkeys(guests)]
    address = parse_destination(guests[0])
    if len(guests) > 1 or isinstance(address, PointAddress):
        raise InvalidInput(
            "--from takes all guests of a host at one destination",
            subject=guests[-1],
            hint=f"name the destination alone: snapchain failover {address.dest} --from {from_host}",
        )
    names = guests_from(options.destination(address.dest, out), from_host, here=socket.gethostname())
    return [(f"{address.dest}::{name}", PointAddress(address.dest, name, None)) for name in names]


class _Opener:
    """Opens the failover of each guest, in the thread that takes it over; destinations once a thread."""

    def __init__(
        self,
        into: Path | None,
        request_of: Callable[[Path], FailoverRequest],
        proofs: Proofs,
        out: Output,
        *,
        many: bool,
    ) -> None:
        self._into, self._request_of, self._proofs, self._out, self._many = into, request_of, proofs, out, many
        self._places = threading.local()

    def opened(self, text: str, address: PointAddress, on_event: OnEvent) -> Failover:
        """Raises InvalidInput for options that do not fit the destination, and as `Failover`."""
        from snapchain.destination.address import local_directory, located
        from snapchain.ops.failover.run import Failover, default_directory

        place = self._place(address.dest)
        local = local_directory(located(address.dest))
        into = self._into
        if place.traits.bootable_files:
            if local is None:
                raise InvalidInput(
                    "a guest starts where its files are",
                    subject=text,
                    hint=f"run it on that host: snapchain failover dir:/path::{address.disk}",
                )
            directory = into or default_directory(local, address.disk)
        elif into is None:
            raise InvalidInput(
                "a repository has no files that a guest can run on",
                subject=text,
                hint="say --into DIR: they are restored",
            )
        else:
            directory = into
        if self._many and into is not None:
            directory = into / address.disk.replace("/", "_")
        return Failover(place, address.disk, self._request_of(directory), proofs=self._proofs, on_event=on_event)

    def _place(self, dest: str) -> Destination:
        places: dict[str, Destination] = self._places.__dict__.setdefault("by_address", {})
        if dest not in places:
            places[dest] = options.destination(dest, self._out, writing=True)
        return places[dest]


def _test(
    guests: list[str],
    into: Path | None,
    out: Output,
    *,
    to: str | None,
    prove: bool,
    check: str | None,
    console_says: str | None,
    full_restore: bool,
    timeout: float,
    connect: str | None,
) -> None:
    from snapchain.destination.address import parse_disk_address
    from snapchain.ops.failover.trial import TrialRequest, TrialsReport, trial
    from snapchain.ops.guest_points_merge import guest_at

    if into is None:
        raise InvalidInput("a clone needs a place for its disks", hint="say --into DIR: it is removed there at the end")
    if out.dry_run:
        raise InvalidInput("--test changes nothing", hint="leave out --dry-run")
    request = TrialRequest(
        directory=into,
        point=to,
        proves=prove,
        restores=full_restore,
        console_says=console_says,
        check=[] if check is None else options.argv_of(check, option="--check"),
        seconds=timeout,
        connect=connect,
    )
    found = []
    for text in dict.fromkeys(guests):
        address = parse_disk_address(text)
        place = options.destination(address.dest, out)
        found.append(trial(place, guest_at(place, address.disk), request, on_event=out.on_event))
    out.report(TrialsReport(guests=tuple(found)), draw_trials)
    if bad := [each.guest for each in found if not each.ok]:
        raise PartialFailure(f"{len(bad)} of {len(found)} guests did not boot: {', '.join(bad)}")


def _ask(plan: FailoverPlan) -> None:
    """Raises InvalidInput where nobody can be asked, or the answer is no."""
    if not sys.stdin.isatty():
        raise InvalidInput(
            f"nobody can be asked whether {plan.guest} is to be taken over, with a loss of {_lost(plan.loss)}",
            subject=f"{plan.destination}::{plan.guest}",
            hint="say --yes",
        )
    where = f"guest point {plan.guest_point} of {moment(plan.time, zone=True)}"
    question = f"Take {plan.guest} over from {_from(plan)} at {where}? Lost: {_lost(plan.loss)}."
    if plan.silent:
        question += f" No answer from {', '.join(plan.silent)}."
    if not typer.confirm(question, err=True):
        raise InvalidInput("nothing was done", subject=f"{plan.destination}::{plan.guest}")


def _from(plan: FailoverPlan) -> str:
    """The host that is replaced, which may have taken the guest over elsewhere."""
    where = "" if plan.master_at is None else f", to which it went at {plan.master_at}"
    return f"{plan.master or 'its host'}{where}"


def _ask_all(plans: FailoversPlan) -> None:
    """As `_ask`, once for all of them."""
    if not plans.guests:
        raise PartialFailure("no guest can be taken over", hint="--dry-run shows why")
    lines = [f"{each.guest}: from {_from(each)}; lost: {_lost(each.loss)}" for each in plans.guests]
    lines += [f"{each.guest}: cannot be taken over: {each.message}" for each in plans.failed]
    if not sys.stdin.isatty():
        raise InvalidInput(
            f"nobody can be asked whether {counted(len(plans.guests), 'guest')} are to be taken over",
            hint="say --yes; --dry-run shows what each of them loses",
        )
    for line in lines:
        typer.echo(printable(line), err=True)
    if not typer.confirm(f"Take {counted(len(plans.guests), 'guest')} over?", err=True):
        raise InvalidInput("nothing was done")


def _lost(loss: Loss) -> str:
    """In seconds and bytes."""
    words = f"what was written in {quantities.duration(loss.seconds)}"
    if loss.likely_bytes is not None:
        words += f", about {size(loss.likely_bytes)}"
    if loss.known_bytes:
        words += f"; {size(loss.known_bytes)} of it are at the destination, and not of a whole guest point"
    return words


def _draw_plan(console: Console, plan: FailoverPlan) -> None:
    time = moment(plan.time, zone=True)
    render.headline(console, f"would take {plan.guest} over at guest point {plan.guest_point} of {time}")
    render.facts(
        console,
        [
            ("lost", _lost(plan.loss)),
            ("from", _from(plan)),
            ("others", ", ".join(plan.others)),
            ("no answer", ", ".join(plan.silent)),
            ("state", f"{plan.state.value}; then in epoch {plan.epoch}"),
            ("consistency", plan.consistency.value),
            ("to write", size(plan.bytes_to_write)),
            ("definition in", plan.directory),
            ("lease", "" if plan.lease is None else render.lease(plan.lease)),
            ("proof takes", "" if plan.lease_seconds is None else quantities.duration(plan.lease_seconds)),
        ],
    )
    for skipped in plan.skipped:
        render.line(console, f"guest point {skipped.guest_point} is newer and not whole: {skipped.reason}", indent=2)
    _draw_lacking(console, plan.lacking)


def _draw_report(console: Console, report: FailoverReport) -> None:
    time = moment(report.time, zone=True)
    words = "started" if report.started else "not started"
    render.headline(console, f"{report.guest} is {report.state.value} on this host, in epoch {report.epoch}; {words}")
    render.facts(
        console,
        [
            ("guest point", f"{report.guest_point} of {time}, {report.consistency.value}"),
            ("lost", _lost(report.loss)),
            ("from", report.former or "a host that is not recorded"),
            ("proof", _proof(report)),
            ("disks", ", ".join(each.path or "" for each in report.disks)),
            ("definition", report.definition or ""),
            ("defined", report.defined or ""),
            ("took", quantities.duration(report.seconds)),
        ],
    )
    _draw_lacking(console, report.lacking)


def _proof(report: FailoverReport) -> str:
    vouched = report.vouched
    word = f": {vouched.words}" if vouched.words else ""
    kind = {"fence": "fence program", "lease": "its lease", "person": f"{vouched.who} vouched"}[vouched.how]
    return f"{kind}{word}"


def _draw_all(console: Console, report: FailoversReport) -> None:
    render.headline(
        console,
        f"{len(report.guests)} guests taken over, {len(report.failed)} not, in {quantities.duration(report.seconds)}",
    )
    rows = [
        (each.order, each.group, each.guest, str(each.guest_point), "started" if each.started else "", each.seconds)
        for each in report.guests
    ]
    rows += [(each.order, each.group, each.guest, "", "failed", each.seconds) for each in report.failed]
    render.table(
        console,
        ["order>", "group>", "guest", "point>", "state", "took>"],
        [
            (str(order), str(group), guest, point, words, quantities.duration(took))
            for order, group, guest, point, words, took in sorted(rows)
        ],
    )
    _draw_failed(console, report)


def _draw_failed(console: Console, found: FailoversReport | FailoversPlan) -> None:
    for each in found.failed:
        render.line(console, f"{each.guest}: {each.message}", style="red", indent=2)
        if each.hint:
            render.line(console, f"hint: {each.hint}", indent=6)


def _draw_plans(console: Console, plans: FailoversPlan) -> None:
    for plan in plans.guests:
        _draw_plan(console, plan)
    _draw_failed(console, plans)


def _draw_withdraw_plan(console: Console, standing: GuestStanding) -> None:
    from snapchain.model.guest_state import describe

    render.headline(console, f"would withdraw the failover of {standing.guest}: it is {describe(standing)}")


def _draw_withdrawn(console: Console, standing: GuestStanding) -> None:
    from snapchain.model.guest_state import describe

    render.headline(console, f"the failover of {standing.guest} was withdrawn: it is {describe(standing)}")
    hint = f"its old host ships again with --epoch {standing.epoch}"
    render.line(console, hint, indent=2)


def _draw_lacking(console: Console, lacking: tuple[str, ...]) -> None:
    for sentence in lacking:
        render.line(console, f"note: {sentence}", style="yellow")
