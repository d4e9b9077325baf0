"""QEMU's option arguments: `socket,id=a,path=/b`, where `,,` is a comma of a value, or the same as a JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress

_COMMA = "\0"
"""In place of a doubled comma while a text is split; an argument cannot hold it."""


def split(text: str) -> list[str]:
    """The parts between single commas, without empty ones."""
    return [part.replace(_COMMA, ",") for part in text.replace(",,", _COMMA).split(",") if part]


def fields(text: str) -> tuple[str, dict[str, str]]:
    """The first part where it has no key, and the value of each key.

    Of JSON the first is '', and values are the texts; keys of inner objects are joined by dots. JSON that cannot be
    parsed has no fields.
    """
    if text.startswith("{"):
        with suppress(ValueError, RecursionError):
            return "", dict(_flat("", json.loads(text)))
        return "", {}
    parts = [part.partition("=") for part in split(text)]
    head = parts[0][0] if parts and not parts[0][1] else ""
    return head, {key: value for key, equals, value in parts if equals}


def _flat(prefix: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, inner)
    elif isinstance(value, str):
        yield prefix, value
