"""What the user asks of a merge: layers by name, or rules by which they are chosen."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING

from snapchain.errors import InvalidInput
from snapchain.merge.strategy import Strategy
from snapchain.model.retention import Policy

if TYPE_CHECKING:
    from snapchain.destination.protocol import Destination

_NO_RULE = Policy()


@dataclass(frozen=True, slots=True)
class At:
    """A disk at a destination, which must be able to build on the chain afterwards. name: as the user wrote it."""

    name: str
    destination: Destination
    disk: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """flatten, from_layer, to_layer, strategy, cluster_size, keep_inputs, drop_bitmaps: as merge.plan.plan has them.

    policy: which sealed layers stay as views, in the calendar of `zone`, at the clock `now`
    max_layers: cap of the chain's length; budget_bytes: to be moved at most; budget_seconds: to be worked at most
    remove: files that may go, or be replaced, though they lie elsewhere than the top or may have other users
    at: destinations to look out for

    Raises InvalidInput for a cap or a budget that is none, or rules together with a range.
    """

    image: Path
    flatten: bool = False
    from_layer: str | None = None
    to_layer: str | None = None
    strategy: Strategy | None = None
    cluster_size: int | None = None
    keep_inputs: bool = False
    drop_bitmaps: bool = False
    image_format: str | None = None
    image_dirs: tuple[Path, ...] = ()
    policy: Policy = _NO_RULE
    zone: tzinfo = UTC
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    max_layers: int | None = None
    budget_bytes: int | None = None
    budget_seconds: float | None = None
    at: tuple[At, ...] = ()
    remove: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        named = self.from_layer is not None or self.to_layer is not None
        if self.flatten and self.from_layer is not None:
            raise InvalidInput("--flatten begins at the root; it cannot be combined with --from")
        if named and self.chooses:
            raise InvalidInput(
                "--from and --to name the layers; a rule, a cap or a budget would choose them",
                subject=self.image,
                hint="say one or the other",
            )
        if self.remove and self.keep_inputs:
            raise InvalidInput("--keep-inputs and --remove contradict each other", subject=self.image)
        if self.max_layers is not None and self.max_layers < 1:
            raise InvalidInput("a chain has at least one layer", subject="--max-layers")
        if self.budget_bytes is not None and self.budget_bytes < 0:
            raise InvalidInput("a budget cannot be negative", subject="--budget-bytes")
        if self.budget_seconds is not None and not self.budget_seconds >= 0:
            raise InvalidInput("a budget cannot be negative", subject="--budget-seconds")

    @property
    def chooses(self) -> bool:
        """Whether rules choose the layers; else they are those that were named, or all above the root."""
        return not self.policy.is_empty or self.max_layers is not None or self.has_budget

    @property
    def has_budget(self) -> bool:
        """Whether what is moved or the time is limited."""
        return self.budget_bytes is not None or self.budget_seconds is not None
