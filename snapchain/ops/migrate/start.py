"""The hook that starts a guest at its new host: a program of the user's, with the facts in its environment.

    SNAPCHAIN_HOOK=start SNAPCHAIN_DESTINATION=ssh://kvm2/srv/replica SNAPCHAIN_DISKS=2
    SNAPCHAIN_IMAGE_1=/images/web1.qcow2 SNAPCHAIN_DISK_1=web1/vda SNAPCHAIN_OVERLAY_1=/srv/... SNAPCHAIN_EPOCH_1=2
    SNAPCHAIN_IMAGE_2=... ; of the first disk without a number, too

An argument list, no shell.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from snapchain.errors import NotFound, ToolFailed
from snapchain.host.processes import run
from snapchain.ops.migrate.request import Move
from snapchain.replica.stream.messages import Standing

_SECONDS = 600.0
_CAP = 64 << 10


def check_hook(hook: Sequence[str]) -> None:
    """Raises NotFound for a hook that cannot be run: that is told before anything is handed over."""
    if hook and shutil.which(hook[0]) is None:
        raise NotFound("the start hook: no such program", subject=hook[0], hint="it is run without a shell")


def start(hook: Sequence[str], destination: str, moves: Sequence[Move], standings: Sequence[Standing]) -> None:
    """Run it. Raises ToolFailed when it fails, or takes longer than ten minutes."""
    facts = {"HOOK": "start", "DESTINATION": destination, "DISKS": str(len(moves))}
    for number, (move, standing) in enumerate(zip(moves, standings, strict=True), 1):
        disk = {
            "IMAGE": str(move.image.absolute()),
            "DISK": move.disk,
            "OVERLAY": standing.overlay,
            "EPOCH": str(standing.epoch),
        }
        facts |= {f"{name}_{number}": value for name, value in disk.items()} | (disk if number == 1 else {})
    try:
        run(hook, env={f"SNAPCHAIN_{name}": value for name, value in facts.items()}, timeout=_SECONDS, output_cap=_CAP)
    except ToolFailed as error:
        raise ToolFailed(
            f"the start hook: {error.message}",
            argv=error.argv,
            status=error.status,
            stderr=error.stderr,
            subject=hook[0],
            hint="the disks are the destination's; run it again to run the hook again, or start the guest there by "
            "hand; with --take-back they are this host's again, as long as no guest has written there",
        ) from error
