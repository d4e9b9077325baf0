"""`snapchain fence IMAGE DEST::DISK...`: keep a guest from running here that another host has taken over."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, render
from snapchain.cli.app import verb
from snapchain.cli.options import disk_pairs
from snapchain.cli.output import Output
from snapchain.cli.quantities import size
from snapchain.errors import InvalidInput
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.destination.protocol import Destination
    from snapchain.ops.fence.hook import HookReport
    from snapchain.ops.fence.returned import FenceReport

_HOOK = "The hook of libvirt"
_SHOWN = 20


@verb(
    examples="""
    snapchain fence web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda
    snapchain fence web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda --keep-tail
    snapchain fence --install-hook --at ssh://root@kvm2/srv/replica
    snapchain fence --install-hook --at /backup --password-file /etc/snapchain/password
    """,
    when_interrupted="run it again; a mark that was set stays",
)
@options.takes_output(passphrase=True)
def fence(
    disks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE DEST::DISK]...",
            help="The top of a chain here, and its disk at a destination. More pairs are other disks of that guest.",
        ),
    ] = None,
    *,
    keep_tail: Annotated[
        bool,
        typer.Option(
            "--keep-tail",
            help="Ship what the images hold beyond the point that was taken over, as points of a guest of its own: "
            "GUEST.tail-EPOCH.",
        ),
    ] = False,
    install_hook: Annotated[
        bool,
        typer.Option(
            "--install-hook",
            help="Install a hook that refuses to start a domain whose guest another host has taken over.",
            rich_help_panel=_HOOK,
        ),
    ] = False,
    remove_hook: Annotated[
        bool, typer.Option("--remove-hook", help="Remove that hook.", rich_help_panel=_HOOK)
    ] = False,
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="DEST",
            autocompletion=options.complete_address,
            help="A destination that the hook asks, for at most 5 seconds. The guest has its domain's name there. "
            "May be repeated.",
            rich_help_panel=_HOOK,
        ),
    ] = None,
    require_answer: Annotated[
        bool,
        typer.Option(
            "--require-answer",
            help="Refuse the start also when one of the destinations does not answer. By default the hook then goes by "
            "the marks beside the images, and by the answers of the others.",
            rich_help_panel=_HOOK,
        ),
    ] = False,
    hook: Annotated[
        str | None,
        typer.Option("--hook", metavar="DOMAIN", help="What the hook runs: the XML is on stdin.", hidden=True),
    ] = None,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    out: Output,
) -> None:
    """Find out whether another host has taken a guest over, and keep the images here from being written.

    Run it on a host that was away. If the destination is in a newer epoch than the images, they are marked and made
    read-only. From then on no command of snapchain here writes or ships them. What they hold beyond the point that was
    taken over is named in ranges and bytes, and nothing is deleted.

    The hook does the same at each start of a domain, and refuses it: a host that starts its guests at boot asks first.
    """
    words = disks or []
    chosen = [bool(words), install_hook, remove_hook, hook is not None]
    if sum(chosen) != 1:
        raise InvalidInput(
            "name images, or one of --install-hook and --remove-hook", hint="such as: fence web1.qcow2 DEST::web1/vda"
        )
    if (at or require_answer) and not install_hook and hook is None:
        raise InvalidInput("--at and --require-answer are for --install-hook")
    if hook is not None:
        _run_hook(hook, at or (), out, require_answer=require_answer)
        return
    if install_hook or remove_hook:
        _change_hook(at or (), out, installs=install_hook, require_answer=require_answer)
        return
    from snapchain.ops.fence.returned import FenceRequest, plan, run

    dest, pairs = disk_pairs(words)
    request = FenceRequest(
        disks=pairs,
        keeps_tail=keep_tail,
        format=options.format_of(image_format),
        image_dirs=options.image_dirs(image_dir),
    )
    place = options.destination(dest, out, writing=True)
    if out.dry_run:
        out.plan(plan(request, place, on_event=out.on_event), _draw)
    else:
        out.report(run(request, place, on_event=out.on_event), _draw)


def _run_hook(domain: str, at: list[str] | tuple[str, ...], out: Output, *, require_answer: bool) -> None:
    from snapchain.ops.fence.hook import check

    def opened(url: str) -> Callable[[], Destination]:
        return lambda: options.destination(url, out)

    notes = check(domain, sys.stdin.read(), [opened(each) for each in at], requires_answer=require_answer)
    for note in notes:
        sys.stderr.write(f"snapchain: note: {note}\n")


def _change_hook(at: list[str] | tuple[str, ...], out: Output, *, installs: bool, require_answer: bool) -> None:
    from snapchain.ops.fence.hook import HookRequest, install, plan, uninstall

    secrets: list[str] = []
    if out.password_file is not None:
        secrets = ["--password-file", str(out.password_file.absolute())]
    elif out.password_command is not None:
        secrets = ["--password-command", out.password_command]
    request = HookRequest(at=tuple(at), options=secrets, requires_answer=require_answer)
    if out.dry_run:
        out.plan(plan(request), _draw_hook)
    else:
        out.report(install(request) if installs else uninstall(request), _draw_hook)


def _draw(console: Console, report: FenceReport) -> None:
    from snapchain.model.guest_state import describe

    place = f"{render.place(report.destination)}::{report.guest}"
    if not report.taken_over:
        render.headline(console, f"{place} was not taken over: it is {describe(report.standing)}")
        return
    render.headline(console, f"{place} is {describe(report.standing)}; nothing here may write or start it")
    for disk in report.disks:
        if disk.point is None:
            words = "the point that was taken over is not recorded"
        elif not disk.changed_bytes:
            words = f"holds nothing beyond point {disk.point}"
        else:
            words = f"{size(disk.changed_bytes)} beyond point {disk.point}, in {counted(len(disk.ranges), 'range')}"
        render.line(console, f"{disk.disk}: {render.place(disk.image)}: {words}", indent=2)
        if disk.kept is not None:
            render.line(console, f"kept as {disk.kept}", indent=4)
        rows = [(str(each.offset), str(each.length), size(each.length)) for each in disk.ranges[:_SHOWN]]
        if rows:
            render.table(console, ["offset>", "length>", ""], rows)
        if len(disk.ranges) > _SHOWN:
            render.line(console, f"and {len(disk.ranges) - _SHOWN} more: --json lists them", style="dim", indent=4)


def _draw_hook(console: Console, report: HookReport) -> None:
    words = "installed" if report.installed else "removed" if not report.text else "would install"
    render.headline(console, f"{words} {report.path}")
    if report.text and not report.installed:
        for line in report.text.splitlines():
            render.line(console, line, indent=2)
