"""Prometheus' text format 0.0.4, read as strictly as its description allows: anything doubtful is an error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"')
_HELP = re.compile(r"(?:[^\\\n]|\\[\\n])*")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|NaN|[+-]Inf")
_ESCAPES = {r"\"": '"', r"\\": "\\", r"\n": "\n"}

Labels = frozenset[tuple[str, str]]


@dataclass
class Family:
    """One metric."""

    name: str
    help: str
    kind: str = ""
    series: dict[Labels, float] = field(default_factory=dict)


def read(text: str) -> dict[str, Family]:
    """The families by name. Raises AssertionError."""
    assert text.endswith("\n"), "the last line has no end"
    assert "\r" not in text
    found: dict[str, Family] = {}
    current = Family("", "")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name, _, words = line.removeprefix("# HELP ").partition(" ")
            assert _NAME.fullmatch(name), line
            assert _HELP.fullmatch(words), line
            assert words, f"{name}: no help"
            assert name not in found, f"{name} stands in two places"
            current = found[name] = Family(name, words)
        elif line.startswith("# TYPE "):
            name, _, kind = line.removeprefix("# TYPE ").partition(" ")
            assert name == current.name, f"{line}: not after its HELP"
            assert kind in {"counter", "gauge", "histogram", "summary", "untyped"}, line
            assert not current.kind, f"{name}: two types"
            assert not current.series, f"{name}: its type comes after its series"
            current.kind = kind
        else:
            name, labels, value = _series(line)
            assert name == current.name, f"{line}: not in its group"
            assert current.kind, f"{name} has no type"
            assert labels not in current.series, f"{line}: twice"
            current.series[labels] = value
    assert all(family.series for family in found.values())
    return found


def _series(line: str) -> tuple[str, Labels, float]:
    match = _NAME.match(line)
    assert match, line
    rest = line[match.end() :]
    labels: list[tuple[str, str]] = []
    if rest.startswith("{"):
        body, closed, rest = _until_brace(rest)
        assert closed, line
        labels = list(_labels(body))
    assert rest.startswith(" "), line
    assert _NUMBER.fullmatch(rest[1:]), line
    assert len({name for name, _ in labels}) == len(labels), f"{line}: a label twice"
    return match[0], frozenset(labels), float(rest[1:])


def _until_brace(text: str) -> tuple[str, bool, str]:
    at = 1
    while at < len(text) and text[at] != "}":
        label = _LABEL.match(text, at)
        assert label, text
        at = label.end()
        at += text.startswith(",", at)
    return text[1:at], at < len(text), text[at + 1 :]


def _labels(body: str) -> Iterator[tuple[str, str]]:
    for match in _LABEL.finditer(body):
        yield match[1], re.sub(r"\\[\"\\n]", lambda escape: _ESCAPES[escape[0]], match[2])


def value(families: dict[str, Family], name: str, **labels: str) -> float:
    """Of the one series with at least these labels."""
    wanted = set(labels.items())
    (found,) = [number for mine, number in families[f"snapchain_{name}"].series.items() if wanted <= mine]
    return found
