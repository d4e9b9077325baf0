"""What can be asked of `ship`, and what it answers: values only. `send` is the same for a replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.destination.writing import HeldLayer, Moment
from snapchain.errors import InvalidInput
from snapchain.image import ImageChain
from snapchain.model.disk_name import LARGEST_EPOCH, check_disk_name
from snapchain.model.events import OnEvent, ignore
from snapchain.model.inventory import Wanted
from snapchain.model.points import check_label
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.protocol import Scope, Source


class Files(Enum):
    """How the files of a chain become layers."""

    COMPOSED = "composed"
    """By the rules of grouping: redundant overwrites are neither sent nor stored."""
    EACH = "each"
    """Every file under its own name."""


class Divergence(Enum):
    """What to do when a destination with one chain a disk holds layers that the image never had."""

    REFUSE = "refuse"
    CUT_REPLICA = "cut-replica"
    """Drop them there, and the points that they give."""
    COMPARE = "compare"
    """The image follows what is there, whatever its files were made of: the difference becomes a layer."""

    def of_epoch(self, epoch: int) -> Divergence:
        """This, but COMPARE in place of REFUSE for a disk that has been at other hosts. epoch: of the disk here

        A host that it has left has layers of the files there, and of files that were merged since. The disk is the one
        of the newest epoch, so what it shows follows on them.
        """
        return Divergence.COMPARE if epoch > 1 and self is Divergence.REFUSE else self


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, defer_build=True)


class LayerPlan(_Shown):
    """A layer that would be made. Sizes in bytes.

    files: that make it, lower first; bytes_to_read: of the guest; data_bytes: of its map
    publishes: whether a point follows
    """

    files: tuple[str, ...]
    virtual_size: int
    bytes_to_read: int
    data_bytes: int
    publishes: bool


class ShipPlan(_Shown):
    """What `ship` would do. Sizes in bytes.

    layers_present: of the image's files, recognised at the destination
    note: what makes it cost more than the image's last changes
    """

    image: str
    destination: str
    disk: str
    layers_present: int
    layers: tuple[LayerPlan, ...]
    bytes_to_read: int
    data_bytes: int
    labels: tuple[str, ...]
    note: str | None


class CapturedBy(StrEnum):
    """How a running guest's disk was captured without an overlay."""

    BITMAP = "bitmap"
    """A dirty bitmap listed what was written since the destination's newest point."""
    COMPARED = "compared"
    """All of it was read, and compared with the destination's newest point."""
    WHOLE = "whole"
    """All of it was read: the destination had nothing of it."""


class ShipReport(_Shown):
    """What `ship` did. Sizes in bytes.

    points: all numbers published; point: the last of them, which is the image as given; none where a stream was saved
    layers_present: files that were recognised at the destination
    bytes_read: of the guest; bytes_stored: new at the destination; bytes_sent: on the wire, or to the store
    data_bytes: of the layers' maps; carried_bytes: those of them that travelled, before compression to a replica
    damaged: earlier points of the disk of which the destination has lost bytes that the image no longer has
    resumed: whether a transfer that was cut off was continued
    unchanged: whether it shows what the newest point before it shows, as far as the destination's records tell
    captured_by: of a disk of a running guest; captured_why: no dirty bitmap could be used, a sentence
    """

    disk: str
    destination: str
    point: int | None
    points: tuple[int, ...]
    layers_sent: int
    layers_present: int
    bytes_read: int
    bytes_stored: int
    bytes_sent: int
    data_bytes: int
    carried_bytes: int
    resumed: bool
    virtual_size: int
    content_id: str
    damaged: tuple[int, ...] = ()
    unchanged: bool = False
    captured_by: CapturedBy | None = None
    captured_why: str | None = None
    seconds: float


def is_unchanged(newest: HeldLayer | None, top: HeldLayer) -> bool:
    """Whether a point of `top` shows the same as one of `newest`, the top of the newest point before it."""
    return newest is not None and (newest.content_id, newest.size) == (top.content_id, top.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShipRequest:
    """What is to be shipped as which disk.

    image: the top of a chain; opens: how it is read, where it is no image at rest
    top: the image that `image` is a sealed file of, if another: what was read is remembered by its path, which stays
    labels: for the points; each_point: a point for every layer, not only for the image as given
    lineage: files that local merges have made, each with what it replaces, beside what their own notes say
    time: of the point, for an image that was sealed before now
    moment: of the guest point that the point of the image as given belongs to
    format, image_dirs: as `scan` takes them; limit_rate: bytes a second to the destination
    epoch: in which this host writes the disk, at least: what a handover has left beside its files counts, too; older
    than the destination's is refused, newer becomes the destination's
    though_given: to the destination's host, by a handover that was cut off and goes on
    """

    image: Path
    disk: str
    labels: Sequence[str] = ()
    files: Files = Files.COMPOSED
    each_point: bool = False
    scope: Scope = Scope.ALL
    divergence: Divergence = Divergence.REFUSE
    lineage: Sequence[Wanted] = ()
    time: datetime | None = None
    moment: Moment | None = None
    format: str | None = None
    image_dirs: Sequence[Path] = ()
    limit_rate: int | None = None
    epoch: int = 1
    though_given: bool = False
    opens: Source | None = None
    top: Path | None = None

    @property
    def remembered_by(self) -> Path:
        """The image by whose path it is remembered what was read."""
        return self.top or self.image

    def check(self) -> None:
        """Raises InvalidInput for labels, names and epochs that cannot be."""
        for label in self.labels:
            check_label(label)
        check_disk_name(self.disk)
        if not 1 <= self.epoch <= LARGEST_EPOCH:
            raise InvalidInput(f"{self.epoch} is no epoch", hint=f"a number from 1 to {LARGEST_EPOCH}")

    def source(self, on_event: OnEvent = ignore) -> Source:
        """The disk that is shipped."""
        if self.opens is not None:
            return self.opens
        return ImageAtRest(self.image, format=self.format, image_dirs=self.image_dirs, on_event=on_event)

    @contextmanager
    def chain(self, on_event: OnEvent = ignore) -> Iterator[ImageChain]:
        """What is to be shipped of the image, locked; the top is no part of it where only what is sealed is meant.

        Raises Conflict for a disk that was given to another host.
        """
        source = self.source(on_event)
        with source.opened(self.scope) as chain:
            if not self.though_given:
                source.check_not_given(chain)
            yield chain
