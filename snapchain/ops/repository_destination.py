"""A repository as a Destination: its use cases under the common names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, tzinfo
from pathlib import Path

from snapchain.model.events import OnEvent, ignore
from snapchain.model.retention import Policy
from snapchain.ops.inspect import InspectReport, inspect_point
from snapchain.ops.log import LogReport, log
from snapchain.ops.merge_repository import RepositoryMerge
from snapchain.ops.restore.from_repository import Restoration
from snapchain.ops.restore.target import Format
from snapchain.ops.ship.to_repository import Shipment, shipment
from snapchain.ops.verify import VerifyReport, verify
from snapchain.repository.repository import Repository


class RepositoryDestination:
    """See destination.Destination. repository: opened, for writing where that is meant."""

    def __init__(self, repository: Repository) -> None:
        self.repository = repository

    @property
    def url(self) -> str:
        return self.repository.store.url

    @property
    def notices(self) -> Sequence[str]:
        return self.repository.notices

    def deliver(
        self,
        image: Path,
        disk: str,
        *,
        labels: Sequence[str] = (),
        each_layer: bool = False,
        format: str | None = None,
        image_dirs: Sequence[Path] = (),
        on_event: OnEvent = ignore,
    ) -> AbstractContextManager[Shipment]:
        """As `shipment`."""
        return shipment(
            image,
            self.repository,
            disk,
            labels=labels,
            each_layer=each_layer,
            format=format,
            image_dirs=image_dirs,
            on_event=on_event,
        )

    def log(self, disk: str | None = None) -> LogReport:
        """As `ops.log.log`."""
        return log(self.repository, disk)

    def restoration(
        self,
        disk: str,
        output: Path,
        *,
        point: str | None = None,
        format: Format | None = None,
        whole_chain: bool = False,
        force: bool = False,
    ) -> Restoration:
        """As `Restoration`."""
        return Restoration(
            self.repository, disk, output, point=point, format=format, whole_chain=whole_chain, force=force
        )

    def verify(self, disk: str | None = None, *, share: float = 0.0, on_event: OnEvent = ignore) -> VerifyReport:
        """As `ops.verify.verify`."""
        return verify(self.repository, disk=disk, share=share, on_event=on_event)

    def inspect(self, disk: str, point: str | None = None) -> InspectReport:
        """As `inspect_point`."""
        return inspect_point(self.repository, disk, point=point)

    def merging(self, disk: str, policy: Policy, *, zone: tzinfo = UTC) -> RepositoryMerge:
        """As `RepositoryMerge`."""
        return RepositoryMerge(self.repository, disk, policy, zone=zone)
