"""By what a file is known again, from which a layer was read: stored in records, and beside images."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Source(BaseModel):
    """The file that a layer was read from, as far as it takes to know it again (image/fingerprint.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
