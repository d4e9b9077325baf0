"""`snapchain key ACTION DEST [SLOT]`: list, add, change and remove the passphrases of a repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.cli.quantities import heading, moment, size
from snapchain.errors import InvalidInput, SnapchainError, Unavailable
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.keys import KeyCost, KeyList, KeyReport

_ACTIONS = ("list", "add", "change", "remove")
_SHORT = 8
"""Characters of a slot's name that a table shows."""
_NEW = "New passphrase"


@verb(
    examples="""
    snapchain key list /backup
    snapchain key add /backup --label "night shift"
    snapchain key add /backup --recovery
    snapchain key add s3://bucket/prefix --recovery-file /media/usb/backup.key
    snapchain key change /backup
    snapchain key change /backup --keep-passphrase --cost 4
    snapchain key remove /backup 5f0c2a91
    """,
    when_interrupted="the old passphrase opens the repository, or the new one, or both; see `snapchain key list`",
)
@options.takes_output(passphrase=True)
def key(
    action: Annotated[
        str,
        typer.Argument(
            metavar="|".join(_ACTIONS),
            help="What to do.",
            autocompletion=options.of(*_ACTIONS),
        ),
    ],
    dest: Annotated[str, options.address(metavar="DEST", help="A repository.")],
    slot: Annotated[
        str | None, typer.Argument(metavar="SLOT", help="With remove: the key slot, or how its name begins.")
    ] = None,
    *,
    label: Annotated[
        str | None, typer.Option("--label", metavar="TEXT", help="With add and change: a name of the slot, for people.")
    ] = None,
    cost: Annotated[
        int | None,
        typer.Option(
            "--cost",
            metavar="N",
            help="With add and change: what one guess costs, as a multiple of the default: 1, 2, 4 or 8. "
            "8 takes 256 MiB of memory, and two seconds of processor.",
            autocompletion=options.of("1", "2", "4", "8"),
        ),
    ] = None,
    keep_passphrase: Annotated[
        bool, typer.Option("--keep-passphrase", help="With change: only the slot is new, for another --cost.")
    ] = False,
    recovery: Annotated[
        bool,
        typer.Option("--recovery", help="With add: make a recovery key, and show it on the terminal once."),
    ] = False,
    recovery_file: Annotated[
        Path | None,
        typer.Option(
            "--recovery-file",
            readable=False,
            metavar="FILE",
            help="With add: make a recovery key, and write it to this new file.",
        ),
    ] = None,
    even_own: Annotated[
        bool,
        typer.Option("--even-own", help="With remove: also the slot that opened the repository for this command."),
    ] = False,
    new_password_file: Annotated[
        Path | None,
        typer.Option(
            "--new-password-file",
            readable=False,
            metavar="FILE",
            help="Read the new passphrase from the first line of this file.",
            rich_help_panel=_NEW,
        ),
    ] = None,
    new_password_command: Annotated[
        str | None,
        typer.Option(
            "--new-password-command",
            metavar="COMMAND",
            help="Run this program (no shell) and read the new passphrase from the first line that it prints.",
            rich_help_panel=_NEW,
        ),
    ] = None,
    out: Output,
) -> None:
    """List, add, change and remove the passphrases that open a repository.

    Each passphrase has a key slot, which holds the repository's master key under that passphrase. `list` shows the
    slots, who made each, and what is wrong with them. `add` makes a slot for another passphrase, or for a recovery key:
    a passphrase to print or write down, which opens the repository as any other. `change` replaces the slot that opened
    the repository. `remove` removes a slot.

    The command opens the repository as every command does. The new passphrase comes from --new-password-file,
    --new-password-command or SNAPCHAIN_NEW_PASSWORD. At a terminal it is asked for, twice.

    Removing a slot does not change the master key. Whoever has a copy of the slot from before, and its passphrase, can
    still read the repository, and what is shipped to it later.
    """
    from snapchain.ops import keys as ops

    given: dict[str, object] = {
        "SLOT": slot,
        "--label": label,
        "--cost": cost,
        "--keep-passphrase": keep_passphrase,
        "--recovery": recovery,
        "--recovery-file": recovery_file,
        "--even-own": even_own,
        "--new-password-file": new_password_file,
        "--new-password-command": new_password_command,
    }
    _check(action, {name for name, value in given.items() if value not in (None, False)}, cost)
    secret = options.passphrase_source(out, dest)
    repository = ops.open_keys(
        dest, passphrase=secret, writing=action != "list" and not out.dry_run, on_event=out.on_event
    )
    if action == "list":
        out.show(ops.listed(repository, on_event=out.on_event), _draw_list, problems=_draw_warnings)
        return
    if action == "remove":
        report = ops.remove(repository, slot or "", even_own=even_own, dry_run=out.dry_run, on_event=out.on_event)
        _show(out, report)
        return
    typed = options.given_passphrase(
        out, new_password_file, new_password_command, options="--new-password", variable="SNAPCHAIN_NEW_PASSWORD"
    )
    paper = _Paper(dest, recovery_file) if recovery or recovery_file is not None else None
    passphrase = paper.make if paper is not None else lambda: _typed(typed, out, dest)
    new = ops.NewKey(
        passphrase=None if keep_passphrase else passphrase, label=label, recovery=paper is not None, cost=cost
    )
    if action == "change":
        report = ops.change(repository, new, secret=secret, dry_run=out.dry_run, on_event=out.on_event)
    elif paper is None:
        report = ops.add(repository, new, dry_run=out.dry_run, on_event=out.on_event)
    else:
        with paper:
            report = ops.add(repository, new, dry_run=out.dry_run, on_event=out.on_event)
    _show(out, report)


_FOR = {
    "SLOT": {"remove"},
    "--label": {"add", "change"},
    "--cost": {"add", "change"},
    "--keep-passphrase": {"change"},
    "--recovery": {"add"},
    "--recovery-file": {"add"},
    "--even-own": {"remove"},
    "--new-password-file": {"add", "change"},
    "--new-password-command": {"add", "change"},
}
"""What is only for some of the actions."""


def _check(action: str, given: set[str], cost: int | None) -> None:
    """Raises InvalidInput for an unknown action, and for words that do not belong together."""
    from snapchain.ops.keys import COSTS

    if action not in _ACTIONS:
        raise InvalidInput(f"unknown action {action!r}", hint=f"one of {', '.join(_ACTIONS)}: snapchain key list DEST")
    for name in sorted(given):
        if action not in _FOR[name]:
            raise InvalidInput(
                f"{name} is not for `key {action}`", hint=f"it is for {' and '.join(sorted(_FOR[name]))}"
            )
    if action == "remove" and "SLOT" not in given:
        raise InvalidInput("no key slot is named", hint="`snapchain key list DEST` shows their names")
    if cost is not None and cost not in COSTS:
        raise InvalidInput(f"unknown cost {cost}", hint=f"one of {', '.join(map(str, COSTS))}")
    new = given & {"--new-password-file", "--new-password-command"}
    for alone in given & {"--keep-passphrase", "--recovery", "--recovery-file"}:
        if new:
            raise InvalidInput(f"{alone} and {min(new)} are both given", hint="choose one of them")


def _typed(given: Callable[[], str | None], out: Output, dest: str) -> str:
    from snapchain.cli.new_passphrases import new_passphrase

    found = new_passphrase(given, out, dest)
    if not found:
        raise InvalidInput(
            "no new passphrase was given",
            subject=dest,
            hint="set SNAPCHAIN_NEW_PASSWORD, --new-password-file or --new-password-command",
        )
    return found


class _Paper:
    """A recovery key for paper: in a new file before its slot is made, or on the terminal afterwards.

    A context manager around the making of the slot. file: None: the terminal. Raises InvalidInput where there is none.
    """

    def __init__(self, dest: str, file: Path | None) -> None:
        from snapchain.host.passphrases import is_at_terminal

        if file is None and not is_at_terminal():
            raise InvalidInput(
                "a recovery key is shown only on a terminal, and this command does not run on one",
                subject=dest,
                hint="name a new file for it: --recovery-file FILE",
            )
        self._dest, self._file = dest, file
        self._made: str | None = None

    def make(self) -> str:
        """The key."""
        from snapchain.host.passphrases import write_new_file
        from snapchain.ops.keys import recovery_key

        made = recovery_key()
        if self._file is not None:
            write_new_file(self._file, f"{made}\n")
        self._made = made
        return made

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from snapchain.host import files, passphrases
        from snapchain.host.terminal import printable

        if self._made is None:
            return
        if self._file is not None:
            # Where the answer of the store was lost, there may be a slot for it.
            if isinstance(error, SnapchainError) and not isinstance(error, Unavailable):
                files.remove(self._file)
        elif error is None:
            passphrases.show(
                f"The recovery key of {printable(self._dest)}:\n\n    {self._made}\n\n"
                "Write it down, and keep it away from this host. It is not shown again.\n"
            )


def _show(out: Output, report: KeyReport) -> None:
    if not out.plan(report, lambda console, found: _draw(console, found, is_done=False)):
        out.report(report, lambda console, found: _draw(console, found, is_done=True))


def _draw(console: Console, report: KeyReport, *, is_done: bool) -> None:
    place = render.place(report.destination)
    done, would = {
        "add": ("added a key slot to", "would add a key slot to"),
        "change": ("changed a key slot of", "would change a key slot of"),
        "remove": ("removed a key slot of", "would remove a key slot of"),
    }[report.action]
    render.headline(console, f"{done if is_done else would} {place}")
    new = report.added
    render.facts(
        console,
        [
            ("new", "" if new is None else new.slot),
            ("label", "" if new is None else new.label),
            ("cost", "" if new is None or new.cost is None else _cost(new.cost)),
            ("removed", report.removed or ""),
            ("not deleted", ", ".join(report.not_deleted)),
            ("slots now", str(report.left)),
        ],
    )


def _draw_list(console: Console, found: KeyList) -> None:
    render.headline(console, f"{counted(len(found.slots), 'key slot')} of {render.place(found.destination)}")
    render.table(
        console,
        ["slot", "label", heading("created"), "host?", "kind", "cost?", ""],
        [
            (
                f"{row.slot[:_SHORT]}{'*' if row.opened else ''}",
                row.label,
                "" if row.created is None else moment(row.created),
                row.host or "",
                "recovery key" if row.recovery else "passphrase" if row.warning is None else "",
                "" if row.cost is None else _cost(row.cost),
                "" if row.warning is None else "see below",
            )
            for row in found.slots
        ],
    )
    if any(row.opened for row in found.slots):
        render.line(console, "* opened the repository for this command")
    _draw_warnings(console, found)


def _draw_warnings(console: Console, found: KeyList) -> None:
    for row in found.slots:
        if row.warning is not None:
            render.line(console, f"warning: {row.slot}: {row.warning}", style="yellow", indent=2)


def _cost(cost: KeyCost) -> str:
    return f"{cost.factor:g} ({size(cost.memory_kib * 1024)}, {cost.iterations} passes)"
