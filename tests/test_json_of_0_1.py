"""What `--json` prints has every field that version 0.1 printed, with its type; more may stand beside them.

`fixtures/0.1/json_fields.json` was recorded once by version 0.1, in a checkout of commit e78b667:

    .venv/bin/python THIS_CHECKOUT/tests/test_json_of_0_1.py > THIS_CHECKOUT/fixtures/0.1/json_fields.json
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

RECORDED = Path(__file__).parents[1] / "fixtures" / "0.1" / "json_fields.json"

NIGHTLY = """
time_zone = "UTC"
state = "state"
keep = { last = 2 }
[[disks]]
path = "night.qcow2"
merge_above = 4
[[destinations]]
name = "vault"
url = "repo"
password_env = "SNAPCHAIN_PASSWORD"
[[disks]]
path = "nowhere.qcow2"
name = "nowhere"
"""


def _spawn(*words: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
    argv = [sys.executable, "-m", "snapchain", *words]
    done = subprocess.run(argv, input=stdin, capture_output=True, check=False)
    return done.returncode, done.stdout, done.stderr


def _run(*words: str) -> tuple[int, str, str]:
    from snapchain.cli import main

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(words)
    return status, out.getvalue(), err.getvalue()


def _qemu(folder: Path, *words: str) -> None:
    subprocess.run(words, cwd=folder, check=True, capture_output=True)


def _write(folder: Path, image: str, *commands: str) -> None:
    _qemu(folder, "qemu-io", "-f", "qcow2", *(word for each in commands for word in ("-c", each)), image)


def play(folder: Path) -> Iterator[tuple[str, Any]]:
    """Run each command on small disks in an empty folder: its words and exit code, and what it printed."""

    def run(*words: str) -> Iterator[tuple[str, Any]]:
        status, out, err = _run(*words, "--json")
        name = " ".join(words).replace(str(folder), "")
        assert out, f"{name}: {err}"
        yield f"{name} -> {status}", json.loads(out)

    def both(*words: str) -> Iterator[tuple[str, Any]]:
        yield from run(*words, "--dry-run")
        yield from run(*words)

    replica = f"dir:{folder}/replica"
    (folder / "chain").mkdir()
    for name in ("web1.qcow2", "night.qcow2", "moving.qcow2"):
        _qemu(folder, "qemu-img", "create", "-q", "-f", "qcow2", name, "4M")
        _write(folder, name, "write -P 1 0 1M", "write -z 2M 64k")
    yield from both("init", "repo")
    yield from both("init", "plain", "--no-encryption")
    yield from both("ship", "web1.qcow2", "repo::web1/vda", "--label", "first")
    yield from both("send", "web1.qcow2", f"{replica}::web1/vda", "--label", "first")
    yield from both("snapshot", "web1.qcow2", "--label", "one")
    for day in range(2, 5):
        _write(folder, "web1.qcow2", f"write -P {day} 0 256k", f"write -z {day * 256}k 64k")
        yield from both("ship", "web1.qcow2", "repo::web1/vda", "--label", f"day-{day}")
        yield from both("ship", "web1.qcow2", f"{replica}::web1/vda", "--label", f"day-{day}")
        yield from run("snapshot", "web1.qcow2", "--label", f"day-{day}")
    yield from run("log", "repo")
    yield from run("log", "repo::web1/vda")
    yield from run("log", replica)
    yield from both("hold", "repo::web1/vda@2", "--tag", "audit", "--reason", "why")
    yield from run("log", "repo::web1/vda")
    yield from both("release", "repo::web1/vda@2", "--tag", "audit")
    yield from both("hold", "web1.2.qcow2", "--tag", "audit")
    yield from run("inspect", "web1.qcow2")
    yield from run("inspect", "repo::web1/vda")
    yield from run("inspect", f"{replica}::web1/vda@2")
    yield from run("diff", "repo::web1/vda@1", "repo::web1/vda@2")
    yield from run("diff", "web1.qcow2", "web1.1.qcow2")
    yield from both("restore", "repo::web1/vda@1", "one.qcow2")
    yield from both("restore", "repo::web1/vda", "chain/web1.qcow2", "--chain")
    yield from both("restore", f"{replica}::web1/vda", "two.raw")
    yield from both("merge", "web1.qcow2", "--max-layers", "4", "--at", "repo::web1/vda")
    yield from both("release", "web1.2.qcow2", "--tag", "audit")
    yield from run("merge", "web1.qcow2", "--strategy", "new-file", "--dry-run")
    yield from both("merge", "web1.qcow2")
    yield from both("merge", "repo::web1/vda", "--keep-last", "2")
    yield from both("merge", f"{replica}::web1/vda", "--keep-last", "2")
    yield from both("gc", "repo")
    for words in ([], ["--read-data"], ["--sample", "50%"]):
        yield from run("verify", "repo", *words)
    yield from run("verify", replica)
    yield from run("verify", f"{replica}::web1/vda", "--read-data")
    yield from run("sync", "moving.qcow2", f"{replica}::moving/vda", "--dry-run")
    yield from both("migrate", "moving.qcow2", f"{replica}::moving/vda", "--offline")
    yield from both("doctor", ".")
    status, stream, report = _spawn("send", "night.qcow2", "--disk", "s/vda", "--json")
    yield f"send night.qcow2 --disk s/vda -> {status}", json.loads(report.decode().splitlines()[-1])
    _, received, _ = _spawn("receive", "other", "--json", stdin=stream)
    yield "receive other", json.loads(received)
    _, _, lines = _run("ship", "night.qcow2", "plain::n", "--progress", "json", "--json")
    for line in lines.splitlines():
        event = json.loads(line)
        yield f"ship --progress json: {event['event']}", event

    (folder / "nightly.toml").write_text(NIGHTLY)
    yield from both("nightly", "nightly.toml")
    for day in range(4):
        _write(folder, "night.qcow2", f"write -P {day + 9} 0 64k")
        yield from run("nightly", "nightly.toml")
    yield from run("nightly", "nightly.toml", "--dry-run")
    yield from run("nightly", "nightly.toml", "--print-systemd")

    pack = max((folder / "repo" / "packs").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    pack.write_bytes(bytes(pack.stat().st_size))
    yield from run("verify", "repo", "--read-data")
    yield from run("gc", "repo")
    for words in (
        ["init", "repo"],
        ["ship", "none.qcow2", "repo::a"],
        ["ship", "web1.qcow2"],
        ["log", "nowhere"],
        ["log", f"{replica}::none"],
        ["restore", "repo::web1/vda@99", "x.qcow2"],
        ["inspect", "nightly.toml"],
        ["merge", "web1.qcow2", "--from", "none", "--to", "none"],
        ["hold", "repo::web1/vda@99", "--tag", "a"],
        ["nightly", "none.toml"],
        ["no-such-verb"],
    ):
        yield from run(*words)


def shape(value: Any) -> Any:
    """A value without what it says: fields of objects, what all entries of a list have in common, names of types."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list):
        shapes = [shape(each) for each in value]
        return [_common(shapes)] if shapes else []
    return "null" if value is None else type(value).__name__


def _common(shapes: list[Any]) -> Any:
    first = shapes[0]
    if all(isinstance(each, dict) for each in shapes):
        names = [name for name in first if all(name in each for each in shapes)]
        return {name: _common([each[name] for each in shapes]) for name in names}
    if all(isinstance(each, list) for each in shapes):
        inner = [entry for each in shapes for entry in each]
        return [_common(inner)] if inner else []
    kinds = {each if isinstance(each, str) else type(each).__name__ for each in shapes}
    known = next((each for each in shapes if not isinstance(each, str)), None)
    return "|".join(sorted(kinds)) if known is None or kinds == {"null"} else known


def lacking(now: Any, then: Any, at: str) -> Iterator[str]:
    """What `now` lacks of `then`, or has with another type."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name, each in then.items():
            if name in now:
                yield from lacking(now[name], each, f"{at}.{name}")
            else:
                yield f"{at}.{name} is gone"
    elif isinstance(then, list) and isinstance(now, list):
        if then and now:
            yield from lacking(now[0], then[0], f"{at}[]")
        elif then:
            yield f"{at}[] is empty"
    elif then not in ("null", now) and not _fits(now, then):
        yield f"{at} was {then} and is {now}"


def _fits(now: Any, then: Any) -> bool:
    if not isinstance(now, str) or not isinstance(then, str):
        return False
    allowed = {*then.split("|"), *(["int"] if "float" in then else [])}
    return set(now.split("|")) <= allowed or "null" in then.split("|")


def recorded(folder: Path) -> dict[str, Any]:
    """The shape of everything that the commands print; the same words may come several times."""
    shapes: dict[str, list[Any]] = {}
    os.environ |= {"SNAPCHAIN_PASSWORD": "secret", "XDG_STATE_HOME": f"{folder}/.s", "XDG_CACHE_HOME": f"{folder}/.c"}
    for name, printed in play(folder):
        shapes.setdefault(name, []).append(shape(printed))
    return {name: _common(each) for name, each in shapes.items()}


def test_every_field_of_0_1_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SNAPCHAIN_PASSWORD", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # what `recorded` sets is undone with it
    monkeypatch.chdir(tmp_path)
    then = json.loads(RECORDED.read_text())
    now = recorded(tmp_path)
    gone = [
        f"{name} is not printed; there are {[each for each in now if each not in then]}"
        for name in then
        if name not in now
    ]
    problems = [line for name, each in then.items() if name in now for line in lacking(now[name], each, name)]
    assert "\n".join(gone + problems) == ""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory, chdir(directory):
        print(json.dumps(recorded(Path(directory)), indent=1, sort_keys=True))
