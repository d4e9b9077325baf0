"""verify of a replica, where it is: nothing but the verdict crosses the link.

Records always: the catalogue is sound, and its files are the chain that it names, by sizes, links and qcow2 tables.
With `read_data` every byte of every layer, and what the chain shows is compared with what was proven when it came.
"""

from __future__ import annotations

from snapchain.ops.events import OnEvent, Progress, ignore
from snapchain.ops.verify import Finding, VerifyReport
from snapchain.replica.asking import soundness_at
from snapchain.replica.endpoint import Endpoint


def verify_replica(
    endpoint: Endpoint, disk: str | None = None, *, read_data: bool, on_event: OnEvent = ignore
) -> VerifyReport:
    """Look at all disks of a replica, or at one; findings are values, not errors.

    Raises NotFound for a replica or disk that is not there, Unavailable when the link breaks.
    """
    verdicts, findings = soundness_at(
        endpoint,
        disk,
        data=read_data,
        on_bytes=lambda done, total: on_event(Progress("verify", done, total)),
    )
    return VerifyReport(
        ok=not findings,
        destination=endpoint.url,
        disks=len(verdicts),
        points=sum(verdict.points for verdict in verdicts),
        layers=sum(verdict.layers for verdict in verdicts),
        data_read=read_data,
        checked_bytes=sum(verdict.checked_bytes for verdict in verdicts),
        findings=tuple(
            Finding(
                kind=finding.kind,
                subject=finding.subject,
                message=finding.message,
                disk=finding.disk,
                points=finding.points,
            )
            for finding in findings
        ),
    )
