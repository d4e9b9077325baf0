"""The options of a guest's snapshot: which disks, and how its filesystems are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from snapchain.cli.options import argv_of, as_parameter, in_the_place_of, of
from snapchain.errors import InvalidInput

if TYPE_CHECKING:
    from snapchain.guest.snapshot import SnapshotRequest

_QUIESCE = "Snapshot of a guest"
Disks = Annotated[
    list[str] | None,
    typer.Option(
        "--disk",
        metavar="NAME",
        help="Take this disk of the guest, not all. May be repeated. `snapchain guests` shows their names.",
        rich_help_panel=_QUIESCE,
    ),
]
QuiesceMode = Annotated[
    str | None,
    typer.Option(
        "--quiesce",
        metavar="auto|require|no",
        autocompletion=of("auto", "require", "no"),
        help="Freeze the filesystems by the guest agent: if one answers (auto, the default), always (require: fail "
        "without), or not at all (no).",
        rich_help_panel=_QUIESCE,
    ),
]
FreezeTimeout = Annotated[
    float | None,
    typer.Option(
        "--freeze-timeout",
        metavar="SECONDS",
        min=0.1,
        max=600,
        help="How long a freeze may take. Default: 10.",
        rich_help_panel=_QUIESCE,
    ),
]
PreFreeze = Annotated[
    str | None,
    typer.Option(
        "--pre-freeze",
        metavar="COMMAND",
        help="Run this program of the host (no shell) before the freeze.",
        rich_help_panel=_QUIESCE,
    ),
]
PostThaw = Annotated[
    str | None,
    typer.Option(
        "--post-thaw",
        metavar="COMMAND",
        help="Run this program of the host (no shell) after the thaw, whatever became of the snapshot.",
        rich_help_panel=_QUIESCE,
    ),
]


def snapshot_request(
    *,
    disk: list[str] | None,
    quiesce: str | None,
    freeze_timeout: float | None,
    pre_freeze: str | None,
    post_thaw: str | None,
) -> SnapshotRequest | None:
    """How a snapshot of a guest is taken; None where no option says so. Raises InvalidInput."""
    from snapchain.guest.snapshot import Quiesce, SnapshotRequest

    given: dict[str, Any] = {}
    if disk:
        given["disks"] = tuple(dict.fromkeys(disk))
    if quiesce is not None:
        if quiesce not in set(Quiesce):
            raise InvalidInput(f"{quiesce!r} is no way to quiesce a guest", hint="--quiesce auto, require or no")
        given["quiesce"] = Quiesce(quiesce)
    if freeze_timeout is not None:
        given["freeze_seconds"] = freeze_timeout
    for name, command in (("pre_freeze", pre_freeze), ("post_thaw", post_thaw)):
        if command is not None:
            given[name] = argv_of(command, option=f"--{name.replace('_', '-')}")
    return SnapshotRequest(**given) if given else None


def check_no_snapshot_options(given: SnapshotRequest | None) -> None:
    """Raises InvalidInput for options of a guest's snapshot where no guest is named."""
    if given is not None:
        raise InvalidInput(
            "options of a guest's snapshot are given, and no guest is named", hint="add --domain NAME or --qmp SOCKET"
        )


def takes_snapshot_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb with a parameter `snapshot` the options of a guest's snapshot: --disk, --quiesce, and others.

    The verb gets a SnapshotRequest, or None without any of them; labels and image_dirs are left to it.
    """
    chosen = {
        "disk": Disks,
        "quiesce": QuiesceMode,
        "freeze_timeout": FreezeTimeout,
        "pre_freeze": PreFreeze,
        "post_thaw": PostThaw,
    }
    options = [as_parameter(*each) for each in chosen.items()]
    return in_the_place_of("snapshot", options, lambda given, _: snapshot_request(**given))(function)
