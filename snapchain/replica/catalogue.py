"""The catalogue of a disk at a replica: its chain, its points, and who may write it; one small JSON file.

Each change is the next generation, put in the place of the one before by a rename: a reader, or a crash, sees one or
the other.  Files that it does not name are not part of the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

from blake3 import blake3
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from snapchain.errors import Unsupported
from snapchain.host.files import directory_of, write_in
from snapchain.model.consistency import Consistency
from snapchain.model.content import Sum, content_id, decode_sum
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.fingerprint import SHORT_KEY_BYTES, Fingerprint, ShortKey, short_key
from snapchain.model.inventory import MAX_LAYERS
from snapchain.replica.access import Access
from snapchain.replica.stream.fields import MOST_HOLDS, MOST_OLDER, Digest, Instant, Label, LayerId, PointNumber
from snapchain.replica.stream.messages import OF_GUEST_POINTS, HeldLayer, Hold, Terse
from snapchain.source.handed_over import HandedOver, read_checked

LARGEST_FILE = 16 << 20
"""Bytes of a record: no more are ever read, so no more are ever written."""
FOR_A_POINT, FOR_CHANGES = 512 << 10, 512 << 10
"""What a new layer leaves free in the catalogue for a point on it, and both leave for merges and handovers."""

M = TypeVar("M", bound=BaseModel)


class Layer(HeldLayer):
    """A layer in place. time: when it came; cluster_size: of its file, bytes; data_bytes: DATA of its map."""

    time: AwareDatetime
    cluster_size: int
    data_bytes: int

    def sum(self) -> Sum:
        """uint16[1024]: of the chain up to here."""
        return decode_sum(self.content_sum)


class Point(Terse):
    """A moment of the disk. layer: the top of the chain that gives it; size: virtual, bytes; holds: why it stays.

    instant, consistency: of the guest point that it belongs to
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    newer = OF_GUEST_POINTS

    point: PointNumber
    time: AwareDatetime
    labels: tuple[Label, ...] = ()
    layer: LayerId
    size: int = Field(ge=0)
    content_id: Digest
    holds: tuple[Hold, ...] = Field(default=(), max_length=MOST_HOLDS)
    instant: Instant | None = None
    consistency: Consistency | None = None


class Catalogue(BaseModel):
    """One generation.

    format: 3 while a point belongs to a guest point, 2 while one is held, else 1: a snapchain that does not know holds
        must not drop a held point, and one that does not know guest points must not tear one; each refuses the file by
        its format
    layers: root first, each lying on the one before; epoch: who may write the disk, grows at each failover
    handover: by which this host became its master, None where it is a replica only
    taken_back: the token of the last handover that is void, whether it had come to that or not
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    format: Literal[1, 2, 3] = 1
    disk: Annotated[str, StringConstraints(min_length=1, max_length=250)]
    generation: int = Field(ge=1)
    time: AwareDatetime
    epoch: int = Field(ge=1, le=LARGEST_EPOCH)
    next_point: PointNumber
    layers: tuple[Layer, ...] = Field(default=(), max_length=MAX_LAYERS)
    points: tuple[Point, ...] = ()
    handover: HandedOver | None = None
    taken_back: LayerId | None = None

    @model_validator(mode="after")
    def _sound(self) -> Self:
        numbers = [*(point.point for point in self.points), self.next_point]
        if any(upper <= lower for lower, upper in pairwise(numbers)):
            raise ValueError("its points do not ascend")
        if self.format != _format_of(self.points):
            raise ValueError("its format is not the one of what it holds")
        known = {layer.id: layer for layer in self.layers}
        if len(known) < len(self.layers) or len({layer.file for layer in self.layers}) < len(self.layers):
            raise ValueError("two of its layers have one name")
        for point in self.points:
            layer = known.get(point.layer)
            if layer is None or (layer.size, layer.content_id) != (point.size, point.content_id):
                raise ValueError(f"its point {point.point} is not what its layer shows")
        for layer in self.layers:
            if content_id(layer.size, layer.sum()) != layer.content_id:
                raise ValueError(f"layer {layer.file} contradicts itself")
        return self

    @property
    def tip(self) -> Layer | None:
        """The uppermost layer."""
        return self.layers[-1] if self.layers else None

    @property
    def latest(self) -> Point | None:
        """The newest point."""
        return self.points[-1] if self.points else None

    def after(self, **change: object) -> Catalogue:
        """The next generation, with some fields changed."""
        fields: dict[str, object] = dict(self)
        fields.update(change)
        points: tuple[Point, ...] = fields["points"]  # type: ignore[assignment]
        fields["format"] = _format_of(points)
        fields.update(generation=self.generation + 1, time=datetime.now(UTC))
        return Catalogue.model_validate(fields)


def _format_of(points: Sequence[Point]) -> Literal[1, 2, 3]:
    if any(point.instant is not None or point.consistency is not None for point in points):
        return 3
    return 2 if any(point.holds for point in points) else 1


def empty_catalogue(disk: str) -> Catalogue:
    """Of a disk that has nothing yet."""
    return Catalogue(disk=disk, generation=1, time=datetime.now(UTC), epoch=1, next_point=1)


def read_record(shape: type[M], path: Path) -> M | None:
    """A small JSON file of snapchain's own; errors as `read_checked`."""
    return read_checked(shape, path, cap=LARGEST_FILE)


def write_record(path: Path, record: BaseModel, *, access: Access, reserve: int = 0) -> None:
    """Replace such a file, durably. access: who may read it; reserve: bytes that it leaves free for what may follow.

    Raises Unsupported for one that would be too large to be read again; then nothing is changed.
    """
    text = _encoded(record)
    _check_size(len(text), subject=path, reserve=reserve)
    with directory_of(path) as directory:
        write_in(directory, path.name, text, prepare=lambda fd: access.give(fd, access.record))


def check_room_for_layer(catalogue: Catalogue, layer: Layer, *, subject: object) -> None:
    """Raises Unsupported for a layer that would leave no room in the catalogue for a point on it."""
    grown = catalogue.model_copy(update={"layers": (*catalogue.layers, layer)})
    _check_size(len(_encoded(grown)), subject=subject, reserve=FOR_A_POINT + FOR_CHANGES)


def _check_size(size: int, *, subject: object, reserve: int) -> None:
    if size > LARGEST_FILE - reserve:
        raise Unsupported(
            f"this record would have {size} bytes, and no more than {LARGEST_FILE - reserve} are allowed",
            subject=subject,
            hint="merge points away (`snapchain merge DEST::DISK --keep-last N`), use fewer or shorter labels, or send "
            "under another disk name",
        )


def _encoded(record: BaseModel) -> bytes:
    text = record.model_dump_json(indent=1).encode().removesuffix(b"\n}")
    check = blake3(text).hexdigest().encode()
    return b'%b,\n "check": "%b"\n}\n' % (text, check)


# --- The files that a layer was made of, when there are too many to list in full: a hash of 8 bytes each.
#
# A layer that absorbs one more each night for years is made of thousands of files. The newest are listed in full, the
# older ones by a hash. A hash is only compared with one file at one position, so 64 bits are enough.


def keys_of(layer: HeldLayer) -> tuple[ShortKey | Fingerprint, ...]:
    """All files that a layer was made of, lowest first; none where that is not known."""
    raw = bytes.fromhex(layer.older)
    edges = pairwise(range(0, len(raw) + 1, SHORT_KEY_BYTES))
    return (*(ShortKey(raw[first:stop]) for first, stop in edges), *layer.sources)


def joined(members: Sequence[HeldLayer]) -> tuple[str, tuple[Fingerprint, ...]]:
    """(`older`, `sources`) of a layer that several became, lowest first; none where one of them has none."""
    parts = [keys_of(layer) for layer in members]
    found = [key for part in parts for key in part]
    if not all(parts) or len(found) > MOST_OLDER:
        return "", ()
    whole: list[Fingerprint] = []
    for key in found[: -2 * MAX_LAYERS - 1 : -1]:
        if isinstance(key, ShortKey):
            break
        whole.append(key)
    older = found[: len(found) - len(whole)]
    raw = b"".join((key if isinstance(key, ShortKey) else short_key(key)).raw for key in older)
    return raw.hex(), tuple(reversed(whole))
