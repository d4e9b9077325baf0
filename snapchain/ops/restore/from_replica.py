"""restore from a replica: a point comes over the wire and becomes what `restore` makes of a repository's.

It is written straight into OUT's place, read back from there, and gets its name only when what it shows has the
content id of the point.  The other side is not trusted with anything but being slow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from snapchain.errors import Corrupt, NotFound, SnapchainError, Unavailable
from snapchain.host.files import free_bytes
from snapchain.image import Backing
from snapchain.image.qcow2.layout import Layout, plan as lay_out
from snapchain.image.qcow2.write import Qcow2Writer
from snapchain.image.raw_write import RawWriter
from snapchain.model.events import OnEvent, Progress, ignore
from snapchain.model.extents import DATA
from snapchain.ops.points import in_full
from snapchain.ops.restore.output import OutputFile
from snapchain.ops.restore.proof import ChainProof, raw_content_id
from snapchain.ops.restore.target import Claim, FilePlan, Format, RestorePlan, RestoreReport, Target, sectors
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.fetch_client import Answer, FetchedLayer, Piece, fetch
from snapchain.replica.stream.messages import HeldPoint

OnBytes = Callable[[int], None]


class ReplicaRestoration:
    """A point of a replica, and where it is to go. Nothing is asked over there before `plan` or `run`."""

    def __init__(
        self,
        endpoint: Endpoint,
        disk: str,
        output: Path,
        *,
        point: str | None = None,
        format: Format | None = None,
        whole_chain: bool = False,
        force: bool = False,
        limit_rate: int | None = None,
    ) -> None:
        """limit_rate: bytes a second on the wire. Raises NotFound, InvalidInput, Conflict for an OUT that cannot be."""
        self._endpoint, self._disk, self._wanted = endpoint, disk, in_full(point)
        self._limit_rate = limit_rate
        self._target = Target(output, format=format, whole_chain=whole_chain, force=force)
        self._planned: HeldPoint | None = None

    def plan(self) -> RestorePlan:
        """What `run` will do; of the other side's files only the tables are read. Raises as `run`."""
        self._target.check_unused()
        files: list[FilePlan] = []
        with self._fetch(look=True) as answer:
            for number, layer in enumerate(answer.layers(), 1):
                for _ in layer.batches():
                    raise AssertionError("nobody sends data to one who only looks")
                files.append(self._file_plan(answer, layer, number, files))
        point = self._planned = answer.point
        return RestorePlan(
            source=self._endpoint.url,
            disk=self._disk,
            point=point.point,
            time=point.time.isoformat(),
            virtual_size=point.size,
            content_id=point.content_id,
            output=str(self._target.output),
            device=self._target.device,
            replaces=self._target.replaces,
            files=tuple(files),
            bytes_to_write=sum(file.data_bytes for file in files),
        )

    def run(self, *, on_event: OnEvent = ignore) -> RestoreReport:
        """Fetch, write, prove, publish.

        Raises Corrupt when what came is not the point, Unavailable when the link breaks; then no output appears.
        """
        with self._target.claimed(on_event) as claim, self._fetch(look=False) as answer:
            self._check_planned(answer.point)
            total, done = answer.data_bytes, 0

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                on_event(Progress("restore", done, max(done, total)))

            on_bytes(0)
            if self._target.device:
                files, shown = self._write_device(claim, answer, on_bytes)
            else:
                self._target.check_space(total)
                files, shown = self._write_files(claim, answer, on_bytes)
        return RestoreReport(
            disk=self._disk,
            point=answer.point.point,
            output=str(self._target.output),
            files=tuple(map(str, files)),
            virtual_size=answer.point.size,
            bytes_written=done,
            content_id=shown,
            incomplete=claim.incomplete,
        )

    def _fetch(self, *, look: bool) -> AbstractContextManager[Answer]:
        wanted = self._wanted if self._planned is None else str(self._planned.point)
        chain = self._target.whole_chain
        return fetch(self._endpoint, self._disk, wanted, chain=chain, look=look, limit_rate=self._limit_rate)

    def _check_planned(self, point: HeldPoint) -> None:
        if self._planned is not None and self._planned.content_id != point.content_id:
            raise NotFound(f"point {point.point} is another one by now", subject=f"{self._endpoint.url}::{self._disk}")

    def _write_files(self, claim: Claim, answer: Answer, on_bytes: OnBytes) -> tuple[list[Path], str]:
        """The files, root first, and the content id of what the last of them shows."""
        outputs: list[OutputFile] = []
        shown = ""
        with ChainProof() as proof:
            for number, layer in enumerate(answer.layers(), 1):
                path = self._path(answer, layer, number)
                output = claim.output(path)
                if self._target.format == "raw":
                    shown = _write_raw(layer, output, on_bytes)
                else:
                    layout = _layout(layer, self._backing(answer, outputs, number), answer.peer)
                    self._check_tables(layout)
                    _write_qcow2(layer, output, layout, on_bytes)
                    shown = proof.add(output, size=layer.offer.size)
                _check_shown(shown, layer, answer.peer)
                outputs.append(output)
            claim.publish(outputs)
        return [output.path for output in outputs], shown

    def _write_device(self, claim: Claim, answer: Answer, on_bytes: OnBytes) -> tuple[list[Path], str]:
        path, fd = self._target.file, claim.device
        shown = ""
        for layer in answer.layers():
            with RawWriter(fd, layer.offer.size, subject=path) as raw:
                for start, length, val in layer.extents.runs():
                    if val < DATA:
                        raw.zero(start, length)
                for batch in layer.batches():
                    raw.write_pieces([(piece.offset, piece.data) for piece in batch if piece.data is not None])
                    for piece in batch:
                        if piece.data is None:
                            raw.zero(piece.offset, piece.length)
                    on_bytes(_length(batch))
            shown = raw_content_id(fd, layer.extents, subject=path)
            _check_shown(shown, layer, answer.peer)
        return [path], shown

    def _path(self, answer: Answer, layer: FetchedLayer, number: int) -> Path:
        if not self._target.whole_chain or number == answer.point.layers:
            return self._target.file
        return self._target.lower(layer.id, "qcow2")

    def _backing(self, answer: Answer, below: list[OutputFile], number: int) -> Backing | None:
        if not below:
            return None
        of_top = number == answer.point.layers
        return Backing(self._target.backing_name(below[-1].name, of_top=of_top), "qcow2")

    def _file_plan(self, answer: Answer, layer: FetchedLayer, number: int, below: list[FilePlan]) -> FilePlan:
        return FilePlan(
            path=str(self._path(answer, layer, number)),
            format=self._target.format or "qcow2",
            virtual_size=layer.offer.size,
            data_bytes=layer.extents.data_bytes,
            backing=self._target.backing_name(Path(below[-1].path), of_top=number == answer.point.layers)
            if below
            else None,
        )

    def _check_tables(self, layout: Layout) -> None:
        """Data may turn out to be zeroes, which need no room; tables are written in full."""
        if layout.metadata_bytes > free_bytes(self._target.file.parent):
            raise Unavailable(
                f"the file needs {layout.metadata_bytes} bytes for its tables alone",
                subject=self._target.file.parent,
                hint="make room, or restore elsewhere",
            )


def _layout(layer: FetchedLayer, backing: Backing | None, peer: str) -> Layout:
    offer = layer.offer
    try:
        return lay_out(layer.extents, cluster_size=offer.cluster_size, backing=backing, extended_l2=offer.extended_l2)
    except SnapchainError as error:
        raise Corrupt(f"a layer comes that cannot be: {error.message}", subject=peer) from error


def _write_qcow2(layer: FetchedLayer, output: OutputFile, layout: Layout, on_bytes: OnBytes) -> None:
    with Qcow2Writer(output.fd, layout, subject=output.path) as writer:
        for batch in layer.batches():
            writer.write_pieces([(piece.offset, piece.data) for piece in batch if piece.data is not None])
            on_bytes(_length(batch))


def _write_raw(layer: FetchedLayer, output: OutputFile, on_bytes: OnBytes) -> str:
    """The content id of what was written."""
    with RawWriter(output.fd, sectors(layer.offer.size), subject=output.path) as raw:
        for batch in layer.batches():
            raw.write_pieces([(piece.offset, piece.data) for piece in batch if piece.data is not None])
            on_bytes(_length(batch))
    return raw_content_id(output.fd, layer.extents, subject=output.path)


def _check_shown(shown: str, layer: FetchedLayer, peer: str) -> None:
    if shown != layer.announced:
        raise Corrupt(
            f"what came shows the content {shown}, announced was {layer.announced}",
            subject=peer,
            hint="run it again; if it persists: snapchain verify --read-data",
        )


def _length(batch: list[Piece]) -> int:
    return sum(piece.length for piece in batch)
