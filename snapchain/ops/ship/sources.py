"""By what a replica and a sender know a file again: one key, told by the stream, by notes, and by the open file."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from snapchain.image import ImageFile
from snapchain.image.fingerprint import Fingerprint
from snapchain.model.inventory import Wanted
from snapchain.model.source import Source as NotedSource
from snapchain.replica.catalogue import ShortKey, short_key
from snapchain.replica.stream.messages import MAX_LAYERS, Source


def source_of(file: ImageFile) -> Source:
    """The key by which a replica knows a file again."""
    mark = file.fingerprint
    return Source(inode=mark.inode, size=mark.size, mtime_ns=mark.mtime_ns, ctime_ns=mark.ctime_ns)


def keys(parts: Iterable[Hashable]) -> tuple[Source, ...]:
    """Parts of merged files, as a stream says them."""
    return tuple(Source(**part.model_dump()) for part in parts if isinstance(part, Source | NotedSource))


def sources_of(files: Sequence[ImageFile], rest: tuple[Source, ...]) -> tuple[Source, ...]:
    """What a layer of these files says that it was made of.

    rest: parts of the first one that the replica lacks, which stand for it then: together with those that it has they
    are what the files' lineage says, and so they are known again
    """
    own = tuple(source_of(file) for file in files)
    found = (*rest, *own[1:]) if rest else own
    return found if len(found) <= 2 * MAX_LAYERS else own


def wanted(file: ImageFile, lineage: Sequence[Wanted]) -> Wanted:
    """A file of the chain, with what a merge has made it of where that is known."""
    source = source_of(file)
    return next((known for known in lineage if same_source(source, known.source)), Wanted(source))


def same_source(mine: object, theirs: object) -> bool:
    """Whether two Sources, of a stream or of notes, are of one file, which nobody has written to in between.

    mine: may also be the short key of one
    """
    if isinstance(mine, ShortKey):
        return isinstance(theirs, Source | NotedSource) and theirs.size > 0 and short_key(theirs) == mine
    if not isinstance(mine, Source | NotedSource) or not isinstance(theirs, Source | NotedSource) or not mine.size:
        return False
    return Fingerprint(**mine.model_dump()).same_content_as(Fingerprint(**theirs.model_dump()))
