"""`snapchain files ACTION SOURCE [PATH] [OUT]`: list, show, get and find single files of a point or an image."""

from __future__ import annotations

import base64
import stat
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from snapchain.cli import options, quantities, render, streams
from snapchain.cli.app import verb
from snapchain.cli.output import Output, plain
from snapchain.cli.quantities import heading, moment, size
from snapchain.errors import InvalidInput, PartialFailure
from snapchain.host.terminal import counted

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.files.getting import GetPlan, GetReport
    from snapchain.ops.files.history import FindReport
    from snapchain.ops.files.listing import FileList, VolumeList
    from snapchain.ops.files.opening import FileRow, Limits, Skipped
    from snapchain.ops.files.source import Source

_ACTIONS = ("volumes", "ls", "cat", "get", "find")
_STREAM = "-"
_MOST_IN_JSON = 16 << 20
_KINDS = {"directory": "d", "symlink": "l", "file": "-", "device": "c", "fifo": "p", "socket": "s"}
_LIMITS = "Limits"


@verb(
    examples="""
    snapchain files volumes /backup::web1/vda
    snapchain files ls /backup::web1/vda /etc
    snapchain files ls s3://bucket/prefix::web1/vda@7 / --volume vg0/root
    snapchain files cat /backup::web1/vda@7 /etc/fstab
    snapchain files get /backup::web1/vda /home/ann/papers ./papers --keep
    snapchain files get dir:/srv/replica::web1/vda /var/log - --tar | tar -tv
    snapchain files get web1.qcow2 /etc etc.zip --zip
    snapchain files find /backup::web1/vda 'invoice*.pdf' --all-points
    snapchain files find /backup::web1/vda /etc/passwd --all-points --json
    """,
    when_interrupted="what was got so far stays in the new directory: remove it before you run it again",
)
@options.takes_output(passphrase=True)
def files(
    action: Annotated[
        str,
        typer.Argument(metavar="|".join(_ACTIONS), help="What to do.", autocompletion=options.of(*_ACTIONS)),
    ],
    source: Annotated[
        str, options.address(metavar="DEST::DISK[@POINT]|IMAGE", help="A point of a disk, or the path of an image.")
    ],
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="PATH",
            help="A file or directory of the guest; with find also a name, which may have * and ? in it. ls: / if not "
            "given.",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Argument(metavar="OUT", help="With get: the new file or directory, or - for an archive on stdout."),
    ] = None,
    *,
    volume: Annotated[
        str | None,
        typer.Option(
            "--volume",
            "-V",
            metavar="NAME",
            help="The volume, as `files volumes` names it: p1, vg/lv, or disk for a disk without partitions. "
            "Not needed where one volume has a file system.",
        ),
    ] = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-R", help="With ls: all that is below the directory.")
    ] = False,
    tar: Annotated[bool, typer.Option("--tar", help="With get: make a tar archive.")] = False,
    zip_archive: Annotated[bool, typer.Option("--zip", help="With get: make a zip archive.")] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            "-k",
            help="With get: keep owners, modes, times, hard links and user attributes; in a tar archive all "
            "attributes.",
        ),
    ] = False,
    all_points: Annotated[
        bool, typer.Option("--all-points", help="With find: look in all points of the disk.")
    ] = False,
    no_hash: Annotated[
        bool, typer.Option("--no-hash", help="With find: compare size and time alone, and read no file.")
    ] = False,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            "--max-bytes",
            metavar="BYTES",
            help="Stop when the files have more bytes together, holes included. Default: four times the disk's size, "
            "and at least 1G.",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    image_format: options.Format = None,
    image_dir: options.ImageDir = None,
    out: Output,
) -> None:
    """List, show, get and find single files of a point or an image.

    `volumes` lists the partitions and logical volumes of a disk, and what each holds. `ls` lists a directory. `cat`
    writes a file to stdout. `get` writes a file, or a directory with all that it holds, to a new place. `find` looks
    for a name or a path. With --all-points it tells which points have the file, and when it changed.

    ext2, ext3, ext4, XFS, NTFS, FAT and exFAT are read, in MBR and GPT partitions and in linear and striped LVM
    volumes. This needs `pip install 'snapchain[files]'`. Btrfs and encrypted volumes are not read: `snapchain serve`
    gives the point to a guest of your own, which can mount it.

    A file system belongs to its guest and may be hostile: a child process without rights reads it. Nothing is written
    outside of OUT, and no existing file is replaced. Devices, FIFOs and sockets are left out. Symbolic links are made
    as they are, and never followed while files are written. Links in PATH are followed inside the guest.

    Journals are not replayed. In a point of a running guest, files that changed in the last seconds may be missing or
    old; a note says so.
    """
    from snapchain.ops.files.opening import Limits

    given: dict[str, object] = {
        "PATH": path,
        "OUT": output,
        "--volume": volume,
        "--recursive": recursive,
        "--tar": tar,
        "--zip": zip_archive,
        "--keep": keep,
        "--all-points": all_points,
        "--no-hash": no_hash,
        "--dry-run": out.dry_run,
    }
    _check(action, {name for name, value in given.items() if value not in (None, False)})
    limits = Limits(most_bytes=None if max_bytes is None else quantities.parse_size(max_bytes))
    with _source(source, out, image_format, image_dir, all_points=all_points) as opened:
        if action == "volumes":
            from snapchain.ops.files.listing import list_volumes

            out.show(list_volumes(opened, limits=limits), _draw_volumes)
        elif action == "ls":
            from snapchain.ops.files.listing import list_files

            listed = list_files(
                opened, path or "/", volume=volume, recursive=recursive, limits=limits, on_event=out.on_event
            )
            out.show(listed, _draw_files, problems=_draw_skipped, status=_status(listed.skipped))
        elif action == "cat":
            _cat(opened, path or "", volume, limits, out)
        elif action == "find":
            from snapchain.ops.files.history import find

            found = find(opened, path or "", volume=volume, hashes=not no_hash, limits=limits, on_event=out.on_event)
            out.show(found, _draw_found, problems=_draw_skipped, status=_status(found.skipped))
        else:
            form: Literal["tree", "tar", "zip"] = "tar" if tar else "zip" if zip_archive else "tree"
            _get(opened, path or "", output or "", form, volume, limits, out, keep=keep)


_TAKES = {
    "volumes": set[str](),
    "ls": {"PATH", "--volume", "--recursive"},
    "cat": {"PATH", "--volume"},
    "get": {"PATH", "OUT", "--volume", "--tar", "--zip", "--keep", "--dry-run"},
    "find": {"PATH", "--volume", "--all-points", "--no-hash"},
}
_NEEDS = {"cat": {"PATH"}, "get": {"PATH", "OUT"}, "find": {"PATH"}}


def _check(action: str, given: set[str]) -> None:
    """Raises InvalidInput for an action that there is not, or that is given something else than it takes."""
    if action not in _ACTIONS:
        raise InvalidInput("there is no such action", subject=action, hint=", ".join(_ACTIONS))
    if extra := sorted(given - _TAKES[action]):
        raise InvalidInput(f"{', '.join(extra)} is not for {action}", hint="snapchain files --help")
    if missing := sorted(_NEEDS.get(action, set()) - given, reverse=True):
        raise InvalidInput(f"{action} needs {' and '.join(missing)}", hint="snapchain files --help")
    if {"--tar", "--zip"} <= given:
        raise InvalidInput("--tar and --zip are both given", hint="choose one of them")


def _source(
    text: str, out: Output, image_format: str | None, image_dir: Sequence[Path] | None, *, all_points: bool
) -> Source:
    from snapchain.destination.address import ImageAddress, parse_address
    from snapchain.ops.files.source import ImageSource, PointSource

    address = parse_address(text)
    if isinstance(address, ImageAddress):
        if all_points:
            raise InvalidInput("an image has no points", subject=text, hint="name a disk of a destination: DEST::DISK")
        return ImageSource(
            address.path,
            format=options.format_of(image_format),
            image_dirs=options.image_dirs(image_dir),
            on_event=out.on_event,
        )
    if image_format is not None:
        raise InvalidInput("--format is for images", subject=text, hint="leave it out")
    return PointSource(options.destination(address.dest, out), address, all_points=all_points, on_event=out.on_event)


def _cat(source: Source, path: str, volume: str | None, limits: Limits, out: Output) -> None:
    from snapchain.ops.files.listing import show_file

    if not out.as_json:
        show_file(
            source, path, partial(streams.write_all, streams.claim_stdout()), volume=volume, limits=limits,
            on_event=out.on_event,
        )  # fmt: skip
        return
    data = bytearray()

    def take(piece: memoryview) -> None:
        if len(data) + len(piece) > _MOST_IN_JSON:
            raise InvalidInput(
                f"the file is larger than the {_MOST_IN_JSON >> 20} MiB that --json shows",
                subject=path,
                hint="leave out --json, or get it into a file",
            )
        data.extend(piece)

    shown = show_file(source, path, take, volume=volume, limits=limits, on_event=out.on_event)
    out.show({**plain(shown), "content_base64": base64.b64encode(data).decode()}, _draw_nothing)


def _get(
    source: Source,
    path: str,
    output: str,
    form: Literal["tree", "tar", "zip"],
    volume: str | None,
    limits: Limits,
    out: Output,
    *,
    keep: bool,
) -> None:
    from snapchain.ops.files.getting import GetRequest, Getting

    is_stream = output == _STREAM
    if is_stream and not out.dry_run and sys.stdout.isatty():
        raise InvalidInput("an archive does not go to a terminal", subject=path, hint="pipe it, or redirect it")
    request = GetRequest(path, None if is_stream else Path(output), form, volume=volume, keep=keep, limits=limits)
    work = Getting(source, request, on_event=out.on_event)
    if out.dry_run:
        plan = work.plan()
        out.plan(plan, _draw_plan, problems=_draw_skipped, status=_status(plan.skipped))
    elif is_stream:
        report = work.run(partial(streams.write_all, streams.claim_stdout()))
        with redirect_stdout(sys.stderr):
            out.report(report, _draw_report, problems=_draw_skipped, status=_status(report.skipped))
    else:
        report = work.run()
        out.report(report, _draw_report, problems=_draw_skipped, status=_status(report.skipped))


def _status(skipped: Sequence[Skipped]) -> int:
    return PartialFailure.exit_code if skipped else 0


def _draw_nothing(console: Console, shown: object) -> None:
    """Shown as JSON only."""


def _draw_volumes(console: Console, report: VolumeList) -> None:
    render.table(
        console,
        ["volume", "size>", "holds", "?"],
        [(each.name, size(each.size), each.content, each.trouble or "") for each in report.volumes],
    )


def _draw_files(console: Console, report: FileList) -> None:
    render.table(
        console,
        ["mode", "owner?", "size>", heading("modified"), "name"],
        [_row(each, report.path) for each in report.files],
    )
    _draw_skipped(console, report)


def _row(file: FileRow, above: str) -> tuple[str, str, str, str, str]:
    name = file.path.removeprefix(above.rstrip("/") + "/")
    arrow = "" if file.target is None else f" -> {file.target}"
    letters = (
        _KINDS.get(file.kind, "?") if file.mode is None else _KINDS.get(file.kind, "?") + stat.filemode(file.mode)[1:]
    )
    owner = "" if file.uid is None else f"{file.uid}:{file.gid}"
    return letters, owner, size(file.size), "" if file.modified is None else moment(file.modified), name + arrow


def _draw_found(console: Console, report: FindReport) -> None:
    if not report.files:
        render.headline(console, f"{counted(report.points, 'point')} looked at: none has {report.name}")
    for file in report.files:
        render.headline(console, file.path)
        rows = []
        for version in file.versions:
            if version.change == "same":
                continue
            rows.append(
                (
                    "" if version.point is None else str(version.point),
                    "" if version.time is None else moment(version.time),
                    version.change,
                    "" if version.size is None else size(version.size),
                    "" if version.modified is None else moment(version.modified),
                    (version.sha256 or "")[:16],
                )
            )
        render.table(console, ["point>", heading("time"), "change", "size>", heading("modified"), "sha256?"], rows)
        last = file.versions[-1]
        if last.change == "same" and last.point is not None:
            render.line(console, f"unchanged since, up to point {last.point}")
    _draw_skipped(console, report)


def _draw_plan(console: Console, plan: GetPlan) -> None:
    what = "standard output" if plan.output == _STREAM else plan.output
    render.headline(console, f"would get {plan.path} of {plan.source}, and make {what}")
    render.facts(
        console,
        [
            ("files", str(plan.files)),
            ("directories", str(plan.directories)),
            ("links", str(plan.links)),
            ("to write", size(plan.bytes)),
        ],
    )
    _draw_skipped(console, plan)


def _draw_report(console: Console, report: GetReport) -> None:
    what = "standard output" if report.output == _STREAM else report.output
    render.headline(console, f"{report.path} of {report.source} is in {what}")
    render.facts(
        console,
        [
            ("files", f"{report.files}, {size(report.bytes)}"),
            ("directories", str(report.directories)),
            ("links", str(report.links)),
            ("took", quantities.duration(report.seconds)),
            *([("not kept", ", ".join(report.not_kept))] if report.not_kept else []),
        ],
    )
    for each in report.left_out:
        render.line(console, f"left out: {each.path}: {each.reason}")
    _draw_skipped(console, report)


def _draw_skipped(console: Console, report: FileList | FindReport | GetPlan | GetReport) -> None:
    for each in report.skipped:
        render.line(console, f"skipped: {each.path}: {each.reason}")
