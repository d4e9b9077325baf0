"""Prepare a disk for its handover: seal it, send it, make an empty overlay on it there. The source can still go on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from snapchain.errors import Conflict, Unsupported
from snapchain.host.retry import RetryPolicy
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.events import OnEvent
from snapchain.ops.migrate.look import Look, check_was_given, look_at, opened
from snapchain.ops.migrate.request import MigrateRequest, Move
from snapchain.ops.ship.run import ShipReport, layers_lacking, opening_of, run
from snapchain.replica.disk_writer import DiskWriter, ReplicaWriting, open_message
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.names import offered_name
from snapchain.replica.sender import Sender
from snapchain.replica.stream.messages import Active
from snapchain.source import ownership
from snapchain.source.at_rest import ImageAtRest
from snapchain.source.notes import Overlay
from snapchain.source.protocol import Scope


@dataclass(slots=True)
class Prepared:
    """A disk that is at the destination, ready for the handover. sent: None if an earlier run has sent it."""

    move: Move
    look: Look
    overlay: Overlay
    epoch: int
    sealed: Path | None = None
    sent: ShipReport | None = None
    fenced: tuple[Path, ...] = ()


def whole(request: MigrateRequest) -> Scope:
    return Scope.PAUSED if request.paused else Scope.ALL


def seals(request: MigrateRequest, look: Look) -> bool:
    """Whether the top is to be a layer here, too: then whoever goes on here has not diverged."""
    return look.sealable and not request.paused


def prepare(request: MigrateRequest, move: Move, endpoint: Endpoint, on_event: OnEvent) -> Prepared:
    """Seal, send, and have the overlay made."""
    look, sealed = look_at(request, move), None
    with opened(request, move) as chain:
        ownership.check_not_given(chain)
        ownership.check_can_be_given(chain, image_dirs=request.image_dirs)
    if seals(request, look) and not look.quiet:
        sealer = ImageAtRest(move.image, format=request.format, image_dirs=request.image_dirs, on_event=on_event)
        sealed = sealer.seal()
        look = look_at(request, move)
    scope = Scope.SEALED if seals(request, look) else whole(request)
    follows = replace(request, divergence=request.divergence.of_epoch(look.epoch))
    sent = run(follows.send(move, scope), ReplicaWriting(endpoint, policy=RetryPolicy()), on_event=on_event)
    # A disk that was at another host before may find its overlay of that time at this one.
    name = overlay_name(move.disk.rpartition("/")[2], look.epoch) if look.epoch > 1 else None
    overlay, epoch = make_overlay(request, move, look, scope, endpoint, on_event, name=name)
    if max(look.epoch, epoch) + 2 > LARGEST_EPOCH:  # one to give it, one to take it back
        raise Unsupported(f"its epoch is {max(look.epoch, epoch)}, and there is none after it", subject=move.image)
    return Prepared(move, look, overlay, max(look.epoch, epoch) + 1, sealed, sent)


def overlay_name(disk: str, epoch: int) -> str:
    """Another one after each handover: a disk that comes back finds the old one in its place."""
    return f"{disk}-{epoch + 1}.qcow2"


def make_overlay(
    request: MigrateRequest,
    move: Move,
    look: Look,
    scope: Scope,
    endpoint: Endpoint,
    on_event: OnEvent,
    *,
    name: str | None = None,
) -> tuple[Overlay, int]:
    """Make the overlay on the newest layer there. Returns it, with the epoch of the disk there.

    name: of its file, by default the image's. Raises Conflict where a layer is not there.
    """
    send = request.send(move, scope)
    with (
        send.chain(on_event) as chain,
        endpoint.connect() as channel,
        Sender(channel, link=endpoint.link) as sender,
    ):
        held = sender.open(open_message(opening_of(send, chain), endpoint))
        there = DiskWriter(sender, held)
        if not held.layers or layers_lacking(send, chain, there, endpoint.url, on_event=on_event):
            raise Conflict("it was written to after it was sent", subject=move.image, hint="run it again")
        overlay = Overlay(
            name=offered_name(name or move.image.name),
            layer=held.layers[-1].id,
            virtual_size=look.size,
            cluster_size=look.cluster_size,
            extended_l2=look.extended_l2,
        )
        said = sender.ask_for_active(active_of(overlay).model_copy(update={"make": True, "prove": request.prove}))
        if said.broken:
            raise Conflict(f"{said.broken[0]} there no longer shows what it did", subject=endpoint.url)
    return overlay, held.epoch


def taken_up(move: Move, look: Look) -> Prepared:
    """The disks of an earlier run that had fenced them all. Raises Conflict for one that was written to since."""
    mark = look.given
    assert mark is not None, "else the handover begins anew"
    check_was_given(move, mark)
    last = max(fingerprint.mtime_ns for _, fingerprint in look.files)
    if not mark.confirmed and last > mark.time.timestamp() * 1e9:
        raise Conflict(
            "it was written to while its handover was interrupted, in spite of its mark",
            subject=move.image,
            hint="say --take-back, and migrate it again",
        )
    return Prepared(move, look, mark.overlay, mark.epoch)


def active_of(overlay: Overlay) -> Active:
    """As the stream asks for it, to be looked at."""
    return Active(
        name=overlay.name,
        size=overlay.virtual_size,
        cluster_size=overlay.cluster_size,
        extended_l2=overlay.extended_l2,
        on=overlay.layer,
        make=False,
        prove=False,
    )
