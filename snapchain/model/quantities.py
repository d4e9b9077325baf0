"""Sizes as people write them, on a command line and in a configuration: 512, 64M, 1.5 GiB.

K, M, G, T are powers of 1024, with or without iB or B, as in qemu-img; pydantic's ByteSize takes 64M for 64 000 000.
"""

from __future__ import annotations

import re

from snapchain.errors import InvalidInput

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_UNITS = "BKMGT"


def parse_size(text: str) -> int:
    """Bytes of '512', '64K', '1.5GiB'. Raises InvalidInput."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidInput(f"not a size: {text!r}", hint="write bytes, or a number with K, M, G or T: 64M")
    number, unit = match.groups()
    return int(float(number) * 1024 ** _UNITS.index(unit.upper() or "B"))
