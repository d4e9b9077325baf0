"""A configuration's mistakes are named by file and dotted key, all at once; and what is right is taken as it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from snapchain.errors import InvalidInput, NotFound
from snapchain.model.retention import Policy
from snapchain.ops.nightly.config import (
    BootTests,
    Budget,
    Destination,
    DiskHooks,
    Disks,
    GuestHooks,
    Guests,
    Hooks,
    Nightly,
    Verify,
)
from snapchain.ops.nightly.document import load, parse
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
        ("time_zome = 'UTC'", "time_zome: is unknown here; did you mean time_zone?"),
        ("time_zone = 'Europe/Berlim'", 'time_zone: "Europe/Berlim" is not a time zone'),
        ("window = '22-6'", 'window: "22-6" is not a window'),
        ("window = '22:00-22:00'", "window:"),
        ("concurrency = 0", "concurrency: input should be greater than or equal to 1"),
        ("budget = { ship = 'much' }", 'budget.ship: "much" is not a size'),
        ("budget = { shpi = 1 }", "budget.shpi: is unknown here; did you mean ship?"),
        ("keep = { daily = -2 }", "keep.daily: "),
        ("keep = { within = 'long' }", "keep.within: "),
        ("keep = { labels = [\n  'ok',\n  '7' ] }", "keep.labels[1]: "),
        ("hooks = { before = 'echo' }", "hooks.before: "),
        ("hooks = { timeout = '5m' }", 'hooks.timeout: "5m" is not a duration'),
        ("[[disks]]\nname = 'x'", "disks[0]: name either one image (path) or a pattern (glob)"),
        ("[[disks]]\npath = 'a'\n[[disks]]\npath = 'b'\nmerge_above = 2", "disks[1].merge_above: "),
        ("[[disks]]\nglob = 'a'\nname = '{stem.__class__}'", 'disks[0].name: "{stem.__class__}" is not a field'),
        ("[[disks]]\nglob = 'a'\nname = '{stem'", "disks[0].name: "),
        ("[[disks]]\npath = 'a'\n[disks.hooks]\nbefore = []", "disks[0].hooks.before: "),
        ("[[disks]]\npath = 'a'\n[[disks]]\npath = 'a'", "disks[1].path: this image is named twice"),
        ("[[disks]]\npath = 'a'\ndestinations = ['vualt']", 'disks[0].destinations[0]: "vualt" is not a destination'),
        ("[[destinations]]\nname = 'v'", "destinations[0].url: is missing"),
        (
            "[[destinations]]\nname='v'\nurl='u'\npassword='x'",
            "destinations[0].password: a configuration holds no passphrase",
        ),
        (
            "[[destinations]]\nname='v'\nurl='u'\npassword_file='x'\npassword_env='Y'",
            "destinations[0]: name one source of the passphrase",
        ),
        ("[[destinations]]\nname='v'\nurl='u'\n[[destinations]]\nname='v'\nurl='w'", "names two destinations"),
        ("[disks]\npath = 'a'", "disks: is a list, as a table [[disks]]"),
        ("[[disks]]\npath = 'a'\nlabels = 'x'", "disks[0].labels: is a list, in brackets"),
        ("disks = []", "the whole: there is nothing to do: name [[disks]] or [[guests]]"),
        ("window = ", "/etc/snapchain/nightly.toml: not TOML: Invalid value (at line 2, column 10)"),
        ("disks = [", "not TOML: Invalid value"),
    ],
)
def test_a_mistake_is_named_by_its_dotted_key(wrong: str, told: str) -> None:
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


def test_all_mistakes_are_named_at_once() -> None:
    told = refusal(LEAST + "colour = 1\nlimit_rate = 'x'\n" + '[keep]\nlast = "three"\n')
    assert told.splitlines()[0] == f"{PATH}: 3 mistakes"
    keys = [line.strip().split(":")[0] for line in told.splitlines()[1:]]
    assert keys == ["keep.last", "destinations[0].limit_rate", "destinations[0].colour"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512", 512), ("512B", 512), ("64K", 64 << 10), ("64k", 64 << 10), ("64KB", 64 << 10), ("64KiB", 64 << 10),
        ("64 KiB", 64 << 10), ("10M", 10 << 20), ("10MB", 10 << 20), ("1.5GiB", 3 << 29), ("2T", 2 << 40),
        (" 1G ", 1 << 30),
        ("1 P", None), ("much", None), ("-1", None), ("1e3", None), ("1 bit", None), ("", None),
    ],
)  # fmt: skip
def test_sizes_are_powers_of_1024(text: str, count: int | None) -> None:
    """What pydantic's ByteSize does not have: there 10M is ten million bytes, and `1 bit` and `1 P` are sizes."""
    if count is None:
        assert "is not a size" in refusal(LEAST + f"limit_rate = '{text}'")
    else:
        assert parsed(LEAST + f"limit_rate = '{text}'").destinations[0].limit_rate == count


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


PAGE = (Path(__file__).resolve().parents[3] / "docs" / "guide" / "nightly.md").read_text()


def test_the_configuration_of_the_guide_is_one() -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    config = parse(example, path=Path("/etc/snapchain/web.toml"))
    assert [each.copy_of for each in config.destinations] == [None, None, "away", None]
    assert config.keep_of(config.destinations[1]).monthly == 24
    assert [(guests.pattern, guests.idle) for guests in config.guests] == [("web*", True)]


def test_the_guide_names_every_field_and_no_other() -> None:
    models: dict[str, list[type[BaseModel]]] = {
        "top": [Nightly], "`[keep]`": [Policy], "`[budget]`": [Budget], "`[test]`": [BootTests], "`[hooks]`": [Hooks],
        "`[[disks]]`": [Disks, DiskHooks], "`[[guests]]`": [Guests, GuestHooks],
        "`[[destinations]]`": [Destination, Verify],
    }  # fmt: skip
    told = {
        where: set(re.findall(r"`([a-z_]+)`", words))
        for where, words in re.findall(r"^\| (\S+) \| (.*) \|$", PAGE, re.MULTILINE)
    }
    parts = {"keep", "budget", "test", "hooks", "disks", "guests", "destinations"}
    for where, kinds in models.items():
        fields = {name for kind in kinds for name in kind.model_fields}
        common = set(Hooks.model_fields) if where in {"`[[disks]]`", "`[[guests]]`"} else set()
        assert told[where] - fields == set(), where
        assert fields - told[where] - common - (parts if where == "top" else set()) == set(), where


def test_the_guide_names_every_metric_and_no_other(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.repository()
    host.disk("web1")
    host.run("")
    there = set(re.findall(r"^# TYPE (\S+)", (tmp_path / "snapchain.prom").read_text(), re.MULTILINE))
    assert set(re.findall(r"`(snapchain_[a-z_]+)", PAGE)) == there
