"""snapshot: seal the top of a chain and put a fresh overlay under the same path (source/sealing.py)."""

from __future__ import annotations

from snapchain.source.sealing import SnapshotPlan, SnapshotReport, plan, run

__all__ = ["SnapshotPlan", "SnapshotReport", "plan", "run"]
