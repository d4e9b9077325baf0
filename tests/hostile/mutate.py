"""Mutations of what is stored or said: bytes, numbers, and JSON documents by their structure; drawn from one seed."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Json = Any
Draw = random.Random

WORDS = (
    0, 1, 2, 3, -1, 7, 255, 256, 511, 512, 4095, 65535, 65536, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, (1 << 53) + 1, 1 << 56, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
)  # fmt: skip
"""Numbers at which programs go wrong."""
_HUGE = (1 << 64, -(1 << 63) - 1, 10**30, 10**400, -(10**400))
_TIMES = (
    "0001-01-01T00:00:00+23:59", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59-23:59", "9999-12-31T23:59:59.999999Z",
    "1969-12-31T23:59:59Z", "2016-12-31T23:59:60Z", "2026-11-29T25:00:00Z", "2026-11-29", "2026-11-29T10:00:00", "now",
    "2100-01-01T00:00:00Z", 0, 1e300, "1e300", "253402300800",
)  # fmt: skip
_STRINGS = (
    "", ".", "..", "/", "../../outside/canary", "a/../../b", "/etc/passwd", "/dev/zero", "/proc/self/mem", "x\0y",
    "a\nb",
    "\x1b[2J\x1b]0;owned\x07", "\u202egnp.exe", "\ud800", "-rf", "--help", "$(id)", "%s%n", "con", "x" * 256,
    "y" * 5000,
    "z" * 300_000, "\u0130" * 130, 'json:{"driver":"file"}', "nbd://127.0.0.1:1/x", "https://127.0.0.1/", "0" * 32,
    "f" * 64, "é" * 100, "*", "[bold]x[/bold]", "~", "snapchain-replica.json", "catalogue.json", ".lock", "a\\b",
)  # fmt: skip
_WHEN = re.compile(r"\d{4}-\d\d-\d\dT")
_HEX = re.compile(r"[0-9a-f]{32}(?:[0-9a-f]{32})?")


@dataclass
class Pool:
    """Strings that mean something where a document is used: other ids, names, paths. To be put in place of others."""

    strings: list[str] = field(default_factory=list)

    def learn(self, document: Json) -> None:
        for value in _walk(document):
            if isinstance(value, str) and len(value) < 3000 and value not in self.strings:
                self.strings.append(value)


def flip(data: bytes, draw: Draw) -> bytes:
    """Some bits, or some bytes."""
    if not data:
        return b"\0"
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 4, 16])):
        at = draw.randrange(len(changed))
        if draw.random() < 0.5:
            changed[at] ^= 1 << draw.randrange(8)
        else:
            changed[at] = draw.choice([0, 255, draw.randrange(256)])
    return bytes(changed)


def spoil(data: bytes, draw: Draw) -> bytes:
    """Bytes that are not what they were: flipped, cut, grown, overwritten by words, repeated, emptied."""
    kind = draw.randrange(9)
    if kind <= 2:
        return flip(data, draw)
    if kind == 3:
        return data[: draw.randrange(len(data) + 1)]
    if kind == 4:
        return data + draw.choice([b"\0", bytes(4096), data[-100:], data, draw.randbytes(50)])
    if kind == 5 and len(data) > 8:
        changed = bytearray(data)
        width = draw.choice([2, 4, 8])
        at = draw.randrange(len(data) - width + 1) // draw.choice([1, width]) * 1
        word = draw.choice(WORDS) & ((1 << 8 * width) - 1)
        changed[at : at + width] = word.to_bytes(width, draw.choice(["little", "big"]))
        return bytes(changed)
    if kind == 6 and len(data) > 16:
        at, to = sorted(draw.sample(range(len(data)), 2))
        return draw.choice([data[:at] + data[to:], data[:to] + data[at:to] + data[to:], data[at:to]])
    if kind == 7:
        return b""
    return draw.randbytes(len(data)) if len(data) < 1 << 20 else flip(data, draw)


def number(value: int, draw: Draw, *, bits: int = 64) -> int:
    """Another number that fits into so many bits, unsigned."""
    near = [
        value + 1,
        value - 1,
        value * 2,
        value // 2,
        value ^ (1 << draw.randrange(bits)),
        value + 512,
        value + 65536,
    ]
    return draw.choice([draw.choice(WORDS), draw.choice(near), draw.choice(near)]) & ((1 << bits) - 1)


def document(value: Json, draw: Draw, pool: Pool) -> bytes:
    """A JSON document with some changes, as bytes; now and then not even JSON."""
    changes = draw.choice([1, 1, 1, 1, 2, 3])
    for _ in range(changes):
        value = _changed(value, draw, pool)
    text = json.dumps(value)
    kind = draw.randrange(24)
    if kind == 0:
        return spoil(text.encode(), draw)
    if kind == 1:  # a key twice
        return re.sub(r"^\{(\"[^\"]*\": ?[^,\[{}]*),", r"{\1,\1,", text).encode()
    if kind == 2:
        return b"\xef\xbb\xbf" + text.encode()
    if kind == 3:
        return text.encode("utf-16")
    if kind == 4:
        depth = draw.choice([100, 10_000, 200_000])
        return text[:-1].encode() + b',"x":' + b"[" * depth + b"]" * depth + b"}"
    if kind == 5:
        return text[:-1].encode() + b',"x":' + draw.choice([b"1e999", b"NaN", b"-Infinity", b"1" * 5000]) + b"}"
    return text.encode("utf-8", "surrogatepass") if draw.random() < 0.1 else text.encode()


def _changed(value: Json, draw: Draw, pool: Pool) -> Json:
    """The value with one change somewhere in it; the value given is left as it is."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Json, str | int]] = []
    _collect(value, places)
    if not places:
        return _other(value, draw, pool)
    holder, key = draw.choice(places)
    kind = draw.randrange(10)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice(["x", "format", "__class__", "", *map(str, holder)])] = _other(holder[key], draw, pool)
    elif kind == 2:  # two values change places
        there, other = draw.choice(places)
        try:
            holder[key], there[other] = there[other], holder[key]
            json.dumps(value)
        except (ValueError, KeyError, IndexError):  # one lay in the other: they would go in circles
            holder[key] = None
    elif kind == 3 and isinstance(holder, list):
        many = draw.choice([1, 2, 300, 5000])
        holder.extend([holder[int(key)]] * many)
    elif kind == 4 and isinstance(holder[key], list):
        draw.shuffle(holder[key])
    else:
        holder[key] = _other(holder[key], draw, pool)
    return value


def _other(value: Json, draw: Draw, pool: Pool) -> Json:
    """Something else, mostly of the same kind."""
    if draw.random() < 0.12:
        return draw.choice([None, True, False, 0, -1, 1.5, "", [], {}, [[]], {"x": {}}, "0", [None] * 3])
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        if draw.random() < 0.2:
            return draw.choice([*_HUGE, -value - 1, float(value), str(value)])
        return number(value, draw)
    if isinstance(value, str):
        if _WHEN.match(value):
            return draw.choice(_TIMES)
        alike = [other for other in pool.strings if len(other) == len(value) and other != value]
        if _HEX.fullmatch(value):
            choices: list[Callable[[], Json]] = [
                lambda: draw.choice(alike or [value[::-1]]), lambda: value[::-1], value.upper, lambda: value[:-1],
                lambda: value + "0", lambda: draw.choice(_STRINGS),
            ]  # fmt: skip
            return draw.choice(choices)()
        pooled = [other for other in pool.strings if other != value]
        return draw.choice([draw.choice(_STRINGS), draw.choice(pooled or ["x"]), value + draw.choice(_STRINGS)])
    if isinstance(value, list):
        return draw.choice([[], value * 2, value[:1], value[:-1], value * 500 if len(value) < 20 else value])
    if isinstance(value, dict):
        return draw.choice([{}, [], {**value, "x": 1}, {key: value[key] for key in list(value)[1:]}])
    return draw.choice([0, "", [], {}, draw.choice(pool.strings or ["x"]), 1 << 40])


def _collect(value: Json, places: list[tuple[Json, str | int]]) -> None:
    keys: Sequence[Any] = (
        list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    )
    for key in keys:
        places.append((value, key))
        _collect(value[key], places)


def _walk(value: Json) -> list[Json]:
    places: list[tuple[Json, str | int]] = []
    _collect([value], places)
    return [holder[key] for holder, key in places]
