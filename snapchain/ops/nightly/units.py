"""Sizes, seconds and shares as people write them in a configuration: "500G", "90s", "10min", "6h", "5%".

Minutes are `min` and never `m`: retention writes months as `m`.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

from snapchain.errors import InvalidInput
from snapchain.model.quantities import parse_size

_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", re.ASCII)
_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%", re.ASCII)
_LENGTHS = {"s": 1, "min": 60, "h": 3600, "d": 86400}


def to_bytes(value: object) -> object:
    """Bytes of "500G"; numbers pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return parse_size(value)
    except InvalidInput as error:
        raise ValueError(f'"{value}" is no size: {error.hint}') from error


def to_seconds(value: object) -> object:
    """Seconds of "10min"; numbers pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = _SECONDS.fullmatch(value.strip())
    if match is None:
        raise ValueError(f'"{value}" is no length of time: write seconds, or "90s", "10min", "6h", "2d"')
    return float(match[1]) * _LENGTHS[match[2]]


def to_share(value: object) -> object:
    """0.05 of "5%"; numbers pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    match = _SHARE.fullmatch(value.strip())
    if match is None:
        raise ValueError(f'"{value}" is no share: write it like "5%"')
    return float(match[1]) / 100


Bytes = Annotated[int, BeforeValidator(to_bytes)]
Seconds = Annotated[float, BeforeValidator(to_seconds)]
Share = Annotated[float, BeforeValidator(to_share)]
