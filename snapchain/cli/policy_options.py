"""The options --keep-*, one for each rule of a retention policy, which defines them, and --time-zone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import tzinfo
from typing import Annotated, Any

import typer

from snapchain.cli.options import as_parameter, in_the_place_of
from snapchain.cli.quantities import named_zone
from snapchain.errors import InvalidInput


def takes_policy(*, panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb with a parameter `policy` the options --keep-*: one for each rule of a retention Policy."""
    from snapchain.model.retention import UNLIMITED, Policy

    counts = {name for name, rule in Policy.model_fields.items() if isinstance(rule.default, int)}
    lists = {name for name, rule in Policy.model_fields.items() if isinstance(rule.default, frozenset)}

    def name_of(field: str) -> str:
        return f"keep_{field.removesuffix('s') if field in lists else field}"

    def parameter(field: str) -> inspect.Parameter:
        kind: Any = str | None
        more: dict[str, Any] = {"metavar": "DURATION"}
        if field in counts:
            kind, more = int, {"metavar": "N", "min": UNLIMITED}
        elif field in lists:
            kind, more = list[str] | None, {"metavar": "LABEL"}
        shown = typer.Option(help=Policy.model_fields[field].title, rich_help_panel=panel, **more)
        default = Policy.model_fields[field].default if field in counts else None
        return as_parameter(name_of(field), Annotated[kind, shown], default)

    def value(given: dict[str, Any], _: object) -> Policy:
        chosen = {field: given[name_of(field)] for field in Policy.model_fields}
        try:
            return Policy(**{field: rule for field, rule in chosen.items() if rule not in (None, [])})
        except InvalidInput as error:
            if error.subject in Policy.model_fields:
                error.subject = f"--{name_of(error.subject).replace('_', '-')}"
            raise

    return in_the_place_of("policy", [*map(parameter, Policy.model_fields)], value)


def takes_zone(*, panel: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a verb with a parameter `zone` the option --time-zone, by which calendar rules count days."""
    shown = typer.Option(
        "--time-zone",
        metavar="ZONE",
        help="Time zone that decides what a day is: Europe/Berlin. By default this machine's.",
        rich_help_panel=panel,
    )

    def value(given: dict[str, Any], _: object) -> tzinfo:
        return named_zone(given["zone_name"])

    return in_the_place_of("zone", [as_parameter("zone_name", Annotated[str | None, shown])], value)
