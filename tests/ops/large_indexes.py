"""What a shipment and a collection do where the indexes are large, for tests whose indexes are small."""

from __future__ import annotations

import pytest

from snapchain.repository import samples, sparse, tidying


def as_if_large(patch: pytest.MonkeyPatch) -> None:
    """Indexes are read by their samples alone, each id is sampled, and each shipment tidies up."""
    patch.setattr(sparse, "WHOLE_BYTES", 0)
    patch.setattr(samples, "EVERY", 1)
    patch.setattr(tidying, "LOOSE", 2)
    patch.setattr(tidying, "LOOSE_BYTES", 1)
