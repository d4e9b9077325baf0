"""The typer application, and the one way by which a verb joins it.

A verb's function raises; what reaches the user is made here, so that all verbs speak alike. Interrupts must be caught
inside typer, which would turn them into a bare exit code: those of a verb at its function, others at the group. No path
is checked by typer (readable=False): a permission that is denied would be told in its words instead of ours.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperGroup

from snapchain.cli import exits

P = ParamSpec("P")


@contextmanager
def _telling_interrupts(words: list[str]) -> Iterator[None]:
    """An interrupt outside of a verb's function: nothing has been begun, so there is no hint.

    words: of the command line, as far as they are not parsed yet
    """
    as_json = "--json" in words  # before the block: parsing empties the list
    try:
        yield
    except KeyboardInterrupt as error:
        raise typer.Exit(exits.tell(error, as_json=as_json)) from error


class _Group(TyperGroup):
    """The group of the verbs."""

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        with _telling_interrupts(args):
            return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _telling_interrupts(ctx.args):
            return super().invoke(ctx)


app = typer.Typer(
    name="snapchain",
    cls=_Group,
    help="Ship, merge and restore the snapshot chains of QEMU disks.\n\n"
    "An ADDRESS is the path of an image, or DEST::DISK\\[@POINT]: DEST is a directory or s3://bucket/prefix, DISK a "
    "name such as web1/vda, and POINT is latest, a number, a label, or a time: an RFC 3339 time, or a local date and "
    "time. A date such as 2026-11-30, today or yesterday means the end of that day: the newest point not after it. The "
    "path of an existing file is that image, also with '::' in it; ./a::b is always a path.",
    epilog="Exit codes: 0 done, 2 wrong request, 3 not found, 4 conflict, 5 corrupt, 6 unsupported, 7 unavailable, "
    "8 a program failed, 9 busy, 10 partly failed, 11 the output could not be written, 129 and 130 interrupted.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    *,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        from importlib.metadata import version  # inside: it brings an e-mail parser

        sys.stdout.write(f"snapchain {version('snapchain')}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help())
        raise typer.Exit(exits.USAGE)


def verb(
    *, examples: str, when_interrupted: str, name: str | None = None, hidden: bool = False
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a verb: its docstring is its help, `examples` ends it, `when_interrupted` is the hint after a Ctrl-C.

    hidden: not for people, and not in the list of --help
    """

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except typer.Exit:
                raise
            except BaseException as error:
                as_json = bool(kwargs.get("json", False))
                status = exits.tell(error, as_json=as_json, left_behind=when_interrupted)
                raise typer.Exit(status) from error

        joined = app.command(
            name or function.__name__, help=_help(function), epilog=_example_lines(examples), hidden=hidden
        )
        joined(guarded)
        return guarded

    return register


def _help(function: Callable[P, None]) -> str:
    """The docstring as paragraphs that fold at the terminal's width, not at the source's; no markup in it."""
    paragraphs = (inspect.getdoc(function) or "").replace("[", "\\[").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def _example_lines(examples: str) -> str:
    """Commands one to a line, as they are typed: no markup in them."""
    lines = [line.strip().replace("[", "\\[") for line in examples.strip().splitlines()]
    return "[bold]Examples[/bold]\n\n" + "\n".join(f"  {line}" for line in lines)
