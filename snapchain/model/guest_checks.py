"""What came of the last check of a guest at a destination, as whoever made it has recorded there; read by `status`.

It is a note for people: nothing is decided by it, and a point is as good as its next verification.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import AwareDatetime, Field

from snapchain.model.guest_state import Name, Part, Words


class CheckKind(StrEnum):
    """verified: records, and a share of the data, were read; booted: a clone was started, and had to come up."""

    VERIFIED = "verified"
    BOOTED = "booted"


class GuestCheck(Part):
    """One check. ok: its verdict; by: the host that made it; words: why it is not ok, or what showed that it is

    point: the guest point that was booted, or the newest one that was verified; share: of the data, 0 to 1
    """

    guest: Name
    kind: CheckKind
    time: AwareDatetime
    ok: bool
    point: int = Field(ge=1, lt=1 << 53)
    share: float = Field(default=1.0, ge=0, le=1)
    by: Name
    words: Words = ""


class GuestChecks(Part):
    """The last one of each kind."""

    verified: GuestCheck | None = None
    booted: GuestCheck | None = None

    def after(self, check: GuestCheck) -> GuestChecks:
        """With this one in the place of the last of its kind."""
        return self.model_copy(update={check.kind.value: check})
