"""What is said when a point is fetched: FETCH from who wants it, layers from the replica."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from snapchain.replica.stream.frames import FROM_RECEIVER, FROM_SENDER, Kind
from snapchain.replica.stream.messages import Said

FETCHED: Mapping[Kind, int] = {
    **{kind: FROM_RECEIVER[kind] for kind in (Kind.HELLO, Kind.BEAT, Kind.FAIL, Kind.DONE, Kind.PROGRESS)},
    **{kind: FROM_SENDER[kind] for kind in (Kind.LAYER, Kind.MAP, Kind.DATA, Kind.END)},
    Kind.DISK: 64 * 1024,
}
"""The longest body of each kind that may come in the answer to FETCH."""


class Fetch(Said):
    """A point is wanted, in the place of OPEN; nothing is made or changed over there.

    point: as in an address, None for the latest; chain: its layers as they are, else one that shows all of it
    look: no data, only what there is; plain: no compression, for two ends on one machine; replica: as in Open
    """

    disk: str = Field(min_length=1, max_length=250)
    point: str | None = Field(default=None, min_length=1, max_length=250)
    replica: str | None = Field(default=None, max_length=4096)
    chain: bool = False
    look: bool = False
    plain: bool = False
