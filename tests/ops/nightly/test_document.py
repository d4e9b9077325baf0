"""A configuration's mistakes are told with file, line and field, all at once; and what is right is taken as it is."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from pydantic import BaseModel

from snapchain.errors import InvalidInput, NotFound
from snapchain.model.retention import Policy
from snapchain.ops.nightly.config import Budget, Destination, DiskHooks, Disks, Hooks, Nightly, Verify
from snapchain.ops.nightly.document import load, parse
from snapchain.ops.nightly.toml_lines import lines_of
from tests.ops.nightly.night import Host

PATH = Path("/etc/snapchain/nightly.toml")
LEAST = """\
time_zone = "UTC"
[[disks]]
path = "/images/web1.qcow2"
[[destinations]]
name = "vault"
url = "/backup"
"""


def parsed(text: str) -> Nightly:
    return parse(text, path=PATH)


def refusal(text: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        parsed(text)
    return str(caught.value)


def test_the_least_that_does() -> None:
    config = parsed(LEAST)
    assert config.name == "nightly"
    assert config.concurrency == 1
    assert config.destinations[0].concurrency == 1
    assert config.keep_of(config.destinations[0]).is_empty


def test_everything() -> None:
    config = parsed("""
time_zone = "Europe/Berlin"
name = "web"
window = "22:00-06:00"
concurrency = 2
state = "state"
metrics = "/var/lib/metrics/snapchain.prom"
budget = { ship = "500G", merge = "1T", time = "6h" }
keep = { daily = 14, within = "2m", labels = ["release"] }
[hooks]
before = ["/bin/true"]
timeout = "10min"
failing = "note"
[[disks]]
glob = "images/*.qcow2"
exclude = ["images/scratch-*"]
name = "{parent}/{stem}"
merge_above = 8
labels = ["nightly"]
destinations = ["b"]
[disks.hooks]
after_snapshot = ["virsh", "start", "web1"]
[[destinations]]
name = "a"
url = "s3://bucket/prefix"
password_command = ["pass", "show", "vault"]
limit_rate = "20M"
keep = { last = -1 }
verify = { disks = 2, share = "10%" }
[[destinations]]
name = "b"
url = "b"
""")
    assert config.budget.ship == 500 << 30
    assert config.budget.time == 6 * 3600
    assert config.hooks.timeout == 600
    assert config.disks[0].glob == "/etc/snapchain/images/*.qcow2"
    assert config.destinations[1].url == "/etc/snapchain/b"
    assert config.state == Path("/etc/snapchain/state")
    assert [each.name for each in config.destinations_of(config.disks[0])] == ["b"]
    assert config.keep_of(config.destinations[0]).last == -1
    assert config.keep_of(config.destinations[1]).daily == 14
    assert config.destinations[0].verify is not None
    assert config.destinations[0].verify.share == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("time_zome = 'UTC'", ":1: time_zome: is unknown here; did you mean time_zone?"),
        ("time_zone = 'Europe/Berlim'", ':1: time_zone: "Europe/Berlim" is no time zone'),
        ("window = '22-6'", ':2: window: "22-6" is no window'),
        ("window = '22:00-22:00'", ":2: window:"),
        ("concurrency = 0", ":2: concurrency: input should be greater than or equal to 1"),
        ("budget = { ship = 'much' }", ':2: budget.ship: "much" is no size'),
        ("budget = { shpi = 1 }", ":2: budget.shpi: is unknown here; did you mean ship?"),
        ("keep = { daily = -2 }", ":2: keep.daily: "),
        ("keep = { within = 'long' }", ":2: keep.within: "),
        ("keep = { labels = [\n  'ok',\n  '7' ] }", ":4: keep.labels[1]: "),
        ("hooks = { before = 'echo' }", ":2: hooks.before: "),
        ("hooks = { timeout = '5m' }", ':2: hooks.timeout: "5m" is no length of time'),
        ("[[disks]]\nname = 'x'", ":2: disks[0]: name either one image (path) or a pattern (glob)"),
        ("[[disks]]\npath = 'a'\n[[disks]]\npath = 'b'\nmerge_above = 2", ":6: disks[1].merge_above: "),
        ("[[disks]]\nglob = 'a'\nname = '{stem.__class__}'", ':4: disks[0].name: "{stem.__class__}" is no field'),
        ("[[disks]]\nglob = 'a'\nname = '{stem'", ":4: disks[0].name: "),
        ("[[disks]]\npath = 'a'\n[disks.hooks]\nbefore = []", ":5: disks[0].hooks.before: "),
        ("[[disks]]\npath = 'a'\n[[disks]]\npath = 'a'", ":5: disks[1].path: this image is named twice"),
        ("[[disks]]\npath = 'a'\ndestinations = ['vualt']", ':4: disks[0].destinations[0]: "vualt" is none of'),
        ("[[destinations]]\nname = 'v'", ":2: destinations[0].url: is missing"),
        (
            "[[destinations]]\nname='v'\nurl='u'\npassword='x'",
            ":5: destinations[0].password: a passphrase does not stand",
        ),
        (
            "[[destinations]]\nname='v'\nurl='u'\npassword_file='x'\npassword_env='Y'",
            ":2: destinations[0]: name one source of the passphrase",
        ),
        ("[[destinations]]\nname='v'\nurl='u'\n[[destinations]]\nname='v'\nurl='w'", "names two destinations"),
        ("[disks]\npath = 'a'", ":2: disks: is a list, as a table [[disks]]"),
        ("[[disks]]\npath = 'a'\nlabels = 'x'", ":4: disks[0].labels: is a list, in brackets"),
        ("disks = []", ":2: disks: tuple should have at least 1 item"),
        ("window = ", "/etc/snapchain/nightly.toml:2: not TOML: Invalid value"),
        ("disks = [", "not TOML: Invalid value"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_field(wrong: str, told: str) -> None:
    parts = {
        "disks": LEAST.split("\n[[destinations]]", maxsplit=1)[0].split("\n", 1)[1],
        "destinations": LEAST[LEAST.index("[[des") :],
    }
    text = "" if wrong.startswith("time_zo") else 'time_zone = "UTC"\n'
    text += wrong + "\n"
    text += "".join(
        part + "\n" for name, part in parts.items() if f"[{name}]" not in wrong and not wrong.startswith(name)
    )
    assert told in refusal(text)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    told = refusal(LEAST + "colour = 1\nlimit_rate = 'x'\n" + '[keep]\nlast = "three"\n')
    assert told.splitlines()[0] == f"{PATH}: 3 mistakes"
    assert [line.strip().split(":")[1] for line in told.splitlines()[1:]] == ["7", "8", "10"]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"gone.toml: no such file"):
        load(tmp_path / "gone.toml")
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe9'")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        load(tmp_path / "latin.toml")
    (tmp_path / "web.toml").write_text(LEAST)
    assert load(tmp_path / "web.toml").name == "web"
    (tmp_path / "link.toml").symlink_to("web.toml")
    assert load(tmp_path / "link.toml").name == "link"


KEYS = st.sampled_from(["a", "b-1", '"q.k"', "'l'", '"\\u00e9"'])
VALUES = st.recursive(
    st.sampled_from(["1", "true", '"#]}"', "'x,'", '"""m\nl"" \\""""', "'''\nz'''", "1979-05-27 07:32:00", "-0.5e3"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: "[" + ",".join(f" # c\n {part}" for part in parts) + "\n]"),
        st.dictionaries(KEYS, inner, max_size=3).map(
            lambda parts: "{" + ", ".join(f"{key} = {value}" for key, value in parts.items()) + "}"
        ),
    ),
    max_leaves=5,
)
PAIRS = st.dictionaries(KEYS, VALUES, max_size=4)


def places(value: Any, place: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    found = {place}
    if isinstance(value, dict):
        return found.union(*(places(part, (*place, key)) for key, part in value.items()))
    if isinstance(value, list):
        return found.union(*(places(part, (*place, number)) for number, part in enumerate(value)))
    return found


@given(PAIRS, st.lists(st.tuples(PAIRS, PAIRS), max_size=3), PAIRS)
def test_every_value_of_a_document_has_its_line(
    top: dict[str, str], array: list[tuple[dict[str, str], dict[str, str]]], table: dict[str, str]
) -> None:
    rows = [f"{key} = {value}" for key, value in top.items()]
    for pairs, inner in array:
        rows += ["", "[[ disks ]] # one", *(f"{key} = {value}" for key, value in pairs.items())]
        rows += ["  [disks.hooks.deep]", *(f"  {key}={value}" for key, value in inner.items())]
    rows += ['[t."x y"]', *(f"{key} = {value} # {{[" for key, value in table.items())]
    text = "\n".join(rows)
    said = tomllib.loads(text)
    lines = lines_of(text)
    assert set(lines) >= places(said) - {(), ("t",)}
    lengths = text.split("\n")
    for place, line in lines.items():
        last = place[-1]
        if isinstance(last, str) and last not in {"q.k", "é"} and place[0] != "disks":
            assert last.strip("'") in lengths[line - 1], (place, line)


def test_lines_of_dotted_keys_and_nested_tables() -> None:
    text = "a.b.c = 1\n[x]\ny = [\n  { p = 1, q = [ 2,\n 3] },\n]\n[[z.w]]\nk = 1\n[[z.w]]\n\nk = 2\n[z.w.v]\nk = 3\n"
    assert tomllib.loads(text)["z"]["w"][1]["v"] == {"k": 3}
    lines = lines_of(text)
    told = {json.dumps(place): line for place, line in lines.items()}
    assert told['["a", "b", "c"]'] == 1
    assert told['["x", "y", 0, "q", 1]'] == 5
    assert told['["z", "w", 0, "k"]'] == 8
    assert told['["z", "w", 1, "k"]'] == 11
    assert told['["z", "w", 1, "v", "k"]'] == 13


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "guide" / "nightly.md").read_text()


def test_the_configuration_of_the_guide_is_one() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    config = parse(example, path=Path("/etc/snapchain/web.toml"))
    assert len(config.destinations) == 2
    assert config.keep_of(config.destinations[1]).monthly == 24


def test_the_guide_names_every_field_and_no_other() -> None:
    models: dict[str, list[type[BaseModel]]] = {
        "top": [Nightly], "`[keep]`": [Policy], "`[budget]`": [Budget], "`[hooks]`": [Hooks],
        "`[[disks]]`": [Disks, DiskHooks], "`[[destinations]]`": [Destination, Verify],
    }  # fmt: skip
    told = {
        where: set(re.findall(r"`([a-z_]+)`", words))
        for where, words in re.findall(r"^\| (\S+) \| (.*) \|$", PAGE, re.MULTILINE)
    }
    parts = {"keep", "budget", "hooks", "disks", "destinations"}
    for where, kinds in models.items():
        fields = {name for kind in kinds for name in kind.model_fields}
        common = set(Hooks.model_fields) if where == "`[[disks]]`" else set()
        assert told[where] - fields == set(), where
        assert fields - told[where] - common - (parts if where == "top" else set()) == set(), where


def test_the_guide_names_every_metric_and_no_other(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.repository()
    host.disk("web1")
    host.run("")
    there = set(re.findall(r"^# TYPE (\S+)", (tmp_path / "snapchain.prom").read_text(), re.MULTILINE))
    assert set(re.findall(r"`(snapchain_[a-z_]+)", PAGE)) == there
