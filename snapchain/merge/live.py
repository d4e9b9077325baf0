"""What a merge of a running guest's chain would do: the same rules and economics as at rest, done by block jobs.

    root <- a <- b <- c <- active        merge from a to c

    stream          root <- c' <- active     c takes in what a and b show through it; a and b stay valid until then
    commit          root <- a' <- active     a takes in what b and c hold; b and c are invalid from then on
    active commit   root <- a'               merge from a to the active layer; the guest goes on in a

A result keeps the path that QEMU has it under: no file that a guest has open is renamed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, InstanceOf

from snapchain.errors import SnapchainError, Unsupported
from snapchain.guest.protocol import Guest, GuestDisk, JobKind
from snapchain.host.files import free_bytes
from snapchain.image import ImageChain, ImageFile
from snapchain.image.dependent_search import Dependents, Kind, dependents_of_chain, is_linked_elsewhere
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import DEFAULT_CLUSTER_SIZE
from snapchain.merge import inputs
from snapchain.merge.assembly import merged_extents, surviving_bytes
from snapchain.merge.choose import choose
from snapchain.merge.copying import SPARE
from snapchain.merge.inputs import real_paths
from snapchain.merge.journal import unsettled
from snapchain.merge.live_chain import disk_to_merge, opened
from snapchain.merge.plan import MergePlan, merge_row, ranges_by_name, room_of, totals
from snapchain.merge.rates import Rates
from snapchain.merge.request import MergeRequest
from snapchain.merge.stack import look
from snapchain.merge.step import MergeStep
from snapchain.model.choice import MergeRange
from snapchain.model.merging import Strategy
from snapchain.source.ownership import check_no_layer, check_not_given

_OFF = "merge it while the guest is off"
_USERS = (Kind.CONTENT, Kind.LINK, Kind.UNREAD)
"""Without the guest's own definition: it has the chain that the merge is about."""
_NEARLY = 1.05
"""A stream leaves its inputs whole until its end, and the result under the newer name: that is worth some bytes."""


@dataclass(frozen=True, slots=True)
class LiveStep:
    """One merge, decided. above: number of the file above the inputs, None where the active layer is among them."""

    step: MergeStep
    kind: JobKind

    @property
    def above(self) -> int | None:
        """The number of the file whose header a commit changes."""
        return self.step.last + 1 if self.step.last + 1 < len(self.step.chain) else None


class LiveMergePlan(MergePlan):
    """What `live_run.run` will do to one disk of a running guest.

    guest: its name; option: as one types it; disk: its name in the guest; jobs: kinds, in the order of `merges`
    """

    guest: str
    option: str
    disk: str
    jobs: tuple[JobKind, ...]
    live_steps: tuple[InstanceOf[LiveStep], ...] = Field(exclude=True, repr=False)
    request: InstanceOf[MergeRequest] = Field(exclude=True, repr=False)


def plan(guest: Guest, disk_name: str, request: MergeRequest) -> LiveMergePlan:
    """Look at the chain and decide; changes nothing. The image of the request does not count.

    Raises NotFound for the disk, Unsupported (a chain of other than local files, what a live merge cannot do),
    Conflict for a held layer, and as `merge.plan`.
    """
    _check_request(guest, request)
    disk = disk_to_merge(guest, disk_name)
    rates = Rates.remembered()
    with opened(disk, image_dirs=request.image_dirs) as chain:
        planner = LivePlanner(guest, disk, chain, request)
        stack = look(chain, request.at)
        if request.chooses:
            chosen = choose(stack, request, rates, lambda place: planner.plan(place).step, planner.others)
            ranges, stays, notices = chosen.ranges, chosen.stays, list(chosen.notices)
        else:
            ranges, stays, notices = ranges_by_name(stack, request), {}, []
        steps = tuple(planner.plan(each) for each in ranges)
        for each in steps:
            check_no_layer(each.step.result)
        notices += [planner.others.incomplete] if steps and planner.others.incomplete else []
        merges = tuple(merge_row(stack, each.step, rates) for each in steps)
        free = free_bytes(chain.top.real_path.parent)
        needs, free = room_of([each.step for each in steps], free)
        if any(each.kind is JobKind.ACTIVE_COMMIT for each in steps):
            notices.append(f"the guest will write to {steps[-1].step.result}, which becomes its active layer")
        journals = unsettled(file.real_path for file in chain.files)
        return LiveMergePlan(
            **totals(stack, ranges, stays, merges),
            image=chain.top.path,
            needs_bytes=needs,
            free_bytes=free,
            notices=tuple(notices),
            unfinished=tuple(journal.replaced.path for journal in journals),
            steps=tuple(each.step for each in steps),
            idle=None,
            guest=guest.name,
            option=guest.option,
            disk=disk.name,
            jobs=tuple(each.kind for each in steps),
            live_steps=steps,
            request=request,
        )


def _check_request(guest: Guest, request: MergeRequest) -> None:
    """Raises Unsupported for what only a merge at rest can do."""
    asked = {
        "--keep-inputs": request.keep_inputs,
        "--cluster-size": request.cluster_size is not None,
        "--strategy new-file": request.strategy is Strategy.NEW,
    }
    for option, is_asked in asked.items():
        if is_asked:
            raise Unsupported(
                f"{option} is not possible while the guest runs",
                subject=guest.name,
                hint="leave it out, or shut the guest down first",
            )


class LivePlanner:
    """Decides ranges of one opened chain to the byte, each once."""

    def __init__(self, guest: Guest, disk: GuestDisk, chain: ImageChain, request: MergeRequest) -> None:
        self._guest, self._disk, self._chain, self._request = guest, disk, chain, request
        self._known: dict[MergeRange, LiveStep] = {}
        others = dependents_of_chain(chain, image_dirs=request.image_dirs)
        # libvirt takes what it merges out of the guest's own definition.
        self.others: Dependents = others.without(Kind.DEFINITION) if guest.kind == "libvirt" else others

    @property
    def _other_way(self) -> str:
        """What can be done where a commit is refused."""
        return "--strategy absorb streams the layers instead" if self._guest.streams else _OFF

    def plan(self, place: MergeRange) -> LiveStep:
        """Raises Unsupported, naming the file, where no job can merge the range and keep what must stay."""
        if place not in self._known:
            self._known[place] = self._decide(place.first, place.last)
        return self._known[place]

    def _decide(self, first: int, last: int) -> LiveStep:
        chain, request, others = self._chain, self._request, self.others
        check_not_given(chain)
        files = chain.files[first : last + 1]
        confirmed = real_paths(request.remove)
        for file in files:
            file.check_may_be_changed()
        inputs.check(files, (), keep_inputs=False)
        inputs.check_holds(chain, first, last)
        _check_sizes(chain, first, last)
        lower = [file.real_path for file in files[:-1]][::-1]
        inputs.check_confirmed(lower, confirmed, others)
        merged = merged_extents(chain.at(last), first)
        shares = surviving_bytes(merged, last + 1)
        total = int(shares.sum())
        shadowed = sum(file.shown_extents().data_bytes for file in files) - total
        kind = self._kind(first, last, confirmed, total - int(shares[last]), total - int(shares[first]))
        keeps_lowest = kind is not JobKind.STREAM
        moved = total - int(shares[first if keeps_lowest else last])
        result = files[0] if keeps_lowest else files[-1]
        gone = [file.real_path for file in (files[1:] if keeps_lowest else files[:-1])][::-1]
        remove, keep = inputs.classify(gone, top=chain.top.path, others=others, confirmed=confirmed)
        step = MergeStep(
            request=request.of_range(files[0].real_path, files[-1].real_path),
            strategy=Strategy.COMMIT if keeps_lowest else Strategy.ABSORB,
            chain=tuple(file.path for file in chain.files),
            first=first,
            last=last,
            result=result.real_path,
            backing=self._link(first, last, kind),
            virtual_size=files[-1].size,
            cluster_size=result.cluster_size or DEFAULT_CLUSTER_SIZE,
            extended_l2=bool(result.header and result.header.extended_l2),
            bytes_to_move=moved,
            shares_extents=False,
            needs_bytes=moved + SPARE,
            free_bytes=free_bytes(result.real_path.parent),
            shadowed_bytes=shadowed,
            remove=remove,
            keep=keep,
            kept_as=None,
            unfinished=(),
            confirmed=confirmed,
            incomplete=others.incomplete,
        )
        return LiveStep(step, kind)

    def _kind(self, first: int, last: int, confirmed: Sequence[Path], streamed: int, committed: int) -> JobKind:
        """The job that moves least of those that are possible. Raises Unsupported with the reason where none is."""
        commit = JobKind.COMMIT if last < len(self._chain.files) - 1 else JobKind.ACTIVE_COMMIT
        against = {
            JobKind.STREAM: self._against_stream(first, last, confirmed),
            commit: self._against_commit(first, last, confirmed, commit),
        }
        strategy = self._request.strategy
        wanted = {Strategy.ABSORB: JobKind.STREAM, Strategy.COMMIT: commit}.get(strategy) if strategy else None
        if wanted is not None:
            error = against[wanted]
            if error is not None:
                raise error
            return wanted
        possible = [kind for kind, why in against.items() if why is None]
        if not possible:
            raise next(filter(None, against.values() if self._guest.streams else reversed(against.values())))
        if commit is JobKind.ACTIVE_COMMIT and JobKind.STREAM in possible and self._guest.kind == "qmp":
            # Whoever starts the guest again knows it by the path of its active layer, which a stream keeps.
            return JobKind.STREAM
        if JobKind.STREAM in possible and streamed <= committed * _NEARLY:
            return JobKind.STREAM
        return commit if commit in possible else JobKind.STREAM

    def _against_stream(self, first: int, last: int, confirmed: Sequence[Path]) -> SnapchainError | None:
        chain, upper = self._chain, self._chain.files[last]
        if not self._guest.streams:
            return Unsupported(
                "snapchain does not stream through libvirt", subject=upper.path, hint="use --strategy commit"
            )
        if last < len(chain.files) - 1:
            try:
                inputs.check_may_be_replaced(chain, upper.real_path, confirmed)
            except Unsupported as error:
                return error
            if (why := _why_not_written(upper)) is not None:
                return why
        if upper.format != "qcow2":
            return Unsupported(
                "a stream needs a qcow2 file as its uppermost layer", subject=upper.path, hint="use --strategy commit"
            )
        return self._against_bitmaps(range(first, last))

    def _against_commit(self, first: int, last: int, confirmed: Sequence[Path], kind: JobKind) -> SnapchainError | None:
        chain, lowest = self._chain, self._chain.files[first]
        for place in range(first, last + 1):
            file = chain.files[place]
            users = self.others.on(file.real_path, *_USERS)
            if file.real_path in confirmed:
                users = tuple(each for each in users if each.kind is not Kind.UNREAD)
            if users and place < len(chain.files) - 1:
                return Unsupported(
                    f"a commit would change the content of the layer, and {users[0].description}",
                    subject=file.path,
                    hint=self._other_way,
                )
            if (why := inputs.why_not_own(file.real_path, chain.top.path, confirmed)) is not None:
                return Unsupported(
                    f"a commit would change or remove the layer, and {why}",
                    subject=file.path,
                    hint=self._other_way,
                )
        if not lowest.real_path.is_file():
            return Unsupported(
                "the layer is a device, and a live merge commits only into files", subject=lowest.path, hint=_OFF
            )
        if (why_not := _why_not_written(lowest)) is not None:
            return why_not
        if lowest.format == "raw" and kind is JobKind.COMMIT and lowest.size % 512:
            return Unsupported("the size of the layer is no multiple of 512 bytes", subject=lowest.path, hint=_OFF)
        held = self._against_bitmaps(range(first, last + 1))
        if held is None and self._bitmaps(first):
            return Unsupported(
                f"a commit would make the bitmaps of the layer wrong: {self._bitmaps(first)}",
                subject=lowest.path,
                hint=self._other_way,
            )
        return held

    def _against_bitmaps(self, places: range) -> SnapchainError | None:
        for place in places:
            names = self._bitmaps(place)
            if names and not self._request.drop_bitmaps:
                return Unsupported(
                    f"the layer holds bitmaps ({names}), which would be lost or wrong after a merge",
                    subject=self._chain.files[place].path,
                    hint="--drop-bitmaps merges without them; the next incremental backup must then read everything",
                )
        return None

    def _bitmaps(self, place: int) -> str:
        """The names of a layer's bitmaps, in its file and in QEMU; '' for none."""
        header = self._chain.files[place].header
        stored = [bitmap.name for bitmap in header.bitmaps] if header is not None else []
        open_ones = [bitmap.name for bitmap in self._disk.chain[place].bitmaps if bitmap.name]
        return ", ".join(dict.fromkeys([*stored, *open_ones]))

    def _link(self, first: int, last: int, kind: JobKind) -> Backing | None:
        """What is recorded: by a stream in the uppermost input, by a commit in the file above the inputs."""
        files = self._chain.files
        if kind is JobKind.ACTIVE_COMMIT:
            return files[first].backing
        place, target = (last, first - 1) if kind is JobKind.STREAM else (last + 1, first)
        if target < 0:
            return None
        overlay, below = files[place], files[target]
        name = str(below.real_path)
        if overlay.real_path.parent == below.real_path.parent and not _is_opened_elsewhere(overlay, self.others):
            name = below.real_path.name
            # As QEMU reads it, a colon before the first slash ends the name of a protocol.
            name = f"./{name}" if ":" in name else name
        elif overlay.backing is not None and not overlay.backing.name.startswith("/"):
            name = os.path.relpath(below.real_path, overlay.real_path.parent)
        if any(character < " " for character in name):
            raise Unsupported(
                "the name of the file below holds control characters",
                subject=below.path,
                hint="rename it while the guest is off",
            )
        return Backing(name, below.format)


def _is_opened_elsewhere(file: ImageFile, others: Dependents) -> bool:
    """Whether it may be opened by a link in another directory: QEMU looks from there for a relative name."""
    return is_linked_elsewhere(file.path, others)


def _why_not_written(file: ImageFile) -> SnapchainError | None:
    """Why QEMU may not write to a file. Who QEMU runs as is not known: a file that nobody may write is meant so."""
    if file.real_path.is_file() and not file.real_path.stat().st_mode & 0o222:
        return Unsupported("the file is read-only", subject=file.path, hint="chmod u+w, if it may be merged")
    return None


def _check_sizes(chain: ImageChain, first: int, last: int) -> None:
    """Raises Unsupported where a layer is shorter than the one below it.

    It hides the end of that for ever, also from longer layers above. QEMU's block-commit and block-stream lose this
    (docs/decisions/0118).
    """
    for place in range(max(first, 1), last + 1):
        if chain.files[place].size < chain.files[place - 1].size:
            raise Unsupported(
                f"the layer is shorter than {chain.files[place - 1].path.name} below: QEMU would show that end again",
                subject=chain.files[place].path,
                hint="merge it while the guest is off, or leave it out (--from, --to)",
            )
