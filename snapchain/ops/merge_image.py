"""merge of a local chain, offline: `plan`, then `run`. See `snapchain.ops.merge`."""

from __future__ import annotations

from snapchain.ops.merge.plan import MergePlan, plan
from snapchain.ops.merge.run import MergeReport, run
from snapchain.ops.merge.strategy import Strategy

__all__ = ["MergePlan", "MergeReport", "Strategy", "plan", "run"]
