"""A retention policy is defined once: its options, its keys in TOML and its fields on the wire are its own fields."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest

from snapchain.cli.merge import merge
from snapchain.errors import InvalidInput
from snapchain.model.retention import Duration, Policy
from snapchain.ops.nightly.document import parse
from snapchain.replica.stream.messages import Merge, decode, encode

RULES = Policy(last=1, hourly=2, daily=3, weekly=4, monthly=5, yearly=-1, within=Duration(days=7), labels={"b", "a"})


def test_each_rule_is_an_option() -> None:
    options = {name for name in inspect.signature(merge).parameters if name.startswith("keep_")} - {"keep_inputs"}
    assert options == {"keep_label" if rule == "labels" else f"keep_{rule}" for rule in Policy.model_fields}


def test_each_rule_is_a_key_of_a_configuration() -> None:
    keys = json.loads(RULES.model_dump_json())
    assert keys.keys() == Policy.model_fields.keys()
    table = "\n".join(f"{name} = {json.dumps(value)}" for name, value in keys.items())
    text = (
        'time_zone = "UTC"\n[[disks]]\nglob = "/images/*"\n'
        f'[[destinations]]\nname = "a"\nurl = "/backup"\n[keep]\n{table}\n'
    )
    config = parse(text, path=Path("/etc/nightly.toml"))
    assert config.keep_of(config.destinations[0]) == RULES


def test_each_rule_goes_to_a_replica() -> None:
    """As version 0.1 wrote it, byte for byte."""
    asked = Merge(disk="d", replica="/r", **dict(RULES), zone="UTC", dry_run=True)
    text = (
        b'{"disk":"d","replica":"/r","last":1,"hourly":2,"daily":3,"weekly":4,"monthly":5,"yearly":-1,"within":"7d",'
        b'"labels":["a","b"],"zone":"UTC","epoch":null,"dry_run":true}'
    )
    assert encode(asked) == text
    heard = decode(Merge, text, subject="peer")
    assert Policy(**{rule: getattr(heard, rule) for rule in Policy.model_fields}) == RULES
    assert not heard.is_empty
    assert Merge(disk="d", zone="UTC").is_empty


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keep_within": "long"}, "not a duration"),
        ({"keep_label": ["7"]}, "cannot be a label"),
    ],
)
def test_a_rule_that_cannot_be_is_the_users_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: dict[str, object], told: str
) -> None:
    from snapchain.cli import main

    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", *_listed(value))]
    assert main(["merge", f"{tmp_path}::d", *words]) == InvalidInput.exit_code
    assert told in capsys.readouterr().err


def _listed(value: object) -> list[str]:
    return value if isinstance(value, list) else [str(value)]
