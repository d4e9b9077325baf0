"""Recording at a destination what came of a check of a guest: best effort, since the check itself is what counts."""

from __future__ import annotations

import socket
from datetime import UTC, datetime

from snapchain.destination.reading import ReadableDestination
from snapchain.errors import SnapchainError, Unsupported
from snapchain.model.events import Notice, OnEvent
from snapchain.model.guest_checks import CheckKind, GuestCheck


def record(
    destination: ReadableDestination,
    guest: str,
    kind: CheckKind,
    *,
    ok: bool,
    point: int,
    share: float = 1.0,
    words: str = "",
    on_event: OnEvent,
) -> None:
    """Record a check that was just made by this host. Where that fails, a notice says so."""
    check = GuestCheck(
        guest=guest,
        kind=kind,
        time=datetime.now(UTC),
        ok=ok,
        point=point,
        share=share,
        by=socket.gethostname()[:250],
        words=words[:1000],
    )
    try:
        destination.note_check(check)
    except Unsupported:  # `status` there shows none
        return
    except SnapchainError as error:
        on_event(Notice.of(guest, f"the result of the check was not recorded at {destination.url}: {error}"))
