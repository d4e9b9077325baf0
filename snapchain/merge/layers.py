"""Which files of a chain the user means: everything above the root, or a range by names or paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snapchain.errors import InvalidInput, NotFound
from snapchain.host.directory import real_path
from snapchain.image import ImageChain
from snapchain.merge.journal import MergeJournal


def numbers(
    chain: ImageChain,
    *,
    flatten: bool,
    from_layer: str | None,
    to_layer: str | None,
    journals: Sequence[MergeJournal],
) -> tuple[int, int]:
    """(lowest, uppermost) input, the root is 0. Raises NotFound, InvalidInput."""
    top = len(chain.files) - 1
    last = top if to_layer is None else _number(chain, to_layer, journals)
    if from_layer is not None:
        first = _number(chain, from_layer, journals)
    else:
        first = 0 if flatten else min(1, last)
    if first > last:
        raise InvalidInput(
            f"{from_layer} lies above {to_layer or 'the top'}",
            subject=chain.top.path,
            hint="swap --from and --to",
        )
    return first, last


def _number(chain: ImageChain, layer: str, journals: Sequence[MergeJournal]) -> int:
    """The file of the chain that the user means by a path, or by a bare name."""
    whole = real_path(Path(layer))
    bare = "/" not in layer
    found = [number for number, file in enumerate(chain.files) if file.real_path == whole]
    if not found and bare:
        found = [number for number, file in enumerate(chain.files) if layer in (file.path.name, file.real_path.name)]
    if len(found) > 1:
        raise InvalidInput("more than one layer has this name", subject=layer, hint="give its path")
    if found:
        return found[0]
    # The same command again, after one that was killed past its switch: the layer is part of that merge's result.
    paths = [file.real_path for file in chain.files]
    for journal in journals:
        for path in (journal.lowest, *(entry.path for entry in journal.remove)):
            if journal.replaced.path in paths and (path == whole or (bare and path.name == layer)):
                return paths.index(journal.replaced.path)
    names = ", ".join(file.path.name for file in chain.files)
    raise NotFound(f"no such layer in the chain of {chain.top.path}", subject=layer, hint=f"it holds: {names}")
