"""In what kinds of destination rightly differ: use cases ask these, and never which kind it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What a destination is and can do.

    kind: the word for people
    bootable_files: its points are files that a guest can start from
    deduplicates: equal blocks of different disks are stored once
    needs_collecting: space of dropped points is given back by `gc` alone
    branches: the points of one disk may lie on different chains; False: a disk is one chain
    encrypts: it may be encrypted, and then needs a passphrase
    has_id: it has an id, by which this machine knows it again
    names_damage: each range of a point is proven as it is read, so that a damaged one can be named, and left out
    streams: layers reach it over a stream, by one connection or several, and in an epoch that says who may write a disk
    """

    kind: str
    bootable_files: bool
    deduplicates: bool
    needs_collecting: bool
    branches: bool
    encrypts: bool
    has_id: bool
    names_damage: bool
    streams: bool


REPOSITORY = Traits(
    kind="repository",
    bootable_files=False,
    deduplicates=True,
    needs_collecting=True,
    branches=True,
    encrypts=True,
    has_id=True,
    names_damage=True,
    streams=False,
)
REPLICA = Traits(
    kind="replica",
    bootable_files=True,
    deduplicates=False,
    needs_collecting=False,
    branches=False,
    encrypts=False,
    has_id=False,
    names_damage=False,
    streams=True,
)
