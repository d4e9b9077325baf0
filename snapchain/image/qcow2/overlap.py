"""No host byte has two owners: every table and every cluster claims its place in the file, and no claims may meet.

Overlaps are found without pairing claims up: intervals are disjoint exactly when, both sorted on their own, no end
lies behind the next start.  So a check costs two sorts of integers, in place, whatever the order of the claims.

Compressed clusters may share a host cluster with each other (that is the format's way of packing them), but with
nobody else; so they claim the host clusters that they touch, each once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from snapchain.errors import Corrupt
from snapchain.image.physical import Int64s, Mask, Runs

DATA_CLUSTER = "a data cluster"
COMPRESSED_DATA = "compressed data"


@dataclass(frozen=True, slots=True)
class _Claim:
    owner: str
    start: Int64s
    end: Int64s | int
    """One past each claim's last byte, or the length of every one of them."""

    @property
    def ends(self) -> Int64s:
        return self.start + self.end if isinstance(self.end, int) else self.end

    def holders(self, at: int) -> int:
        """How many of the claims hold this byte."""
        ended = self.start <= at - self.end if isinstance(self.end, int) else self.end <= at
        return int((self.start <= at).sum()) - int(ended.sum())


class Claims:
    """Who owns which bytes of one file."""

    def __init__(self, cluster_bits: int, *, subject: object) -> None:
        self._bits = cluster_bits
        self._subject = subject
        self._claims: list[_Claim] = []
        self._touched: list[Int64s] = []
        self._checked = 0

    def table(self, owner: str, offset: int, length: int) -> None:
        """One contiguous table; its last cluster is its own to the end."""
        if length:
            self.tables(owner, np.array([offset], np.int64), -(-length >> self._bits) << self._bits)

    def tables(self, owner: str, offsets: Int64s, length: int) -> None:
        """Many tables of one length."""
        self._claims.append(_Claim(owner, offsets, length))

    def data(self, offsets: Int64s) -> None:
        """Data clusters, at these offsets in guest order; neighbours that are contiguous are kept as one claim."""
        if len(offsets):
            size = 1 << self._bits
            joined = np.diff(offsets) == size
            start, last = offsets[np.append(True, ~joined)], offsets[np.append(~joined, True)]
            self._claims.append(_Claim(DATA_CLUSTER, start, last + size))

    def compressed(self, runs: Runs) -> None:
        """Compressed clusters, by the bytes that they may occupy."""
        first = runs.host >> self._bits
        last = (runs.host + runs.stored - 1) >> self._bits
        # At most twice the size of a cluster: three host clusters.
        self._touched.append(np.unique(np.concatenate([first, np.minimum(first + 1, last), last])))

    def check(self) -> None:
        """Raises Corrupt naming the owners of the first bytes that two claim."""
        claims = [*self._claims, *self._packed()]
        if len(claims) == self._checked:
            return
        self._checked = len(claims)
        start = np.concatenate([claim.start for claim in claims])
        start.sort()
        end = np.concatenate([claim.ends for claim in claims])
        end.sort()
        meets = end[:-1] > start[1:]
        if meets.any():
            at = int(start[1 + int(meets.argmax())])
            raise Corrupt(self._contested(claims, at), subject=self._subject)

    def owned(self, offsets: Int64s) -> Mask:
        """Which of these bytes of the file have an owner; after `check`."""
        claims = [*self._claims, *self._packed()]
        start = np.sort(np.concatenate([claim.start for claim in claims]))
        end = np.sort(np.concatenate([claim.ends for claim in claims]))
        # The header owns offset 0, so every offset has a claim that starts at or before it.
        return offsets < end[start.searchsorted(offsets, side="right") - 1]

    def _packed(self) -> list[_Claim]:
        if not self._touched:
            return []
        touched = np.unique(np.concatenate(self._touched))
        return [_Claim(COMPRESSED_DATA, touched << self._bits, 1 << self._bits)]

    @staticmethod
    def _contested(claims: list[_Claim], at: int) -> str:
        owners: list[str] = []
        for claim in claims:
            owners += [claim.owner] * min(claim.holders(at), 2)
        if owners[0] == owners[-1] and owners[0] == DATA_CLUSTER:
            return f"the host cluster at offset {at} is referenced twice"
        return f"overlap: offset {at} of the file is part of {' and of '.join(owners[:2])}"


def check_compressed_starts(host: Int64s, *, subject: object) -> None:
    """Raises Corrupt when two compressed clusters begin at the same byte."""
    ordered = np.sort(host)
    twice = ordered[1:] == ordered[:-1]
    if twice.any():
        at = int(ordered[1 + int(twice.argmax())])
        raise Corrupt(f"the compressed cluster at offset {at} is referenced twice", subject=subject)
