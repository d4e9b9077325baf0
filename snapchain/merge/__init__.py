"""The merge engine over chains of files: request, plan, methods, journal, proof, recovery.

    request  ->  plan: ranges, each a step  ->  run: each step by its method  ->  report

`step` decides one range to the byte, `choose` picks ranges by rules, `methods` picks the strategy of a step. A killed
merge leaves a journal (`journal`), by which the next run finishes or undoes it (`settle`).
"""

from __future__ import annotations

from snapchain.merge.request import At, MergeRequest

__all__ = ["At", "MergeRequest"]
