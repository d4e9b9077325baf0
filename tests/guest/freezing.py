"""A process that freezes a guest, says so, and waits: `python -m tests.guest.freezing SOCKET [BOUND]`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapchain.guest.address import GuestAddress
from snapchain.guest.agent import open_agent
from snapchain.guest.quiesce import frozen
from snapchain.host.process_identity import Identity
from snapchain.model.events import ignore


@dataclass
class AgentsGuest:
    """What `frozen` needs of a guest: an agent, or none."""

    socket: Path | None
    qemu: Identity | None = None
    name: str = "web1"
    option: str = "--qmp /run/web1.qmp"
    address: GuestAddress = field(default_factory=lambda: GuestAddress(qmp=Path("/run/web1.qmp")))

    def process(self) -> Identity | None:
        return self.qemu

    def agent(self) -> Any:
        return None if self.socket is None else open_agent({"kind": "socket", "path": str(self.socket)})


def main() -> None:
    guest: Any = AgentsGuest(Path(sys.argv[1]))
    bound = float(sys.argv[2]) if len(sys.argv) > 2 else 1000.0
    with frozen(guest, required=True, freeze_seconds=60, bound_seconds=bound, on_event=ignore):
        sys.stdout.write("frozen\n")
        sys.stdout.flush()
        sys.stdin.readline()


if __name__ == "__main__":
    main()
