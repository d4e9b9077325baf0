"""What merging a run of neighbouring files of a local chain would do, decided before anything is touched.

    root <- a <- b <- c <- top        merge from a to c        root <- c' <- top

The result takes the path of the uppermost input, so the link of the file above stays true.  The inputs below it go,
unless another image depends on them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from snapchain.errors import InvalidInput, Unsupported
from snapchain.host.directory import real_path
from snapchain.host.files import free_bytes
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.image.dependent_search import Dependents, dependents_of_chain, is_linked_elsewhere
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import DEFAULT_CLUSTER_SIZE
from snapchain.merge import inputs
from snapchain.merge.assembly import merged_extents, surviving_bytes
from snapchain.merge.inputs import KeptFile, numbers
from snapchain.merge.journal import unsettled
from snapchain.merge.methods import Constraints, Method, choose
from snapchain.model.merging import Strategy
from snapchain.source.ownership import check_not_given


class MergeStep(BaseModel):
    """What `merge_image.run` will do. Sizes in bytes.

    first, last: numbers of the lowest and uppermost input, the root is 0; result: the path that the merged file takes
    backing: the link that it records (None: it is the root); bytes_to_move: what is shared with or copied into its file
    shares_extents: moved bytes take no room, nor reading; needs_bytes: room that it takes while all inputs are there
    shadowed_bytes: overwritten data that goes; kept_as: a second name for the uppermost input
    unfinished: results of killed merges, which are settled first
    confirmed: files, links resolved, that may be removed or replaced although they are not surely the disk's own
    incomplete: what the search for other users of the inputs could not look at, a sentence
    """

    model_config = ConfigDict(frozen=True)

    image: Path
    image_format: str | None
    image_dirs: tuple[Path, ...]
    strategy: Strategy
    chain: tuple[Path, ...]
    first: int
    last: int
    result: Path
    backing: Backing | None
    virtual_size: int
    cluster_size: int
    extended_l2: bool
    layers_before: int
    layers_after: int
    bytes_to_move: int
    shares_extents: bool
    needs_bytes: int
    free_bytes: int
    shadowed_bytes: int
    remove: tuple[Path, ...]
    keep: tuple[KeptFile, ...]
    kept_as: Path | None
    keep_inputs: bool
    drop_bitmaps: bool
    unfinished: tuple[Path, ...]
    confirmed: tuple[Path, ...] = ()
    incomplete: str | None = None


def plan(
    image: Path,
    *,
    flatten: bool = False,
    from_layer: str | None = None,
    to_layer: str | None = None,
    strategy: Strategy | None = None,
    cluster_size: int | None = None,
    keep_inputs: bool = False,
    drop_bitmaps: bool = False,
    image_format: str | None = None,
    image_dirs: Sequence[Path] = (),
    unlocks: bool = False,
    confirmed: Sequence[Path] = (),
) -> MergeStep:
    """Look at the chain and decide; changes nothing.

    Everything above the root by default; flatten: the root too; from_layer, to_layer: file names or paths of the
    lowest and uppermost input; strategy: the best one unless given; cluster_size: of a new file, in bytes; by default
    that of the input which gives most; keep_inputs: nothing is removed, and the uppermost input gets a second name;
    unlocks: the caller makes read-only files of this user's writable before `run`, so that is not counted against them.
    confirmed: inputs that may go although they lie elsewhere than the top, or an unreadable image may depend on them.

    Raises NotFound, InvalidInput, Unsupported (inputs that a merge would lose something of, a strategy that does not
    fit, a result that would replace a file that is not the disk's own), Conflict (a confirmed file that was found
    to have other users), and as `scan`.
    """
    if flatten and from_layer is not None:
        raise InvalidInput("--flatten begins at the root; it cannot be combined with --from")
    asked = Asked(
        image=image,
        flatten=flatten,
        from_layer=from_layer,
        to_layer=to_layer,
        strategy=strategy,
        cluster_size=cluster_size,
        keep_inputs=keep_inputs,
        drop_bitmaps=drop_bitmaps,
        image_format=image_format,
        image_dirs=tuple(image_dirs),
        unlocks=unlocks,
        confirmed=real_paths(confirmed),
    )
    with scan(image, format=image_format, image_dirs=image_dirs) as chain:
        return decide(chain, asked).plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the caller of `plan` said."""

    image: Path
    flatten: bool
    from_layer: str | None
    to_layer: str | None
    strategy: Strategy | None
    cluster_size: int | None
    keep_inputs: bool
    drop_bitmaps: bool
    image_format: str | None
    image_dirs: tuple[Path, ...]
    unlocks: bool = False
    confirmed: tuple[Path, ...] = ()


def real_paths(paths: Iterable[Path]) -> tuple[Path, ...]:
    """With all links resolved, each once."""
    return tuple(dict.fromkeys(real_path(path) for path in paths))


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """The plan, and the work that it stands for (None: nothing to do); valid while the chain is open."""

    plan: MergeStep
    way: Method | None


def decide(chain: ImageChain, asked: Asked, *, others: Dependents | None = None) -> Decision:
    """The plan for an opened chain; errors as `plan`. others: what else depends on its files, if that is known."""
    others = dependents_of_chain(chain, image_dirs=asked.image_dirs) if others is None else others
    check_not_given(chain)
    journals = unsettled(file.real_path for file in chain.files)
    first, last = numbers(
        chain, flatten=asked.flatten, from_layer=asked.from_layer, to_layer=asked.to_layer, journals=journals
    )
    files = chain.files[first : last + 1]
    upper = files[-1]
    link = _link(chain, first, upper, others)
    lower = [file.real_path for file in files[:-1]][::-1]
    remove, keep = inputs.classify(
        lower, top=chain.top.path, others=others, confirmed=asked.confirmed, keep_inputs=asked.keep_inputs
    )
    free = free_bytes(upper.real_path.parent)
    way, shadowed = None, 0
    if len(files) > 1:
        merged = merged_extents(chain.at(last), first)
        shares, runs = surviving_bytes(merged, last + 1), len(merged)
        del merged
        shadowed = sum(file.shown_extents().data_bytes for file in files) - int(shares.sum())
        chain.top.check_may_be_changed()
        inputs.check(files, journals, keep_inputs=asked.keep_inputs)
        inputs.check_holds(chain, first, last)
        inputs.check_may_be_replaced(chain, upper.real_path, asked.confirmed)
        inputs.check_confirmed(lower, asked.confirmed, others)
        terms = Constraints(
            asked=asked.strategy,
            cluster_size=asked.cluster_size,
            keep_inputs=asked.keep_inputs,
            drop_bitmaps=asked.drop_bitmaps,
            kept=keep,
            unlocks=asked.unlocks,
            free=free,
        )
        way = choose(chain.at(last), first, backing=link, terms=terms, shares=shares, runs=runs)
    plan = MergeStep(
        image=asked.image,
        image_format=asked.image_format,
        image_dirs=asked.image_dirs,
        strategy=way.strategy if way else Strategy.NOTHING,
        chain=tuple(file.path for file in chain.files),
        first=first,
        last=last,
        result=upper.real_path,
        backing=link,
        virtual_size=upper.size,
        cluster_size=way.cluster_size if way else upper.cluster_size or DEFAULT_CLUSTER_SIZE,
        extended_l2=way.extended_l2 if way else bool(upper.header and upper.header.extended_l2),
        layers_before=len(chain.files),
        layers_after=len(chain.files) - (last - first),
        bytes_to_move=way.bytes_moved if way else 0,
        shares_extents=way is not None and way.shares_extents,
        needs_bytes=way.bytes_needed if way else 0,
        free_bytes=free,
        shadowed_bytes=shadowed,
        remove=remove,
        keep=keep,
        kept_as=inputs.second_name(upper.real_path, journals) if way and asked.keep_inputs else None,
        keep_inputs=asked.keep_inputs,
        drop_bitmaps=asked.drop_bitmaps,
        unfinished=tuple(journal.replaced.path for journal in journals),
        confirmed=asked.confirmed,
        incomplete=others.incomplete,
    )
    return Decision(plan, way)


def _link(chain: ImageChain, first: int, upper: ImageFile, others: Dependents) -> Backing | None:
    """The lowest input's backing link, for the place of the uppermost one. Raises Unsupported when it has no name."""
    if first == 0:
        return None
    lowest, below = chain.files[first], chain.files[first - 1]
    assert lowest.backing is not None
    name = lowest.backing.name
    if not name.startswith("/"):
        if _is_opened_elsewhere(upper, others):
            # QEMU looks from the directory of the link by which it opened the file: only a whole path suits that, too.
            name = str(below.real_path)
        elif lowest.path.parent != upper.path.parent:
            name = os.path.relpath(below.real_path, upper.real_path.parent)
    # As QEMU reads it, a colon before the first slash ends the name of a protocol.
    if ":" in name.split("/", 1)[0]:
        name = f"./{name}"
    if any(character < " " for character in name):
        raise Unsupported("the name of the file below holds control characters", subject=below.path)
    return Backing(name, below.format)


def _is_opened_elsewhere(upper: ImageFile, others: Dependents) -> bool:
    """Whether the file may be opened by a link in another directory, and could be so far."""
    whole = upper.backing is not None and upper.backing.name.startswith("/")
    return whole or is_linked_elsewhere(upper.path, others)
