"""How a destination stands: what is sealed here against what is there, layer by layer, and the overlay on it.

One connection serves the look and the last step, the making of the overlay, under one lock of the disk over there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from snapchain.errors import Conflict, Corrupt, Diverged, NotFound
from snapchain.image import ImageChain, ImageFile, scan
from snapchain.image.leaves import counted
from snapchain.model.content import content_id, empty_sum
from snapchain.model.events import OnEvent, counting
from snapchain.ops.ship.recognition import same_source
from snapchain.ops.ship.run import Divergence, LayerPlan, layers_lacking, opening_of
from snapchain.ops.sync.request import Destination, LayerThere, Proof, SyncRequest
from snapchain.ops.sync.virsh import migrate_commands
from snapchain.replica.client import points_at
from snapchain.replica.disk_writer import DiskWriter, open_message
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.names import check_offered, offered_name
from snapchain.replica.sender import Sender
from snapchain.replica.stream.messages import Active, ActiveState, HeldLayer, Inventory, Readiness


@dataclass(frozen=True, slots=True)
class ActiveTop:
    """The active top as it is now. image: its path as it is named; name: of the overlay for it at the destination

    data_bytes: DATA of its map; sealed: the files below it, root first
    """

    image: Path
    path: Path
    name: str
    size: int
    cluster_size: int
    extended_l2: bool
    data_bytes: int
    sealed: tuple[Path, ...]


def look_at_top(request: SyncRequest) -> ActiveTop:
    """Scan the image; a guest may be writing to it. The image of a running guest has another path after each seal."""
    send = request.send
    source = send.source()
    image = source.image
    with scan(image, format=source.image_format, image_dirs=send.image_dirs, is_written=True) as chain:
        header = chain.top.header
        return ActiveTop(
            image=image,
            path=chain.top.path,
            name=offered_name(request.overlay_name or image.name),
            size=chain.size,
            cluster_size=chain.top.cluster_size or 64 * 1024,
            extended_l2=bool(header and header.extended_l2),
            data_bytes=chain.top.extents.data_bytes,
            sealed=tuple(file.path for file in chain.files[:-1]),
        )


def stand(request: SyncRequest, endpoint: Endpoint, top: ActiveTop, *, on_event: OnEvent, make: bool) -> Destination:
    """Look at the destination, and make the overlay there if that is all that is missing and `make` says so."""
    look = _Look(request, endpoint, top, on_event)
    try:
        with look.opened(make=make) as (chain, sender, held):
            return look.judged(chain, sender, held, make=make)
    except Diverged as error:
        if make:
            raise
        said = str(error) if error.hint is None else f"{error}: {error.hint}"
        return not_ready(request, endpoint, top, said)


def asked(request: SyncRequest, endpoint: Endpoint) -> tuple[str, ...]:
    """What the destination says of a disk of which nothing is sealed here. Raises what reaching it raises."""
    try:
        there = points_at(endpoint, request.send.disk)
    except NotFound:
        return ("the replica has nothing of this disk",)
    count = sum(len(disk.points) for disk in there)
    return (f"the points of this disk at the replica ({count}) have no layer of this image",) if count else ()


def not_ready(request: SyncRequest, endpoint: Endpoint, top: ActiveTop, *why: str) -> Destination:
    """How a destination stands of which no more is known than why it is not ready."""
    return Destination(
        disk=request.send.disk,
        destination=endpoint.url,
        image=str(top.image),
        ready=False,
        missing=why,
        layers=(),
        layers_to_send=(),
        bytes_to_send=0,
        bytes_left=top.data_bytes,
        virtual_size=top.size,
        overlay=None,
        proof=request.proof,
        names=(),
        commands=(),
    )


class _Look:
    def __init__(self, request: SyncRequest, endpoint: Endpoint, top: ActiveTop, on_event: OnEvent) -> None:
        self._request, self._endpoint, self._top, self._on_event = request, endpoint, top, on_event
        # A cut belongs to the transfer; here a divergence is a divergence.
        self._send = replace(request.send, divergence=Divergence.REFUSE)

    @contextmanager
    def opened(self, *, make: bool) -> Iterator[tuple[ImageChain, Sender, Inventory]]:
        """What is sealed here, and what is there."""
        with (
            self._send.chain(self._on_event) as chain,
            self._endpoint.connect() as channel,
            Sender(channel, link=self._endpoint.link) as sender,
        ):
            if tuple(file.path for file in chain.files) != self._top.sealed:
                raise Conflict("it was sealed again meanwhile", subject=self._top.image, hint="run it again")
            opening = opening_of(self._send, chain)
            held = sender.open(open_message(opening, self._endpoint, look=not make))
            yield chain, sender, held

    def judged(self, chain: ImageChain, sender: Sender, held: Inventory, *, make: bool) -> Destination:
        there = DiskWriter(sender, held)
        lacking = layers_lacking(self._send, chain, there, self._endpoint.url, on_event=self._on_event)
        missing = [_lacks(layer) for layer in lacking]
        if not held.layers:
            missing = missing or ["the replica has nothing of this disk"]
            sender.finish()
            return self._told(missing, lacking, held, chain, None)
        read = self._request.proof is Proof.READ
        if read and not lacking:
            self._prove(chain, held)
        said = sender.ask_for_active(
            Active(
                name=self._top.name,
                size=self._top.size,
                cluster_size=self._top.cluster_size,
                extended_l2=self._top.extended_l2,
                on=held.layers[-1].id,
                make=make and not lacking,
                prove=read,
            )
        )
        missing += [f"{file} there no longer shows what it did when it came" for file in said.broken]
        if said.state is not ActiveState.READY:
            missing.append(_OVERLAY[said.state].format(file=f"{said.directory}/{said.file}"))
        return self._told(missing, lacking, held, chain, said)

    def _prove(self, chain: ImageChain, held: Inventory) -> None:
        """Read the sealed files here: each must show, with those below it, what its layer there shows."""
        total, on_bytes = empty_sum(), counting("prove", None, self._on_event)
        known = {id(file): layer for layer in held.layers if (file := _single(layer, chain)) is not None}
        known[id(chain.top)] = held.layers[-1]
        for number, file in enumerate(chain.files):
            view, below = chain.at(number), chain.at(number - 1) if number else None
            total = counted(file.extents, view, below, total, on_bytes=on_bytes)
            layer = known.get(id(file))
            if layer and (view.size, content_id(view.size, total)) != (layer.size, layer.content_id):
                raise Corrupt(
                    f"with its backing files it shows other content than {layer.file} at the replica",
                    subject=file.path,
                    hint="one of these files was changed without a trace: verify both sides before anything else",
                )

    def _told(
        self,
        missing: list[str],
        lacking: tuple[LayerPlan, ...],
        held: Inventory,
        chain: ImageChain,
        said: Readiness | None,
    ) -> Destination:
        base = "" if said is None else f"{said.directory}/"
        layers = []
        for layer in held.layers:
            file = _single(layer, chain)
            whole = None if file is None else str(file.path)
            there = f"{base}{check_offered(layer.file, subject=self._endpoint.url)}"
            layers.append(LayerThere(path=there, source=whole, virtual_size=layer.size, content_id=layer.content_id))
        overlay = None if said is None else f"{base}{said.file}"
        ready = said is not None and not missing
        commands: tuple[str, ...] = ()
        image = self._top.image
        names = {
            str(self._top.path),
            str(image.absolute()),
            os.path.normpath(image.absolute()),
            str(image.resolve()),
        }
        if ready and overlay is not None and self._request.guest is not None:
            commands = migrate_commands([(self._request.guest, names, overlay)])
        return Destination(
            disk=self._send.disk,
            destination=self._endpoint.url,
            image=str(image),
            ready=ready,
            missing=tuple(missing),
            layers=tuple(layers),
            layers_to_send=lacking,
            bytes_to_send=sum(layer.data_bytes for layer in lacking),
            bytes_left=self._top.data_bytes,
            virtual_size=self._top.size,
            overlay=overlay,
            proof=self._request.proof,
            names=tuple(sorted(names)),
            commands=commands,
        )


def _single(layer: HeldLayer, chain: ImageChain) -> ImageFile | None:
    """The file that a layer is, where it is one file and not several in one."""
    if len(layer.sources) != 1:
        return None
    return next((file for file in chain.files if same_source(file.fingerprint, layer.sources[0])), None)


_OVERLAY = {
    ActiveState.ABSENT: "the empty overlay {file} is not there",
    ActiveState.STALE: "the empty overlay {file} is there, but not on the newest layer, or of another size",
    ActiveState.FOREIGN: "{file} is no empty overlay of this disk: a guest may have written to it",
}


def _lacks(layer: LayerPlan) -> str:
    return f"{' + '.join(Path(file).name for file in layer.files)} is not there: {layer.data_bytes} bytes"
