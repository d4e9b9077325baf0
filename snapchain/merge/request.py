"""What a merge of an image's chain is asked to do, from the command line to the journal: layers by name, or rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from pathlib import Path

from snapchain.errors import InvalidInput
from snapchain.model.inventory import Held
from snapchain.model.merging import Strategy
from snapchain.model.retention import Policy


@dataclass(frozen=True, slots=True)
class At:
    """What a destination holds of the disk, so that it can build on the chain after the merge.

    name: as the user wrote it; layers: of the disk's newest point there, root first
    """

    name: str
    layers: tuple[Held, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRequest:
    """Without rules: everything above the root, or the layers from `from_layer` to `to_layer`.

    image: the top of the chain; image_format: of that file, None to detect it; image_dirs: where its backing files
        may lie, and where other images may depend on them
    flatten: the root may be merged too
    from_layer, to_layer: file names or paths of the lowest and uppermost input
    strategy: None for the one that moves least
    cluster_size: of a new file, bytes; None for that of the input which gives most
    keep_inputs: no file is removed, and the uppermost input gets a second name
    drop_bitmaps: layers with persistent bitmaps are merged without them
    remove: files that may be removed or replaced although they lie outside the top's directory, or although an
        unreadable image may depend on them
    unlocks: the caller makes read-only files of this user writable before `run`
    policy: which sealed layers stay as views, in the calendar of `zone`, at the clock `now`
    max_layers: merge no more than it takes to have so many files
    budget_bytes: moved at most; budget_seconds: worked at most
    at: destinations that hold the chain; rules merge only what all of them hold

    Raises InvalidInput for a cap or a budget out of range, and for contradictions.
    """

    image: Path
    image_format: str | None = None
    image_dirs: Sequence[Path] = ()
    flatten: bool = False
    from_layer: str | None = None
    to_layer: str | None = None
    strategy: Strategy | None = None
    cluster_size: int | None = None
    keep_inputs: bool = False
    drop_bitmaps: bool = False
    remove: Sequence[Path] = ()
    unlocks: bool = False
    policy: Policy = field(default_factory=Policy)
    zone: tzinfo = UTC
    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    max_layers: int | None = None
    budget_bytes: int | None = None
    budget_seconds: float | None = None
    at: tuple[At, ...] = ()

    def __post_init__(self) -> None:
        named = self.from_layer is not None or self.to_layer is not None
        if self.flatten and self.from_layer is not None:
            raise InvalidInput("--flatten begins at the root; it cannot be combined with --from")
        if named and self.chooses:
            raise InvalidInput(
                "--from and --to name the layers; a rule, a cap or a budget would choose them",
                subject=self.image,
                hint="give either the layers or the rules",
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
        """Whether rules choose the layers; else the request names them, or means all above the root."""
        return not self.policy.is_empty or self.max_layers is not None or self.has_budget

    @property
    def has_budget(self) -> bool:
        """Whether the bytes moved or the time are limited."""
        return self.budget_bytes is not None or self.budget_seconds is not None

    def of_range(self, lowest: Path, uppermost: Path) -> MergeRequest:
        """The same for one range of the chain's files, without rules."""
        return replace(
            self,
            flatten=False,
            from_layer=str(lowest),
            to_layer=str(uppermost),
            policy=Policy(),
            max_layers=None,
            budget_bytes=None,
            budget_seconds=None,
            at=(),
        )
