"""What merging one range of neighbouring files of a local chain would do, decided before anything is touched.

    root <- a <- b <- c <- top        merge from a to c        root <- c' <- top

The result takes the path of the uppermost input, so the link of the file above stays true.  The inputs below it go,
unless another image depends on them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from snapchain.errors import Unsupported
from snapchain.host.files import free_bytes
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.image.dependent_search import Dependents, dependents_of_chain, is_linked_elsewhere
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import DEFAULT_CLUSTER_SIZE
from snapchain.merge import inputs, methods
from snapchain.merge.assembly import merged_extents, surviving_bytes
from snapchain.merge.inputs import KeptFile, real_paths
from snapchain.merge.journal import unsettled
from snapchain.merge.methods import Method
from snapchain.merge.request import MergeRequest
from snapchain.model.economics import Into
from snapchain.model.merging import Strategy
from snapchain.source.ownership import check_not_given


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStep:
    """One merge, decided. Sizes in bytes.

    request: what decides the same again: this range, by this strategy
    chain: paths of its files, root first; first, last: numbers of the lowest and uppermost input, the root is 0
    result: the path that the merged file takes; backing: the link that it records (None: it is the root)
    bytes_to_move: shared with or copied into the result's file; shares_extents: they take no room, nor reading
    needs_bytes: room that it takes while all inputs are there; shadowed_bytes: overwritten data that goes
    remove: inputs that go, uppermost first; keep: inputs that stay; kept_as: a second name for the uppermost input
    unfinished: results of killed merges, which are settled first
    confirmed: files, links resolved, that may be removed or replaced although they are not surely the disk's own
    incomplete: what the search for other users of the inputs could not look at, a sentence
    """

    request: MergeRequest
    strategy: Strategy
    chain: tuple[Path, ...]
    first: int
    last: int
    result: Path
    backing: Backing | None
    virtual_size: int
    cluster_size: int
    extended_l2: bool
    bytes_to_move: int
    shares_extents: bool
    needs_bytes: int
    free_bytes: int
    shadowed_bytes: int
    remove: tuple[Path, ...]
    keep: tuple[KeptFile, ...]
    kept_as: Path | None
    unfinished: tuple[Path, ...]
    confirmed: tuple[Path, ...] = ()
    incomplete: str | None = None

    @property
    def image(self) -> Path:
        """The top of the chain."""
        return self.request.image

    @property
    def layers(self) -> tuple[Path, ...]:
        """The inputs, lowest first."""
        return self.chain[self.first : self.last + 1]

    @property
    def layers_before(self) -> int:
        """Files of the chain now."""
        return len(self.chain)

    @property
    def layers_after(self) -> int:
        """Files of the chain then."""
        return len(self.chain) - (self.last - self.first)

    def is_still(self, now: MergeStep) -> bool:
        """Whether the same was decided again; the room, what killed merges have left and the search may differ."""
        passing: dict[str, object] = {
            "request": self.request,
            "free_bytes": 0,
            "needs_bytes": 0,
            "unfinished": (),
            "kept_as": None,
            "incomplete": None,
        }
        return replace(self, **passing) == replace(now, **passing)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """The step, and the method that does it (None: nothing to do); valid while the chain is open."""

    step: MergeStep
    method: Method | None


def plan_step(request: MergeRequest) -> MergeStep:
    """Look at the range that the request names, and decide; changes nothing.

    Raises NotFound, InvalidInput, Unsupported (inputs that a merge would lose something of, a strategy that does not
    fit, a result that would replace a file that is not the disk's own), Conflict (an input that is held, a file of
    `remove` that other users were found for), and as `scan`.
    """
    with scan(request.image, format=request.image_format, image_dirs=request.image_dirs) as chain:
        return decide(chain, request).step


def decide(chain: ImageChain, request: MergeRequest, *, others: Dependents | None = None) -> Decision:
    """The step for an opened chain; errors as `plan_step`. others: what else depends on its files, if that is known."""
    others = dependents_of_chain(chain, image_dirs=request.image_dirs) if others is None else others
    check_not_given(chain)
    journals = unsettled(file.real_path for file in chain.files)
    first, last = inputs.numbers(chain, request, journals)
    files = chain.files[first : last + 1]
    upper = files[-1]
    link = _link(chain, first, upper, others)
    lower = [file.real_path for file in files[:-1]][::-1]
    confirmed = real_paths(request.remove)
    remove, keep = inputs.classify(
        lower, top=chain.top.path, others=others, confirmed=confirmed, keep_inputs=request.keep_inputs
    )
    free = free_bytes(upper.real_path.parent)
    method, shadowed = None, 0
    if len(files) > 1:
        merged = merged_extents(chain.at(last), first)
        shares, runs = surviving_bytes(merged, last + 1), len(merged)
        del merged
        shadowed = sum(file.shown_extents().data_bytes for file in files) - int(shares.sum())
        chain.top.check_may_be_changed()
        inputs.check(files, journals, keep_inputs=request.keep_inputs)
        inputs.check_holds(chain, first, last)
        inputs.check_may_be_replaced(chain, upper.real_path, confirmed)
        inputs.check_confirmed(lower, confirmed, others)
        method = methods.choose(
            chain.at(last), first, request, backing=link, kept=keep, free=free, shares=shares, runs=runs
        )
    again = request.of_range(files[0].path, upper.path)
    if method is not None:
        again = replace(
            again,
            strategy=method.strategy,
            cluster_size=method.cluster_size if methods.into_of(method.strategy) is Into.NEW else None,
            remove=confirmed,
        )
    step = MergeStep(
        request=again,
        strategy=method.strategy if method else Strategy.NOTHING,
        chain=tuple(file.path for file in chain.files),
        first=first,
        last=last,
        result=upper.real_path,
        backing=link,
        virtual_size=upper.size,
        cluster_size=method.cluster_size if method else upper.cluster_size or DEFAULT_CLUSTER_SIZE,
        extended_l2=method.extended_l2 if method else bool(upper.header and upper.header.extended_l2),
        bytes_to_move=method.bytes_moved if method else 0,
        shares_extents=method is not None and method.shares_extents,
        needs_bytes=method.bytes_needed if method else 0,
        free_bytes=free,
        shadowed_bytes=shadowed,
        remove=remove,
        keep=keep,
        kept_as=inputs.second_name(upper.real_path, journals) if method and request.keep_inputs else None,
        unfinished=tuple(journal.replaced.path for journal in journals),
        confirmed=confirmed,
        incomplete=others.incomplete,
    )
    return Decision(step, method)


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
