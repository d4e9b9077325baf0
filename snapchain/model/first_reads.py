"""What clients of a served point read first: recorded, and fetched ahead when a point of the disk is served again.

    reads      leaf 7, leaf 8, leaf 2, leaf 7        of 64 KiB, by a guest that boots
    recorded   (7, 2), (2, 1)                        in order, each leaf once

It names ranges of the guest, not blobs: a later point of the disk has other blobs in the same places.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from snapchain.model.content import LEAF_BYTES

MOST_LEAVES = (256 << 20) // LEAF_BYTES
"""Of a recording. A boot reads less; a program that copies the disk reads more, and is cut off here."""
_KNOWN_SHARE = 0.9
_LOOK_SHARE = 0.25

FirstReads = tuple[tuple[int, int], ...]
"""Runs (first leaf, number of leaves), in the order in which they were read; each leaf once."""


def joined(leaves: Iterable[int]) -> FirstReads:
    """The runs of some leaves, in their order."""
    found: list[list[int]] = []
    for leaf in leaves:
        if found and found[-1][0] + found[-1][1] == leaf:
            found[-1][1] += 1
        else:
            found.append([leaf, 1])
    return tuple((first, count) for first, count in found)


def size_of(reads: FirstReads) -> int:
    """Leaves."""
    return sum(count for _, count in reads)


def portions(reads: FirstReads, most: int) -> Iterator[FirstReads]:
    """The same leaves in the same order, in portions of `most`; the last one has what is left."""
    portion: list[tuple[int, int]] = []
    room = most
    for first, count in reads:
        at = first
        while at < first + count:
            some = min(room, first + count - at)
            portion.append((at, some))
            at += some
            room -= some
            if not room:
                yield tuple(portion)
                portion, room = [], most
    if portion:
        yield tuple(portion)


def replaces(new: FirstReads, old: FirstReads) -> bool:
    """Whether a recording is to be stored in the place of the one that is there.

    Not where the old one has most of it already, and not where it is so short beside the old one that somebody only
    looked at the disk.
    """
    count = size_of(new)
    if not count or count < _LOOK_SHARE * size_of(old):
        return False
    known = {leaf for first, some in old for leaf in range(first, first + some)}
    again = sum(leaf in known for first, some in new for leaf in range(first, first + some))
    return again < _KNOWN_SHARE * count
