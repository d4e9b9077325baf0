"""JSON that a repository stores, read back: what is unknown is of a newer snapchain, what is malformed is damage.

The difference matters to whoever reads the message: one is cured by an upgrade, the other by nothing.

A hostile store must not make reading expensive. A parser that collects every error of a text takes 500 times the memory
of that text, so each list stops at its first error, and an object with absurdly many fields is one error.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib import metadata
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, ValidationError, model_validator

from snapchain.errors import Corrupt, SnapchainError, Unsupported
from snapchain.repository.format import FORMAT

Stored = TypeVar("Stored", bound=BaseModel)
Item = TypeVar("Item")
Many = Annotated[tuple[Item, ...], FailFast()]
"""A stored list."""
_MOST_FIELDS = 64
"""Of one JSON object with named fields. No record has half as many."""
_SPARSE_MARKS = 10_000
_BYTES_A_MARK = 4
"""A text has at most one comma, colon or bracket in so many bytes, beyond the first _SPARSE_MARKS: objects of Python
take 60 bytes each, and records have 10 bytes a mark."""
_MARKS = b",:[{"
_UNKNOWN = frozenset({"extra_forbidden", "literal_error", "enum"})
"""pydantic's names for a field that the model does not have, and for a word that is none of those it knows."""


class StoredModel(BaseModel):
    """What a repository stores as JSON. An unknown field is of a newer snapchain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and len(fields) > _MOST_FIELDS:
            raise ValueError(f"an object has {len(fields)} fields")
        return fields


def check_density(text: bytes, *, what: str, subject: str) -> None:
    """Raises Corrupt for a JSON text whose values would take far more memory than the text."""
    marks = sum(text.count(mark) for mark in (_MARKS[at : at + 1] for at in range(len(_MARKS))))
    if marks > _SPARSE_MARKS + len(text) // _BYTES_A_MARK:
        raise Corrupt(f"{what} is damaged: {marks} values in {len(text)} bytes are not plausible", subject=subject)


def parse(model: type[Stored], text: bytes, *, what: str, subject: str) -> Stored:
    """`text` as a `model`, whose unknown fields are forbidden.

    what: for people, e.g. `the catalogue`. Raises Corrupt, or Unsupported for what only a newer snapchain writes: a
    higher `format`, an unknown field, an unknown word where there is a list of words.
    """
    check_density(text, what=what, subject=subject)
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
