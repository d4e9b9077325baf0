"""restore: a point becomes a qcow2 or raw file again, a whole chain of files, or the content of a block device.

What is read is proved leaf by leaf against the record, and as a whole against the point's content id, before
the output gets its name.  Nothing but the repository and the passphrase is needed.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from snapchain.errors import InvalidInput, NotFound, Unavailable
from snapchain.host.files import free_bytes
from snapchain.host.os_errors import os_errors
from snapchain.image.block_device import open_device
from snapchain.image.qcow2.aligned import aligned
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import Layout, plan as lay_out
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.image.raw_write import RawWriter
from snapchain.model.extents import DATA, Extents
from snapchain.ops.events import Notice, OnEvent, Progress, ignore
from snapchain.ops.output import OutputFile, exists
from snapchain.ops.points import find_point
from snapchain.repository.catalogue import Point
from snapchain.repository.layers import StoredLayer
from snapchain.repository.replay import Replay, Sink
from snapchain.repository.repository import Repository
from snapchain.repository.view import ChainView

Format = Literal["qcow2", "raw"]
_RAW_SUFFIXES = frozenset({".raw", ".img", ".bin", ".dd"})
_QCOW2_SUFFIXES = frozenset({".qcow2", ".qcow"})


class FilePlan(BaseModel):
    """A file to be written. data_bytes: guest bytes that it will hold; backing: name of the file below it."""

    model_config = ConfigDict(frozen=True)

    path: str
    format: Format
    virtual_size: int
    data_bytes: int
    backing: str | None


class RestorePlan(BaseModel):
    """What `restore` would do. files: root first, the last is OUT."""

    model_config = ConfigDict(frozen=True)

    source: str
    disk: str
    point: int
    time: str
    virtual_size: int
    content_id: str
    output: str
    device: bool
    replaces: bool
    files: tuple[FilePlan, ...]
    bytes_to_write: int


class RestoreReport(BaseModel):
    """What `restore` did. bytes_written: guest bytes of DATA written."""

    model_config = ConfigDict(frozen=True)

    disk: str
    point: int
    output: str
    files: tuple[str, ...]
    virtual_size: int
    bytes_written: int
    content_id: str


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
        self._layers = repository.chain(catalogue, self._point.layer)
        self._output = output
        self._device = output.is_block_device()
        self._force = force
        self._check_output()
        with repository.as_of(catalogue):
            if whole_chain:
                self._jobs = tuple(self._chain_jobs(format))
            else:
                self._jobs = (self._flat_job("raw" if self._device else _format_of(output, format)),)
        if self._device and (format == "qcow2" or whole_chain):
            raise InvalidInput("a block device takes a flat raw disk", subject=output)

    def plan(self) -> RestorePlan:
        """What `run` will do."""
        files = tuple(job.file_plan() for job in self._jobs)
        return RestorePlan(
            source=self._repository.store.url,
            disk=self._disk,
            point=self._point.point,
            time=self._point.time.isoformat(),
            virtual_size=self._point.size,
            content_id=self._point.content_id,
            output=str(self._output),
            device=self._device,
            replaces=self._output.exists(),
            files=files,
            bytes_to_write=sum(file.data_bytes for file in files),
        )

    def run(self, *, on_event: OnEvent = ignore) -> RestoreReport:
        """Write, prove, publish. Raises Corrupt naming the guest range that is lost; then no output appears."""
        plan = self.plan()
        done = 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            on_event(Progress("restore", done, max(done, plan.bytes_to_write)))

        on_bytes(0)
        with self._repository.reading(
            {self._disk: [layer.id for layer in self._layers]},
            f"restore {self._disk}",
            on_wait=lambda words: on_event(Notice(words)),
        ):
            if self._device:
                self._write_device(self._jobs[0], on_bytes)
            else:
                self._check_space(plan)
                self._write_files(on_bytes)
        return RestoreReport(
            disk=self._disk,
            point=self._point.point,
            output=str(self._output),
            files=tuple(str(job.path) for job in self._jobs),
            virtual_size=self._point.size,
            bytes_written=plan.bytes_to_write,
            content_id=self._point.content_id,
        )

    def _write_files(self, on_bytes: Callable[[int], None]) -> None:
        with ExitStack() as stack:
            outputs = [(job, stack.enter_context(OutputFile(job.path))) for job in self._jobs]
            for job, output in outputs:
                if job.format == "qcow2":
                    with Qcow2Writer(output.fd, job.layout(), subject=job.path) as writer:
                        _replay(job, Sink(writer.write_pieces), on_bytes)
                else:
                    with RawWriter(output.fd, _sectors(job.view.size), subject=job.path) as raw:
                        _replay(job, Sink(raw.write_pieces), on_bytes)
            # Lower files first: whoever sees OUT can open it.  A lower file is named after its sealed layer: one that
            # is there already is what another restore has left, and stays, if it has the same bytes.
            fresh = [output for job, output in outputs if not self._is_there(job, output)]
            for output in fresh:
                output.publish(replace=self._force)

    def _is_there(self, job: _Job, output: OutputFile) -> bool:
        """Whether a lower file need not be written. Raises Conflict when another one has its name."""
        if self._force or job.path == self._output or not os.path.lexists(job.path):
            return False
        with os_errors(job.path):
            if not job.path.is_file() or not filecmp.cmp(f"/proc/self/fd/{output.fd}", job.path, shallow=False):
                raise exists(job.path)
        return True

    def _write_device(self, job: _Job, on_bytes: Callable[[int], None]) -> None:
        fd = open_device(self._output)
        try:
            with RawWriter(fd, job.view.size, subject=self._output) as raw:
                for start, length, val in job.extents.runs():
                    if val < DATA:
                        raw.zero(start, length)
                _replay(job, Sink(raw.write_pieces, raw.zero), on_bytes)
        finally:
            os.close(fd)

    def _flat_job(self, format: Format) -> _Job:
        view = ChainView(self._layers, self._repository.blobs)
        cluster_size = self._layers[-1].header.cluster_size
        shown = view.extents.owned_by(0)
        extents = shown if format == "raw" else aligned(shown, shown, cluster_size=cluster_size)
        return _Job(self._output, format, view, extents, (), cluster_size, None)

    def _chain_jobs(self, format: Format | None) -> list[_Job]:
        if format is not None:
            raise InvalidInput("--chain restores each layer in its own format", hint="leave out --format")
        jobs: list[_Job] = []
        for at, layer in enumerate(self._layers):
            is_top = at == len(self._layers) - 1
            below = jobs[-1] if jobs else None
            kind: Format = layer.header.image_format if below is None else "qcow2"
            path = self._output if is_top else _lower_path(self._output, layer, kind)
            view = ChainView(self._layers[: at + 1], self._repository.blobs)
            cluster_size = layer.header.cluster_size
            own = layer.extents()
            shown = view.extents.owned_by(0)
            extents = own if kind == "raw" else aligned(own, shown, cluster_size=cluster_size)
            backing = Backing(below.path.name, below.format) if below else None
            jobs.append(_Job(path, kind, view, extents, self._layers[:at], cluster_size, backing))
        return jobs

    def _check_output(self) -> None:
        parent = self._output.parent
        if not parent.is_dir():
            raise NotFound("there is no such directory", subject=parent)
        if self._output.is_dir():
            raise InvalidInput("this is a directory", subject=self._output, hint="name the file to be made")
        if os.path.lexists(self._output) and not self._device and not self._force:
            raise exists(self._output)

    def _check_space(self, plan: RestorePlan) -> None:
        free = free_bytes(self._output.parent)
        if plan.bytes_to_write > free:
            raise Unavailable(
                f"the restored files need up to {plan.bytes_to_write} bytes, but only {free} are free",
                subject=self._output.parent,
                hint="make room, or restore elsewhere",
            )


def _replay(job: _Job, sink: Sink, on_bytes: Callable[[int], None]) -> None:
    Replay(job.view, job.extents, sink).on(job.below).run(on_bytes)


def _sectors(size: int) -> int:
    """A raw file's bytes: QEMU counts raw disks in sectors of 512."""
    return -(-size // 512) * 512


def _lower_path(output: Path, layer: StoredLayer, kind: Format) -> Path:
    return output.with_name(f"{output.stem}.{layer.id[:12]}.{kind}")


def _format_of(output: Path, format: Format | None) -> Format:
    if format is not None:
        return format
    suffix = output.suffix.lower()
    if suffix in _QCOW2_SUFFIXES:
        return "qcow2"
    if suffix in _RAW_SUFFIXES:
        return "raw"
    raise InvalidInput(
        f"the suffix {suffix!r} does not tell the format", subject=output, hint="say --format qcow2 or --format raw"
    )
