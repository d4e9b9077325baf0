"""The inputs of a merge: which files a request names, what may be merged, which of them go and which stay, and why."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import Conflict, InvalidInput, NotFound, Unsupported
from snapchain.host.path_resolution import real_path
from snapchain.host.replica_layout import layers_of
from snapchain.host.terminal import counted, shell_word
from snapchain.image import ImageChain, ImageFile
from snapchain.image.dependent_search import Dependents, is_outside
from snapchain.image.dependents import SEEN
from snapchain.merge.journal import MergeJournal
from snapchain.merge.request import MergeRequest
from snapchain.source.lineage import check_range, held_layers
from snapchain.source.notes import Notes
from snapchain.source.ownership import check_no_layer, check_not_given

_REMEDY = " (--remove FILE removes it)"


class KeptFile(BaseModel):
    """An input that stays, and why."""

    model_config = ConfigDict(frozen=True)

    path: Path
    reason: str


def check(inputs: Sequence[ImageFile], journals: Sequence[MergeJournal], *, keep_inputs: bool) -> None:
    """Raises Unsupported for inputs with something besides their data that a merge would lose."""
    for file in inputs:
        if file.header is not None and file.header.snapshots:
            raise Unsupported(
                f"it holds {counted(file.header.snapshots, 'internal snapshot')}, which a merge would lose",
                subject=file.path,
                hint="`qemu-img snapshot -l` lists them, `-d` deletes one",
            )
        file.check_may_be_changed()
        status = os.fstat(file.fileno())
        if not status.st_nlink:  # another merge may just have removed it
            raise NotFound("it was removed meanwhile", subject=file.path, hint="run it again")
        # A second name that a killed merge gave goes when that is settled.
        ours = sum(
            journal.replaced.path == file.real_path
            and journal.kept_as is not None
            and journal.replaced.still(journal.kept_as)
            for journal in journals
        )
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1 + ours and not keep_inputs:
            raise Unsupported(
                "it has further hard links, whose users would lose their content",
                subject=file.path,
                hint="remove the other names (`find -samefile`), or use --keep-inputs",
            )
    upper = inputs[-1]
    if not stat.S_ISREG(os.fstat(upper.fileno()).st_mode):
        raise Unsupported("the merged image cannot take the place of a device", subject=upper.path)


def check_holds(chain: ImageChain, first: int, last: int) -> None:
    """Raises Conflict for an input that is held, and what reading the notes raises: one may be a hold."""
    notes = Notes()
    files = [file.resolved for file in chain.files[first : last + 1]]
    for fault in notes.faults(files):
        raise fault
    if any(notes.of(file).holds for file in files):
        check_range(chain, first, last, held_layers(chain, notes))


def check_still_allowed(chain: ImageChain, first: int, last: int) -> None:
    """Raises Conflict for a disk that was given away, or a layer that was held, since the plan was made.

    Also raises what reading the notes raises.
    """
    check_not_given(chain)
    check_holds(chain, first, last)


def real_paths(paths: Iterable[Path]) -> tuple[Path, ...]:
    """With all links resolved, each once."""
    return tuple(dict.fromkeys(real_path(path) for path in paths))


def bitmaps(files: Sequence[ImageFile]) -> list[tuple[ImageFile, str]]:
    """The files that hold persistent bitmaps, each with their names."""
    return [
        (file, ", ".join(bitmap.name for bitmap in file.header.bitmaps))
        for file in files
        if file.header is not None and file.header.bitmaps
    ]


def classify(
    paths: Sequence[Path],
    *,
    top: Path,
    others: Dependents,
    confirmed: Collection[Path],
    keep_inputs: bool = False,
) -> tuple[tuple[Path, ...], tuple[KeptFile, ...]]:
    """Which files of one chain may go, and which stay, with the reason. paths: real, uppermost first, as the results.

    top: the file that the guest opens
    confirmed: real paths of --remove. These count as the disk's own, but users that were found still keep them.
    """
    if keep_inputs:
        return (), tuple(KeptFile(path=path, reason="asked for") for path in paths)
    remove: list[Path] = []
    keep: list[KeptFile] = []
    for path in paths:
        why = _why_kept(path, top=top, others=others, confirmed=confirmed)
        if why is None and keep:
            why = f"{keep[-1].path.name} depends on it"
        if why is None:
            remove.append(path)
        else:
            keep.append(KeptFile(path=path, reason=why))
    return tuple(remove), tuple(keep)


def _why_kept(path: Path, *, top: Path, others: Dependents, confirmed: Collection[Path]) -> str | None:
    found = users_of(path, others, confirmed)
    if found is not None:
        return found if others.on(path, *SEEN) else f"{found}{_REMEDY}"
    if layers_of(real_path(top).parent) == path.parent:
        return "it is a layer of a replica"
    if path.is_block_device():
        return "it is a device"
    lies = why_not_own(path, top, confirmed)
    return None if lies is None else f"{lies}{_REMEDY}"


def why_not_own(path: Path, top: Path, confirmed: Collection[Path]) -> str | None:
    """Why a file (a real path) is not the disk's own because of its directory, as a clause; None if it is."""
    if path in confirmed or not is_outside(path, top):
        return None
    return f"it lies outside {real_path(top).parent}, the directory of the disk"


def users_of(path: Path, others: Dependents, confirmed: Collection[Path]) -> str | None:
    """What else uses a file (a real path), as a clause. For a confirmed one, unreadable images do not count."""
    return others.reason(path, *SEEN) if path in confirmed else others.reason(path)


def check_may_be_replaced(chain: ImageChain, result: Path, confirmed: Collection[Path]) -> None:
    """Raises Unsupported for an uppermost input that is not the disk's own.

    Overlays of it are no reason: the result shows the same content under the same name.
    """
    why = why_not_own(result, chain.top.path, confirmed)
    if why is not None:
        check_no_layer(result)
        raise Unsupported(
            f"the merged file would replace it, and {why}",
            subject=result,
            hint=f"choose a file of that directory by --to, or use --remove {shell_word(result)}",
        )


def check_confirmed(lower: Collection[Path], confirmed: Collection[Path], others: Dependents) -> None:
    """Raises Conflict where --remove names an input that was found to have other users."""
    for path in confirmed:
        if path in lower and (why := users_of(path, others, confirmed)):
            raise Conflict(
                f"--remove does not allow that: {why}",
                subject=path,
                hint="it can be removed when nothing uses it any more",
            )


def second_name(path: Path, journals: Sequence[MergeJournal]) -> Path:
    """A free name. A name that a killed merge has taken is free again after that merge is undone."""
    free_again = {journal.kept_as for journal in journals if not journal.result.still(journal.replaced.path)}
    for number in range(1, 1_000_000):
        candidate = path.with_name(f"{path.stem}.unmerged-{number}{path.suffix}")
        if candidate in free_again or not os.path.lexists(candidate):
            return candidate
    raise Conflict("no name is left for the old file", subject=path)


# --- Which files of a chain a request names: everything above the root, or a range by names or paths.


def numbers(chain: ImageChain, request: MergeRequest, journals: Sequence[MergeJournal]) -> tuple[int, int]:
    """(lowest, uppermost) input that a request names, the root is 0. Raises NotFound, InvalidInput."""
    top = len(chain.files) - 1
    last = top if request.to_layer is None else _number(chain, request.to_layer, journals)
    if request.from_layer is not None:
        first = _number(chain, request.from_layer, journals)
    else:
        first = 0 if request.flatten else min(1, last)
    if first > last:
        raise InvalidInput(
            f"{request.from_layer} lies above {request.to_layer or 'the top'}",
            subject=chain.top.path,
            hint="swap --from and --to",
        )
    return first, last


def _number(chain: ImageChain, layer: str, journals: Sequence[MergeJournal]) -> int:
    """The number of the file that a path or a bare name stands for."""
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
    raise NotFound(f"no such layer in the chain of {chain.top.path}", subject=layer, hint=f"its files are: {names}")
