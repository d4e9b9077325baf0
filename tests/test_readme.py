"""What the README says is so."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from snapchain.errors import SnapchainError
from tests.test_errors import defined

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def section(title: str) -> str:
    """The text under a heading, up to the next one of any level."""
    return re.split(r"^#+ ", README.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def test_the_exit_codes_are_those_of_the_errors() -> None:
    told = {
        kind: int(code)
        for code, kinds in re.findall(r"^\| (\d+) \| ([a-z, -]+) \|", section("Exit codes"), re.MULTILINE)
        for kind in kinds.split(", ")
    }
    errors = {error.kind: error.exit_code for error in defined().values() if error is not SnapchainError}
    assert told == {**errors, "bug": 1, "interrupted": 130}


def test_the_commands_are_those_of_the_program() -> None:
    from snapchain.cli.verbs import load

    told = {line.split()[2] for line in section("Commands").splitlines() if line.startswith("| `snapchain ")}
    assert told == {command.name for command in load().registered_commands if not command.hidden}


def test_every_make_target_named_is_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test", "check", "bench", "help"} <= targets
    assert set(re.findall(r"(?:`|^ +)make ([a-z]+)", README, re.MULTILINE)) <= targets


def test_ci_runs_nothing_that_the_readme_does_not_name() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if "make" in line] == ["make check </dev/null", "exec make test </dev/null"]
    assert "make check" in section("Try it")
    assert "make test" in section("Try it")


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, backup = tmp_path / "images" / "web1.qcow2", tmp_path / "backup"
    image.parent.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", image], check=True, capture_output=True)

    from snapchain.repository.opening import create_repository

    create_repository(str(backup), passphrase=lambda: "correct horse")
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    raw = tmp_path / "web1.raw"
    for told, here in {'"/images/web1.qcow2"': image, '"/backup"': backup, '"/tmp/web1.raw"': raw}.items():
        assert told in example
        example = example.replace(told, repr(str(here)))
    exec(compile(example, "README.md", "exec"), {})
    judged = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(image), str(raw)]
    assert subprocess.run(judged, capture_output=True, check=False).returncode == 0
