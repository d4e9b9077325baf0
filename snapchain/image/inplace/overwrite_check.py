"""No write of an amendment may hit what the view shows from the file that is changed.

The proof takes bytes at one place of one file for the same, before and after; this is what makes that true.
"""

from __future__ import annotations

import numpy as np

from snapchain.errors import Corrupt
from snapchain.image.assemble.pieces import pieces_of
from snapchain.image.inplace.amendment import Amendment
from snapchain.model.extents import ABSENT, DATA


def check_harmless(amendment: Amendment) -> None:
    """Raises Corrupt for an amendment that would overwrite what is to be seen; nothing was written then."""
    view = amendment.view
    shown = view.resolve()
    own = shown.mapped(np.where(shown.val == amendment.target, np.int64(DATA), np.int64(ABSENT)))
    pieces = pieces_of(own, shown, view.files)
    if not len(pieces):
        return
    order = np.argsort(pieces.host, kind="stable")
    start = pieces.host[order]
    length = np.where(pieces.stored > 0, pieces.stored, pieces.length)[order]
    reach = np.maximum.accumulate(start + length)
    for target, size in (
        (amendment.copies.target, amendment.copies.length),
        (amendment.unpack_target, amendment.unpack_length),
        (amendment.zero_target, amendment.zero_length),
    ):
        # How many visible stretches begin before each write ends, and whether any of those reaches into it.
        before = np.searchsorted(start, target + size, side="left")
        hit = (before > 0) & (reach[before - 1] > target)
        if hit.any():
            raise Corrupt(
                f"the merge would overwrite what is seen at offset {int(target[hit.argmax()])} of the file",
                subject=amendment.file.path,
                hint="this is a fault of snapchain: merge with --strategy new-file, and report it",
            )
