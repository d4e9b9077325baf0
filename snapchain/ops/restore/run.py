"""restore: a point becomes a qcow2 or raw file again, a whole chain of files, or the content of a block device.

What a destination gives is written, read back, and its content id must be that of the point and of its layer before
the output gets its name. A run that is cut off leaves its unfinished files; the next one for the same output and point
continues them. They are believed no more than anything else: what does not prove is thrown away, and all begins anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from snapchain.destination.reading import LayerReader, PointReader, ReadableDestination, Sink
from snapchain.destination.records import PointRecord
from snapchain.errors import Corrupt, InvalidInput, NotFound, SnapchainError, Unavailable
from snapchain.host.files import UNCHANGED, Standing, free_bytes
from snapchain.image.qcow2.header import Backing
from snapchain.image.qcow2.layout import Layout, plan as lay_out
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.image.raw import RawWriter
from snapchain.model.events import Notice, OnEvent, counting, ignore
from snapchain.model.extents import DATA
from snapchain.ops.restore.cost import RestoreCost, layer_cost, total
from snapchain.ops.restore.damage import Damage, check_allowed
from snapchain.ops.restore.output import OutputFile, written_before
from snapchain.ops.restore.proof import ChainProof, raw_content_id
from snapchain.ops.restore.target import Claim, FilePlan, Format, RestorePlan, RestoreReport, Target, sectors


@dataclass(frozen=True, slots=True)
class _Job:
    """One file: the layer that it is to hold, and the file that it lies on."""

    path: Path
    format: Format
    layer: LayerReader
    backing: Backing | None

    def layout(self) -> Layout:
        """Raises Corrupt for a map that no file can have."""
        layer = self.layer
        try:
            return lay_out(
                layer.extents, cluster_size=layer.cluster_size, backing=self.backing, extended_l2=layer.extended_l2
            )
        except SnapchainError as error:
            raise Corrupt(
                f"no qcow2 file can hold this layer: {error.message}", subject=layer.peer or layer.name
            ) from error

    def file_plan(self) -> FilePlan:
        return FilePlan(
            path=str(self.path),
            format=self.format,
            virtual_size=self.layer.extents.size,
            data_bytes=self.layer.extents.data_bytes,
            backing=self.backing.name if self.backing else None,
        )

    def origin(self) -> str:
        """Equal only for files whose every byte has one place and one source."""
        layer, extents = self.layer, self.layer.extents
        told = (layer.id, self.format, layer.cluster_size, layer.extended_l2, extents.size, str(self.backing))
        digest = blake3(repr(told).encode())
        digest.update(extents.at.tobytes())
        digest.update(extents.val.tobytes())
        return digest.hexdigest(length=16)


class Restoration:
    """A point of a destination, and where it is to go. Nothing is read before `plan` or `run`."""

    def __init__(
        self,
        destination: ReadableDestination,
        disk: str,
        output: Path,
        *,
        point: str | None = None,
        format: Format | None = None,
        whole_chain: bool = False,
        force: bool = False,
        allow_damaged: bool = False,
        standing: Standing = UNCHANGED,
    ) -> None:
        """allow_damaged: write zeroes for ranges that are lost, and report them; an earlier run is not continued then.

        Raises NotFound, InvalidInput, Unsupported and Conflict for an OUT that does not do.
        """
        self._destination, self._disk, self._wanted = destination, disk, point
        if allow_damaged:
            traits = destination.traits
            check_allowed(names_damage=traits.names_damage, kind=traits.kind, whole_chain=whole_chain)
        self._allow_damaged = allow_damaged
        self._target = Target(output, format=format, whole_chain=whole_chain, force=force, standing=standing)
        self._planned: PointRecord | None = None
        self._resumed = False

    def plan(self) -> RestorePlan:
        """What `run` will do; reads a little of the data, to tell how long that takes.

        Raises Conflict when other images depend on what it would replace.
        """
        self._target.check_unused()
        with self._reader(maps_only=True) as reader:
            point = self._planned = reader.point
            files: tuple[FilePlan, ...] = ()
            costs: list[RestoreCost] = []
            for job in self._jobs(reader):
                files += (job.file_plan(),)
                costs.append(layer_cost(job.layer))
        cost = total(costs)
        return RestorePlan(
            source=self._destination.url,
            disk=self._disk,
            point=point.point,
            time=point.time.isoformat(),
            virtual_size=point.virtual_size,
            content_id=point.content_id,
            output=str(self._target.output),
            device=self._target.device,
            replaces=self._target.replaces,
            files=files,
            bytes_to_write=cost.data_bytes,
            requests=cost.requests,
            bytes_to_fetch=cost.bytes_to_fetch,
            seconds=cost.seconds,
        )

    def run(self, *, on_event: OnEvent = ignore) -> RestoreReport:
        """Write, prove, publish.

        Raises Corrupt naming the guest range that is lost, or when what came is not the point, Unavailable when the
        destination does not answer. Then no output appears.
        """
        with self._target.claimed(on_event) as claim:
            try:
                return self._run(claim, on_event)
            except (Corrupt, InvalidInput) as error:
                if not self._resumed:
                    raise
                why = error.message
        on_event(Notice(f"{why}; what an earlier run had written is thrown away, and the restore begins anew"))
        with self._target.claimed(on_event) as claim:
            return self._run(claim, on_event)

    def _run(self, claim: Claim, on_event: OnEvent) -> RestoreReport:
        self._resumed = False
        with self._reader(first=self._first_lacking(), on_event=on_event) as reader:
            point = reader.point
            if self._planned is not None and self._planned.content_id != point.content_id:
                subject = f"{self._destination.url}::{self._disk}"
                raise NotFound(f"point {point.point} is another one by now", subject=subject)
            on_bytes = counting("restore", reader.data_bytes, on_event)
            on_bytes(0)
            written = resumed = 0
            outputs: list[OutputFile] = []
            files: list[Path] = []
            shown = ""
            damage = Damage(allowed=self._allow_damaged)
            with ChainProof() as proof:
                for job in self._jobs(reader):
                    if self._target.device:
                        shown = _write_device(job, claim.device, damage, on_bytes)
                    else:
                        # What an earlier run found lost it told nobody: then there is nothing to continue.
                        output = claim.output(job.path, origin=None if self._allow_damaged else job.origin())
                        if not outputs:
                            self._check_space(reader.data_bytes, claim)
                        resumed += _data_below(job, output.start)
                        shown = self._write_file(job, output, proof, damage, on_bytes)
                        outputs.append(output)
                    written += job.layer.extents.data_bytes
                    files.append(job.path if self._target.device else outputs[-1].path)
                claim.publish(outputs)
        return RestoreReport(
            disk=self._disk,
            point=point.point,
            output=str(self._target.output),
            files=tuple(map(str, files)),
            virtual_size=point.virtual_size,
            bytes_written=written,
            bytes_resumed=resumed,
            content_id=shown,
            incomplete=claim.incomplete,
            damaged=damage.ranges,
        )

    def _reader(
        self, *, maps_only: bool = False, first: tuple[int, int] = (0, 0), on_event: OnEvent = ignore
    ) -> AbstractContextManager[PointReader]:
        return self._destination.reader(
            self._disk,
            self._wanted if self._planned is None else str(self._planned.point),
            chain=self._target.whole_chain,
            clusters=self._target.format != "raw",
            maps_only=maps_only,
            first=first,
            damaged=self._allow_damaged,
            on_event=on_event,
        )

    def _jobs(self, reader: PointReader) -> Iterator[_Job]:
        count = reader.point.layers if self._target.whole_chain else 1
        below: _Job | None = None
        for number, layer in enumerate(reader.layers(), 1):
            kind: Format = self._target.format or layer.format
            is_top = number == count
            path = self._target.file if is_top else self._target.lower(layer.id, kind)
            backing = None
            if below is not None:
                backing = Backing(self._target.backing_name(below.path, of_top=is_top), below.format)
            below = _Job(path, kind, layer, backing)
            yield below

    def _first_lacking(self) -> tuple[int, int]:
        """Number of the layer, and guest offset, below which an earlier run has written everything."""
        if self._target.device or self._allow_damaged or not self._target.has_parts():
            return 0, 0
        first = 0, 0
        with self._reader(maps_only=True) as reader:
            for number, job in enumerate(self._jobs(reader)):
                start = min(written_before(job.path, job.origin()), job.layer.extents.size)
                first = number, start
                if start < job.layer.extents.size:
                    break
        return first

    def _check_space(self, total: int, claim: Claim) -> None:
        """Raises Unavailable where there is less room than the data need that are not there yet."""
        self._target.check_space(total - claim.allocated)

    def _write_file(
        self, job: _Job, output: OutputFile, proof: ChainProof, damage: Damage, on_bytes: Callable[[int], None]
    ) -> str:
        """The content id of what the file shows."""
        layer, size = job.layer, job.layer.extents.size
        self._resumed |= output.start > 0
        on_bytes(_data_below(job, output.start))

        def on_copied(offset: int, count: int) -> None:
            output.note(offset, count)
            on_bytes(count)

        if output.is_whole:
            recorded = layer.copy(_NOTHING, start=size, on_copied=lambda _offset, _count: None)
        elif job.format == "qcow2":
            layout = job.layout()
            self._check_tables(layout)
            with Qcow2Writer(output.fd, layout, subject=output.path, resumed=output.start > 0) as writer:
                sink = damage.sink(writer.write_pieces, is_proven=True)
                recorded = layer.copy(sink, start=output.start, on_copied=on_copied)
        else:
            with RawWriter(output.fd, sectors(size), subject=output.path, resumed=output.start > 0) as raw:
                sink = damage.sink(raw.write_pieces, is_proven=True)
                recorded = layer.copy(sink, start=output.start, on_copied=on_copied)
        output.note_whole()
        if job.format == "raw" and job.backing is None and not output.start and not self._target.whole_chain:
            # Its map is known, whatever the filesystem tells.
            shown = raw_content_id(output.fd, layer.extents, subject=output.path)
        else:
            shown = proof.add(output, size=size, format=job.format)
        if shown != recorded and not self._resumed and not damage.allowed:
            _prove(job)
        _check_shown(shown, recorded, job)
        return shown

    def _check_tables(self, layout: Layout) -> None:
        """Data may turn out to be zeroes, which need no room; tables are written in full."""
        if layout.metadata_bytes > free_bytes(self._target.file.parent):
            raise Unavailable(
                f"the file needs {layout.metadata_bytes} bytes for its tables alone",
                subject=self._target.file.parent,
                hint="make room, or restore elsewhere",
            )


def _drop(pieces: object) -> None:
    """For a file that is whole."""


_NOTHING = Sink(_drop)


def _write_device(job: _Job, fd: int, damage: Damage, on_bytes: Callable[[int], None]) -> str:
    """The content id of what the device shows."""
    layer = job.layer
    zeroes = deque((start, length) for start, length, val in layer.extents.runs() if val < DATA)
    with RawWriter(fd, layer.extents.size, subject=job.path) as raw:

        def zero_below(offset: int) -> None:
            """In the order of the disk, as the data are."""
            while zeroes and zeroes[0][0] < offset:
                raw.zero(*zeroes.popleft())

        def on_copied(offset: int, count: int) -> None:
            zero_below(offset)
            on_bytes(count)

        recorded = layer.copy(damage.sink(raw.write_pieces, raw.zero, is_proven=True), on_copied=on_copied)
        zero_below(layer.extents.size)
    shown = raw_content_id(fd, layer.extents, subject=job.path)
    if shown != recorded and not damage.allowed:
        _prove(job)
    _check_shown(shown, recorded, job)
    return shown


def _data_below(job: _Job, offset: int) -> int:
    """DATA of a layer below a guest offset, bytes."""
    size = job.layer.extents.size
    if offset >= size:
        return job.layer.extents.data_bytes
    return job.layer.extents.window(0, offset).data_bytes if offset else 0


def _prove(job: _Job) -> None:
    """Raises Corrupt naming the guest range where what the destination holds is not what was recorded.

    A peer would say the same once more.
    """
    if job.layer.peer is None:
        job.layer.copy(_NOTHING, on_copied=lambda _offset, _count: None)


def _check_shown(shown: str, recorded: str, job: _Job) -> None:
    """Raises Corrupt unless a new file shows the content that its layer's record names."""
    if shown != recorded:
        raise Corrupt(
            f"the restored content id is {shown}, but {recorded} is recorded",
            subject=job.layer.peer or job.path,
            hint="run it again; if it persists, snapchain verify --read-data tells whether the destination is damaged; "
            "if it is not, that disk or this machine's memory is bad: restore elsewhere",
        )


__all__ = ["FilePlan", "Format", "Restoration", "RestorePlan", "RestoreReport"]
