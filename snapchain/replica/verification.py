"""verify of a replica, where it is: nothing but the verdict crosses the link.

Records always: the catalogue is sound, and its files are the chain that it names, by sizes, links and qcow2 tables.
With a share of 1 every byte of every layer, and what the chain shows is compared with what was proven when it came.

All that is the word of the replica's host.  A host that has sent the disk there also compares what each layer shows,
as its record says, with what the files that the layer was made of showed here.
"""

from __future__ import annotations

from collections.abc import Iterator

from snapchain.destination.records import Finding, VerifyReport
from snapchain.errors import Conflict, Corrupt, InvalidInput, NotFound, Unsupported
from snapchain.model.disk_name import LARGEST_EPOCH
from snapchain.model.events import Notice, OnEvent, Progress, ignore
from snapchain.replica.client import points_at, soundness_at
from snapchain.replica.endpoint import Endpoint
from snapchain.replica.sender import Sender
from snapchain.replica.sent_views import SentViews
from snapchain.replica.stream.messages import Open


def verify_replica(
    endpoint: Endpoint, disk: str | None = None, *, share: float, on_event: OnEvent = ignore
) -> VerifyReport:
    """Look at all disks of a replica, or at one; findings are values, not errors.

    share: the probability with which the data of each layer are read: 0 none, 1 all
    Raises Unsupported for a share at an older peer, NotFound for a replica or disk that is not there, Unavailable when
    the link breaks.
    """
    verdicts, findings = soundness_at(
        endpoint,
        disk,
        share=share,
        on_bytes=lambda done, total: on_event(Progress("verify", done, total)),
    )
    found = [
        Finding(
            kind=finding.kind,
            subject=finding.subject,
            message=finding.message,
            disk=finding.disk,
            points=finding.points,
        )
        for finding in findings
    ]
    for verdict in verdicts:
        found += _other_than_sent(endpoint, verdict.disk, on_event)
    return VerifyReport(
        ok=not found,
        destination=endpoint.url,
        disks=len(verdicts),
        points=sum(verdict.points for verdict in verdicts),
        layers=sum(verdict.layers for verdict in verdicts),
        data_read=share > 0,
        checked_bytes=sum(verdict.checked_bytes for verdict in verdicts),
        findings=tuple(found),
    )


def _other_than_sent(endpoint: Endpoint, disk: str, on_event: OnEvent) -> Iterator[Finding]:
    """Layers that do not show what this host has sent."""
    try:
        sent = SentViews(endpoint.url, disk)
        if not sent:
            return
        known = points_at(endpoint, disk)[0]
        # A look changes no epoch; in the next one nobody is refused who only looks.
        asked = Open(disk=disk, replica=endpoint.replica, look=True, epoch=min(known.epoch + 1, LARGEST_EPOCH))
        with endpoint.connect() as channel, Sender(channel, link=endpoint.link) as sender:
            layers = sender.open(asked).layers
            sender.finish()
    except (InvalidInput, Unsupported, Conflict, Corrupt, NotFound) as error:
        on_event(Notice(f"{disk} was not compared with what this host has sent: {error}"))
        return
    for number, here in sent.contradicted(layers):
        layer = layers[number]
        yield Finding(
            kind="corrupt",
            subject=layer.file,
            message=f"it shows the content {layer.content_id}; when this host sent the file that it was made of, that "
            f"showed {here}: somebody has put other data there",
            disk=disk,
            points=tuple(point.point for point in known.points if point.layers > number),
        )
