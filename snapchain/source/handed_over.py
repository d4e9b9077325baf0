"""The handover by which this host became a disk's master, as the replica's catalogue records it.

The guest's overlay lies in a directory of the replica, and the catalogue of the disk in the one above it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, TypeVar

from blake3 import blake3
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unsupported
from snapchain.host.files import read_small
from snapchain.host.replica_layout import ACTIVE, CATALOGUE
from snapchain.model.disk_name import LARGEST_EPOCH

_LARGEST = 16 << 20
_CHECK = re.compile(rb',\n "check": "([0-9a-f]{64})"\n}\n\Z')
M = TypeVar("M", bound=BaseModel)


class HandedOver(BaseModel):
    """The disk was given to this host. token: of the handover; overlay: the file that its guest writes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
    epoch: int = Field(ge=2, le=LARGEST_EPOCH)
    overlay: Annotated[str, StringConstraints(max_length=300)]
    time: AwareDatetime


class _Catalogue(BaseModel):
    """The only field that is needed here."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    handover: HandedOver | None = None


def epoch_of_overlay(path: Path) -> int:
    """The epoch in which a disk was handed over to this host, for a file in the `active` directory of a replica's disk.

    1 for all other files, and where nothing was handed over. Raises Corrupt for a catalogue that cannot be read.
    """
    handover = _handover(path)
    return 1 if handover is None else handover.epoch


def epoch_handed(path: Path) -> int:
    """As `epoch_of_overlay`, but only for the file that was made for the guest at that handover."""
    handover = _handover(path)
    return 1 if handover is None or handover.overlay != f"{ACTIVE}/{path.name}" else handover.epoch


def _handover(path: Path) -> HandedOver | None:
    if path.parent.name != ACTIVE:
        return None
    catalogue = read_checked(_Catalogue, path.parent.parent / CATALOGUE, cap=_LARGEST)
    return None if catalogue is None else catalogue.handover


def read_checked(shape: type[M], path: Path, *, cap: int) -> M | None:
    """A small JSON file of snapchain's own, of at most `cap` bytes; None when it is not there.

    Its last field, `check`, is the BLAKE3 of everything before it. Without it a damaged label or time would look
    valid, and a point would be found by it. A file without the field is older than that.
    Raises Corrupt, Unsupported for one of a newer snapchain (a higher `format`, or an unknown field where the check is
    right), and InvalidInput for a user who may not read it.
    """
    try:
        text = read_small(path, cap=cap)
    except NotFound:
        return None
    except InvalidInput as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        raise Corrupt(error.message, subject=path) from error
    check = _CHECK.search(text)
    if check is not None:
        if blake3(text[: check.start()]).hexdigest().encode() != check[1]:
            raise Corrupt("it is not what was written: its check is wrong", subject=path)
        text = text[: check.start()] + b"}"
    try:
        return shape.model_validate_json(text)
    except ValidationError as error:
        raise _judged(error, path, is_proven=check is not None) from error


def _judged(error: ValidationError, path: Path, *, is_proven: bool) -> SnapchainError:
    found = error.errors(include_url=False, include_context=False)
    for each in found:
        is_format = each["loc"] == ("format",) and each["type"] == "literal_error"
        is_higher = is_format and type(each["input"]) is int and each["input"] > 0
        if is_higher or (is_proven and each["type"] == "extra_forbidden"):
            return Unsupported(
                "it was written by a newer snapchain",
                subject=path,
                hint="use that version, or a newer one, on the host that has this file",
            )
    return Corrupt(f"it is unsound: {found[0]['loc']}: {found[0]['msg']}", subject=path)
