"""The fields that messages share: what a name, a time, an id may be, and how much of each there may be.

Records of a replica that keep what a message brought have the same fields.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import AfterValidator, AwareDatetime, Field, StringConstraints

from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.fingerprint import SHORT_KEY_BYTES
from snapchain.replica.names import is_layer_name

LARGEST_DISK = 1 << 56
"""Bytes; see docs/format.md: no signed offset may overflow with two of these added."""
MAX_RUNS = 1 << 22
"""Of a layer's map."""
LARGEST_NUMBER = 1 << 53
"""Of a point: what a program in any language counts exactly."""
MOST_POINTS = 30_000
"""Of one disk at a replica: one a night for 80 years. Of a whole answer, too: 6 KiB each until they are shown."""
POINTS_AT_ONCE = 256
"""In one DISK frame; each may have a hundred labels of a hundred characters."""
MOST_HOLDS = 100
"""Of one point."""
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
LayerId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Instant = LayerId
"""One for all points of a guest point."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a label holds control characters")
    return text


def _file_name(text: str) -> str:
    if not is_layer_name(text):
        raise ValueError(f"a layer cannot be named {text!a}")
    return text


def _of_a_calendar(time: datetime) -> datetime:
    """In UTC. No time zone, and no rule that counts days, leaves the calendar from there."""
    try:
        time = time.astimezone(UTC)
    except OverflowError:
        raise ValueError("no calendar has this time") from None
    if not 1970 <= time.year <= 9990:
        raise ValueError("a time is from 1970 to 9990")
    return time


Printable = AfterValidator(_printable)
Label = Annotated[str, StringConstraints(min_length=1, max_length=100), Printable]
FileName = Annotated[str, StringConstraints(max_length=255), AfterValidator(_file_name)]
"""Of a layer at a replica: a name without a directory, plain in every shell and for QEMU."""
Epoch = Annotated[int, Field(ge=1, le=LARGEST_EPOCH)]
PointNumber = Annotated[int, Field(ge=1, le=LARGEST_NUMBER)]
Moment = Annotated[AwareDatetime, AfterValidator(_of_a_calendar)]
MOST_OLDER = 1 << 14
"""Files of one layer: one a night for 44 years."""
ShortKeys = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{16})*$", max_length=MOST_OLDER * SHORT_KEY_BYTES * 2)]
"""Hexadecimal keys of files, one after the other (model/fingerprint.py `short_key`)."""
