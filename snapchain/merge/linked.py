"""Whether a file's header records a link: by that one knows how far an absorb had come."""

from __future__ import annotations

from snapchain.image.qcow2.header import Backing, read_header


def linked(fd: int, link: Backing | None, *, subject: object) -> bool:
    """Whether an open qcow2 file records just this. Errors as `read_header`."""
    recorded = read_header(fd, subject=subject).backing
    if recorded is None or link is None:
        return recorded is None and link is None
    return (recorded.name, recorded.format) == (link.name, link.format)
