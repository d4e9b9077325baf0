"""`snapchain serve-replica --stdio`: what the ssh of a sender runs on the replica's host."""

from __future__ import annotations

from typing import Annotated

import typer

from snapchain.cli.app import verb


@verb(
    name="serve-replica",
    examples="""
    ssh kvm2 snapchain serve-replica --stdio
    """,
    when_interrupted="what is durable stays; the sender goes on there",
    hidden=True,
)
def serve_replica(
    *,
    stdio: Annotated[bool, typer.Option("--stdio", help="Speak with the sender over stdin and stdout.")],
) -> None:
    """Take what a sender on another host sends. It is started by that sender's ssh, and is of no use at a terminal."""
    from snapchain.errors import InvalidInput
    from snapchain.ops.serve_replica import serve_stdio

    if not stdio:
        raise InvalidInput("a sender speaks over the standard streams", hint="say --stdio")
    serve_stdio()
