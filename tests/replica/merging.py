"""Disks with points, and what each of them must show, whatever is merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from snapchain.destination.records import PointsMergePlan, PointsMergeReport
from snapchain.merge.request import MergeRequest
from snapchain.merge.run import StepReport, run_step
from snapchain.merge.step import MergeStep, plan_step
from snapchain.model.events import Event, OnEvent, Progress
from snapchain.model.merging import Strategy
from snapchain.model.retention import Policy
from snapchain.ops.ship.run import ShipReport, ShipRequest
from snapchain.replica import layer_merge
from snapchain.replica.endpoint import DirectoryEndpoint
from snapchain.replica.points_merge import ReplicaMerge
from snapchain.replica.verification import verify_replica
from tests.ops.stacks import clean, flat, same
from tests.replica.conftest import DISK, Place
from tests.replica.sending import send_to_replica


def endpoint(root: Path) -> DirectoryEndpoint:
    return DirectoryEndpoint(root)


@contextmanager
def merged_by(strategy: Strategy | None, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Merges at replicas go by this strategy. meanwhile: called when one has moved something, in the middle of it."""

    def planned(request: MergeRequest) -> MergeStep:
        return plan_step(replace(request, strategy=strategy))

    def run(step: MergeStep, *, noted: bool, on_event: OnEvent) -> StepReport:
        def listen(event: Event) -> None:
            if isinstance(event, Progress) and event.done:
                meanwhile()
            on_event(event)

        return run_step(step, noted=noted, on_event=listen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_merge, "plan_step", planned)
        patch.setattr(layer_merge, "run_step", run)
        yield


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
        found = verify_replica(endpoint(self.place.root), DISK, share=1.0)
        assert found.ok, found.findings
