"""One qcow2 file out of several neighbours of a chain: planned in one pass over their maps, only survivors move.

    assembly = plan(chain.at(last), first, backing=Backing("root.qcow2", "qcow2"))
    moved = run(assembly, fd)

The caller flushes the file, and proves it, before it gives it a name that anybody relies on.
"""

from __future__ import annotations

from snapchain.image.assemble.move import Moved
from snapchain.image.assemble.plan import Assembly, plan
from snapchain.image.assemble.run import run

__all__ = ["Assembly", "Moved", "plan", "run"]
