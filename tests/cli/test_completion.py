"""What shells offer for an address: disks and points of directories, quickly, silently."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import snapchain
from snapchain import destinations
from snapchain.cli import completion
from snapchain.errors import NotFound
from tests.cli.conftest import Run

Complete = Callable[..., list[str]]
PLACES = ["plain", "secret", "dir:{here}/replica"]


@pytest.fixture
def complete(run: Run, disk: Path, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """What bash gets for the words of a command line, cut as bash cuts them; the last one is incomplete."""
    snapchain.create_repository("plain", encryption="none")
    snapchain.create_repository("secret", passphrase="secret")
    for place in PLACES:
        for name in ("web1/vda", "web2/vda"):
            snapchain.ship(disk, place.format(here=Path.cwd()), name, labels=["nightly"])

    def ask(*words: str) -> list[str]:
        monkeypatch.setenv("_SNAPCHAIN_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "\n".join(["snapchain", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        said = run()
        assert (said.status, said.err) == (0, "")
        return said.out.split()

    return ask


def test_disks_and_points_are_offered_in_the_pieces_that_bash_replaces(complete: Complete) -> None:
    assert complete("log", "plain", "::") == ["web1/vda", "web2/vda"]
    assert complete("log", "plain", "::", "web2") == ["web2/vda"]
    assert complete("restore", "plain", "::", "web1/vda", "@") == ["latest", "1", "nightly"]
    assert complete("restore", "plain", "::", "web1/vda", "@", "n") == ["nightly"]
    assert complete("ship", "web1.qcow2", "plain", "::", "web1") == ["web1/vda"]
    assert complete("diff", "plain", "::", "web1/vda", "@", "1", "plain", "::", "web2") == ["web2/vda"]
    assert complete("merge", "web1.qcow2", "--at", "plain", "::", "web2") == ["web2/vda"]
    replica = ["dir", ":", f"{Path.cwd()}/replica", "::"]
    assert complete("log", *replica) == ["web1/vda", "web2/vda"]
    assert complete("restore", *replica, "web1/vda", "@", "l") == ["latest"]


def test_other_shells_get_whole_words(complete: Complete, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_SNAPCHAIN_COMPLETE", "complete_zsh")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "snapchain log plain::web1")
    assert "plain\\\\:\\\\:web1/vda" in run().out
    monkeypatch.setenv("_SNAPCHAIN_COMPLETE", "complete_fish")
    monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", "snapchain log pla")
    assert run().out.split() == ["plain/"], "fish leaves files to the program"


def test_an_encrypted_repository_opens_with_the_environments_passphrase_alone(
    complete: Complete, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert complete("log", "secret", "::") == ["web1/vda", "web2/vda"]
    monkeypatch.delenv("SNAPCHAIN_PASSWORD")
    assert complete("log", "secret", "::") == []


@pytest.mark.parametrize("dest", ["nowhere", "s3://bucket/prefix", "ssh://host/replica", "memory:", "web1.qcow2", "."])
def test_what_cannot_be_looked_at_here_offers_nothing(
    complete: Complete, dest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dest != ".":
        monkeypatch.setattr(destinations, "open_destination", lambda *_, **__: pytest.fail("it was opened"))
    assert complete("log", f"{dest}::") == []


def test_a_place_that_hangs_offers_nothing_in_bounded_time(complete: Complete, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = threading.Event()
    monkeypatch.setattr(completion, "SECONDS", 0.01)

    def hang(*_: object, **__: object) -> None:
        hanging.wait()
        raise NotFound("it is gone")

    monkeypatch.setattr(destinations, "open_destination", hang)
    try:
        assert complete("log", "plain", "::") == []
    finally:
        hanging.set()


def test_options_offer_their_values(complete: Complete) -> None:
    assert complete("ship", "a", "b", "--format", "") == ["qcow2", "raw"]
    assert complete("ship", "a", "b", "--progress", "j") == ["json"]
    assert complete("merge", "--strategy", "") == ["new-file", "absorb", "commit"]
    assert complete("init", "x", "--cipher", "c") == ["chacha20-poly1305"]
    assert complete("me") == ["merge"]
