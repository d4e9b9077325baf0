"""The options that name a guest, and what they mean together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snapchain.cli.options import as_parameter, in_the_place_of
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from snapchain.guest.address import GuestAddress

_GUEST = "Guest"


def complete_domain(ctx: typer.Context, incomplete: str) -> list[str | tuple[str, str]]:
    from snapchain.cli.completion import domains

    return domains(incomplete, ctx.params.get("connect"))


Domain = Annotated[
    str | None,
    typer.Option(
        "--domain",
        metavar="NAME",
        autocompletion=complete_domain,
        help="A guest of libvirt: the name of its domain.",
        rich_help_panel=_GUEST,
    ),
]
Connect = Annotated[
    str | None,
    typer.Option(
        "--connect",
        metavar="URI",
        help="The libvirt daemon that has the domain. Default: LIBVIRT_DEFAULT_URI, or qemu:///system.",
        rich_help_panel=_GUEST,
    ),
]
Qmp = Annotated[
    Path | None,
    typer.Option(
        "--qmp",
        readable=False,
        metavar="SOCKET",
        help="A guest without libvirt: a QMP socket of its QEMU that no other program uses.",
        rich_help_panel=_GUEST,
    ),
]
AgentSocket = Annotated[
    Path | None,
    typer.Option(
        "--agent",
        readable=False,
        metavar="SOCKET",
        help="With --qmp: the socket of the guest agent. Default: as QEMU reports it.",
        rich_help_panel=_GUEST,
    ),
]
GuestName = Annotated[
    str | None,
    typer.Option(
        "--guest",
        metavar="NAME",
        help="With --qmp: the name of the guest. Default: as QEMU's -name says.",
        rich_help_panel=_GUEST,
    ),
]


def guest_address(
    *, domain: str | None, connect: str | None, qmp: Path | None, agent: Path | None, name: str | None
) -> GuestAddress | None:
    """The guest that the options name; None when they name none. Raises InvalidInput for options that contradict."""
    for option, value in (("--domain", domain), ("--connect", connect), ("--qmp", qmp), ("--guest", name)):
        if value is not None and not str(value):
            raise InvalidInput(f"{option} is empty")
    if domain is not None and qmp is not None:
        raise InvalidInput(
            "--domain and --qmp name two guests", hint="give --domain for a guest of libvirt, --qmp for any other"
        )
    if domain is None and connect is not None:
        raise InvalidInput("--connect is given without --domain", subject=connect, hint="add --domain NAME")
    for option, value in (("--agent", agent), ("--guest", name)):
        if qmp is None and value is not None:
            reason = "libvirt has this of its domains" if domain is not None else "no guest is named"
            raise InvalidInput(f"{option} belongs to --qmp; {reason}", subject=value)
    if domain is None and qmp is None:
        return None
    from snapchain.guest.address import GuestAddress

    return GuestAddress(domain=domain, connect=connect, qmp=qmp, agent=agent, name=name)


def check_either(given: object, guest: GuestAddress | None, *, metavar: str = "IMAGE") -> None:
    """One of both must be named: an image (or what `metavar` says), or a guest. Raises InvalidInput.

    given: what the argument holds; None and [] are nothing
    """
    is_given = given is not None and given != []
    if guest is not None and is_given:
        words = " ".join(map(str, given)) if isinstance(given, list) else given
        raise InvalidInput(
            f"{metavar} and {guest.option.split()[0]} are both given; a guest's images are found by the guest",
            subject=words,
            hint=f"leave out {metavar}, or {guest.option.split()[0]}",
        )
    if guest is None and not is_given:
        raise InvalidInput(f"nothing is named: neither {metavar} nor a guest", hint="--domain NAME or --qmp SOCKET")


def takes_guest(
    *, instead_of: str | None = None, metavar: str = "IMAGE"
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb with a parameter `guest` the options that name one: --domain, --connect, --qmp, --agent, --guest.

    The verb gets a GuestAddress, or None without any of them.
    instead_of: the parameter that a guest replaces; exactly one of both must then be given. metavar: its name in errors
    """
    chosen = {"domain": Domain, "connect": Connect, "qmp": Qmp, "agent": AgentSocket, "guest_name": GuestName}

    def value(given: dict[str, Any], others: Mapping[str, Any]) -> GuestAddress | None:
        guest = guest_address(name=given.pop("guest_name"), **given)
        if instead_of is not None:
            check_either(others.get(instead_of), guest, metavar=metavar)
        return guest

    return in_the_place_of("guest", [as_parameter(*each) for each in chosen.items()], value)
