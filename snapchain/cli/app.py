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
from importlib import import_module
from shutil import get_terminal_size
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand, TyperGroup

import snapchain
from snapchain.cli import exits
from snapchain.cli.verbs import ADDRESSES, SUMMARY, VERBS, check_verb, help_page

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
    """The group of the verbs. The table in verbs.py lists them; the file of one is imported when it is asked for."""

    _listing = False

    def make_context(self, info_name: str | None, args: list[str], *more: Any, **extra: Any) -> Any:
        with _telling_interrupts(args):
            return super().make_context(info_name, args, *more, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _telling_interrupts(ctx.args):
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        _ = ctx
        return [name for name, verb in VERBS.items() if verb.group]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        _ = ctx
        if self._listing:
            return TyperCommand(cmd_name, help=VERBS[cmd_name].summary)
        if not ctx.resilient_parsing:
            check_verb(cmd_name)
        return command(cmd_name) if cmd_name in VERBS else None

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The verbs from the table, none of which is loaded."""
        self._listing = True
        return super().shell_complete(ctx, incomplete)

    def get_help(self, ctx: Any) -> str:
        _ = ctx
        return help_page(width=get_terminal_size().columns, bold=sys.stdout.isatty())


app = typer.Typer(
    name="snapchain",
    cls=_Group,
    help=f"{SUMMARY}\n\n{ADDRESSES}".replace("[", "\\["),
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
        sys.stdout.write(f"snapchain {snapchain.__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        sys.stderr.write(context.get_help())
        raise typer.Exit(exits.USAGE)


_COMMANDS: dict[str, typer.Typer] = {}


def command(name: str) -> Any:
    """The click command of a verb, with its parameters."""
    import_module(f"snapchain.cli.{VERBS[name].module}")
    return typer.main.get_command(_COMMANDS[name])


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

        title = name or function.__name__
        alone = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        panel = VERBS[title].group or None
        joined = alone.command(
            title, help=_help(function), epilog=_example_lines(examples), hidden=hidden, rich_help_panel=panel
        )
        joined(guarded)
        _COMMANDS[title] = alone
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
