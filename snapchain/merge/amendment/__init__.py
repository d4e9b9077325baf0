"""A merge inside an existing qcow2 file: only what it lacks is moved, and it reads right at every instant.

    absorb   the target is the uppermost input: what shows through it is added to it, then it is linked lower
    commit   the target is the lowest input: what the upper ones hold is written into it; the caller then renames it

    amendment = plan_absorb(chain.at(last), first, backing=Backing("root.qcow2", "qcow2"))    # reads, never writes
    fill(amendment, fd)       the file now reads the same on its old backing file and on the new one; after a commit
                              it has the view's size
    ...                       the caller may prove that here
    relink(amendment, fd)     the backing link, by one write of one sector; nothing to do for commit
    settle(fd)                refcounts made exact, free clusters at the end cut off; also alone, after a crash

Killed or without power at any moment, with part of the unflushed writes lost: the chain's top reads as before,
`qemu-img check` finds leaks at the worst, and the whole sequence begun again, from a new plan, ends as if nothing had
happened.
"""

from __future__ import annotations

from snapchain.merge.amendment.plan import Amendment, plan_absorb, plan_commit
from snapchain.merge.amendment.shadow import same_map, shadow
from snapchain.merge.amendment.write import Pending, detach, fill, relink, settle

__all__ = [
    "Amendment",
    "Pending",
    "detach",
    "fill",
    "plan_absorb",
    "plan_commit",
    "relink",
    "same_map",
    "settle",
    "shadow",
]
