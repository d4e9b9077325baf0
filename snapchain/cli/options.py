"""The options and arguments that several verbs share, each declared once: name, environment variable, help."""

from __future__ import annotations

import functools
import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from snapchain.cli import quantities
from snapchain.cli.progress import Mode
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from snapchain.cli.output import Output
    from snapchain.destination.address import DestinationAddress, PointAddress
    from snapchain.destination.protocol import Destination
    from snapchain.host.passphrases import PassphraseSource
    from snapchain.model.compression import Compression
    from snapchain.ops.other_destinations import Reach

_OUTPUT = "Output"
_KEY = "Passphrase"


def complete_address(incomplete: str) -> list[str | tuple[str, str]]:
    from snapchain.cli.completion import addresses

    return addresses(incomplete)


def address(*, metavar: str, help: str) -> Any:
    """An argument that names an image or a place at a destination; a shell completes it."""
    return typer.Argument(metavar=metavar, help=help, autocompletion=complete_address)


def of(*values: str) -> Callable[[str], list[str]]:
    """The `autocompletion` of an option that takes one of these values."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


Labels = Annotated[list[str] | None, typer.Option("--label", "-l", help="A name for the point. May be repeated.")]
CutReplica = Annotated[
    bool,
    typer.Option(
        "--cut-replica",
        help="If both sides have changed: drop the replica's layers and points above the last layer that both have.",
    ),
]
Connections = Annotated[
    int,
    typer.Option(
        "--connections",
        min=1,
        max=16,
        help="Number of ssh connections. Several fill a link with high latency: 8 at 80 ms.",
    ),
]
Epoch = Annotated[
    int,
    typer.Option(
        "--epoch",
        min=1,
        metavar="N",
        help="The epoch in which this host writes the disk. A destination in a later "
        "epoch refuses; one in an earlier epoch takes N.",
    ),
]
ImageDir = Annotated[
    list[Path] | None,
    typer.Option(
        "--image-dir",
        readable=False,
        metavar="DIR",
        help="Allow backing files in DIR too, besides the directory of the image. May be repeated. "
        "SNAPCHAIN_IMAGE_DIRS is a colon-separated list of such directories.",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        "-f",
        metavar="qcow2|raw",
        autocompletion=of("qcow2", "raw"),
        help="Format of the image itself. By default by its suffix; never guessed from its content.",
    ),
]
LimitRate = Annotated[
    str | None,
    typer.Option("--limit-rate", metavar="BYTES", help="Move at most BYTES a second to or from the destination: 10M."),
]

PackSize = Annotated[
    str | None,
    typer.Option(
        "--pack-size",
        metavar="BYTES",
        help="Largest object to write, for servers and proxies with a limit, such as 1M. Default: 16M. "
        "SNAPCHAIN_PACK_SIZE applies to all commands but nightly.",
    ),
]
CompressionMode = Annotated[
    str | None,
    typer.Option(
        "--compression",
        metavar="MODE",
        autocompletion=of("auto", "fast", "default", "max"),
        help="How hard a repository compresses new data: fast, default, max, or auto, which is fast and uses the time "
        "that the store needs. SNAPCHAIN_COMPRESSION applies to all commands but nightly.",
    ),
]
PasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--password-file",
        readable=False,
        metavar="FILE",
        help="Read the repository's passphrase from the first line of this file.",
        rich_help_panel=_KEY,
    ),
]
PasswordCommand = Annotated[
    str | None,
    typer.Option(
        "--password-command",
        metavar="COMMAND",
        help="Run this program (no shell) and read the passphrase from the first line that it prints.",
        rich_help_panel=_KEY,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", "-n", help="Print what would be done, and do nothing.", rich_help_panel=_OUTPUT),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object: sizes in bytes, times in UTC.", rich_help_panel=_OUTPUT),
]
Progress = Annotated[
    Mode,
    typer.Option(
        "--progress",
        help="On stderr: a bar if it is a terminal (auto), one JSON object a line (json), or nothing (none).",
        rich_help_panel=_OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Hide progress, notes and reports, but no failure.", rich_help_panel=_OUTPUT),
]

_FORMATS: dict[str, Literal["qcow2", "raw"]] = {"qcow2": "qcow2", "raw": "raw"}


def format_of(text: str | None) -> Literal["qcow2", "raw"] | None:
    """--format. Raises InvalidInput for what is neither qcow2 nor raw."""
    if text is None:
        return None
    if text not in _FORMATS:
        raise InvalidInput(f"unknown format {text!r}", hint="qcow2 or raw")
    return _FORMATS[text]


def image_dirs(given: Sequence[Path] | None) -> list[Path]:
    """--image-dir and SNAPCHAIN_IMAGE_DIRS together."""
    named = [name for name in os.environ.get("SNAPCHAIN_IMAGE_DIRS", "").split(":") if name]
    return [*(given or ()), *map(Path, named)]


def seconds(text: str, option: str) -> float:
    """Seconds of a time such as 90s, 10min, 26h or 2d. Raises InvalidInput, naming the option."""
    from snapchain.ops.nightly.values import to_seconds

    try:
        found = to_seconds(text)
    except ValueError as error:
        raise InvalidInput(str(error), subject=option) from error
    assert isinstance(found, float)
    return found


def pack_size(given: str | None) -> int | None:
    """--pack-size or SNAPCHAIN_PACK_SIZE, in bytes. Raises InvalidInput."""
    text = given or os.environ.get("SNAPCHAIN_PACK_SIZE")
    return quantities.parse_size(text) if text else None


def compression(given: str | None) -> Compression | None:
    """--compression or SNAPCHAIN_COMPRESSION. Raises InvalidInput."""
    from snapchain.model.compression import parse_compression

    text = given or os.environ.get("SNAPCHAIN_COMPRESSION")
    return parse_compression(text) if text else None


def destination(
    dest: str,
    out: Output,
    *,
    writing: bool = False,
    limit_rate: str | None = None,
    pack_size_text: str | None = None,
    compression_text: str | None = None,
    connections: int = 1,
    accept: str | None = None,
) -> Destination:
    """Open a destination as the shared options say, and show its notices.

    Raises InvalidInput for options that its kind has no use for.
    """
    from snapchain.destinations import open_destination, traits_of
    from snapchain.model.events import Notice

    traits = traits_of(dest)
    if not traits.encrypts and (out.password_file is not None or out.password_command is not None):
        raise InvalidInput(f"a {traits.kind} is not encrypted, and has no passphrase", subject=dest)
    if not traits.has_id and accept is not None:
        raise InvalidInput(f"--accept-repository is for repositories; a {traits.kind} has no id", subject=dest)
    if not traits.deduplicates and pack_size_text is not None:
        raise InvalidInput(f"--pack-size is for repositories; a {traits.kind} has no packs", subject=dest)
    if not traits.deduplicates and compression_text is not None:
        raise InvalidInput(f"--compression is for repositories; a {traits.kind} keeps plain files", subject=dest)
    found = open_destination(
        dest,
        passphrase=passphrase_source(out, dest),
        writing=writing,
        limit_rate=None if limit_rate is None else quantities.parse_size(limit_rate),
        pack_size=pack_size(pack_size_text) if traits.deduplicates else None,
        compression=compression(compression_text) if traits.deduplicates and (writing or compression_text) else None,
        connections=connections,
        accept=accept,
    )
    out.counts(found)
    for notice in found.notices:
        out.on_event(Notice(notice))
    return found


def program() -> list[str]:
    """How a service starts this very snapchain."""
    beside = Path(sys.executable).with_name("snapchain")
    found = str(beside) if beside.exists() else shutil.which("snapchain")
    return [found] if found else [sys.executable, "-m", "snapchain"]


def disk_of(address: DestinationAddress | PointAddress) -> str | None:
    """The disk where a command takes a whole destination or one disk. Raises InvalidInput for a point."""
    from snapchain.destination.address import PointAddress as Point, parse_disk_address

    return parse_disk_address(str(address)).disk if isinstance(address, Point) else None


_OTHERS = "The guest's other destinations"
OtherAt = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        metavar="DEST",
        help="Another destination of the guest, as this host reaches it. May be repeated.",
        rich_help_panel=_OTHERS,
    ),
]
Without = Annotated[
    list[str] | None,
    typer.Option(
        "--without",
        metavar="DEST",
        help="This other destination need not answer: you vouch that no host took the guest over there. Your name is "
        "recorded. May be repeated.",
        rich_help_panel=_OTHERS,
    ),
]


def reach(at: Sequence[str] | None, without: Sequence[str] | None, out: Output) -> Reach:
    """How a guest's other destinations are reached, with the passphrase of this command where one is encrypted."""
    from snapchain.destinations import open_destination
    from snapchain.ops.other_destinations import Reach

    return Reach(
        at=at or (),
        without=without or (),
        opens=lambda url: open_destination(url, passphrase=passphrase_source(out, url), writing=True),
    )


def passphrase_source(out: Output, dest: str = "the repository") -> PassphraseSource:
    """A function that returns the passphrase of a destination when it is called, or None when there is none.

    From a file, a program, or SNAPCHAIN_PASSWORD; never from a command-line argument. An option beats the environment.
    Nothing is read or run until a repository turns out to be encrypted. Then a person at a terminal is asked.
    dest: named in the question
    """
    from snapchain.host.passphrases import PassphraseSource, ask
    from snapchain.host.terminal import printable

    given = given_passphrase(
        out, out.password_file, out.password_command, options="--password", variable="SNAPCHAIN_PASSWORD"
    )
    return PassphraseSource(given, ask=lambda: ask(f"Passphrase of {printable(dest)}: "))


def given_passphrase(
    out: Output, file: Path | None, command: str | None, *, options: str, variable: str
) -> Callable[[], str | None]:
    """A function that returns the passphrase that was set for the command. options: how the two options begin"""
    if file is not None and command is not None:
        raise InvalidInput(f"{options}-file and {options}-command are both given", hint="choose one of them")
    if file is not None:
        return lambda: _from_file(file, out)
    if command is not None:
        return lambda: _from_command(command, f"{options}-command")
    return lambda: os.environ.get(variable) or None


def _from_file(path: Path, out: Output) -> str:
    from snapchain.host import passphrases
    from snapchain.model.events import Notice

    return passphrases.from_file(path, on_notice=lambda words: out.on_event(Notice(words)))


def _from_command(command: str, option: str) -> str:
    from snapchain.host import passphrases

    return passphrases.from_program(argv_of(command, option=option))


DiskPairs = Annotated[
    list[str],
    address(
        metavar="IMAGE DEST::DISK...",
        help="The top of a chain, and a disk at a replica: ssh://\\[user@]host/path or dir:/path. More pairs "
        "are other disks of the same guest, at the same replica.",
    ),
]


def disk_pairs(words: Sequence[str]) -> tuple[str, list[tuple[Path, str]]]:
    """The replica, and each image with its disk's name there. Raises InvalidInput."""
    from snapchain.destination.address import parse_disk_address

    if len(words) % 2:
        raise InvalidInput(f"{words[-1]} stands alone", hint="name pairs, an image and where it goes: IMAGE DEST::DISK")
    pairs = [(Path(image), parse_disk_address(target)) for image, target in zip(words[::2], words[1::2], strict=True)]
    dests = {address.dest for _, address in pairs}
    if len(dests) > 1:
        raise InvalidInput(
            "the disks of one guest go to one replica", subject=", ".join(sorted(dests)), hint="name one DEST for all"
        )
    return dests.pop(), [(image, address.disk) for image, address in pairs]


def _with_parameters(
    called: Callable[..., None], shown: inspect.Signature, parameters: Sequence[inspect.Parameter]
) -> Callable[..., None]:
    """Let typer see these parameters instead of those of the function that `called` wraps."""
    called.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]
    return called


def in_the_place_of(
    name: str, parameters: Sequence[inspect.Parameter], value: Callable[[dict[str, Any], Mapping[str, Any]], object]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb these parameters in the place of one of its own.

    name: its own, which gets what `value` makes of those given and of the verb's other arguments
    """
    names = [each.name for each in parameters]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shown = inspect.signature(function, eval_str=True)

        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> None:
            given = {each: kwargs.pop(each) for each in names}
            function(*args, **{name: value(given, kwargs)}, **kwargs)

        own = shown.parameters.values()
        return _with_parameters(
            called, shown, [each for old in own for each in ([old] if old.name != name else parameters)]
        )

    return decorate


def as_parameter(name: str, annotation: Any, default: object = None) -> inspect.Parameter:
    """A parameter that typer shows as an option. annotation: one of the types here"""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def takes_output(
    *, passphrase: bool = False, dry_run: bool = True, progress: bool = True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb with a parameter `out` the options that make its Output: --json, and those that are asked for.

    passphrase: --password-file and --password-command; dry_run: --dry-run; progress: --progress and --quiet
    """
    chosen: dict[str, tuple[Any, object]] = {}
    if passphrase:
        chosen |= {"password_file": (PasswordFile, None), "password_command": (PasswordCommand, None)}
    if dry_run:
        chosen["dry_run"] = (DryRun, False)
    chosen["json"] = (Json, False)
    if progress:
        chosen |= {"progress": (Progress, Mode.AUTO), "quiet": (Quiet, False)}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        shown = inspect.signature(function, eval_str=True)

        @functools.wraps(function)
        def called(**kwargs: Any) -> None:
            from snapchain.cli.output import Output

            with Output(**{name: kwargs.pop(name) for name in chosen}) as out:
                function(**kwargs, out=out)

        own = [each for each in shown.parameters.values() if each.name != "out"]
        shared = [as_parameter(name, annotation, default) for name, (annotation, default) in chosen.items()]
        return _with_parameters(called, shown, [*own, *shared])

    return decorate


def argv_of(command: str, *, option: str) -> tuple[str, ...]:
    """A program and its arguments, as a shell would split them. Raises InvalidInput."""
    try:
        argv = tuple(shlex.split(command))
    except ValueError as error:
        raise InvalidInput(f"not a command: {error}", subject=command) from error
    if not argv:
        raise InvalidInput(f"{option} is empty")
    return argv
