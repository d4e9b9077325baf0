"""The guest agent of a libvirt domain. libvirt owns the channel, so every command goes through it.

`qemu-agent-command --timeout` makes libvirt itself give up in time. A virsh that is killed instead would leave libvirt
waiting for the agent, and no thaw could be sent until then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

from snapchain.errors import SnapchainError, ToolFailed, Unavailable
from snapchain.guest.agent import refused
from snapchain.host.virsh import Virsh
from snapchain.host.virsh_session import VirshSession

_SYNC_SECONDS = 5.0
"""libvirt first waits so long for the agent to answer a sync."""
_SPARE_SECONDS = 5.0


class LibvirtAgent:
    """Implements `protocol.Agent`. domain: its UUID; name: as people know it."""

    def __init__(self, virsh: Virsh, domain: str, name: str) -> None:
        self.virsh, self.domain, self.name = virsh, domain, name
        self._asked: Virsh | VirshSession = virsh

    @contextmanager
    def connected(self) -> Iterator[None]:
        """See `agent.ConnectedAgent`. libvirt keeps its connection to the agent, and this ours to libvirt."""
        with VirshSession(self.virsh) as session:
            self._asked = session
            try:
                yield
            finally:
                self._asked = self.virsh

    def ping(self, *, timeout: float) -> None:
        self._ask("guest-ping", timeout)

    def freeze(self, *, timeout: float) -> int:
        return _count(self._ask("guest-fsfreeze-freeze", timeout))

    def thaw(self, *, timeout: float) -> int:
        return _count(self._ask("guest-fsfreeze-thaw", timeout))

    def is_frozen(self, *, timeout: float) -> bool:
        return self._ask("guest-fsfreeze-status", timeout) == "frozen"

    def address(self) -> dict[str, str]:
        return {"kind": "libvirt", "domain": self.domain, "name": self.name, "connect": self.virsh.uri}

    def _ask(self, command: str, timeout: float) -> object:
        """What the agent returns. Raises Unavailable without an answer, and as `agent.refused`."""
        seconds = max(1, math.ceil(timeout))
        words = ["qemu-agent-command", "--domain", self.domain, "--timeout", str(seconds)]
        try:
            said = self._asked.text(
                *words,
                "--cmd",
                json.dumps({"execute": command}),
                timeout=_SYNC_SECONDS + seconds + _SPARE_SECONDS,
                subject=self.name,
            )
        except ToolFailed as error:
            raise _explained(error, command) from error
        try:
            return json.loads(said)["return"]
        except (ValueError, LookupError, TypeError) as error:
            raise Unavailable(f"the guest agent gave no answer to {command}: {said!r}", subject=self.name) from error


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _explained(error: ToolFailed, command: str) -> SnapchainError:
    said = " ".join(line.strip().removeprefix("error: ") for line in error.stderr.splitlines() if line.strip())
    if "unable to execute QEMU agent command" in said:  # it answered, with an error
        return refused(command, said, subject=error.subject)
    return Unavailable(
        f"the guest agent did not answer {command}: {said}",
        subject=error.subject,
        hint="see whether qemu-guest-agent runs in the guest",
    )
