"""A destination, whatever kind it is: points of disks go there, can be listed, proven, given back, and let go.

    with destination_at("ssh://kvm2/srv/replica").deliver(image, "web1/vda", labels=["nightly"]) as work:
        work.run()
    destination_at("/backup", passphrase=...).restoration("web1/vda", out, point="nightly").run()

One protocol over the use cases of either kind; testing/destination_contract.py holds what every kind must do.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, tzinfo
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import BaseModel

from snapchain.destination.address import is_replica, located
from snapchain.model.events import OnEvent, ignore
from snapchain.model.retention import Policy
from snapchain.ops.inspect import InspectReport
from snapchain.ops.log import LogReport
from snapchain.ops.restore.target import Format, RestorePlan, RestoreReport
from snapchain.ops.ship.to_repository import ShipPlan, ShipReport
from snapchain.ops.verify import VerifyReport
from snapchain.repository.repository import Passphrase

PlanT_co = TypeVar("PlanT_co", covariant=True)
ReportT_co = TypeVar("ReportT_co", covariant=True)


class Work(Protocol[PlanT_co, ReportT_co]):
    """A use case that was opened: what it would do, and doing it."""

    def plan(self) -> PlanT_co:
        """What `run` will do; changes nothing."""
        ...

    def run(self, *, on_event: OnEvent = ignore) -> ReportT_co:
        """Do it. Raises errors of the tree; what is half done then is as good as not begun, or is gone on with."""
        ...


class Merged(Protocol):
    """What is common to the reports of merges by policy."""

    @property
    def points_kept(self) -> tuple[int, ...]: ...

    @property
    def points_dropped(self) -> tuple[int, ...]: ...


class Destination(Protocol):
    """Points of disks, at one place. url: for people; notices: what its user should know."""

    @property
    def url(self) -> str: ...

    @property
    def notices(self) -> Sequence[str]: ...

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
    ) -> AbstractContextManager[Work[ShipPlan, ShipReport]]:
        """Bring what is lacking of an image, and publish a point of it.

        Raises Busy when somebody writes to the image, Diverged where the kind keeps one chain a disk and the image
        does not lie on it.
        """
        ...

    def log(self, disk: str | None = None) -> LogReport:
        """All disks, or one. Raises NotFound."""
        ...

    def restoration(
        self,
        disk: str,
        output: Path,
        *,
        point: str | None = None,
        format: Format | None = None,
        whole_chain: bool = False,
        force: bool = False,
    ) -> Work[RestorePlan, RestoreReport]:
        """A point becomes a file, a chain of files, or a device's content. Raises NotFound, Corrupt."""
        ...

    def verify(self, disk: str | None = None, *, share: float = 0.0, on_event: OnEvent = ignore) -> VerifyReport:
        """Is it whole and true? share: of the data to read, 0 to 1. Findings are values; raises NotFound."""
        ...

    def inspect(self, disk: str, point: str | None = None) -> InspectReport:
        """What each layer of a point holds. Raises NotFound."""
        ...

    def merging(self, disk: str, policy: Policy, *, zone: tzinfo = UTC) -> Work[BaseModel, Merged]:
        """Keep the points that the rules name, and merge what they do not need. Raises NotFound, Unsupported."""
        ...


def destination_at(
    url: str,
    *,
    passphrase: Passphrase = lambda: None,
    writing: bool = False,
    limit_rate: int | None = None,
    pack_size: int | None = None,
    connections: int = 1,
    accept: str | None = None,
) -> Destination:
    """What an address means: dir:/path and ssh://[user@]host/path are replicas, everything else is a repository.

    passphrase: asked where it is encrypted; writing: whether points will be delivered or merged
    limit_rate: bytes a second to and from it; pack_size: bytes that new objects of a repository have at most
    connections: of ssh, to a replica; accept: as of `open_destination`
    A replica is not touched here. Raises InvalidInput, and as `open_destination`.
    """
    if is_replica(url):
        from snapchain.ops.replica_destination import ReplicaDestination

        return ReplicaDestination.at(url, limit_rate=limit_rate, connections=connections)
    from snapchain.destinations import open_destination
    from snapchain.ops.repository_destination import RepositoryDestination

    opened = open_destination(
        located(url),
        passphrase=passphrase,
        writing=writing,
        limit_rate=limit_rate,
        pack_size=pack_size,
        accept=accept,
    )
    return RepositoryDestination(opened)
