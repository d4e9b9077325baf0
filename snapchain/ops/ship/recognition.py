"""What a destination has of an image already, and what new layers lie on: one answer, whatever the kind.

1. by the files that its layers were made of, and what notes say of local merges (model.inventory.missing);
2. by content: a merge, a copy or a restore gives files new identities, but the content id of a view stays;
3. by comparing: an image that went on from what is there, sealed or not, is compared with the newest content by leaf
   hashes, and the difference becomes one layer.

That layer names all files of the image, from the root on, as what it was made of: it stands for the image as a whole,
and so the next shipment knows it again.  *Diverged* is a disk whose newest layers were made of files that this image
never had, where the destination keeps one chain a disk; docs/decisions/0102-one-recognition.md.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from snapchain.destination.writing import DiskLook, HeldLayer, NewestLeaves
from snapchain.errors import Corrupt, Diverged
from snapchain.host.terminal import counted
from snapchain.image import ImageChain, ImageFile
from snapchain.model import inventory as model
from snapchain.model.content import Sum, content_id, empty_sum
from snapchain.model.events import Notice, OnEvent, counting
from snapchain.model.extents import Extents
from snapchain.model.fingerprint import Fingerprint, ShortKey, same_file, short_key
from snapchain.model.inventory import MAX_LAYERS, Collapse, Held, Missing, Send, UpToDate, Wanted, missing
from snapchain.ops.ship.compare import Difference, compare, region_of, to_read
from snapchain.ops.ship.grouping import composed
from snapchain.ops.ship.request import Divergence, Files, ShipRequest
from snapchain.source.counted_sums import CountedSums
from snapchain.source.lineage import noted_lineage

_MOST_SOURCES = 2 * MAX_LAYERS
"""Files that a layer can name as what it was made of."""


@dataclass(frozen=True, slots=True)
class Base:
    """What new layers lie on.

    files: how many of the image's files it stands for; layer: the newest one of it, None for a new root
    total: what the files below the new layers show
    same: whether the destination shows that too; rest: parts of the next file that it lacks, where it has some of them
    compares: where the image may differ from `layer`, which shows something else: that difference is the new layer
    cut: whether the destination's layers above `layer` are dropped first
    note: for people, on what this costs
    """

    files: int
    layer: HeldLayer | None
    total: Sum
    same: bool = True
    rest: tuple[Fingerprint, ...] = ()
    compares: Extents | None = None
    cut: bool = False
    note: str | None = None


def same_source(mine: object, theirs: object) -> bool:
    """As model.fingerprint.same_file; `mine` may also be the short key of a file."""
    if isinstance(mine, ShortKey):
        return isinstance(theirs, Fingerprint) and theirs.size > 0 and short_key(theirs) == mine
    return same_file(mine, theirs)


def sources_of(files: Sequence[ImageFile], rest: tuple[Fingerprint, ...] = ()) -> tuple[Fingerprint, ...]:
    """What a layer of these files names as what it was made of.

    rest: parts of the first one that the destination lacks, which stand for it then: together with those that it has
    they are what the files' lineage says, and so they are known again
    """
    own = tuple(file.fingerprint for file in files)
    found = (*rest, *own[1:]) if rest else own
    return found if len(found) <= _MOST_SOURCES else own


class Recognition:
    """Of one image at one disk of a destination.

    reads: whether files are read where it is not remembered what they show; else the destination is believed
    """

    def __init__(
        self,
        chain: ImageChain,
        there: DiskLook,
        request: ShipRequest,
        destination: str,
        sums: CountedSums,
        on_event: OnEvent,
        *,
        reads: bool = True,
    ) -> None:
        self._chain, self._there, self._request, self._on_event = chain, there, request, on_event
        self._subject = f"{destination}::{request.disk}"
        self._sums, self._reads = sums, reads and not there.believed
        self._cuts = request.divergence is Divergence.CUT_REPLICA
        self._follows = request.divergence is Divergence.COMPARE
        self._held = list(there.held)
        self._leaves: NewestLeaves | None = None
        self.bytes_compared = 0
        lineage = (*request.lineage, *noted_lineage(chain, on_event))
        self._want = [_wanted(file, lineage) for file in chain.files]

    def base(self) -> Base:
        """Where the new layers begin.

        Raises Diverged, Corrupt where what the destination shows is not what the files here show, and Unsupported
        where the other side is too old for a comparison.
        """
        if not self._held:
            return _NOTHING
        found = self._missing(self._held)
        if isinstance(found, model.Diverged):
            return self._parted(found)
        if isinstance(found, Collapse) and not self._there.branches:
            self._on_event(
                Notice(
                    f"the replica still has the parts of {counted(len(found.merges), 'merged file')}, "
                    "and reads the same; `snapchain merge` with rules merges them there, too"
                )
            )
        tip = self._held[-1]
        if not isinstance(found, UpToDate) and found.inside is not None:
            as_rules = self._request.files is Files.COMPOSED and not self._cuts
            if as_rules and not self._there.branches:
                return self._comparing(found)
            # The tip is a part of what was merged into the next layer. That counts from the files below it, and
            # stands for what the destination lacks of it; what the tip shows no file here knows any more.
            name = self._chain.files[found.first].path.name
            self._on_event(Notice(f"{name} was merged with what the destination lacks: all of it is sent"))
            total = tip.total if self._there.believed else self._counted(found.first)
            rest = tuple(part for part in found.inside.rest if isinstance(part, Fingerprint))
            return Base(found.first, tip, total, same=False, rest=rest)
        count = _covered(found, self._want)
        if self._is_true(tip, count):
            return Base(count, tip, tip.total)
        if not self._cuts:
            raise self._false()
        return self._after_cut(self._held)

    def difference(self, base: Base) -> Difference | None:
        """The one layer that makes the newest content show the image; None where records there contradict each other.

        Raises Corrupt where another host's do; errors as `compare`.
        """
        assert base.layer is not None
        assert base.compares is not None
        assert self._leaves is not None
        chain, tip, leaves, sums = self._chain, base.layer, self._leaves, self._sums
        if not self._follows:
            self._on_event(Notice(f"comparing the image with {tip.name}, the newest layer there"))
        whole = region_of(None, chain, tip)
        if base.compares != whole:
            # What both had before is equal there, unless somebody else has written: the sum tells.
            if self._there.believed:
                sums = CountedSums(self._request.remembered_by, self._on_event)
            own = sums.count(chain, len(chain.files), on_bytes=self._reading("recognise"))
            sums.flush()
            found = self._compared(tip, leaves, base.compares)
            if (found.total == own).all():
                return found
        found = self._compared(tip, leaves, whole)
        if (found.total == found.read).all():
            sums.note(chain, len(chain.files), found.read)
            return found
        if self._there.believed:
            return None
        raise Corrupt(
            f"the leaf hashes of its layer {tip.name!a} contradict the content id that it announces",
            subject=self._subject,
            hint="verify the replica: snapchain verify",
        )

    def _compared(self, tip: HeldLayer, leaves: NewestLeaves, region: Extents) -> Difference:
        shown = self._reading("compare", to_read(region, self._chain).data_bytes)

        def on_bytes(count: int) -> None:
            self.bytes_compared += count
            shown(count)

        return compare(self._chain, tip, leaves, region, on_bytes=on_bytes)

    def _common_files(self) -> int:
        """How many of the lowest files are parts of the newest content there, as they are now."""
        rows = [
            [Held(layer.id, layer.sources) for layer in self._held],
            *(rest for _, rest in self._restarts(self._held)),
        ]
        return max(
            bisect_left(range(1, len(self._want) + 1), True, key=lambda n: not self._lies_in(row, n)) for row in rows
        )

    def _lies_in(self, row: Sequence[Held], count: int) -> bool:
        found = missing(row, self._want[:count], same=same_source)
        return found.is_ahead if isinstance(found, model.Diverged) else isinstance(found, UpToDate | Collapse)

    def _missing(self, held: Sequence[HeldLayer]) -> Missing:
        """As model.inventory.missing, also from each layer on that stands for the image as a whole."""
        found = self._missing_from([Held(layer.id, layer.sources) for layer in held])
        if not isinstance(found, model.Diverged):
            return found
        best = found
        for skipped, rest in self._restarts(held):
            again = self._missing_from(rest)
            if not isinstance(again, model.Diverged):
                return _moved(again, skipped)
            if again.base_count and again.base_count + skipped >= best.base_count:
                best = replace(again, base_count=again.base_count + skipped)
        return best

    def _missing_from(self, have: Sequence[Held]) -> Missing:
        return missing(have, self._want, same=same_source)

    def _restarts(self, held: Sequence[HeldLayer]) -> Iterator[tuple[int, list[Held]]]:
        """(layers skipped, the rest) from each place on where a root of this image stands, the newest first.

        What is named from a root on stands for all below it, too. A file that is a root now was one before: its header
        names what it lies on. Only the format can deceive, where qcow2 is read as raw.
        """
        roots = [self._want[0]]
        for each in roots:
            roots += each.replaces[:1]
        for number in range(len(held) - 1, -1, -1):
            layer = held[number]
            for at, key in enumerate(layer.sources):
                if (number or at) and any(same_source(key, root.source) for root in roots) and self._is_format(layer):
                    rest = [Held(each.id, each.sources) for each in held[number + 1 :]]
                    yield number, [Held(layer.id, layer.sources[at:]), *rest]

    def _is_format(self, layer: HeldLayer) -> bool:
        file = next((file for file in self._chain.files if same_source(layer.sources[-1], file.fingerprint)), None)
        return layer.image_format is None or file is None or file.format == layer.image_format

    def _parted(self, found: model.Diverged) -> Base:
        """The destination's newest layers are not what the image's files are."""
        if self._there.branches:
            each = self._request.files is Files.EACH or self._there.mends
            if found.base_count or each:
                return self._branch(found)
            return self._comparing(found, note=None if self._follows else self._unknown())
        known = None if found.is_ahead or self._follows else self._recognised(found)
        if known is not None:
            return Base(known, self._held[-1], self._held[-1].total)
        if self._follows:
            return self._comparing(found)
        if self._cuts:
            return self._after_cut(self._held[: found.base_count])
        if not found.is_ahead and self._went_on(found):
            return self._comparing(found)
        raise self._diverged(found)

    def _branch(self, found: model.Diverged) -> Base:
        if not found.base_count:
            return replace(_NOTHING, note=self._unknown())
        layer = self._held[found.base_count - 1]
        return Base(found.first, layer, layer.total)

    def _unknown(self) -> str:
        return f"no layer of disk {self._request.disk} is known to be part of this image: all of it is read again"

    def _comparing(self, found: model.Diverged | Send | Collapse, *, note: str | None = None) -> Base:
        """To compare with the newest content: in what was written since, or in all of it."""
        chain, tip = self._chain, self._held[-1]
        common, count = self._common_files(), len(chain.files)
        extents = None
        if common == count:  # the newest layer there was made of these files, and of more that no file here knows
            if isinstance(found, model.Diverged) and not self._there.branches:
                raise self._diverged(replace(found, ours=()))
            note = f"disk {self._request.disk} is newer than this image: all of it is read again"
        elif common:
            extents, note = composed(chain, range(common, count)), None
        self._leaves = self._there.leaves()  # now: a plan, too, is refused where the other side is too old for it
        return Base(found.first, tip, tip.total, compares=region_of(extents, chain, tip), note=note)

    def _went_on(self, found: model.Diverged) -> bool:
        """Whether the newest layers there were made of files of this image, as they are now or were before.

        So they were where the image under this path showed that content once: its files may be copies since.
        """
        if self._sums.has_shown(self._held[-1].size, self._held[-1].content_id):
            return True
        parts = list(self._want)
        for part in parts:
            parts += (*part.replaces, *part.empty)
        mine = [part.source for part in parts if isinstance(part.source, Fingerprint)]
        inodes = {source.inode for source in mine}
        theirs = set(found.theirs)
        keys = [key for layer in self._held if layer.id in theirs for key in layer.sources]
        return any(
            key.inode in inodes if isinstance(key, Fingerprint) else any(same_source(key, source) for source in mine)
            for key in keys
        )

    def _counted(self, count: int) -> Sum:
        """What the lowest `count` files show, by our own reading."""
        return self._sums.count(self._chain, count, on_bytes=self._reading("recognise"))

    def _is_true(self, layer: HeldLayer, count: int) -> bool:
        """Whether a layer there shows what the lowest `count` files show here."""
        if self._there.believed:
            return True
        total = self._sums.of(self._chain, count)
        if total is None and not self._reads:
            return True
        if total is None:
            unread = self._sums.unread(self._chain, count)
            self._on_event(Notice(f"reading {counted(unread, 'file')} to compare the image with the replica"))
            total = self._counted(count)
        size = self._chain.files[count - 1].size
        return (layer.size, layer.content_id) == (size, content_id(size, total))

    def _ends(self, layers: Sequence[HeldLayer]) -> Iterator[tuple[HeldLayer, int, bool]]:
        """The layers at whose ends files end, lowest first: how many of these, and whether both show the same.

        Up to the first where they do not.
        """
        for number in range(1, len(layers) + 1):
            found = self._missing(layers[:number])
            if isinstance(found, model.Diverged) or (not isinstance(found, UpToDate) and found.inside is not None):
                continue
            count = _covered(found, self._want)
            is_true = self._is_true(layers[number - 1], count)
            yield layers[number - 1], count, is_true
            if not is_true:
                return

    def _false(self) -> Corrupt:
        """The error for a replica whose layers are not what they should be; the lowest of them is named."""
        layer, count, _ = list(self._ends(self._held))[-1]
        file = self._chain.files[count - 1].path
        return Corrupt(
            f"its layer {layer.name} does not show what {file} shows here, though it was made of that file by its own "
            "account",
            subject=self._subject,
            hint="somebody has put other data there, or that file was changed after it was sent: `snapchain send "
            "--cut-replica` drops that layer and all above it there, and sends them again",
        )

    def _recognised(self, found: model.Diverged) -> int | None:
        """How many of the lowest files together show what the newest layer there shows; None when no number does.

        Where several numbers do, since a file says nothing new, the largest that costs no more reading: else that file
        would be sent again with every run. Reads what the files above the common base hold, and what it hides.
        """
        chain, tip = self._chain, self._held[-1]
        count = len(chain.files)
        self._on_event(
            Notice(f"the replica does not know {counted(count - found.first, 'file')}: comparing by content")
        )
        whole = sum(file.extents.data_bytes for file in chain.files[found.first :])
        on_bytes = self._reading("recognise", whole)
        known: int | None = None
        # Which file the newest layer there was made from, if it is one of these.
        newest = next(
            (
                at
                for at, file in enumerate(chain.files)
                if tip.sources and same_source(tip.sources[-1], file.fingerprint)
            ),
            None,
        )
        for number in range(found.first, count):
            view, below = chain.at(number), chain.at(number - 1) if number else None
            silent = below is not None and view.top.extents == Extents.absent(below.size)
            if known is not None and not silent and number > (newest or 0):
                return known
            total = self._sums.count(chain, number + 1, on_bytes=on_bytes)
            if view.size == tip.size and content_id(view.size, total) == tip.content_id:
                known = number + 1
        return known

    def _after_cut(self, common: Sequence[HeldLayer]) -> Base:
        """Cut off all above the uppermost of the common layers that shows what the files here show."""
        keep = next(((each, n) for each, n, is_true in reversed(list(self._ends(common))) if is_true), None)
        dropped = len(self._held) if keep is None else len(self._held) - 1 - self._held.index(keep[0])
        self._on_event(Notice(f"the replica drops {counted(dropped, 'layer')}, with the points on them"))
        if keep is None:
            return replace(_NOTHING, cut=True)
        return Base(keep[1], keep[0], keep[0].total, cut=True)

    def _diverged(self, found: model.Diverged) -> Diverged:
        names = {layer.id: layer.name for layer in self._held}
        theirs = _listed([names[layer] for layer in found.theirs])
        ours = _listed([file.path.name for file in self._chain.files[found.first :]])
        if found.is_ahead:
            what = f"the replica is ahead: it holds {theirs} on top of all that the image has"
        elif found.is_related:
            common = self._held[found.base_count - 1].name
            what = f"both sides have gone on from {common}: here {ours}, at the replica {theirs}"
        else:
            what = f"the replica holds another disk under this name: {theirs}; nothing of {ours} is known there"
        return Diverged(
            what,
            subject=self._subject,
            hint="send under another disk name; or, if what the replica has beyond may go, cut it off there "
            "(--cut-replica)",
        )

    def _reading(self, phase: str, whole: int = 0) -> Callable[[int], None]:
        return counting(phase, whole, self._on_event)


_NOTHING = Base(0, None, empty_sum())


def _wanted(file: ImageFile, lineage: Sequence[Wanted]) -> Wanted:
    """A file of the chain, with what a merge has made it of where that is known."""
    source = file.fingerprint
    return next((known for known in lineage if same_source(source, known.source)), Wanted(source))


def _covered(found: UpToDate | Send | Collapse, want: Sequence[Hashable]) -> int:
    """How many of the wanted files a destination has."""
    return len(want) if isinstance(found, UpToDate) else found.first


def _moved(found: UpToDate | Send | Collapse, count: int) -> UpToDate | Send | Collapse:
    """The same, where `count` more layers lie below."""
    return replace(found, base_count=found.base_count + count)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(ascii(name)[1:-1] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
