"""JSON that a repository stores, read back: what is unknown is of a newer snapchain, what is malformed is damage.

The difference matters to whoever reads the message: one is cured by an upgrade, the other by nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import metadata
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from snapchain.errors import Corrupt, SnapchainError, Unsupported
from snapchain.repository.format import FORMAT

Stored = TypeVar("Stored", bound=BaseModel)
_UNKNOWN = frozenset({"extra_forbidden", "literal_error", "enum"})
"""pydantic's names for a field that the model does not have, and for a word that is none of those it knows."""


def parse(model: type[Stored], text: bytes, *, what: str, subject: str) -> Stored:
    """`text` as a `model`, whose unknown fields are forbidden.

    what: for people, e.g. `the catalogue`. Raises Corrupt, or Unsupported for what only a newer snapchain writes: a
    higher `format`, an unknown field, an unknown word where there is a list of words.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        raise _judged(error.errors(include_url=False, include_context=False), what, subject) from error


def newer(what: str, subject: str) -> Unsupported:
    """The error for something that this program is too old for."""
    return Unsupported(f"{what} was written by a newer snapchain", subject=subject, hint="use a newer snapchain")


@functools.cache
def made_by() -> str:
    """What new records say of the program that wrote them, e.g. `snapchain 0.1.0`."""
    try:
        return f"snapchain {metadata.version('snapchain')}"
    except metadata.PackageNotFoundError:  # run from a source tree that was not installed
        return "snapchain"


def _judged(errors: Iterable[Any], what: str, subject: str) -> SnapchainError:
    found = [(tuple(each["loc"]), str(each["type"]), each["input"], str(each["msg"])) for each in errors]
    for where, _, given, _ in found:
        if where == ("format",) and type(given) is int and given > FORMAT:
            return newer(what, subject)
    for where, kind, given, words in found:
        if kind not in _UNKNOWN or where == ("format",) or not (kind == "extra_forbidden" or isinstance(given, str)):
            return Corrupt(f"{what} is damaged: {'.'.join(map(str, where)) or 'JSON'}: {words}", subject=subject)
    return newer(what, subject)
