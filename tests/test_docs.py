"""What the guide says is so: each command is parsed by the program, and run where that is cheap.

A page's commands run each in a world of its own: a directory with images, a repository and replicas, in which the paths
of the page lie. `/backup` is a directory there, and `ssh://host/path` becomes `dir:`. The page of running guests has a
real QEMU: `--domain web1` becomes `--qmp SOCKET`.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

import snapchain
from docs.modules import START, folders
from snapchain.cli import main
from snapchain.cli.app import command
from snapchain.cli.verbs import VERBS
from snapchain.errors import SnapchainError
from snapchain.host.qemu_processes import QemuProcess, qemu_processes
from snapchain.ops import guests as listing
from snapchain.ops.watch.run import LeaseReport, RoundReport, Shipped, TargetReport, WatchReport
from tests.guest.machine import Machine
from tests.pages import GUIDE, PAGES, ROOT, Command, anchors, commands, section
from tests.test_errors import defined

DOCUMENTS = [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
             ROOT / "docs" / "architecture.md", ROOT / "docs" / "format.md", ROOT / "docs" / "stream.md",
             *sorted((ROOT / "docs" / "decisions").glob("*.md"))]  # fmt: skip
ALL = [each for page in PAGES for each in commands(page)]
SCRIPTING = (GUIDE / "scripting.md").read_text()

GUESTS = ("running-guests.md", "live-migration.md")

# What a test cannot reach: a bucket, a device, a password manager, another host, /etc, a libvirtd; what has no end.
ELSEWHERE = re.compile(
    r"s3://|/dev/|pass show|ssh kvm2|^nightly /etc/|--define|^watch (?!.*--(print|dry))|^serve (?!.*--dry)|^mount "
    # The server is a process of its own, which does not have the cheap keys of these tests.
    r"|^restore --instant (?!.*--dry)"
    r"|^migrate --(?:domain|qmp) (?!.*--(dry|abort))"
)  # it would leave a QEMU behind
# Commands that a page shows for a state that the world is not in -> how they end here.
OTHERWISE = {
    "log /backup --accept-repository": 2,
    "doctor --accept": 3,
    "key add /backup --label": 2,
    "key change /backup": 2,
    "key remove /backup": 3,
    "restore /backup::web1/vda@yesterday": 3,
    "forget /backup::web1@2": 3,
    "forget /backup::old/vda --all-points": 3,
    "sync /images/web1.qcow2 ssh://root@kvm2/srv/replica::web1/vda --check": 4,
    "migrate web1.qcow2 ssh://kvm2/srv/replica::web1/vda --take-back": 3,
    "failover dir:/srv/replica::web1 --dry-run": 3,
    "failover dir:/srv/replica --from kvm1 --dry-run": 3,
    "failover dir:/srv/replica::web1 --fence ipmi-off kvm1 --": 3,
    "failover /backup::web1 --test --into /var/tmp": 3,
    "failback --prepare /images/web1.qcow2 dir:/srv/back::web1/vda": 3,
    "failback vda-epoch2.qcow2 ssh://root@kvm1/srv/back::web1/vda --dry-run": 3,
    "failback vda-epoch2.qcow2 ssh://root@kvm1/srv/back::web1/vda --start-hook": 3,
    "snapshot --qmp /run/web1.qmp --disk vda --quiesce require": 7,
    "status /images/web1.qcow2": 3,
}


@functools.cache
def program() -> dict[str, Any]:
    """The parser of every verb."""
    return {name: command(name) for name in VERBS}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.MULTILINE | re.DOTALL)
    ):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there.read_text()), target


def test_the_index_names_every_page() -> None:
    index = (GUIDE / "README.md").read_text()
    assert [
        page.name for page in GUIDE.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index
    ] == []


def test_the_index_names_every_command() -> None:
    table = section((GUIDE / "README.md").read_text(), "Commands")
    told = set(re.findall(r"^\| `snapchain ([a-z-]+)", table, re.MULTILINE))
    assert told == {name for name, verb in VERBS.items() if verb.group}


def test_the_exit_codes_are_those_of_the_errors() -> None:
    told = {
        kind: int(code)
        for code, kinds in re.findall(r"^\| (\d+) \| ([a-z, -]+) \|", section(SCRIPTING, "Exit codes"), re.MULTILINE)
        for kind in kinds.split(", ")
    }
    errors = {error.kind: error.exit_code for error in defined().values() if error is not SnapchainError}
    assert told == {**errors, "bug": 1, "interrupted": 130}


@pytest.mark.parametrize("shown", ALL, ids=lambda shown: f"{shown.page}: {' '.join(shown.words)}")
def test_each_command_is_one_of_the_program(shown: Command) -> None:
    verb, *words = shown.words
    program()[verb].make_context(verb, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_option_is_one_of_the_program(page: Path) -> None:
    """In sentences and tables: `snapchain VERB --option` has the option, and `--option` alone is one of some verb."""
    options = {name: {each for param in verb.params for each in param.opts} for name, verb in program().items()}
    known = {"--help", "--version", "--install-completion"}.union(*options.values())
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for quoted in re.findall(r"`([^`]+)`", text):
        if re.match(r"(pip|virsh|qemu|systemctl)\b", quoted):
            continue
        named = re.match(r"(?:snapchain )?([a-z-]+) ", quoted)
        allowed = options[named[1]] | {"--help"} if named and named[1] in options else known
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*(?!\.\.\.)(?![\w-])", quoted):
            assert option in allowed, quoted


def run(words: list[str]) -> None:
    assert main(words) == 0, words


def write(image: str, pattern: int) -> None:
    """What nobody wrote before, and the first cluster once more."""
    new = f"write -P {pattern} {pattern * 64}k 64k"
    argv = ["qemu-io", "-f", "qcow2", "-c", new, "-c", f"write -P {pattern} 0 64k", image]
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A template: images with chains, a repository at two places, replicas, and what this machine remembers of them.

    It is made once, and copied to where it was made.
    """
    base = tmp_path_factory.getbasetemp() / "docs"
    template, here = base / "template", base / "world"
    monkeypatch.setenv("SNAPCHAIN_PASSWORD", "correct horse")
    monkeypatch.setenv("XDG_STATE_HOME", str(here / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    if template.exists():
        return template
    for folder in ("images", "etc", "mnt/share", "srv", "vault"):
        (here / folder).mkdir(parents=True)
    monkeypatch.chdir(here)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "images/web1.qcow2", "1M"], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "raw", "images/disk.raw", "1M"], check=True)
    for name in ("web1.qcow2", "a.qcow2", "b.qcow2"):
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", name, "1M"], check=True)
        write(name, 1)
        run(["snapshot", name])
    run(["init", "backup"])
    for number, label in enumerate(("installed", "before-upgrade", "day-3", "day-4", "day-5", "release", "golden"), 1):
        write("images/web1.qcow2", number)
        run(["ship", "images/web1.qcow2", "backup::web1/vda", "-l", label])
        if number < 6:
            run(["snapshot", "images/web1.qcow2", "-l", label])
    run(["send", "images/web1.qcow2", f"dir:{here}/srv/replica::web1/vda"])
    (here / "etc" / "here.secret").write_text("correct horse\n")
    (here / "etc" / "here.secret").chmod(0o600)
    (here / "nightly.toml").write_text(
        f'time_zone = "UTC"\n[[disks]]\npath = "{here}/images/web1.qcow2"\nname = "web1/vda"\n'
        f'[[destinations]]\nname = "here"\nurl = "{here}/backup"\npassword_env = "SNAPCHAIN_PASSWORD"\n'
    )
    shutil.copytree(here / "backup", here / "repo")
    for folder in ("images", "srv", "run", "var"):
        (here / "guests" / folder).mkdir(parents=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "guests/images/web1.qcow2", "1M"], check=True)
    run(["init", "guests/backup"])
    with running(here) as machine:
        for number, label in enumerate(("installed", "before-upgrade", "day-3", "day-4"), 1):
            machine.write("vda", number << 16, 65536, number)
            run(["ship", "--qmp", str(machine.qmp), "guests/backup", "-l", label])
        machine.quit()
    here.rename(template)
    return template


def running(here: Path) -> Machine:
    """The guest `web1` of the world."""
    folder = here / "guests"
    top = max((folder / "images").glob("web1*.qcow2"), key=lambda path: (len(path.name), path.name))
    return Machine(folder / "run", disks={"vda": top})


def fresh(world: Path) -> Path:
    """A new copy of the template, at the place where it was made."""
    here = world.with_name("world")
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(world, here, symlinks=True)
    return here


def placed(words: tuple[str, ...], here: Path) -> list[str]:
    """The words of a command with the paths of the page in the world."""
    found: list[str] = []
    for word in words:
        if found[-1:] == ["--domain"]:
            found[-1:] = ["--qmp", f"{here}/run/qmp"]
            continue
        local = re.sub(r"^ssh://[^/]+/", "dir:/", word)
        inside = re.sub(r"(^|dir:)/(backup|images|mnt|srv|vault|var)\b", rf"\1{here}/\2", local)
        found.append(inside.replace("/etc/snapchain/", f"{here}/etc/").replace("/run/web1.qmp", f"{here}/run/qmp"))
    return found


def only_the_guest_of(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`guests` finds no QEMU of another test."""

    def of_this_test() -> list[QemuProcess]:
        return [each for each in qemu_processes() if any(str(here) in word for word in each.argv)]

    monkeypatch.setattr(listing, "qemu_processes", of_this_test)


def labels(lines: Sequence[str]) -> set[str]:
    """What a report calls its facts, and its first word: the numbers of a page are those of another disk."""
    first = [word for line in lines[:1] for word in line.split()[:1] if word.isalpha()]
    return {*first, *(label for line in lines for label in re.findall(r"^  ([a-z][a-z ]*?) {2,}\S", line))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_do_what_the_page_says(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for shown in commands(page):
        line, verb = " ".join(shown.words), shown.words[0]
        if not shown.plain or ELSEWHERE.search(line):
            continue
        here = fresh(world)
        needs_guest = verb == "guests" or not {"--domain", "--qmp"}.isdisjoint(shown.words)
        guest: AbstractContextManager[object] = running(here) if needs_guest else nullcontext()
        if page.name in GUESTS:
            here /= "guests"
            only_the_guest_of(here, monkeypatch)
        monkeypatch.chdir(here)
        if verb == "init":
            shutil.rmtree(here / "repo")
            shutil.rmtree(here / "backup")
        if verb == "release":
            run(["hold", *placed(shown.words[1:4], here)])
        if verb == "restore":
            shutil.rmtree(here / "images")
            (here / "images").mkdir()
            (here / "web1.qcow2").unlink(missing_ok=True)
        if verb in {"sync", "migrate"}:  # each file is a layer; the template's replica has composed ones
            shutil.rmtree(here / "srv" / "replica", ignore_errors=True)
        capsys.readouterr()
        with guest:
            status = main(placed(shown.words, here))
        expected = next((code for start, code in OTHERWISE.items() if line.startswith(start)), 0)
        printed = capsys.readouterr()
        assert status == expected, (line, printed.err)
        assert labels(shown.output) <= labels(printed.out.splitlines()), (line, printed.out)


# ---- JSON: every field that is printed is documented, and every one that is documented is printed


def paths(value: object, at: str = "") -> Iterator[str]:
    """`layers[].path` and so on: all that an object holds, and all that leads there."""
    if at:
        yield at
    if isinstance(value, dict):
        for key, each in value.items():
            yield from paths(each, f"{at}.{key}" if at else key)
    elif isinstance(value, list):
        yield f"{at}[]"
        for each in value:
            yield from paths(each, f"{at}[]")


OF_A_GUEST = "\nOf a guest:"


def documented(title: str) -> set[str]:
    """The fields in the tables of a section: of its part about guests, or of what stands before that."""
    title, separator, _ = title.partition(OF_A_GUEST)
    of_images, _, of_guests = section(SCRIPTING, title).partition(OF_A_GUEST)
    rows = re.findall(r"^\| (`.*?) \|", of_guests if separator else of_images, re.MULTILINE)
    return {field.removesuffix("[]") for row in rows for field in re.findall(r"`([^`]+)`", row)}


def printed_json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    capsys.readouterr()
    main([*words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_json_fields_are_those_that_are_documented(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = fresh(world)
    monkeypatch.chdir(here)
    image, replica = f"{here}/images/web1.qcow2", f"dir:{here}/srv/replica::web1/vda"
    migration = ["migrate", "a.qcow2", f"dir:{here}/srv/other::a"]
    guest, live = f"{here}/guests/backup::web1", ["--qmp", f"{here}/guests/run/qmp"]
    only_the_guest_of(here, monkeypatch)
    with running(here):
        check_json(capsys, {
            "`guests`": [["guests", "web1", "--at", f"{here}/guests/backup"]],
            f"`ship` and `send`{OF_A_GUEST}": [["ship", *live, f"{here}/guests/backup"]],
            "`snapshot` of a guest": [["snapshot", *live]],
        })  # fmt: skip
        watched = ["watch", *live, f"{here}/guests/backup", "--every", "1h", "--dry-run"]
        assert set(printed_json(capsys, *watched)["plan"]) == {"guest", "every", "shipments"}
    check_json(capsys, {
        "`init`": [["init", "new"]],
        "`key`": [["key", "list", "backup"]],
        "`snapshot`": [["snapshot", image]],
        "`ship` and `send`": [["ship", image, "backup::web1/vda"], ["send", image, replica]],
        "`log`": [["log", "backup"], ["log", f"dir:{here}/srv/replica"]],
        "`inspect`": [["inspect", image], ["inspect", "backup::web1/vda"], ["inspect", replica]],
        "`diff`": [["diff", "backup::web1/vda@1", "backup::web1/vda@2"], ["diff", f"{guest}@1", f"{guest}@2"]],
        "`restore`": [["restore", "backup::web1/vda@1", "old.qcow2"], ["restore", replica, "new.qcow2"]],
        f"`restore`{OF_A_GUEST}": [["restore", guest, "web2"]],
        "`verify`": [["verify", "backup", "--read-data"], ["verify", f"dir:{here}/srv/replica"]],
        "`hold` and `release`": [["hold", "backup::web1/vda@1", "-t", "a"], ["hold", image, "-t", "a"],
                                 ["release", image, "-t", "a"], ["release", "backup::web1/vda@1", "-t", "a"],
                                 ["hold", f"{guest}@1", "-t", "a"], ["release", f"{guest}@1", "-t", "a"]],
        "`sync`": [["sync", image, f"dir:{here}/srv/other::web1/vda"]],
        "`migrate`": [[*migration, "--offline"], [*migration, "--take-back"]],
        "`merge`": [["merge", image], ["merge", "backup::web1/vda", "--keep-last", "1"],
                    ["merge", replica, "--keep-last", "1"], ["merge", guest, "--keep-last", "1"]],
        "`gc`": [["gc", "backup"]],
        "`repair`": [["repair", "backup"]],
        "`doctor`": [["doctor", "images"]],
        "`nightly`": [["nightly", "nightly.toml"]],
    })  # fmt: skip


def check_json(capsys: pytest.CaptureFixture[str], runs: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """runs: title of a section -> commands that print all of its fields, and no others."""
    for title, each in runs.items():
        fields = {path for words in each for path in paths(printed_json(capsys, *words))} - {"notices"}
        told = documented(title) - {"notices"}
        assert "error" not in fields, title
        assert told - fields == set(), title
        assert {path for path in fields if path.isidentifier()} == {re.split(r"[.[]", path)[0] for path in told}, title


def test_the_json_fields_of_a_watch_are_those_that_are_documented() -> None:
    rounds, end = section(SCRIPTING, "`watch`").partition("\n\nPlan:")[0].split("At the end one more:")
    told = set(re.findall(r"`([a-z_]+)`", rounds)) - {"watch"}
    assert told == {name for model in (RoundReport, TargetReport, Shipped, LeaseReport) for name in model.model_fields}
    assert set(re.findall(r"`([a-z_]+)`", end)) == set(WatchReport.model_fields)


def test_the_python_example_runs(tmp_path: Path) -> None:
    image, backup = tmp_path / "images" / "web1.qcow2", tmp_path / "backup"
    image.parent.mkdir()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "1M"], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", image], check=True, capture_output=True)

    snapchain.create_repository(backup, passphrase="correct horse")
    (example,) = re.findall(r"```python\n(.*?)```", (GUIDE / "python.md").read_text(), re.DOTALL)
    raw = tmp_path / "web1.raw"
    for told, here in {'"/images/web1.qcow2"': image, '"/backup"': backup, '"/tmp/web1.raw"': raw}.items():
        assert told in example
        example = example.replace(told, repr(str(here)))
    exec(compile(example, "python.md", "exec"), {})
    judged = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(image), str(raw)]
    assert subprocess.run(judged, capture_output=True, check=False).returncode == 0


def test_the_python_page_names_every_public_name() -> None:
    table = (GUIDE / "python.md").read_text().split("| name |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(snapchain.__all__)


# ---- decisions


def test_the_index_of_the_decisions_is_complete() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    told = dict(re.findall(r"^\| \[(\d{4})\]\(([^)]+)\) \|", index, re.MULTILINE))
    there = {path.name[:4]: path.name for path in folder.glob("[0-9]*.md")}
    missing = [f"| [{number}]({there[number]}) | ... |" for number in sorted(there.keys() - told.keys())]
    assert missing == [], "add these lines to docs/decisions/README.md"
    assert told == there


# ---- architecture

ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_the_architecture_names_what_exists() -> None:
    """Every path, and every name that stands behind a path."""
    by_hand = ARCHITECTURE.read_text().split(START)[0]
    quoted = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|\w+\.py)`(?: `(\w+)`)?", by_hand)
    assert len(quoted) > 60
    for path, name in quoted:
        if "NAME" in path:
            continue
        found = [base / path for base in (ROOT / "snapchain", ROOT) if (base / path).exists()]
        assert found, path
        if name:
            assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b", found[0].read_text(), re.MULTILINE), (path, name)


def test_the_architecture_names_every_module() -> None:
    told: dict[str, set[str]] = {}
    for title, rows in re.findall(
        r"^### `([^`]+)/`\n(.*?)(?=^### |\Z)", ARCHITECTURE.read_text(), re.MULTILINE | re.DOTALL
    ):
        told[title] = set(re.findall(r"^\| `([^`]+)`", rows, re.MULTILINE))
    there = {str(folder.relative_to(ROOT)): {path.name for path in modules} for folder, modules in folders()}
    assert told == there, "run `make map`"
