"""SIGTERM and SIGHUP at the worst moment of any verb: clean-up, a hint, the exit code; and what must stay ignored."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.core import TyperCommand, TyperGroup

from snapchain.host.processes import held_back
from snapchain.ops import receive as serve_replica
from snapchain.ops.nightly.run import _Run
from snapchain.ops.restore.output import OutputFile
from snapchain.repository.disk_writer import DiskWriter
from snapchain.repository.filling import Filling
from tests.cli.conftest import Run, write
from tests.ops.stacks import names

DISK = "repo::web1"
CODES = {signal.SIGTERM: 130, signal.SIGHUP: 129}


@pytest.fixture
def shipped(run: Run, disk: Path) -> Path:
    run("init", "repo")
    assert run("ship", str(disk), DISK).status == 0
    (disk.parent / "out").mkdir()
    return disk


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sends a signal to this process at the end of a method, in the middle of the verb that calls it."""
    before = [signal.getsignal(number) for number in CODES]

    def at(owner: type, method: str, number: signal.Signals) -> None:
        whole = getattr(owner, method)

        def cut(*arguments: object, **named: object) -> object:
            result = whole(*arguments, **named)
            signal.raise_signal(number)
            return result

        monkeypatch.setattr(owner, method, cut)

    yield at
    assert [signal.getsignal(number) for number in CODES] == before, "handlers of the caller are put back"


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("target", ["out/web1.qcow2", "out/web1.raw", "out/chain.qcow2 --chain"])
def test_a_restore_leaves_neither_file_nor_lease(
    run: Run, shipped: Path, interrupt: Callable[..., None], number: signal.Signals, target: str
) -> None:
    interrupt(Filling, "run", number)
    said = run("restore", DISK, *target.split())
    assert said.status == CODES[number]
    assert said.err.startswith("snapchain: interrupted\nsnapchain: hint: OUT was not made")
    assert names(shipped.parent / "out") == []
    assert names(shipped.parent / "repo" / "leases") == []


@pytest.mark.parametrize("number", CODES)
def test_json_tells_the_code_too(
    run: Run, shipped: Path, interrupt: Callable[..., None], number: signal.Signals
) -> None:
    interrupt(Filling, "run", number)
    said = run("restore", DISK, "out/web1.raw", "--json")
    assert (said.status, json.loads(said.out)["error"]["exit_code"]) == (CODES[number], CODES[number])


@pytest.mark.parametrize("number", CODES)
def test_a_shipment_lets_its_lease_go(
    run: Run, shipped: Path, interrupt: Callable[..., None], number: signal.Signals
) -> None:
    write(shipped, "write -P 9 4M 1M")
    interrupt(DiskWriter, "add", number)
    said = run("ship", str(shipped), DISK)
    assert (said.status, "run it again to finish" in said.err) == (CODES[number], True)
    assert names(shipped.parent / "repo" / "leases") == []


@pytest.mark.parametrize("number", CODES)
def test_a_night_ends_with_the_code_of_its_signal(
    run: Run, shipped: Path, interrupt: Callable[..., None], number: signal.Signals
) -> None:
    config = shipped.parent / "nightly.toml"
    config.write_text(
        f'time_zone = "UTC"\n[[disks]]\npath = "{shipped}"\nname = "web1"\n'
        f'[[destinations]]\nname = "d"\nurl = "{shipped.parent}/repo"\n'
    )
    interrupt(_Run, "_call_the_roll", number)
    assert run("nightly", str(config)).status == CODES[number]


@pytest.mark.parametrize("number", CODES)
def test_what_a_sender_has_started_here_ends_so_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(serve_replica, "serve_stdio", lambda **_options: signal.raise_signal(number))
    said = run("serve-replica", "--stdio")
    assert (said.status, said.err) == (
        CODES[number],
        "snapchain: interrupted\nsnapchain: hint: what is durable stays; the sender resumes there\n",
    )


def test_a_closing_terminal_says_it_twice(
    run: Run, shipped: Path, interrupt: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel, and then the shell: the second must not cut the clean-up short."""
    whole = OutputFile.__exit__

    def clean_up(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGHUP)
        whole(*arguments)

    monkeypatch.setattr(OutputFile, "__exit__", clean_up)
    interrupt(Filling, "run", signal.SIGHUP)
    assert run("restore", DISK, "out/web1.raw").status == 129
    assert names(shipped.parent / "out") == []


@pytest.mark.parametrize("number", [*CODES, signal.SIGINT])
@pytest.mark.parametrize("parser", [TyperGroup, TyperCommand])
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_interrupt_while_the_words_are_parsed_is_told_too(
    run: Run, interrupt: Callable[..., None], number: signal.Signals, parser: type, more: list[str]
) -> None:
    """Typer would end with 130 and no word, whichever signal it was."""
    interrupt(parser, "parse_args", number)
    said = run("log", "repo", *more)
    assert said.status == CODES.get(number, 130)
    if more:
        assert said.json["error"]["message"] == "interrupted"
        assert said.json["error"]["exit_code"] == said.status
    else:
        assert said.err == "snapchain: interrupted\n"


def test_nohup_keeps_working(run: Run, shipped: Path, interrupt: Callable[..., None]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt(Filling, "run", signal.SIGHUP)
        assert run("restore", DISK, "out/web1.raw").status == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_program_is_begun_before_a_signal_takes_effect() -> None:
    """Raised in the middle of a fork, nobody would have the child to end it."""
    done = []
    before = signal.signal(signal.SIGHUP, lambda *_: done.append("handled"))
    try:
        with held_back():
            signal.raise_signal(signal.SIGHUP)
            assert done == []
        assert done == ["handled"]
    finally:
        signal.signal(signal.SIGHUP, before)
