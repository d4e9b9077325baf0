"""What merges files at a replica: the engine of local merges, as the replica's side wants it.

A receiver is given it by whoever starts one; one that has none refuses what would need it.  What it stands for is
loaded when it is first needed: most receivers never merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import Conflict
from snapchain.model.events import Event, Progress, ignore

if TYPE_CHECKING:
    from snapchain.merge.plan import MergePlan
    from snapchain.merge.run import MergeReport
    from snapchain.merge.strategy import Strategy
    from snapchain.replica.merge_journal import OnBytes


@dataclass(frozen=True, slots=True)
class _Planned:
    """A `Planned` of the replica."""

    plan: MergePlan

    @property
    def strategy(self) -> str:
        return self.plan.strategy.value

    @property
    def bytes_to_move(self) -> int:
        return self.plan.bytes_to_move

    @property
    def needs_bytes(self) -> int:
        return self.plan.needs_bytes

    @property
    def shadowed_bytes(self) -> int:
        return self.plan.shadowed_bytes

    def run(self, *, on_bytes: OnBytes) -> MergeReport:
        from snapchain.merge.run import run

        moved = 0

        def on_event(event: Event) -> None:
            nonlocal moved
            if isinstance(event, Progress):
                # The proof moves nothing; that it goes on is said all the same.
                moved = event.done if event.phase == "merge" else moved
                on_bytes(moved, self.plan.bytes_to_move)

        return run(self.plan, noted=False, on_event=on_event)


class ReplicaEngine:
    """An `Engine` of the replica (replica/merge_journal.py). strategy: the best one unless given."""

    def __init__(self, strategy: Strategy | None = None) -> None:
        self._strategy = strategy

    def plan(self, tip: Path, members: Sequence[Path], *, image_dirs: Sequence[Path]) -> _Planned:
        """As the protocol says."""
        from snapchain.merge.plan import plan

        planned = plan(
            tip,
            from_layer=str(members[0]),
            to_layer=str(members[-1]),
            strategy=self._strategy,
            image_format="qcow2",
            image_dirs=image_dirs,
            unlocks=True,
        )
        if planned.keep:
            raise Conflict(planned.keep[0].reason, subject=planned.keep[0].path)
        return _Planned(planned)

    def pending(self, members: Sequence[Path]) -> bool:
        """As the protocol says."""
        from snapchain.merge.journal import unsettled

        return bool(unsettled([members[-1]]))

    def settle(self, members: Sequence[Path]) -> None:
        """As the protocol says."""
        from snapchain.merge.journal import sweep, unsettled
        from snapchain.merge.recover import recover

        for journal in unsettled([members[-1]]):
            recover(journal, noted=False, on_event=ignore)
        sweep(members[-1])
