"""What to merge so that nothing but the kept points remains, and every kept point reads as before.

A point is named by its top layer.  A kept layer absorbs the dropped ones beneath it, down to the next layer that
stays; that is right because neighbours may be merged first (`over` is associative).

    layers        a   b   c   d   e   f          keep c, e
    groups       [a   b   c] [d   e]             f leads to no kept point: it is in no group

Points of one disk may share a lower part and then branch.  A layer on which two kept points go separate ways
stays, kept itself or not: merged upwards it would have to be stored twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from snapchain.errors import InvalidInput


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring layers that become one.

    members: layer ids, lowest first; the last one's view is what stays readable
    parent:  the top of the group below, None when this group contains the root
    """

    members: tuple[str, ...]
    parent: str | None

    @property
    def top(self) -> str:
        """The layer whose view the merged layer keeps."""
        return self.members[-1]

    @property
    def is_root(self) -> bool:
        """Whether the merged layer has nothing below it."""
        return self.parent is None

    @property
    def is_merge(self) -> bool:
        """Whether there is anything to do: more than one layer."""
        return len(self.members) > 1


def collapse(chain_ids: Sequence[str], keep: Collection[str]) -> tuple[Group, ...]:
    """The groups of one chain, lowest first.

    chain_ids: layer ids, root first
    keep:      ids of the layers that are tops of kept points

    Raises InvalidInput when an id is listed twice, when a kept one is not in the chain, or when none is kept.
    """
    parents = dict(zip(chain_ids, [None, *chain_ids], strict=False))
    if len(parents) != len(chain_ids):
        raise InvalidInput("a layer stands in the chain twice")
    return collapse_tree(parents, keep)


def collapse_tree(parents: Mapping[str, str | None], keep: Collection[str]) -> tuple[Group, ...]:
    """The groups of all chains of a disk, every group after its parent.

    parents: the parent of each layer, None for a root
    keep:    ids of the layers that are tops of kept points

    Raises InvalidInput for an unknown layer, a loop, or when no layer is kept.
    """
    if not keep:
        raise InvalidInput("no point is kept: nothing would remain")
    needed = _lowest_first(parents, keep)
    children = Counter(parents[layer] for layer in needed)
    kept = set(keep)
    groups: list[Group] = []
    # The layers collected so far for the group that each layer belongs to, while its top is not reached.
    open_below: dict[str | None, tuple[tuple[str, ...], str | None]] = {None: ((), None)}
    for layer in needed:
        beneath, parent = open_below[parents[layer]]
        members = (*beneath, layer)
        if layer in kept or children[layer] > 1:
            groups.append(Group(members, parent))
            open_below[layer] = ((), layer)
        else:
            open_below[layer] = (members, parent)
    return tuple(groups)


def _lowest_first(parents: Mapping[str, str | None], keep: Collection[str]) -> list[str]:
    """The kept layers and everything beneath them, each after its parent, in the order of `parents`."""
    done: dict[str, None] = {}
    rank = {layer: place for place, layer in enumerate(parents)}
    unknown = sorted(set(keep) - rank.keys())
    if unknown:
        raise InvalidInput("a kept point's layer does not exist", subject=unknown[0])
    for top in sorted(keep, key=rank.__getitem__):
        path: dict[str, None] = {}
        layer: str | None = top
        while layer is not None and layer not in done:
            if layer in path:
                raise InvalidInput("its parents form a loop", subject=layer)
            path[layer] = None
            if layer not in parents:
                raise InvalidInput("no such layer, although another one depends on it", subject=layer)
            layer = parents[layer]
        done.update(dict.fromkeys(reversed(path)))
    return list(done)
