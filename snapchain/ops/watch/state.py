"""What a watch has reached, in one small file, so that it goes on after a crash or a restart.

Losing it costs one snapshot before its time, and the reading of what can no longer be recognised.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import AwareDatetime, BaseModel, ConfigDict, ValidationError

from snapchain.errors import NotFound
from snapchain.guest.snapshot import GuestSnapshot
from snapchain.host import files, private
from snapchain.host.temporary_names import NEW
from snapchain.model.fingerprint import Fingerprint
from snapchain.model.inventory import Held

_CAP = 64 << 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class HeldLayer(_Part):
    """A layer of a disk's newest point at a destination: its id there, and the files here that it is made of."""

    layer_id: str
    sources: tuple[Fingerprint, ...]


class TargetState(_Part):
    """One destination.

    captured: when what it holds was taken; instant, point: of its newest guest point
    failures: in a row; retry_at: seconds since 1970; error: of the last of them
    held: disk -> the layers of its newest point
    """

    captured: AwareDatetime | None = None
    instant: str | None = None
    point: int | None = None
    failures: int = 0
    retry_at: float = 0.0
    error: str | None = None
    held: dict[str, tuple[HeldLayer, ...]] = {}

    def held_of(self, disk: str) -> tuple[Held, ...]:
        """The layers of one disk, as recognition takes them."""
        return tuple(Held(each.layer_id, each.sources) for each in self.held.get(disk, ()))


class WatchState(_Part):
    """All of it. snapshot: the newest; merge_at: seconds since 1970, before which no merge is tried again."""

    version: int = 1
    snapshot: GuestSnapshot | None = None
    merge_at: float = 0.0
    targets: dict[str, TargetState] = {}

    def target(self, name: str) -> TargetState:
        """Of one destination, which may be new."""
        return self.targets.get(name, TargetState())

    def with_target(self, name: str, **values: object) -> WatchState:
        """The same, with these values of a destination."""
        changed = self.target(name).model_copy(update=values)
        return self.model_copy(update={"targets": {**self.targets, name: changed}})


def read_state(path: Path) -> WatchState:
    """What is there; a beginning where there is nothing, or nothing that can be understood."""
    files.remove_temporaries(path, purpose=NEW)
    try:
        return WatchState.model_validate_json(private.read_own(path, cap=_CAP))
    except (NotFound, ValidationError):
        return WatchState()


def write_state(path: Path, state: WatchState) -> None:
    """Replace the file. Raises what writing a small file raises."""
    files.write_atomically(path, state.model_dump_json(indent=1).encode())
