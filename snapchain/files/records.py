"""What the child says, checked: it may have been taken over by the file system that it reads."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from snapchain.files.node import NodeKind
from snapchain.files.volumes import Content

MOST_NAME = 255
_MOST_DEPTH = 256
_Number = Annotated[int, Field(ge=0, lt=1 << 63)]
_Id = Annotated[int, Field(ge=0, lt=1 << 64)]
_Time = Annotated[int, Field(gt=-(1 << 72), lt=1 << 72)]
_Names = Annotated[tuple[str, ...], Field(max_length=_MOST_DEPTH)]
_Hexadecimal = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$")]


class _Said(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Entry(_Said):
    """A node. path: its names, from where the walk began; same_as: the path of the first name of this file

    attributes: extended attributes, in hexadecimal. The rest is as in `node.Facts`.
    """

    path: _Names
    kind: NodeKind
    id: _Id
    size: _Number
    mode: Annotated[int, Field(ge=0, le=0o7777)] | None = None
    uid: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    gid: Annotated[int, Field(ge=0, lt=1 << 32)] | None = None
    links: _Number = 1
    mtime: _Time | None = None
    atime: _Time | None = None
    ctime: _Time | None = None
    crtime: _Time | None = None
    target: Annotated[str, Field(max_length=4096)] | None = None
    same_as: _Names | None = None
    attributes: dict[str, _Hexadecimal] | None = None


class Problem(_Said):
    """What was left out, and why."""

    path: _Names
    words: Annotated[str, Field(max_length=2000)]


class VolumeSaid(_Said):
    """A volume, as it is listed."""

    name: Annotated[str, Field(max_length=600)]
    size: _Number
    content: Annotated[Content, Field(strict=False)]
    trouble: str | None


class Opened(_Said):
    """dirty: whether the journal has to be replayed"""

    dirty: bool


class Walked(_Said):
    """path: where the walk began, links resolved"""

    path: tuple[str, ...]


class Failure(_Said):
    """Why a command failed. kind: of the error"""

    kind: str
    words: str


VOLUMES = TypeAdapter(list[VolumeSaid])
MISSING = TypeAdapter(list[str])


def trouble_of(name: str) -> str | None:
    """Why no file here can have this name; None for one that can."""
    if not name or name in {".", ".."} or "/" in name or "\0" in name:
        return "no file can have this name"
    if len(name.encode("utf-8", "surrogateescape")) > MOST_NAME:
        return f"its name is longer than {MOST_NAME} bytes"
    return None
