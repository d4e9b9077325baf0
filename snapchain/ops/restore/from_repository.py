"""restore: a point becomes a qcow2 or raw file again, a whole chain of files, or the content of a block device.

Each leaf that is read is proved against the record.  Then the output is read back: its content id must be that of the
point and of its layer, before the output gets its name.  Nothing but the repository and the
passphrase is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snapchain.errors import Corrupt
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import Layout, plan as lay_out
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.image.raw_write import RawWriter
from snapchain.model.events import Notice, OnEvent, Progress, ignore
from snapchain.model.extents import DATA, Extents
from snapchain.ops.points import find_point
from snapchain.ops.restore.output import OutputFile
from snapchain.ops.restore.proof import ChainProof, raw_content_id
from snapchain.ops.restore.target import Claim, FilePlan, Format, RestorePlan, RestoreReport, Target, sectors
from snapchain.repository.catalogue import Point
from snapchain.repository.chain import ChainView
from snapchain.repository.layers import StoredLayer
from snapchain.repository.replay import Replay, Sink
from snapchain.repository.repository import Repository


@dataclass(frozen=True, slots=True)
class _Job:
    """One file: what it shows, what it holds, and what its chain below holds already."""

    path: Path
    format: Format
    view: ChainView
    extents: Extents
    below: Sequence[StoredLayer]
    cluster_size: int
    backing: Backing | None

    def layout(self) -> Layout:
        return lay_out(self.extents, cluster_size=self.cluster_size, backing=self.backing)

    def file_plan(self) -> FilePlan:
        return FilePlan(
            path=str(self.path),
            format=self.format,
            virtual_size=self.view.size,
            data_bytes=self.extents.data_bytes,
            backing=self.backing.name if self.backing else None,
        )


class Restoration:
    """A point, opened, and where it is to go."""

    def __init__(
        self,
        repository: Repository,
        disk: str,
        output: Path,
        *,
        point: str | None = None,
        format: Format | None = None,
        whole_chain: bool = False,
        force: bool = False,
    ) -> None:
        catalogue = repository.catalogue(disk)
        self._repository = repository
        self._disk = disk
        self._point: Point = find_point(catalogue, point)
        self._layers = repository.chain_of(catalogue, self._point)
        self._target = Target(output, format=format, whole_chain=whole_chain, force=force)
        with repository.as_of(catalogue):
            kind = self._target.format
            self._jobs = tuple(self._chain_jobs()) if kind is None else (self._flat_job(kind),)

    def plan(self) -> RestorePlan:
        """What `run` will do. Raises Conflict when other images depend on what it would replace."""
        self._target.check_unused()
        return self._plan()

    def _plan(self) -> RestorePlan:
        files = tuple(job.file_plan() for job in self._jobs)
        return RestorePlan(
            source=self._repository.store.url,
            disk=self._disk,
            point=self._point.point,
            time=self._point.time.isoformat(),
            virtual_size=self._point.size,
            content_id=self._point.content_id,
            output=str(self._target.output),
            device=self._target.device,
            replaces=self._target.replaces,
            files=files,
            bytes_to_write=sum(file.data_bytes for file in files),
        )

    def run(self, *, on_event: OnEvent = ignore) -> RestoreReport:
        """Write, prove, publish. Raises Corrupt naming the guest range that is lost; then no output appears."""
        plan = self._plan()
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            on_event(Progress("restore", done, max(done, plan.bytes_to_write)))

        on_bytes(0)
        with (
            self._target.claimed(on_event) as claim,
            self._repository.reading(
                {self._disk: [layer.id for layer in self._layers]},
                f"restore {self._disk}",
                on_wait=lambda words: on_event(Notice(words)),
            ),
        ):
            if self._target.device:
                shown = self._write_device(claim, self._jobs[0], on_bytes)
            else:
                self._target.check_space(plan.bytes_to_write)
                shown = self._write_files(claim, on_bytes)
        return RestoreReport(
            disk=self._disk,
            point=self._point.point,
            output=str(self._target.output),
            files=tuple(str(job.path) for job in self._jobs),
            virtual_size=self._point.size,
            bytes_written=plan.bytes_to_write,
            content_id=shown,
            incomplete=claim.incomplete,
        )

    def _write_files(self, claim: Claim, on_bytes: Callable[[int], None]) -> str:
        """The content id of what OUT shows."""
        shown = ""
        outputs: list[OutputFile] = []
        with ChainProof() as proof:
            for job in self._jobs:
                output = claim.output(job.path)
                if job.format == "qcow2":
                    with Qcow2Writer(output.fd, job.layout(), subject=job.path) as writer:
                        _replay(job, Sink(writer.write_pieces), on_bytes)
                else:
                    with RawWriter(output.fd, sectors(job.view.size), subject=job.path) as raw:
                        _replay(job, Sink(raw.write_pieces), on_bytes)
                if job.format == "raw" and len(self._jobs) == 1:  # its map is known, whatever the filesystem tells
                    shown = raw_content_id(output.fd, job.extents, subject=job.path)
                else:
                    shown = proof.add(output, size=job.view.size, format=job.format)
                _check_shown(shown, job)
                outputs.append(output)
            claim.publish(outputs)
        return shown

    def _write_device(self, claim: Claim, job: _Job, on_bytes: Callable[[int], None]) -> str:
        """The content id of what the device shows."""
        with RawWriter(claim.device, job.view.size, subject=job.path) as raw:
            for start, length, val in job.extents.runs():
                if val < DATA:
                    raw.zero(start, length)
            _replay(job, Sink(raw.write_pieces, raw.zero), on_bytes)
        shown = raw_content_id(claim.device, job.extents, subject=job.path)
        _check_shown(shown, job)
        return shown

    def _flat_job(self, format: Format) -> _Job:
        view = ChainView(self._layers, self._repository.blobs)
        cluster_size = self._layers[-1].header.cluster_size
        shown = view.extents.owned_by(0)
        extents = shown if format == "raw" else aligned(shown, shown, cluster_size=cluster_size)
        return _Job(self._target.file, format, view, extents, (), cluster_size, None)

    def _chain_jobs(self) -> list[_Job]:
        jobs: list[_Job] = []
        for at, layer in enumerate(self._layers):
            is_top = at == len(self._layers) - 1
            below = jobs[-1] if jobs else None
            kind: Format = layer.header.image_format if below is None else "qcow2"
            path = self._target.file if is_top else self._target.lower(layer.id, kind)
            view = ChainView(self._layers[: at + 1], self._repository.blobs)
            cluster_size = layer.header.cluster_size
            own = layer.extents()
            shown = view.extents.owned_by(0)
            extents = own if kind == "raw" else aligned(own, shown, cluster_size=cluster_size)
            name = self._target.backing_name(below.path, of_top=is_top) if below else ""
            backing = Backing(name, below.format) if below else None
            jobs.append(_Job(path, kind, view, extents, self._layers[:at], cluster_size, backing))
        return jobs


def _replay(job: _Job, sink: Sink, on_bytes: Callable[[int], None]) -> None:
    Replay(job.view, job.extents, sink).on(job.below).run(on_bytes)


def _check_shown(shown: str, job: _Job) -> None:
    """Raises Corrupt unless a new file shows the content that its layer's record names."""
    recorded = job.view.layers[-1].header.content_id
    if shown != recorded:
        raise Corrupt(
            f"the restored content id is {shown}, but {recorded} is recorded",
            subject=job.path,
            hint="run it again; if it persists, that disk or this machine's memory is bad: restore elsewhere",
        )


__all__ = ["FilePlan", "Format", "Restoration", "RestorePlan", "RestoreReport"]
