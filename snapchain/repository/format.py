"""The names, numbers and binary rows of a repository.  docs/format.md describes every byte of it.

    config                        what the repository is; plain JSON, bound to every key slot
    keys/SLOT                     a wrapped master key; JSON
    slots/GENERATION              which key slots there are, and which were removed
    packs/AA/PACK                 blobs: guest data, or pages of layer records
    index/ERA-NAME                which blob lies where
    index/damaged-NAME            packs that were found damaged
    index/condemned-NAME          packs and layers that are to be deleted
    index/awaited-NAME            for whose leases that waits
    index/sampled-NAME            some ids of each index, to find the right ones by
    verified/NAME                 packs and layers that were read and found good, and when
    layers/LAYER                  one layer: its header and the table of its pages
    disks/DISK/GENERATION         the catalogue of one disk: its points and their layers
    reads/DISK                    what clients of a served point of the disk read first
    guests/GUEST/NUMBER           a step of a guest from one state to another: who may run it
    leases/MODE-NAME              who is at work; put again as long as he is
    witness                       made once: a store that lets it be made again ignores conditions
    NAME.claim.NONCE              a writer's claim on NAME, on stores that ignore them

Everything but `config`, `keys/`, `witness` and claims is sealed.  Everything but leases is written once under a fresh
name and never changed; a disk changes by one create-if-absent of its next catalogue generation.
"""

from __future__ import annotations

import re
import secrets

import numpy as np

FORMAT = 1

ID_BYTES = 32
"""Blob ids: keyed BLAKE3, or BLAKE3 keyed by a public key where there is no encryption."""

PACK_ID_BYTES = 16
"""Packs and layers are named by 16 random bytes in hex."""

MIN_BLOCK_BYTES = 64 * 1024
MAX_BLOCK_BYTES = 1024 * 1024
PACK_BYTES = 16 * 1024 * 1024
"""The most that a pack has, unless the repository or the command says otherwise; one object, one PUT, never a multipart
upload. Indexes keep to the same limit."""
MIN_PACK_BYTES = 512 * 1024
MAX_PACK_BYTES = 128 * 1024 * 1024

BLOB_ROW = np.dtype([("pack", "<u4"), ("offset", "<u4"), ("stored", "<u4"), ("raw", "<u4")])
"""Where a blob lies: place of its pack in a table beside, offset, stored bytes (tag included), plain bytes."""

RUN_ROW = np.dtype(
    [
        ("start", "<u8"),
        ("length", "<u8"),
        ("id", "u1", (ID_BYTES,)),
        ("pack", "<u4"),
        ("offset", "<u4"),
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("skip", "<u4"),
    ]
)
"""A run of a layer: guest bytes [start, start+length) are plain bytes [skip, skip+length) of a blob.

A run with stored == 0 is ZERO and names no blob.
"""

LEAF_ROW = np.dtype([("index", "<u8"), ("hash", "u1", (32,))])
PAGE_ROW = np.dtype(
    [
        ("first", "<u8"),
        ("stop", "<u8"),
        ("id", "u1", (ID_BYTES,)),
        ("pack", "u1", (PACK_ID_BYTES,)),
        ("offset", "<u4"),
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("data", "<u8"),
        ("zero", "<u8"),
    ]
)
"""A page of a layer record: the guest range it speaks of, the blob that holds it, its DATA and ZERO bytes."""

VERIFIED_ROW = np.dtype([("id", "u1", (PACK_ID_BYTES,)), ("time", "<u8")])
"""A pack or a layer that was found good, and when: seconds since 1970."""

FIRST_READS_ROW = np.dtype([("first", "<u8"), ("count", "<u8")])
"""Leaves that were read: the first, and how many."""

_INDEX = re.compile(r"index/([0-9]{10})-[0-9a-f]{32}")
_DAMAGE = re.compile(r"index/damaged-[0-9a-f]{32}")
_CONDEMNED = re.compile(r"index/condemned-[0-9a-f]{32}")
_AWAITED = re.compile(r"index/awaited-[0-9a-f]{32}")
_SAMPLES = re.compile(r"index/sampled-[0-9a-f]{32}")
_VERIFIED = re.compile(r"verified/[0-9a-f]{32}")
_HEX16 = re.compile(r"[0-9a-f]{32}")


def fresh_id() -> str:
    """32 hex digits that nobody has used before."""
    return secrets.token_hex(PACK_ID_BYTES)


def is_id(text: str) -> bool:
    """Whether `text` may name a pack, a layer or a disk."""
    return _HEX16.fullmatch(text) is not None


def pack_name(pack: str) -> str:
    """Object name of a pack; 256 folders keep directories of local repositories small."""
    return f"packs/{pack[:2]}/{pack}"


def index_name(era: int, name: str) -> str:
    """Object name of an index."""
    return f"index/{era:010d}-{name}"


def index_era(name: str) -> int | None:
    """The era of an index object; None for a name that is none's."""
    found = _INDEX.fullmatch(name)
    return int(found[1]) if found else None


def damage_name(name: str) -> str:
    """Object name of a record of damaged packs; below index/, so that one listing shows both."""
    return f"index/damaged-{name}"


def is_damage(name: str) -> bool:
    """Whether an object is a record of damaged packs."""
    return _DAMAGE.fullmatch(name) is not None


def condemned_name(name: str) -> str:
    """Object name of a list of packs and layers that are to be deleted; below index/, as `damage_name`."""
    return f"index/condemned-{name}"


def is_condemned(name: str) -> bool:
    """Whether an object lists packs and layers that are to be deleted."""
    return _CONDEMNED.fullmatch(name) is not None


def awaited_name(name: str) -> str:
    """Object name of a record of the leases for which a deletion waits."""
    return f"index/awaited-{name}"


def is_awaited(name: str) -> bool:
    """Whether an object says for which leases a deletion waits."""
    return _AWAITED.fullmatch(name) is not None


def samples_name(name: str) -> str:
    """Object name of samples of indexes; below index/, as `damage_name`."""
    return f"index/sampled-{name}"


def is_samples(name: str) -> bool:
    """Whether an object has samples of indexes."""
    return _SAMPLES.fullmatch(name) is not None


def verified_name(name: str) -> str:
    """Object name of a record of what was verified."""
    return f"verified/{name}"


def first_reads_name(disk: str) -> str:
    """Object name of the record of what clients of a disk read first."""
    return f"reads/{disk}"


def is_verified(name: str) -> bool:
    """Whether an object is a record of what was verified."""
    return _VERIFIED.fullmatch(name) is not None


def layer_name(layer: str) -> str:
    """Object name of a layer record."""
    return f"layers/{layer}"


def generation_name(disk: str, generation: int) -> str:
    """Object name of a catalogue generation; 20 digits sort as numbers."""
    return f"disks/{disk}/{generation:020d}"
