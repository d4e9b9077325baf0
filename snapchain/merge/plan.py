"""What a merge of a local chain would do, layer by layer and merge by merge, before anything moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from snapchain.errors import InvalidInput, Unavailable
from snapchain.image import ImageChain, scan
from snapchain.image.dependent_search import dependents_of_chain
from snapchain.merge.choose import choose
from snapchain.merge.inputs import KeptFile, numbers, real_paths
from snapchain.merge.journal import unsettled
from snapchain.merge.rates import Rates, seconds_of
from snapchain.merge.request import MergeRequest
from snapchain.merge.stack import Stack, look
from snapchain.merge.step import MergeStep, decide
from snapchain.model.choice import MergeRange
from snapchain.model.merging import MergeRow
from snapchain.source.lineage import check_range
from snapchain.source.notes import Hold
from snapchain.source.ownership import check_no_layer

NOTHING = "nothing"


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True)


class LayerUse(_Shown):
    """One layer as it is, in guest bytes. shadowed_bytes: hidden by layers above.

    sealed: when (None for the top); at: destinations that hold it; stays: why no merge takes it away;
    merge: number of the planned merge that takes it, from 0 for the lowest
    """

    path: Path
    virtual_size: int
    data_bytes: int
    shadowed_bytes: int
    sealed: datetime | None
    labels: tuple[str, ...]
    holds: tuple[Hold, ...]
    at: tuple[str, ...]
    stays: tuple[str, ...]
    merge: int | None


class PlannedMerge(_Shown):
    """One merge. Bytes moved and freed are the guest's, needed bytes are of the filesystem, meanwhile.

    layers: its files, lowest first; shares_extents: what is moved is shared with the inputs and costs no room
    seconds: by the rate of earlier merges here; requests: to an object store
    held_bytes, shadowed_bytes: of the layer that is made, in its chain
    """

    layers: tuple[Path, ...]
    first: int
    last: int
    result: Path
    strategy: str
    cluster_size: int
    shares_extents: bool
    bytes_to_move: int
    bytes_to_free: int
    needs_bytes: int
    seconds: float
    requests: int
    held_bytes: int
    shadowed_bytes: int
    remove: tuple[Path, ...]
    keep: tuple[KeptFile, ...]


class MergePlan(_Shown):
    """What `run` will do. strategy: of all merges, joined by '+'; merges: lowest first, run from the last on.

    bytes_to_move, shadowed_bytes, seconds, requests: of all merges; shadowed_bytes is what they drop
    needs_bytes: room that is needed at the worst moment; free_bytes: room that there is, where it is scarcest
    unfinished: results of killed merges, which are settled first; steps: for `run`; idle: where there is no merge
    """

    image: Path
    strategy: str
    layers_before: int
    layers_after: int
    bytes_to_move: int
    shadowed_bytes: int
    needs_bytes: int
    free_bytes: int
    seconds: float
    requests: int
    layers: tuple[LayerUse, ...]
    merges: tuple[PlannedMerge, ...]
    notices: tuple[str, ...]
    unfinished: tuple[Path, ...]
    steps: tuple[InstanceOf[MergeStep], ...] = Field(exclude=True, repr=False)
    idle: InstanceOf[MergeStep] | None = Field(exclude=True, repr=False)

    @property
    def rows(self) -> tuple[MergeRow, ...]:
        """The merges as every plan shows them, lowest first."""
        return tuple(
            MergeRow(
                layers=tuple(path.name for path in each.layers),
                method=each.strategy,
                bytes_to_move=each.bytes_to_move,
                bytes_to_free=each.bytes_to_free,
                needs_bytes=each.needs_bytes,
                seconds=each.seconds,
                shares_extents=each.shares_extents,
            )
            for each in self.merges
        )

    @property
    def missing_bytes(self) -> int:
        """Room that would have to be freed first."""
        return max(0, self.needs_bytes - self.free_bytes) if self.merges else 0

    def check_room(self) -> None:
        """Raises Unavailable with the number when the room does not suffice."""
        if self.missing_bytes:
            raise Unavailable(
                f"it needs {self.needs_bytes} bytes beside the files that are there, and {self.free_bytes} are free",
                subject=self.image.parent,
                hint=f"free {self.missing_bytes} bytes more, or merge fewer layers at a time (--from, --to)",
            )


def plan(request: MergeRequest) -> MergePlan:
    """Look at the chain and decide; changes nothing.

    Raises Conflict for a range with a held layer, Corrupt for a note that cannot be read (it may be a hold), and as
    `step.plan_step`.
    """
    rates = Rates.remembered()
    with scan(request.image, format=request.image_format, image_dirs=request.image_dirs) as chain:
        stack = look(chain, request.at)
        _check_remove(chain, request)
        planner = _Planner(chain, request)
        if request.chooses:
            chosen = choose(stack, request, rates, planner.plan, planner.others)
            ranges, stays, notices = chosen.ranges, chosen.stays, chosen.notices
        else:
            ranges = ranges_by_name(stack, request)
            stays, notices = {}, _not_there(stack, ranges)
        plans = tuple(planner.plan(each) for each in ranges)
        for each in plans:
            check_no_layer(each.result)
        notices = [*notices, *([planner.others.incomplete] if plans and planner.others.incomplete else [])]
        idle = None if plans else planner.plan(MergeRange(len(stack) - 1, len(stack) - 1))
        of_all = idle or plans[0]
        merges = tuple(merge_row(stack, each, rates) for each in plans)
        needs, free = room_of(plans, of_all.free_bytes)
        if needs > free and merges:
            notices = [*notices, f"{needs} bytes are needed meanwhile, and {free} are free: it would be refused"]
        return MergePlan(
            **totals(stack, ranges, stays, merges),
            image=request.image,
            needs_bytes=needs,
            free_bytes=free,
            notices=tuple(notices),
            unfinished=of_all.unfinished,
            steps=plans,
            idle=idle,
        )


def totals(
    stack: Stack, ranges: Sequence[MergeRange], stays: dict[int, list[str]], merges: Sequence[PlannedMerge]
) -> dict[str, Any]:
    """The fields of a plan that follow from its merges. ranges: of the merges; stays: as `choose` gives it"""
    return {
        "strategy": "+".join(dict.fromkeys(each.strategy for each in merges)) or NOTHING,
        "layers_before": len(stack),
        "layers_after": len(stack) - sum(each.removes for each in ranges),
        "bytes_to_move": sum(each.bytes_to_move for each in merges),
        "shadowed_bytes": sum(each.bytes_to_free for each in merges),
        "seconds": round(sum(each.seconds for each in merges), 3),
        "requests": 0,
        "layers": tuple(layer_uses(stack, ranges, stays)),
        "merges": tuple(merges),
    }


class _Planner:
    """Plans ranges of one opened chain to the byte, each once."""

    def __init__(self, chain: ImageChain, request: MergeRequest) -> None:
        self._chain, self._request = chain, request
        self._known: dict[MergeRange, MergeStep] = {}
        self.others = dependents_of_chain(chain, image_dirs=request.image_dirs)

    def plan(self, place: MergeRange) -> MergeStep:
        if place not in self._known:
            files = self._chain.files
            wanted = self._request.of_range(files[place.first].real_path, files[place.last].real_path)
            self._known[place] = decide(self._chain, wanted, others=self.others).step
        return self._known[place]


def outlook(request: MergeRequest, *, present: dict[str, int]) -> list[tuple[Path, ...]]:
    """The files of each merge that rules would choose, if each destination held so many files from the root on."""
    with scan(request.image, format=request.image_format, image_dirs=request.image_dirs) as chain:
        planner = _Planner(chain, request)
        found = choose(replace(look(chain), present=present), request, Rates.remembered(), planner.plan, planner.others)
        paths = [file.real_path for file in chain.files]
        return [tuple(paths[each.first : each.last + 1]) for each in found.ranges]


def _check_remove(chain: ImageChain, request: MergeRequest) -> None:
    """Raises InvalidInput where --remove names a file that is not of this chain."""
    known = {file.real_path for file in chain.files}
    for path in real_paths(request.remove):
        if path not in known:
            raise InvalidInput(
                "--remove names a file that is not in the chain",
                subject=path,
                hint="the chain is " + ", ".join(str(file.path) for file in chain.files),
            )


def ranges_by_name(stack: Stack, request: MergeRequest) -> tuple[MergeRange, ...]:
    """The range that the user named, or all above the root. Raises Conflict when a layer of it is held."""
    journals = unsettled(file.real_path for file in stack.chain.files)
    first, last = numbers(stack.chain, request, journals)
    if first == last:
        return ()
    check_range(stack.chain, first, last, stack.holds)
    return (MergeRange(first, last),)


def _not_there(stack: Stack, ranges: Sequence[MergeRange]) -> list[str]:
    """What a destination lacks of layers that the user names: it can be shipped afterwards, but is read again then."""
    lacking: list[str] = []
    for name, there in stack.present.items():
        names = [
            stack.chain.files[place].path.name
            for each in ranges
            for place in range(max(each.first, there), each.last + 1)
        ]
        if names:
            lacking.append(f"not yet at {name}: {', '.join(names)}; the next shipment reads all that they become")
    return lacking


def merge_row(stack: Stack, planned: MergeStep, rates: Rates) -> PlannedMerge:
    """A decided merge as a plan shows it."""
    held, visible = stack.after(planned.first, planned.last)
    return PlannedMerge(
        layers=planned.layers,
        first=planned.first,
        last=planned.last,
        result=planned.result,
        strategy=planned.strategy.value,
        cluster_size=planned.cluster_size,
        shares_extents=planned.shares_extents,
        bytes_to_move=planned.bytes_to_move,
        bytes_to_free=planned.shadowed_bytes,
        needs_bytes=planned.needs_bytes,
        seconds=round(seconds_of(planned, rates), 3),
        requests=0,
        held_bytes=held,
        shadowed_bytes=held - visible,
        remove=planned.remove,
        keep=planned.keep,
    )


def room_of(plans: Sequence[MergeStep], free: int) -> tuple[int, int]:
    """(needed, free) on the filesystem where it is scarcest, at the worst moment of a run from the last plan on.

    What an earlier merge frees is not counted: a compressed or sparse file gives back less than its guest bytes.
    """
    worst = 0, free
    left: dict[int, int] = {}
    for each in reversed(plans):
        device = each.result.parent.stat().st_dev
        needed = left.get(device, 0) + each.needs_bytes
        if each.free_bytes - needed < worst[1] - worst[0]:
            worst = needed, each.free_bytes
        if each.keep:
            left[device] = needed
    return worst


def layer_uses(stack: Stack, ranges: Sequence[MergeRange], stays: dict[int, list[str]]) -> list[LayerUse]:
    """The layers of a chain as a plan shows them. stays: by place why a file is not merged away."""
    merge_of = {place: at for at, each in enumerate(ranges) for place in range(each.first, each.last + 1)}
    top = len(stack) - 1
    return [
        LayerUse(
            path=file.path,
            virtual_size=file.size,
            data_bytes=stack.held_bytes[place],
            shadowed_bytes=stack.held_bytes[place] - stack.visible_bytes[place],
            sealed=None if place == top else stack.sealed[place][0],
            labels=() if place == top else stack.sealed[place][1],
            holds=stack.holds.get(place, ()),
            at=stack.at(place),
            stays=tuple(stays.get(place, ())),
            merge=merge_of.get(place),
        )
        for place, file in enumerate(stack.chain.files)
    ]
