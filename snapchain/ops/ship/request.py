"""What may be asked of `send`, and what it says: values only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import InvalidInput
from snapchain.image import ImageChain
from snapchain.model.disk_name import check_disk_name
from snapchain.model.epoch import LARGEST_EPOCH
from snapchain.model.events import OnEvent
from snapchain.model.inventory import Wanted
from snapchain.source.chains import locked_chain, paused_chain, sealed_chain
from snapchain.source.ownership import check_not_given


class Files(Enum):
    """How the files of a chain become layers."""

    COMPOSED = "composed"
    """Pending overlays as one."""
    EACH = "each"
    """Every file under its own name."""


class Divergence(Enum):
    """What to do when the replica holds layers that the image never had."""

    REFUSE = "refuse"
    CUT_REPLICA = "cut-replica"
    """Drop them there, and the points that they give."""


class Scope(Enum):
    """How much of a chain is sent."""

    ALL = "all"
    SEALED = "sealed"
    """All but the top, which a guest will go on writing to."""
    PAUSED = "paused"
    """All; a guest that is paused may have the top open."""


_OPENED = {Scope.ALL: locked_chain, Scope.SEALED: sealed_chain, Scope.PAUSED: paused_chain}


class LayerPlan(BaseModel):
    """A layer that would be sent. files: that make it, lower first; data_bytes: of its map."""

    model_config = ConfigDict(frozen=True)

    files: tuple[str, ...]
    virtual_size: int
    data_bytes: int


class SendPlan(BaseModel):
    """What `send` would do. layers_present: of the image's files, known by the replica."""

    model_config = ConfigDict(frozen=True)

    image: str
    destination: str
    disk: str
    layers_present: int
    layers: tuple[LayerPlan, ...]
    data_bytes: int
    labels: tuple[str, ...]


class SendReport(BaseModel):
    """What `send` did.

    point: its number, None where a stream was saved and nobody has given one; layers_present: known by the replica
    bytes_sent: on the wire; data_bytes: of the layers' maps; carried_bytes: those of them that travelled, before
    compression: the rest was zero, or at the replica already
    """

    model_config = ConfigDict(frozen=True)

    disk: str
    destination: str
    point: int | None
    layers_sent: int
    layers_present: int
    bytes_sent: int
    data_bytes: int
    carried_bytes: int
    resumed: bool
    virtual_size: int
    content_id: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be sent where.

    labels: for the point; lineage: files that local merges have made, each with what it replaces, beside what their own
    notes say; format, image_dirs: as `scan` takes them; limit_rate: bytes a second on the wire
    epoch: in which this host writes the disk, at least: what a handover has left beside its files counts, too; older
    than the replica's is refused, newer makes it the replica's
    though_given: to the replica's host, by a handover that was cut off and goes on
    """

    image: Path
    disk: str
    labels: Sequence[str] = ()
    files: Files = Files.COMPOSED
    scope: Scope = Scope.ALL
    divergence: Divergence = Divergence.REFUSE
    lineage: Sequence[Wanted] = ()
    format: str | None = None
    image_dirs: Sequence[Path] = ()
    limit_rate: int | None = None
    epoch: int = 1
    though_given: bool = False

    def check(self) -> None:
        """Raises InvalidInput for labels and names that cannot be."""
        if self.labels:
            from snapchain.model.points import check_label  # inside: the whole repository comes with it

            for label in self.labels:
                check_label(label)
        check_disk_name(self.disk)
        if not 1 <= self.epoch <= LARGEST_EPOCH:
            raise InvalidInput(f"{self.epoch} is no epoch", hint=f"a number from 1 to {LARGEST_EPOCH}")

    @contextmanager
    def chain(self, on_event: OnEvent) -> Iterator[ImageChain]:
        """What is to be sent of the image, locked; the top is no part of it where only what is sealed is meant.

        Raises Conflict for a disk that was given to another host.
        """
        with _OPENED[self.scope](
            self.image, format=self.format, image_dirs=self.image_dirs, on_event=on_event
        ) as chain:
            if not self.though_given:
                check_not_given(chain, image=self.image)
            yield chain
