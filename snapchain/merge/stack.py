"""A chain as a merge sees it: what each layer holds, how much of it is hidden, its holds, and where it was shipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from snapchain.image import ImageChain
from snapchain.merge.request import At
from snapchain.model.chain import Chain, Layer
from snapchain.model.economics import RangeGains, gains_of, hidden_by
from snapchain.model.extents import Extents, Int64s
from snapchain.model.fingerprint import Fingerprint, same_file
from snapchain.model.inventory import UpToDate, Wanted, missing
from snapchain.source.lineage import held_layers, lineage, note_of, sealed_at
from snapchain.source.notes import Hold, Notes


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """hidden: see economics.hidden_by; present: for each destination by name, how many files from the root it holds.

    silent: places of files that say nothing: they show what is below them
    holds: by place; sealed: for each file the time and the labels, also for the top, whose time means little
    """

    chain: ImageChain
    hidden: Int64s
    gains: RangeGains
    holds: dict[int, tuple[Hold, ...]]
    present: dict[str, int]
    silent: frozenset[int]
    sealed: tuple[tuple[datetime, tuple[str, ...]], ...]

    def __len__(self) -> int:
        return len(self.chain.files)

    @property
    def held_bytes(self) -> list[int]:
        """Guest bytes of data in each file."""
        return [int(count) for count in self.hidden.sum(axis=1)]

    @property
    def visible_bytes(self) -> list[int]:
        """Guest bytes of data in each file that a reader of the top sees."""
        return [int(count) for count in self.hidden[:, -1]]

    def after(self, first: int, last: int) -> tuple[int, int]:
        """(held, visible) bytes of the layer that files `first` to `last` become."""
        held = sum(self.held_bytes[first : last + 1]) - int(self.gains.freed[first, last])
        return held, sum(self.visible_bytes[first : last + 1])

    def at(self, place: int) -> tuple[str, ...]:
        """The destinations that hold a file."""
        return tuple(name for name, count in self.present.items() if place < count)


def look(chain: ImageChain, destinations: tuple[At, ...] = ()) -> Stack:
    """Of an opened chain. Raises what reading the notes raises: a note that cannot be read may be a hold."""
    notes = Notes()
    for fault in notes.faults(file.resolved for file in chain.files):
        raise fault
    places = range(len(chain.files))
    # Not by file.extents, which a file keeps as long as it is open.
    layers = [Layer(str(at), chain.files[at].shown_extents(), str(at - 1) if at else None) for at in places]
    silent = {at for at in places[1:] if layers[at].extents == Extents.absent(chain.files[at - 1].size)}
    hidden = hidden_by(Chain(layers))
    del layers
    return Stack(
        chain=chain,
        hidden=hidden,
        gains=gains_of(hidden),
        holds=held_layers(chain, notes),
        present={
            each.name: count for each, count in zip(destinations, _present(chain, notes, destinations), strict=True)
        },
        silent=frozenset(silent),
        sealed=tuple(sealed_at(file, note_of(file, notes)) for file in chain.files),
    )


def held_by(chain: ImageChain, destinations: Sequence[At]) -> list[int]:
    """How many files of a chain, from the root on, each destination holds. Raises what reading the notes raises."""
    return _present(chain, Notes(), destinations)


def _present(chain: ImageChain, notes: Notes, destinations: Sequence[At]) -> list[int]:
    """How many files, from the root on, each destination holds: by its records, without reading any data."""
    known = {each.source.content_key: each for each in lineage(chain, notes) if isinstance(each.source, Fingerprint)}
    want = [known.get(file.fingerprint.content_key, Wanted(file.fingerprint)) for file in chain.files]
    found = [missing(each.layers, want, same=same_file) for each in destinations]
    return [len(want) if isinstance(each, UpToDate) else each.first for each in found]
