"""By what a replica and a sender know a file again."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from snapchain.image import ImageFile
from snapchain.model.fingerprint import Fingerprint, same_file
from snapchain.model.inventory import Wanted
from snapchain.replica.catalogue import ShortKey, short_key
from snapchain.replica.stream.messages import MAX_LAYERS


def keys(parts: Iterable[Hashable]) -> tuple[Fingerprint, ...]:
    """The parts of merged files that are files, as a stream names them."""
    return tuple(part for part in parts if isinstance(part, Fingerprint))


def sources_of(files: Sequence[ImageFile], rest: tuple[Fingerprint, ...]) -> tuple[Fingerprint, ...]:
    """What a layer of these files says that it was made of.

    rest: parts of the first one that the replica lacks, which stand for it then: together with those that it has they
    are what the files' lineage says, and so they are known again
    """
    own = tuple(file.fingerprint for file in files)
    found = (*rest, *own[1:]) if rest else own
    return found if len(found) <= 2 * MAX_LAYERS else own


def wanted(file: ImageFile, lineage: Sequence[Wanted]) -> Wanted:
    """A file of the chain, with what a merge has made it of where that is known."""
    source = file.fingerprint
    return next((known for known in lineage if same_source(source, known.source)), Wanted(source))


def same_source(mine: object, theirs: object) -> bool:
    """As model.fingerprint.same_file; `mine` may also be the short key of a file."""
    if isinstance(mine, ShortKey):
        return isinstance(theirs, Fingerprint) and theirs.size > 0 and short_key(theirs) == mine
    return same_file(mine, theirs)
