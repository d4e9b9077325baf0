"""The locks: they pin what pyproject.toml asks for, by hash, and nothing is installed past them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (ROOT / "requirements.lock", ROOT / ".ci" / "tools.lock")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
ASKED: dict[str, list[str]] = {
    "build": [*PROJECT["build-system"]["requires"], *PROJECT["dependency-groups"]["build"]],
    "runtime": PROJECT["project"]["dependencies"],
    **PROJECT["project"]["optional-dependencies"],
}
_ENTRY = re.compile(r"([a-z0-9-]+)==([^ ;]+)(?: ; ([^\\]+))? \\\n")
_HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}( \\)?\n")


def pinned(lock: Path) -> dict[str, dict[str, list[Version]]]:
    """Section -> name -> versions. Fails where a line is neither an entry nor a hash of one."""
    section = "tools"
    sections: dict[str, dict[str, list[Version]]] = {}
    more = False  # whether the line before goes on
    for line in lock.read_text().splitlines(keepends=True):
        if line.startswith("# ---- "):
            section = line.split()[2]
        elif not line.startswith("#"):
            found = _ENTRY.fullmatch(line)
            assert found or _HASH.fullmatch(line), line
            assert bool(found) != more, f"{line}: an entry without a hash, or a hash without an entry"
            more = line.endswith("\\\n")
            if found:
                sections.setdefault(section, {}).setdefault(found[1], []).append(Version(found[2]))
    assert not more
    return sections


def flat(sections: dict[str, dict[str, list[Version]]]) -> dict[str, list[Version]]:
    return {name: versions for entries in sections.values() for name, versions in entries.items()}


def satisfied(text: str, found: dict[str, list[Version]]) -> bool:
    wanted = Requirement(text)
    versions = found.get(canonicalize_name(wanted.name), [])
    return bool(versions) and all(wanted.specifier.contains(version, prereleases=True) for version in versions)


def test_every_line_of_a_lock_pins_a_version_or_is_a_hash_of_it() -> None:
    for lock in LOCKS:
        assert flat(pinned(lock))
        assert "://" not in lock.read_text()  # whichever registry the machine asks


def test_the_sections_are_those_of_the_project() -> None:
    assert list(pinned(LOCKS[0])) == list(ASKED)


def test_a_package_stands_in_one_section() -> None:
    names = [name for entries in pinned(LOCKS[0]).values() for name in entries]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("section", ASKED)
def test_what_pyproject_asks_for_is_pinned(section: str) -> None:
    sections = pinned(LOCKS[0])
    order = list(sections)
    # Of an extra what the sections before it pin may be relied on: .ci/setup installs them together.
    before = flat({each: sections[each] for each in order[: order.index(section) + 1]})
    assert [text for text in ASKED[section] if not satisfied(text, before)] == []


def test_the_tools_are_pinned() -> None:
    found = flat(pinned(LOCKS[1]))
    assert [text for text in PROJECT["dependency-groups"]["tools"] if not satisfied(text, found)] == []


def test_what_the_pinned_packages_need_is_pinned() -> None:
    """Of those that are installed here, with the extras by which another one of them is asked for."""
    found = flat(pinned(LOCKS[0]))
    todo = [Requirement(text) for texts in ASKED.values() for text in texts]
    seen: set[str] = set()
    missing = []
    while todo:
        wanted = todo.pop()
        if str(wanted) in seen or (wanted.marker is not None and not wanted.marker.evaluate()):
            continue
        seen.add(str(wanted))
        if not satisfied(str(wanted), found):
            missing.append(str(wanted))
        try:
            further = map(Requirement, requires(wanted.name) or [])
        except PackageNotFoundError:  # an extra that is not installed here
            continue
        for each in further:
            extras = wanted.extras or {""}
            if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
                each.marker = None
                todo.append(each)
    assert not missing
    assert len(seen) > 40


def test_setup_installs_nothing_past_the_locks() -> None:
    lines = re.sub(r"\\\n", " ", (ROOT / ".ci" / "setup").read_text()).splitlines()
    installs = [line.strip() for line in lines if re.search(r"\bpip install\b", line) and not line.startswith("#")]
    by_hash = "pip_locked() { pip install --quiet --require-hashes --only-binary :all: "
    itself = "pip install --quiet --no-deps --no-build-isolation --editable . "
    assert len(installs) == 2
    assert installs[0].startswith(by_hash)
    assert installs[1].startswith(itself)


# -- make lock ---------------------------------------------------------------------------------------------------------


def test_an_entry_keeps_the_markers_that_tell_it_from_others() -> None:
    lock = runpy.run_path(str(ROOT / ".ci" / "lock"))
    common = " and ".join(lock["FOR_ALL"])
    text = (
        f"# a\nnumpy==1 ; {common} \\\n    --hash=sha256:0\nnumpy==2 ; python_full_version >= '3.12' and {common} \\\n"
    )
    assert lock["blocks"](text) == {
        "numpy": ["numpy==1 \\\n", "    --hash=sha256:0\n", "numpy==2 ; python_full_version >= '3.12' \\\n"]
    }


def test_the_common_markers_are_those_of_pyproject() -> None:
    lock = runpy.run_path(str(ROOT / ".ci" / "lock"))
    (environment,) = PROJECT["tool"]["uv"]["environments"]
    said = {part.replace("python_version", "python_full_version") for part in environment.split(" and ")}
    assert said == set(lock["FOR_ALL"])


# -- make audit --------------------------------------------------------------------------------------------------------

_PIP_AUDIT = """#!{python}
import json, sys
from pathlib import Path
names = [line.partition("==")[0] for line in Path(sys.argv[-1]).read_text().splitlines() if line[0] != " "]
found = {{"PYSEC-1": ["9.9"], "PYSEC-2": []}}
vulns = {{"numpy": [{{"id": id, "fix_versions": fixed}} for id, fixed in found.items()]}} if {known} else {{}}
rows = [{{"name": name, "version": "1", "vulns": vulns.get(name, [])}} for name in names]
print(json.dumps({{"dependencies": rows[{first}:]}}))
print("it is not there", file=sys.stderr)
"""


def audit(directory: Path, text: str, **facts: object) -> subprocess.CompletedProcess[str]:
    """`make audit` with a pip-audit that does as told."""
    program = directory / "pip-audit"
    program.write_text(text.format(python=sys.executable, **facts))
    program.chmod(0o700)
    argv = [sys.executable, str(ROOT / ".ci" / "audit"), str(program)]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_an_audit_asks_about_every_version_in_the_locks(tmp_path: Path) -> None:
    done = audit(tmp_path, _PIP_AUDIT, known=False, first=0)
    count = sum(len(versions) for lock in LOCKS for versions in flat(pinned(lock)).values())
    assert (done.returncode, done.stdout) == (0, f"audit: 0 known vulnerabilities in {count} packages\n")


def test_an_audit_tells_what_is_known(tmp_path: Path) -> None:
    done = audit(tmp_path, _PIP_AUDIT, known=True, first=0)
    assert done.returncode == 1
    assert "numpy 1: PYSEC-1, mended in 9.9\n" in done.stdout
    assert "numpy 1: PYSEC-2, mended in no version yet\n" in done.stdout


_SKIPPED = """#!/bin/sh
echo '{{"dependencies": [{{"name": "numpy", "skip_reason": "x"}}]}}'
"""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("#!/bin/sh\necho cannot reach it >&2\nexit 1\n", "cannot reach it"),
        ("#!/bin/sh\nexit 1\n", "status 1"),
        ("#!/no/such/program\n", "No such file"),
        (_PIP_AUDIT.replace("{first}", "1"), "it is not there"),  # one package is left out
        (_SKIPPED, "status 0"),
    ],
)
def test_an_audit_that_got_no_answer_says_so(tmp_path: Path, text: str, why: str) -> None:
    done = audit(tmp_path, text, known=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "requirements.lock was not checked" in done.stderr
    assert why in done.stderr
