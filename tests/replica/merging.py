"""Disks with points, and what each of them must show, whatever is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snapchain.destination.records import PointsMergePlan, PointsMergeReport
from snapchain.model.retention import Policy
from snapchain.ops.ship.run import ShipReport, ShipRequest
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.engine import ReplicaEngine
from snapchain.replica.points_merge import ReplicaMerge
from snapchain.replica.verification import verify_replica
from tests.ops.stacks import clean, flat, same
from tests.replica.conftest import DISK, Place
from tests.replica.sending import send_to_replica


def endpoint(root: Path) -> DirectoryEndpoint:
    return DirectoryEndpoint(root, engine=ReplicaEngine())


@dataclass
class Pointed:
    """A disk at a replica. shown: by its points' numbers, raw files of what each shows."""

    place: Place
    shots: Path
    shown: dict[int, Path] = field(default_factory=dict)

    def send(self, image: Path, **options: Any) -> ShipReport:
        report = send_to_replica(ShipRequest(image=image, disk=DISK, **options), endpoint(self.place.root))
        if report.point is not None:
            self.shots.mkdir(exist_ok=True)
            self.shown[report.point] = flat(image, self.shots / f"{report.point}.raw", image.suffix[1:])
        return report

    def merge(self, **rules: Any) -> PointsMergeReport:
        return self.merging(**rules).run()

    def plan(self, **rules: Any) -> PointsMergePlan:
        return self.merging(**rules).plan()

    def merging(self, **rules: Any) -> ReplicaMerge:
        return ReplicaMerge(endpoint(self.place.root), DISK, Policy(**rules), zone="UTC")

    def points(self) -> list[int]:
        return [point["point"] for point in self.place.catalogue()["points"]]

    def check(self, *, kept: Sequence[int] | None = None, besides: Sequence[str] = ()) -> None:
        """Every point that there is shows what it did, every file is sound, and nothing else is there."""
        catalogue = self.place.catalogue()
        if kept is not None:
            assert self.points() == list(kept)
        files = {layer["id"]: self.place.directory / layer["file"] for layer in catalogue["layers"]}
        for point in catalogue["points"]:
            assert same(files[point["layer"]], self.shown[point["point"]]), point["point"]
        for path in files.values():
            assert clean(path), path
            assert path.stat().st_mode & 0o7777 == 0o400
        left = {entry.name for entry in self.place.directory.iterdir()}
        assert left == {"catalogue.json", ".lock", *(path.name for path in files.values()), *besides}
        found = verify_replica(endpoint(self.place.root), DISK, read_data=True)
        assert found.ok, found.findings
