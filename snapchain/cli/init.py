"""`snapchain init DEST`: make a repository."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from snapchain.cli import options, quantities, render
from snapchain.cli.app import verb
from snapchain.cli.output import Output
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from rich.console import Console

    from snapchain.ops.init import InitPlan, InitReport


_ADVICE = """\
The passphrase opens the repository. Whoever loses it loses everything in the repository: nobody can replace it.
Keep a copy elsewhere. `snapchain key add DEST --recovery` makes a recovery key for paper, which opens it too."""


@verb(
    examples="""
    snapchain init /backup
    SNAPCHAIN_PASSWORD=... snapchain init /backup
    snapchain init s3://bucket/prefix --password-command 'pass show backup'
    snapchain init /backup --no-encryption
    """,
    when_interrupted="there is no repository yet: run init again",
)
@options.takes_output(passphrase=True)
def init(
    dest: Annotated[str, options.address(metavar="DEST", help="A directory, file:///path, or s3://bucket/prefix.")],
    *,
    no_encryption: Annotated[
        bool,
        typer.Option("--no-encryption", help="Store names and data unencrypted, for everybody who can read the store."),
    ] = False,
    cipher: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            autocompletion=options.of("aes-256-gcm", "chacha20-poly1305"),
            help="aes-256-gcm (default), or chacha20-poly1305 for machines without AES.",
        ),
    ] = None,
    block_size: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Size of the blocks that are deduplicated, a power of two. It cannot be changed later.",
        ),
    ] = None,
    pack_size: options.PackSize = None,
    out: Output,
) -> None:
    """Make an empty repository in a directory or an S3 bucket.

    It is encrypted with a key from a passphrase, unless --no-encryption is given. At a terminal the passphrase is asked
    for, twice. Without it nothing can be read again: keep a copy elsewhere, or make a recovery key with `snapchain key
    add DEST --recovery`. The store is tested, and what it lacks is reported. An S3 server that ignores
    conditional writes can be used by one writer at a time.
    """
    from snapchain.cli.new_passphrases import new_passphrase
    from snapchain.destination.address import located
    from snapchain.ops import init as ops

    if no_encryption and cipher is not None:
        raise InvalidInput("--no-encryption and --cipher are both given", hint="choose one of them")
    plan = ops.plan(
        located(dest),
        encryption="none" if no_encryption else cipher,
        block_size=None if block_size is None else quantities.parse_size(block_size),
        pack_size=options.pack_size(pack_size),
    )
    if out.plan(plan, _draw_plan):
        return
    given = options.given_passphrase(
        out, out.password_file, out.password_command, options="--password", variable="SNAPCHAIN_PASSWORD"
    )
    report = ops.run(plan, passphrase=lambda: new_passphrase(given, out, dest, advice=_ADVICE), on_event=out.on_event)
    out.report(report, _draw_report)


def _draw_plan(console: Console, plan: InitPlan) -> None:
    render.headline(console, f"would make a repository at {render.place(plan.destination)}")
    sizes = [("blocks", quantities.size(plan.block_size)), *_packs(plan.pack_size)]
    render.facts(console, [("encryption", plan.encryption), *sizes])


def _draw_report(console: Console, report: InitReport) -> None:
    render.headline(console, f"made a repository at {render.place(report.destination)}")
    writers = "many at a time" if report.conditional_put else "one at a time: this store ignores conditional writes"
    render.facts(
        console,
        [
            ("id", report.repository),
            ("encryption", report.encryption),
            ("blocks", quantities.size(report.block_size)),
            *_packs(report.pack_size),
            ("writers", writers),
        ],
    )


def _packs(size: int | None) -> list[tuple[str, str]]:
    return [] if size is None else [("objects", f"at most {quantities.size(size)}")]
