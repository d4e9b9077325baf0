"""Numbers as people write and read them: 64M, 1.5 GiB, 2 min 5 s.

K, M, G, T are powers of 1024, as in qemu-img; a JSON object never holds anything but plain bytes and seconds.
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


def parse_share(text: str) -> float:
    """0.05 of '5%' or of '0.05'; a share above nothing and up to all. Raises InvalidInput."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise InvalidInput(f"not a share: {text!r}", hint="write it like 5%")
    return share


def size(count: int | None) -> str:
    """'1.5 GiB'; '?' where nobody knows."""
    if count is None:
        return "?"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float) -> str:
    """'0.3 s', '2 min 5 s', '1 h 10 min'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
