"""From a file to a checked configuration: every mistake by its dotted key (`disks[2].destinations`), all at once."""

from __future__ import annotations

import difflib
import glob
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from snapchain.destination.address import located
from snapchain.destinations import traits_of
from snapchain.errors import InvalidInput
from snapchain.host.private import read_trusted
from snapchain.host.terminal import printable
from snapchain.ops.nightly.config import Nightly

Place = tuple[str | int, ...]
"""The keys and positions that lead to a value."""
_SECRET = {"password", "passphrase", "secret"}


@dataclass(frozen=True, slots=True)
class _Mistake:
    place: Place
    message: str


def load(path: Path) -> Nightly:
    """The configuration in this file, its paths made absolute.

    Raises InvalidInput, one message for all mistakes, and for a file that somebody else can write; NotFound.
    """
    whole = path.absolute()
    # Links are followed: /etc may be managed by them.
    data = read_trusted(whole)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput("not UTF-8 text", subject=path) from error
    return parse(text, path=whole)


def parse(text: str, *, path: Path) -> Nightly:
    """The configuration in this text of the file `path`. Raises InvalidInput."""
    try:
        said = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"not TOML: {error}", subject=path) from error
    said.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem) or "nightly")
    try:
        config = Nightly.model_validate(said)
    except ValidationError as error:
        found = error.errors()
        # A list whose only entry is wrong counts as empty, too.
        inside = {each["loc"][:-1] for each in found} | {each["loc"][:1] for each in found if len(each["loc"]) > 1}
        said_twice = [each for each in found if each["type"] == "too_short" and each["loc"] in inside]
        mistakes = [_mistake(each["loc"], each["type"], each["msg"]) for each in found if each not in said_twice]
        raise _refusal(mistakes, path) from error
    mistakes = list(_contradictions(config))
    if mistakes:
        raise _refusal(mistakes, path)
    return _absolute(config, path.parent)


def _mistake(place: Place, kind: str, said: str) -> _Mistake:
    if kind == "extra_forbidden":
        return _Mistake(place, _unknown(place))
    if kind == "missing":
        return _Mistake(place, "is missing")
    if kind in {"tuple_type", "frozen_set_type"}:
        table = (
            f", as a table [[{place[0]}]]" if place in {("disks",), ("guests",), ("destinations",)} else ", in brackets"
        )
        return _Mistake(place, f"is a list{table}")
    message = said.removeprefix("Value error, ")
    return _Mistake(place, message[:1].lower() + message[1:] if message[1:2].islower() else message)


def _unknown(place: Place) -> str:
    name = str(place[-1])
    if name in _SECRET:
        return "a configuration holds no passphrase: name its password_file, password_command or password_env"
    known = _fields_at(place[:-1])
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"is unknown here; did you mean {near[0]}?" if near else f"is unknown here; known are {', '.join(known)}"


def _fields_at(place: Place) -> list[str]:
    """The names that the table at `place` may have."""
    model: type[BaseModel] = Nightly
    for step in place:
        if isinstance(step, str):
            model = _model_in(model.model_fields[step].annotation) or model
    return list(model.model_fields)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part))), None)


def _contradictions(config: Nightly) -> Iterator[_Mistake]:
    """Contradictions between fields."""
    names = Counter(each.name for each in config.destinations)
    urls = Counter(each.url for each in config.destinations)
    for number, destination in enumerate(config.destinations):
        if names[destination.name] > 1:
            yield _Mistake(("destinations", number, "name"), f'"{destination.name}" names two destinations')
        if urls[destination.url] > 1:
            yield _Mistake(("destinations", number, "url"), "two destinations have this address")
    yield from _contradicting_copies(config)
    paths = Counter(each.path for each in config.disks if each.path is not None)
    domains = Counter((each.connect, each.domain) for each in config.guests if each.domain is not None)
    for number, disks in enumerate(config.disks):
        if disks.path is not None and paths[disks.path] > 1:
            yield _Mistake(("disks", number, "path"), "this image is named twice")
        yield from _unknown_destinations(("disks", number), disks.destinations, names)
    if config.test is not None:
        if not config.guests:
            yield _Mistake(("test",), "boot tests are of [[guests]], and none are named")
        yield from _unknown_destinations(("test",), config.test.destinations, names)
    for number, guests in enumerate(config.guests):
        if guests.domain is not None and domains[guests.connect, guests.domain] > 1:
            yield _Mistake(("guests", number, "domain"), "this domain is named twice")
        yield from _unknown_destinations(("guests", number), guests.destinations, names)


def _unknown_destinations(place: Place, wanted: tuple[str, ...] | None, names: Counter[str]) -> Iterator[_Mistake]:
    for number, name in enumerate(wanted or ()):
        if name not in names:
            known = ", ".join(names)
            yield _Mistake((*place, "destinations", number), f'"{name}" is not a destination: known are {known}')


def _contradicting_copies(config: Nightly) -> Iterator[_Mistake]:
    """A copy is of a destination that is shipped to, and nothing else is shipped there."""
    by_name = {each.name: each for each in config.destinations}
    for number, destination in enumerate(config.destinations):
        if destination.copy_of is None:
            continue
        place = ("destinations", number, "copy_of")
        source = by_name.get(destination.copy_of)
        if source is None:
            known = ", ".join(each.name for each in config.destinations if each.copy_of is None)
            yield _Mistake(place, f'"{destination.copy_of}" is not a destination: known are {known}')
        elif source.copy_of is not None:
            yield _Mistake(place, f'"{source.name}" is itself a copy: name what is shipped to')
        elif not traits_of(destination.url).branches:
            yield _Mistake(place, f"points are copied to repositories, and this is a {traits_of(destination.url).kind}")
    wanted: list[tuple[Place, tuple[str, ...] | None]] = []
    wanted += [(("disks", number), each.destinations) for number, each in enumerate(config.disks)]
    wanted += [(("guests", number), each.destinations) for number, each in enumerate(config.guests)]
    for entry, names in wanted:
        for at, name in enumerate(names or ()):
            if name in by_name and (of := by_name[name].copy_of) is not None:
                words = f'"{name}" is a copy of "{of}", and nothing else is shipped there: leave it out'
                yield _Mistake((*entry, "destinations", at), words)


def _refusal(mistakes: list[_Mistake], path: Path) -> InvalidInput:
    found = list(dict.fromkeys(f"{_field(each.place)}: {each.message}" for each in mistakes))
    if len(found) == 1:
        return InvalidInput(found[0], subject=path)
    rows = "".join(f"\n    {printable(message)}" for message in found)
    refusal = InvalidInput(f"{len(found)} mistakes{rows}", subject=path)
    refusal.has_rows = True
    return refusal


def _field(place: Place) -> str:
    """disks[0].hooks.before"""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return text.removeprefix(".") or "the whole"


def _absolute(config: Nightly, directory: Path) -> Nightly:
    def path(given: Path | None) -> Path | None:
        return None if given is None else directory / given.expanduser()

    inside = Path(glob.escape(str(directory)))
    disks = tuple(
        each.model_copy(
            update={
                "path": path(each.path),
                "glob": None if each.glob is None else str(inside / Path(each.glob).expanduser()),
                "exclude": tuple(str(inside / Path(pattern).expanduser()) for pattern in each.exclude),
                "image_dirs": tuple(directory / each_dir.expanduser() for each_dir in each.image_dirs),
            }
        )
        for each in config.disks
    )
    guests = tuple(
        each.model_copy(
            update={
                "qmp": None if each.qmp is None else str(inside / Path(each.qmp).expanduser()),
                "exclude": tuple(
                    pattern if each.qmp is None else str(inside / Path(pattern).expanduser())
                    for pattern in each.exclude
                ),
                "agent": path(each.agent),
                "image_dirs": tuple(directory / each_dir.expanduser() for each_dir in each.image_dirs),
            }
        )
        for each in config.guests
    )
    destinations = tuple(
        each.model_copy(
            update={
                "url": located(each.url, directory=directory),
                "password_file": path(each.password_file),
            }
        )
        for each in config.destinations
    )
    test = config.test and config.test.model_copy(update={"directory": path(config.test.directory)})
    more = {"test": test, "disks": disks, "guests": guests, "destinations": destinations}
    return config.model_copy(update={**more, "state": path(config.state), "metrics": path(config.metrics)})
